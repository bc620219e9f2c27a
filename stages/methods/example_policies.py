"""Examples that come and go while training: swaps by forgetting, and soft pruning by loss.

Shapes: M examples of the pool, one number each, numpy. Random draws come from a generator that the caller seeds.

- Swap: Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer
  Training" (Tri-Level E-ViT), AAAI 2023, the example level. A part of the examples is removed at random; at every
  swap the least forgotten of the active ones go and as many of the removed ones come back.
- InfoBatch: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024, §3. Before
  each pass a share of the examples with a loss below the mean is dropped, the others of them count more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Window:
    """What was seen of every example since the last swap. All (M,)."""

    seen: np.ndarray  # int32, presentations that were judged
    last: np.ndarray  # bool, the latest of them was right
    ever: np.ndarray  # bool, one of them was right
    forgotten: np.ndarray  # int32, how often right was followed by wrong
    variance: np.ndarray  # float64, sum over presentations of the variance of the attention across tokens


def empty_window(examples: int) -> Window:
    """Nothing seen yet."""
    integers, flags = np.zeros(examples, np.int32), np.zeros(examples, bool)
    return Window(integers, flags, flags.copy(), integers.copy(), np.zeros(examples))


def present(window: Window, indices: np.ndarray, correct: np.ndarray, variance: np.ndarray, length: int) -> None:
    """Enter one batch into the window, in place. What an example shows after its first `length` presentations is passed
    over.

    Args:
        indices: (B,) positions in the pool, all different.
        correct: (B,) bool, the answer was the example's own label.
        variance: (B,) of the attention across tokens; zeros where nothing is sorted by it.
    """
    counts = window.seen[indices] < length
    indices, correct, variance = indices[counts], correct[counts], variance[counts]
    window.forgotten[indices] += window.last[indices] & ~correct
    window.last[indices] = correct
    window.ever[indices] |= correct
    window.variance[indices] += variance
    window.seen[indices] += 1


def forgetting_counts(window: Window, length: int) -> np.ndarray:
    """(M,) int64: right-to-wrong transitions; an example that was never right gets `length`, more than can occur."""
    return np.where(window.ever, window.forgotten, length).astype(np.int64)


def mean_variance(window: Window) -> np.ndarray:
    """(M,) float64: mean over the presentations; 0 where there was none."""
    mean: np.ndarray = window.variance / np.maximum(1, window.seen)
    return mean


def share_count(examples: int, share: float) -> int:
    """floor(share * M), without the surprise of binary fractions: the paper's 20% and 5% of ImageNet's 1,281,167 are
    256,233 and 64,058.
    """
    return int(np.floor(share * examples + 1e-9))


def first_pool(examples: int, removed: int, draw: np.random.Generator) -> np.ndarray:
    """(M,) bool, the active examples after a random removal of `removed` of them."""
    active = np.ones(examples, bool)
    active[draw.permutation(examples)[:removed]] = False
    return active


def swap(
    active: np.ndarray, counts: np.ndarray, ties: np.ndarray, number: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One swap: the easiest active examples against randomly drawn removed ones.

    Args:
        active: (M,) bool.
        counts: (M,) forgetting counts; low ones go first.
        ties: (M,) decides between equal counts, low ones go first; between equal ties the lower index goes.
        number: examples that go, and that come back; at most as many as are removed.
    Returns: active afterwards (M,); the indices that went and the indices that came back, ascending. An example cannot
    come back in the swap that removed it.
    """
    here, away = np.flatnonzero(active), np.flatnonzero(~active)
    order = np.lexsort((here, ties[here], counts[here]))
    removed = np.sort(here[order[:number]])
    restored = np.sort(draw.permutation(away)[:number])
    after = active.copy()
    after[removed], after[restored] = False, True
    return after, removed, restored


@dataclass(frozen=True)
class SoftPruning:
    """weights (M,) float32: 0 for a dropped example, else what its loss is multiplied by. mean: of the known losses
    (nan: none is known); below: how many lie below it; dropped: how many of these are left out.
    """

    weights: np.ndarray
    mean: float
    below: int
    dropped: int


def prune_softly(losses: np.ndarray, prune: float, draw: np.random.Generator) -> SoftPruning:
    """Drop a share of the examples whose loss is below the mean, and let the rest of them stand for all of them.

    Args:
        losses: (M,) the latest loss of every example, nan where it has not been seen; such an example stays.
        prune: share r dropped, 0 < r < 1, of those strictly below the mean.

    Over the draws, the expected sum of weight * gradient is the sum of all gradients. That holds exactly: `below` is
    divided by the number that stays, which is 1 / (1 - r) when r * below is a whole number. The authors' code always
    multiplies by 1 / (1 - r), and starts from a loss of 3 where ours starts from "not seen".
    """
    weights = np.ones(len(losses), np.float32)
    known = ~np.isnan(losses)
    if not known.any():
        return SoftPruning(weights, float("nan"), 0, 0)
    mean = float(losses[known].mean(dtype=np.float64))
    low = np.flatnonzero(known & (losses < mean))
    dropped = min(share_count(len(low), prune), max(0, len(low) - 1))
    shuffled = draw.permutation(low)
    weights[shuffled[:dropped]] = 0
    weights[shuffled[dropped:]] = len(low) / max(1, len(low) - dropped)
    return SoftPruning(weights, mean, len(low), dropped)
