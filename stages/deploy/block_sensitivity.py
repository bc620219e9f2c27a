"""What 8 bits cost each half block, and which of them must stay float.

A half block is judged alone: the file in which only its layers are 8-bit, by how far its answers are from the float
file's. Costs nearly add up (HAWQ and nncf's accuracy-aware search rest on the same), so that the worst are left float
first; how many is then found on whole files, by top-1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 16  # images


def divergence(expected: NDArray[np.float64], scored: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a file's answers are from others, for each image: Kullback-Leibler divergence, nats. Logarithms of
    probabilities (n, classes) -> (n).
    """
    difference: NDArray[np.float64] = (np.exp(expected) * (expected - scored)).sum(axis=1)
    return difference


def rank(
    groups: Sequence[str],
    cost: Callable[[str, int, int], NDArray[np.float64]],
    images: int,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """The mean cost of each group, the dearest first.

    cost: (group, first image, last) -> the cost of each image. All groups see the same images, a few at a time, until
    `images` are done or `seconds` are over; the first few are always seen.
    """
    end = now() + seconds
    seen: dict[str, list[NDArray[np.float64]]] = {group: [] for group in groups}
    for start in range(0, images, CHUNK):
        if start and now() > end:
            break
        for group in groups:
            seen[group].append(cost(group, start, min(images, start + CHUNK)))
    means = {group: float(np.concatenate(costs).mean()) for group, costs in seen.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def fewest(costs: Mapping[str, float], passes: Callable[[Sequence[str]], bool]) -> list[str] | None:
    """The smallest number of the dearest groups with which `passes` holds, by bisection; None if it does with none.

    Bisection takes for granted that more float is not worse; what it returns has passed all the same.
    """
    order = list(costs)
    low, high, best = 1, len(order), None
    while low <= high:
        middle = (low + high) // 2
        if passes(order[:middle]):
            best, high = order[:middle], middle - 1
        else:
            low = middle + 1
    return best
