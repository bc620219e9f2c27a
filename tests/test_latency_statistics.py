"""What may be concluded from latency samples; on synthetic samples, never on a clock."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sievit.stages.deploy.statistics import (
    ENOUGH,
    Interval,
    Slot,
    median_interval,
    noise_factor,
    percentile,
    ratio_interval,
    verdict,
    wilson,
)


def slots(
    level: float, *, noise: float = 0.02, seed: int = 0, sessions: int = 3, rounds: int = 20, calls: int = 15
) -> list[Slot]:
    """Log-normal calls around `level` ms; `mood` is what the machine does in a round to everybody."""
    rng = np.random.default_rng(seed)
    made = []
    for session in range(sessions):
        for number in range(rounds):
            mood = np.random.default_rng((session, number)).choice([1.0, 1.0, 1.5])
            walls = level * mood * np.exp(noise * rng.standard_normal(calls))
            made.append(Slot(session, number, walls, float(walls.mean()), float(walls.mean())))
    return made


@pytest.mark.parametrize(("rank", "share"), [(50, 0.5), (90, 0.9), (95, 0.95), (99, 0.99)])
def test_a_percentile_is_said_from_the_number_of_samples_that_the_binomial_rule_asks(rank: int, share: float) -> None:
    enough = next(n for n in range(1, 1000) if stats.binom.cdf(1, n, 1 - share) <= 0.01)
    assert ENOUGH[rank] == enough
    samples = np.arange(enough, dtype=np.float64)
    assert percentile(samples[:-1], rank) is None
    assert percentile(samples, rank) == pytest.approx(np.percentile(samples, rank))


def test_a_slow_moment_of_the_machine_hits_both_sides_of_a_ratio() -> None:
    ratio = ratio_interval(slots(2.0, seed=1), slots(1.0, seed=2))
    assert ratio.value == pytest.approx(2.0, rel=0.02)
    assert 1.95 < ratio.low <= ratio.value <= ratio.high < 2.05
    assert median_interval(slots(2.0)).high > 2.0 * 1.02  # the level itself is far less certain


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(40):
        ratio = ratio_interval(slots(1.5, seed=2 * seed, rounds=8), slots(1.0, seed=2 * seed + 1, rounds=8), seed)
        hits += ratio.low <= 1.5 <= ratio.high
    assert hits >= 33


def test_sessions_that_disagree_widen_the_interval() -> None:
    same = slots(1.0, seed=3)
    moved = [
        Slot(s.session, s.round, s.wall_ms * (1.0, 1.0, 1.3)[s.session], s.cpu_ms, s.thread_ms)
        for s in slots(1.0, seed=4)
    ]
    agreeing, disagreeing = ratio_interval(slots(1.0, seed=4), same), ratio_interval(moved, same)
    assert disagreeing.high - disagreeing.low > 5 * (agreeing.high - agreeing.low)


def test_a_file_against_itself_makes_no_difference() -> None:
    verdicts = set()
    for seed in range(10):
        noise = noise_factor(ratio_interval(slots(1.0, seed=3 * seed), slots(1.0, seed=3 * seed + 1)))
        verdicts.add(verdict(ratio_interval(slots(1.0, seed=3 * seed), slots(1.0, seed=3 * seed + 2)), noise))
    assert verdicts == {"no difference"}


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (Interval(1.5, 1.4, 1.6), 1.02, "faster"),
        (Interval(0.6, 0.5, 0.7), 1.02, "slower"),
        (Interval(1.5, 0.99, 1.6), 1.02, "no difference"),  # the interval holds 1
        (Interval(1.05, 1.04, 1.06), 1.10, "no difference"),  # inside the noise floor
        (Interval(0.95, 0.94, 0.96), 1.10, "no difference"),
        (Interval(1.0, 1.0, 1.0), 1.0, "no difference"),
    ],
)
def test_a_verdict_needs_both_the_interval_and_the_noise_floor(ratio: Interval, noise: float, expected: str) -> None:
    assert verdict(ratio, noise) == expected


def test_the_noise_floor_is_symmetric_and_never_below_one() -> None:
    assert noise_factor(Interval(0.9, 0.8, 1.0)) == pytest.approx(1.25)
    assert noise_factor(Interval(1.1, 1.0, 1.2)) == pytest.approx(1.2)
    assert noise_factor(Interval(1.0, 1.0, 1.0)) == 1.0


def test_only_shared_rounds_are_compared_and_none_is_an_error() -> None:
    first = slots(2.0, sessions=1, rounds=4)
    assert ratio_interval(first, slots(1.0, sessions=1, rounds=9)).value == pytest.approx(2.0, rel=0.05)
    elsewhere = [Slot(7, s.round, s.wall_ms, s.cpu_ms, s.thread_ms) for s in first]
    with pytest.raises(ValueError, match="share no round"):
        ratio_interval(first, elsewhere)


def test_processor_time_can_be_compared_instead() -> None:
    loaded = [Slot(s.session, s.round, 3 * s.wall_ms, s.cpu_ms, s.thread_ms) for s in slots(1.0, seed=5)]
    assert ratio_interval(slots(1.0, seed=6), loaded).value == pytest.approx(1 / 3, rel=0.05)
    assert ratio_interval(slots(1.0, seed=6), loaded, of=lambda slot: slot.cpu_ms).value == pytest.approx(1.0, rel=0.05)


def test_the_same_samples_give_the_same_interval() -> None:
    assert ratio_interval(slots(2.0), slots(1.0), 4) == ratio_interval(slots(2.0), slots(1.0), 4)


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (7, 10), (440, 450), (1, 1)])
def test_wilson_agrees_with_scipy(right: int, of: int) -> None:
    expected = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    low, high = wilson(right, of)
    assert math.isclose(low, expected.low, abs_tol=1e-9)
    assert math.isclose(high, expected.high, abs_tol=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)
