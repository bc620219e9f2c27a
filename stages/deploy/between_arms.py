"""Every two arms on the same test images: which one's final files are right more often, and whether that is chance.

The report picks the pairs that it has something to say of, an arm and its random control above all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..methods.paired_tests import LEVEL, greater
from .variants import Variant

Word = Literal["better", "worse", "not decided"]


def between_arms(
    variants: Sequence[Variant], labels: NDArray[np.int64], answered: Mapping[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """A line for every two arms, in the order of the variants; arms that share no seed have none.

    labels: int64 [n]; answered: sha256 of a file -> the class that it gives each image, int64 [n]. difference: top-1 of
    `arm` less that of `against`, a fraction, mean over the seeds that both have, with its 95 % interval; p, by: of no
    difference at all (methods/paired_tests.py), McNemar's test of one seed, a paired t test over more. verdict: of
    `arm`, at the 5 % level.
    """
    right: dict[str, dict[int | None, NDArray[np.bool_]]] = {}
    for variant in variants:
        if variant.final:
            right.setdefault(variant.family, {})[variant.seed] = answered[variant.bundle.sha256] == labels
    return [
        _line(one, other, seeds, right, len(labels))
        for one, other in combinations(right, 2)
        if (seeds := [seed for seed in right[one] if seed in right[other]])
    ]


def _line(
    one: str,
    other: str,
    seeds: Sequence[int | None],
    right: Mapping[str, Mapping[int | None, NDArray[np.bool_]]],
    images: int,
) -> dict[str, Any]:
    left, against = (np.stack([right[arm][seed] for seed in seeds]) for arm in (one, other))
    found = greater(left, against)
    verdict: Word = "not decided" if found.p >= LEVEL else "better" if found.value > 0 else "worse"
    return {
        "arm": one,
        "against": other,
        "seeds": list(seeds),
        "images": images,
        "top1": float(left.mean()),
        "top1_against": float(against.mean()),
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "by": found.by,
        "verdict": verdict,
    }
