"""From scores of M examples to those that are kept: the highest, or an even share of every stratum; class by class or
over all.

Every choice is determined by the scores, the seed and the index, and nothing larger than a few numbers an example is
held: 1.3 million examples take seconds (bench/select_examples.py).

- Coverage-centric selection (CCS): Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR
  2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import InvalidInput
from .example_policies import share_count


def select_examples(
    scores: np.ndarray,
    labels: np.ndarray,
    keep: float,
    *,
    balanced: bool,
    skip_hardest: float = 0.0,
    strata: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """ceil(keep * M) examples as ascending indices.

    Args:
        scores: (M,) finite. labels: (M,) int64, not negative.
        keep: fraction kept, 0 < keep <= 1.
        balanced: choose within each class, in proportion to what skip_hardest leaves of it (largest remainders fill
            up, so the total is exact).
        skip_hardest: fraction of the highest scores of all passed over first as probable label noise (CCS: beta).
        strata: None takes the highest scores, equal ones by index. A number takes an even share of as many equally
            wide ranges of the score, at random within each (CCS).
        seed: of the random choice within strata.
    Returns: (ceil(keep * M),) int64 ascending.
    Raises: InvalidInput when keep + skip_hardest leave fewer examples than asked for, or a score is not finite.
    """
    total = len(scores)
    if not np.isfinite(scores).all():
        raise InvalidInput(
            f"{int((~np.isfinite(scores)).sum())} of {total} scores are no finite numbers",
            "lower proxy.lr, or clip gradients (proxy.clip: 1.0)",
        )
    wanted = kept_count(total, keep)
    skipped = share_count(total, skip_hardest) if keep < 1 else 0  # everything is kept: nothing is passed over
    if total - skipped < wanted:
        raise InvalidInput(
            f"keep {keep} and skip_hardest {skip_hardest} ask for {wanted} of {total - skipped} examples",
            "lower one of the two; together they must not pass 1",
        )
    candidates = np.arange(total)
    if skipped:
        candidates = np.sort(np.argsort(-scores, kind="stable")[skipped:])
    values, groups = scores[candidates], labels[candidates] if balanced else np.zeros(len(candidates), np.int64)
    quota = quotas(np.bincount(groups), wanted)
    if strata is None:
        priority = np.lexsort((-values, groups))
    else:
        cells = groups * strata + _stratum(values, groups, strata)
        sizes = np.bincount(cells, minlength=len(quota) * strata).reshape(-1, strata)
        quota = np.concatenate([spread(row, int(budget)) for row, budget in zip(sizes, quota, strict=True)])
        groups = cells
        priority = np.lexsort((np.random.default_rng(seed).random(len(values)), cells))
    sizes = np.bincount(groups, minlength=len(quota))
    place = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(candidates[priority[place < np.repeat(quota, sizes)]])


def kept_count(total: int, keep: float) -> int:
    """ceil(keep * total) without the surprise of binary fractions (0.55 * 100 is 55, not 56); at least 1."""
    return max(1, int(np.ceil(keep * total - 1e-9)))


def quotas(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """`wanted` split in proportion to (G,) group sizes: floors, then the largest remainders, equal ones by group.

    Returns: (G,) int64 summing to `wanted`, none above its group's size.
    """
    exact = sizes * (wanted / max(1, int(sizes.sum())))
    quota = np.floor(exact).astype(np.int64)
    remainders = np.argsort(quota - exact, kind="stable")
    quota[remainders[: wanted - int(quota.sum())]] += 1
    return quota


def spread(sizes: np.ndarray, budget: int) -> np.ndarray:
    """An even budget over strata of these (S,) sizes, from the smallest up: what a small one cannot use, the larger
    share (CCS, algorithm 1). Equal sizes by index; the budget is spent to the last while there are examples.
    """
    shares = np.zeros(len(sizes), np.int64)
    for left, stratum in zip(range(len(sizes), 0, -1), np.argsort(sizes, kind="stable"), strict=True):
        shares[stratum] = min(int(sizes[stratum]), budget // left)
        budget -= int(shares[stratum])
    return shares


def _stratum(values: np.ndarray, groups: np.ndarray, strata: int) -> np.ndarray:
    """Which of `strata` equally wide ranges between its group's lowest and highest value each value is in."""
    count = int(groups.max()) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, groups, values)
    np.maximum.at(high, groups, values)
    width = np.where(high > low, high - low, 1)
    place = np.floor((values - low[groups]) / width[groups] * strata).astype(np.int64)
    clipped: np.ndarray = np.minimum(place, strata - 1)  # the highest value of all would open one more
    return clipped


def balanced_prefix(labels: np.ndarray, wanted: int) -> np.ndarray:
    """Positions of the first examples of each class, in proportion to the class sizes, `wanted` in all."""
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
    quota = quotas(sizes, wanted)
    return (
        np.concatenate([of_class[:n] for of_class, n in zip(by_class, quota, strict=True)]) if len(classes) else quota
    )


def check_classes(kept: np.ndarray, labels: np.ndarray, names: Sequence[str], how: str, hint: str) -> None:
    """Refuse a selection that leaves no example of a class that there is.

    Args:
        kept: (n,) indices into labels. names: of all classes.
        how: the settings that chose, for the message, such as "keep 0.05".
    Raises: InvalidInput naming the smallest such class, with counts.
    """
    before = np.bincount(labels, minlength=len(names))
    after = np.bincount(labels[kept], minlength=len(names))
    lost = np.flatnonzero((before > 0) & (after == 0))
    if len(lost) == 0:
        return
    first = lost[np.argmin(before[lost])]
    more = f", and of {len(lost) - 1} more of {len(names)} classes" if len(lost) > 1 else ""
    raise InvalidInput(
        f"{how} keeps {len(kept)} of {len(labels)} images and none of the {before[first]} of class "
        f"{names[first]!r}{more}",
        hint,
    )
