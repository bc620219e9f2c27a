"""What may be said from samples: percentiles with enough of them, intervals, paired ratios, noise floor, verdicts.

A round is one pass over all variants in random order, a session one life of all worker processes. Calls within a slot
(one variant's turn in one round) share the machine's mood, those of one process its place in memory, so they are not
independent. Intervals therefore ask only how sessions differ. Ratios are taken within a round, so that a slow second
hits both sides.

What a percentile is of: the calls of processes like those measured, one started anew after the other, and not of the
one process that happened to run. The few slow calls are then those of slow processes too, of which five sessions show
few: its interval reaches as far as processes that were not met may have gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

# The smallest number of samples at which a percentile is printed: with 99 % confidence the true percentile is not above
# the largest sample but one (MLPerf's early-stopping rule: P[Binomial(n, 1 - p) <= 1] <= 0.01).
ENOUGH = {90: 64, 95: 130, 99: 662}
RESAMPLES = 1000
POPULATIONS = 4000  # of processes that may have brought forth the sessions
MEDIAN = 50
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
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def too_few(calls: int, rank: int) -> str:
    """Why the percentile `rank` (90, 95 or 99) is not said of so many calls; "" when it is."""
    return "" if calls >= ENOUGH[rank] else f"{calls} calls, {ENOUGH[rank]} needed"


def percentile_interval(slots: Sequence[Slot], rank: int) -> Interval:
    """The percentile `rank` of all calls, ms, and how far it can be trusted, from two sessions on.

    Raises ValueError for a single session.
    """
    sessions = [
        np.concatenate([slot.wall_ms for slot in slots if slot.session == number])
        for number in sorted({slot.session for slot in slots})
    ]
    return _over_sessions(sessions) if rank == MEDIAN else _of_population(sessions, rank)


def ratio_interval(
    baseline: Sequence[Slot], other: Sequence[Slot], *, of: Callable[[Slot], float] | None = None
) -> Interval:
    """How many times faster `other` is: the median over rounds of baseline / other within the same round, and how far
    it can be trusted, from two sessions on.

    of: what is compared, the slot's median wall time by default. Rounds that only one side has are left out. Raises
    ValueError when no round is left, and for a single session.
    """
    return _over_sessions(_ratios(baseline, other, of))


def noise_factor(baseline: Sequence[Slot], twin: Sequence[Slot], seed: int = 0) -> float:
    """From an A/A pair (one file against itself): ratios up to this factor are noise. At least 1.

    As far as the pair's own rounds went apart: the further end of the bootstrapped interval (two stages, sessions with
    replacement, then as many rounds of each with replacement) of their median ratio. Raises ValueError when the two
    share no round.
    """
    sessions = _ratios(baseline, twin, None)
    rounds = np.array([len(ratios) for ratios in sessions])
    table = np.full((len(rounds), int(rounds.max())), np.nan)  # sessions may differ in how many rounds they share
    for row, ratios in zip(table, sessions, strict=True):
        row[: len(ratios)] = ratios
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(rounds), size=(RESAMPLES, len(rounds)))
    places = (rng.random((*chosen.shape, table.shape[1])) * rounds[chosen][..., None]).astype(np.int64)
    taken = np.where(np.arange(table.shape[1]) < rounds[chosen][..., None], table[chosen[..., None], places], np.nan)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.nanmedian(taken.reshape(RESAMPLES, -1), axis=1), [tail, 100 - tail])
    return max(1.0, float(high), float(1 / low))


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
    ends = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(ends.low), float(ends.high)


def _ratios(baseline: Sequence[Slot], other: Sequence[Slot], of: Callable[[Slot], float] | None) -> list[Floats]:
    """Of each session, baseline over other in each round that both have."""
    quantity = of or _slot_median
    first = {(slot.session, slot.round): quantity(slot) for slot in baseline}
    found: dict[int, list[float]] = {}
    for slot in other:
        if (slot.session, slot.round) in first:
            found.setdefault(slot.session, []).append(first[slot.session, slot.round] / quantity(slot))
    if not found:
        raise ValueError("the two variants share no round")
    return [np.array(ratios) for ratios in found.values()]


def _slot_median(slot: Slot) -> float:
    return float(np.median(slot.wall_ms))


def _over_sessions(sessions: Sequence[Floats]) -> Interval:
    """The median of all sessions' numbers, and its interval from how the logarithm of each session's own differs:
    Student's t, for as many sessions as there are less one. It ends where the numbers do.

    Three sessions rightly make a wide one: order statistics, bootstraps and a jackknife are narrower or jumpier, and
    miss the truth too often when sessions differ (docs/LOG.md).
    """
    every = np.concatenate(_several(sessions))
    value = float(np.median(every))
    deviation = np.std([np.log(np.median(numbers)) for numbers in sessions], ddof=1) / np.sqrt(len(sessions))
    spread = float(np.exp(_students(len(sessions)) * deviation))
    return Interval(value, max(value / spread, float(every.min())), min(value * spread, float(every.max())))


def _of_population(sessions: Sequence[Floats], rank: int) -> Interval:
    """The percentile `rank` of all sessions' numbers, and an interval of that of all processes that there might be.

    The paces of processes are taken as log-normal, each a session's median; what calls take beside it as alike in all.
    Which means and deviations of such paces may have brought forth the sessions is drawn from Student's and the
    chi-squared distribution (the fiducial interval, for normal numbers the exact one of a quantile), and for each the
    percentile of paces and calls together is computed. How the sessions' own tails differ is added, by Student's t.
    """
    logs = [np.log(numbers) for numbers in _several(sessions)]
    count, rng = len(logs), np.random.default_rng(0)
    paces = np.array([np.median(numbers) for numbers in logs])
    beside = np.concatenate([numbers - pace for numbers, pace in zip(logs, paces, strict=True)])
    tails = [np.percentile(numbers, rank) - pace for numbers, pace in zip(logs, paces, strict=True)]
    even = (np.arange(POPULATIONS) + 0.5) / POPULATIONS  # draws at even shares, each in an order of its own
    squares, normal, student = (rng.permutation(even) for _ in range(3))
    deviations = paces.std(ddof=1) * np.sqrt((count - 1) / stats.chi2.ppf(squares, count - 1))
    means = paces.mean() + deviations * special.ndtri(normal) / np.sqrt(count)
    shapes = np.std(tails, ddof=1) / np.sqrt(count) * stats.t.ppf(student, count - 1)
    drawn = np.exp(means + _with_paces(beside, deviations, rank / 100) + shapes)
    value = float(np.percentile(np.concatenate(sessions), rank))
    low, high = np.percentile(drawn, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _with_paces(beside: Floats, deviations: Floats, share: float) -> Floats:
    """The quantile `share` of numbers like `beside` plus normal ones of each deviation, all on the logarithm.

    Found by bisection on a grid of deviations, between which it is read off; `beside` stands for itself by 256 of its
    quantiles.
    """
    points = np.quantile(beside, (np.arange(256) + 0.5) / 256)
    widest = max(float(deviations.max()), 1e-9)
    grid = widest * np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 31)])
    low, high = np.full(len(grid), points[0]) - 9 * grid, np.full(len(grid), points[-1]) + 9 * grid
    for _ in range(30):
        middle = (low + high) / 2
        below = special.ndtr((middle[1:, None] - points) / grid[1:, None]).mean(1) < share
        low[1:], high[1:] = np.where(below, middle[1:], low[1:]), np.where(below, high[1:], middle[1:])
    found = (low + high) / 2
    found[0] = np.quantile(beside, share)
    return np.interp(deviations, grid, found)


def _several(sessions: Sequence[Floats]) -> Sequence[Floats]:
    if len(sessions) < 2:
        raise ValueError("one session tells nothing about how sessions differ")
    return sessions


def _students(count: int) -> float:
    """How many standard errors of a mean of `count` numbers its 95 % interval reaches to each side."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
