"""How much two choices have in common: intersection over union (Jaccard), and what two random choices of the same sizes
would have.
"""

from __future__ import annotations

import numpy as np

ROWS = 65_536  # images whose ranks are in memory at once


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Of two sets of indices, (n,) and (m,), each index once: shared / either. 1 for two empty ones."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    either = len(left) + len(right) - shared
    return shared / either if either else 1.0


def by_chance(left: int, right: int, of: int) -> float:
    """Expected intersection over expected union of two independent random choices of `left` and `right` of `of`."""
    shared = left * right / of
    return shared / (left + right - shared)


def patch_jaccard(left: np.ndarray, keep_left: int, right: np.ndarray, keep_right: int) -> float:
    """Mean over images of the Jaccard of their kept patches.

    Args:
        left, right: (M, N) ranks, 0 first; may be memory maps, they are read in blocks of rows.
        keep_left, keep_right: how many patches of each image are kept, at least 1.
    """
    total = 0.0
    for start in range(0, len(left), ROWS):
        one, other = left[start : start + ROWS] < keep_left, right[start : start + ROWS] < keep_right
        total += float(((one & other).sum(1) / (one | other).sum(1)).sum())
    return total / len(left)
