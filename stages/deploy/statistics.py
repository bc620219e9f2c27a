"""What may be said from samples: percentiles with enough of them, intervals, paired ratios, noise floor, verdicts.

A round is one pass over all variants in random order, a session one life of all worker processes. Calls within a slot
(one variant's turn in one round) share the machine's mood, so they are not independent: intervals are bootstrapped over
sessions and, within them, over rounds; ratios are taken within a round, so that a slow second hits both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# The smallest number of samples at which a percentile is printed: with 99 % confidence the true percentile is not above
# the largest sample but one (MLPerf's early-stopping rule: P[Binomial(n, 1 - p) <= 1] <= 0.01).
ENOUGH = {50: 11, 90: 64, 95: 130, 99: 662}
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Slot:
    """One variant's turn: the wall time of each call, and what the calls cost in processor time."""

    session: int
    round: int
    wall_ms: Floats  # one a call
    cpu_ms: float  # processor time of the whole process, mean a call
    thread_ms: float  # processor time of the calling thread, mean a call


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def percentile(samples: Floats, rank: int) -> float | None:
    """The percentile `rank` (50, 90, 95 or 99) of the samples, or None when there are too few to say."""
    if len(samples) < ENOUGH[rank]:
        return None
    return float(np.percentile(samples, rank))


def median_interval(slots: Sequence[Slot], seed: int = 0) -> Interval:
    """The median latency over all calls, ms."""
    return _bootstrap(slots, lambda chosen: float(np.median(np.concatenate([slot.wall_ms for slot in chosen]))), seed)


def ratio_interval(
    baseline: Sequence[Slot], other: Sequence[Slot], seed: int = 0, *, of: Callable[[Slot], float] | None = None
) -> Interval:
    """How many times faster `other` is: the median over rounds of baseline / other within the same round.

    of: what is compared, the slot's median wall time by default. Rounds that only one side has are left out; raises
    ValueError when no round is left.
    """
    quantity = of or _slot_median
    first = {(slot.session, slot.round): quantity(slot) for slot in baseline}
    pairs = [
        _Pair(slot.session, first[slot.session, slot.round] / quantity(slot))
        for slot in other
        if (slot.session, slot.round) in first
    ]
    if not pairs:
        raise ValueError("the two variants share no round")
    return _bootstrap(pairs, lambda chosen: float(np.median([pair.ratio for pair in chosen])), seed)


def noise_factor(same: Interval) -> float:
    """From the interval of an A/A pair (one file against itself): ratios up to this factor are noise. At least 1."""
    return max(1.0, same.high, 1 / same.low)


def verdict(ratio: Interval, noise: float) -> str:
    """'faster', 'slower' or 'no difference': the interval must leave out 1 and the ratio must leave the noise floor."""
    if ratio.low > 1 and ratio.value > noise:
        return "faster"
    if ratio.high < 1 and ratio.value < 1 / noise:
        return "slower"
    return "no difference"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True, slots=True)
class _Pair:
    session: int
    ratio: float


T = TypeVar("T", Slot, _Pair)


def _slot_median(slot: Slot) -> float:
    return float(np.median(slot.wall_ms))


def _bootstrap(items: Sequence[T], statistic: Callable[[Sequence[T]], float], seed: int) -> Interval:
    """Two-stage bootstrap: sessions with replacement, then as many rounds of each with replacement."""
    sessions = [[item for item in items if item.session == number] for number in sorted({i.session for i in items})]
    rng = np.random.default_rng(seed)
    draws = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        chosen: list[T] = []
        for number in rng.integers(len(sessions), size=len(sessions)):
            rounds = sessions[number]
            chosen.extend(rounds[place] for place in rng.integers(len(rounds), size=len(rounds)))
        draws[index] = statistic(chosen)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    value = statistic(items)
    return Interval(value, min(float(low), value), max(float(high), value))
