"""Which test images two files answer otherwise, and small pictures of some of them.

A top-1 that stays the same can hide images lost and as many won. So the answers of a final file are laid beside those
of the dense one, image by image: lost are those that dense alone gets right, won those that the final file alone does.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..methods.paired_tests import mcnemar
from .variants import Variant

SHOWN = 24  # pictures of one pair of files
PAIRS = 20  # pairs of classes that are named; the others are added up
SIDE = 96  # pixels of a picture at most


class SplitImages(Protocol):
    """As much of a split as is needed: labels int64 [n], class names, image names, pixels uint8 [n, S, S, 3]."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    def name(self, index: int, /) -> str: ...
    def pixels(self, indices: NDArray[np.int64], /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Pair:
    """A file, and the dense one that it is laid beside."""

    dense: Variant
    final: Variant


def pairs_of(variants: Sequence[Variant], baseline: Variant) -> list[Pair]:
    """Every final file beside the dense arm's of its seed, else beside the baseline; none beside itself. The main arm's
    come first.
    """
    dense = {variant.seed: variant for variant in variants if variant.final and variant.family == "dense"}
    found = [Pair(dense.get(final.seed, baseline), final) for final in variants if final.final]
    unlike = [pair for pair in found if pair.final is not pair.dense]
    return sorted(unlike, key=lambda pair: pair.final.family != "main")


def counted(labels: NDArray[np.int64], dense: NDArray[np.int64], final: NDArray[np.int64]) -> dict[str, Any]:
    """How many images, of how many, the final file loses and wins, and on how many both answer alike.

    labels, dense, final: int64 [n], of the same images. wrong_otherwise: both are wrong, each by another class. p:
    McNemar's exact test (methods/paired_tests.py) of no difference at all.
    """
    test = mcnemar(dense == labels, final == labels)
    alike = int((dense == final).sum())
    return {
        "images": len(labels),
        "lost": test.left,
        "won": test.right,
        "wrong_otherwise": len(labels) - alike - test.left - test.right,
        "agreement": alike / len(labels),
        "p": test.p,
    }


def by_class(
    labels: NDArray[np.int64], dense: NDArray[np.int64], final: NDArray[np.int64], classes: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Images that both answer otherwise, by the class that dense gives and the one that the final file gives.

    The commonest PAIRS, ties in the order of the classes; and how many pairs and images stand in no line. lost: dense
    names the true class; won: the final file does.
    """
    unlike = np.flatnonzero(dense != final)
    met = Counter((int(dense[i]), int(final[i])) for i in unlike)
    lost = Counter((int(dense[i]), int(final[i])) for i in unlike if dense[i] == labels[i])
    won = Counter((int(dense[i]), int(final[i])) for i in unlike if final[i] == labels[i])
    order = sorted(met, key=lambda pair: (-met[pair], pair))
    lines = [
        {
            "dense": _named(classes, pair[0]),
            "final": _named(classes, pair[1]),
            "images": met[pair],
            "lost": lost[pair],
            "won": won[pair],
        }
        for pair in order[:PAIRS]
    ]
    return lines, {"pairs": len(order[PAIRS:]), "images": sum(met[pair] for pair in order[PAIRS:])}


def shown(labels: NDArray[np.int64], dense: NDArray[np.int64], final: NDArray[np.int64]) -> list[int]:
    """Positions of at most SHOWN images to show: those lost, then those won, each ascending.

    Half of the places are for each; what one side does not need the other may take. Where a side has more images than
    places, they are taken at even distances through the test split, so that no class is preferred.
    """
    lost = np.flatnonzero((dense == labels) & (final != labels))
    won = np.flatnonzero((final == labels) & (dense != labels))
    half = SHOWN // 2
    places = min(len(lost), max(half, SHOWN - len(won)))
    return [*_evenly(lost, places), *_evenly(won, min(len(won), SHOWN - places))]


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A JPEG of at most SIDE pixels a side, from uint8 [S, S, 3]; a smaller image keeps its size."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=88, subsampling=0)
    return stream.getvalue()


def keep_flips(
    out: Path, pairs: Sequence[Pair], images: SplitImages, answered: Mapping[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """Write flips.json and the pictures of the first pair into `out`; return the counts of every pair.

    answered: sha256 of a file -> the class that it gives each image, int64 [n].
    """
    records: list[tuple[dict[str, Any], dict[str, Any]]] = []  # counts alone, and with the pairs of classes
    pictures: list[dict[str, Any]] = []
    for pair in pairs:
        dense, final = answered[pair.dense.bundle.sha256], answered[pair.final.bundle.sha256]
        names = {**pair.final.short(), "seed": pair.final.seed, "against": pair.dense.short()}
        lines, further = by_class(images.labels, dense, final, images.classes)
        if not records:
            pictures = _pictures(out, images, dense, final)
        counts = names | counted(images.labels, dense, final)
        records.append((counts, counts | {"pairs": lines, "further": further}))
    kept = json.dumps({"files": [whole for _, whole in records], "shown": pictures}, indent=1)
    (out / "flips.json").write_text(f"{kept}\n", encoding="utf-8")
    return [counts for counts, _ in records]


def _pictures(
    out: Path, images: SplitImages, dense: NDArray[np.int64], final: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Write a picture of each shown image; the image's name, its class and what both files answer."""
    (out / "flips").mkdir()
    found = []
    for index in shown(images.labels, dense, final):
        file = f"flips/{index}.jpg"
        (out / file).write_bytes(thumbnail(images.pixels(np.array([index]))[0]))
        said = {"truth": images.labels, "dense": dense, "final": final}
        answers_ = {role: _named(images.classes, int(each[index])) for role, each in said.items()}
        flip = "lost" if dense[index] == images.labels[index] else "won"
        found.append({"index": index, "name": images.name(index), **answers_, "flip": flip, "file": file})
    return found


def _evenly(found: NDArray[np.int64], places: int) -> list[int]:
    return [int(found[place * len(found) // places]) for place in range(places)]


def _named(classes: Sequence[str], answer: int) -> str:
    return classes[answer] if answer >= 0 else "no number"
