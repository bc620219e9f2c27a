"""What may be concluded from latency samples; on synthetic samples, never on a clock."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from sievit.stages.deploy.statistics import (
    ENOUGH,
    Interval,
    Slot,
    noise_factor,
    percentile_interval,
    ratio_interval,
    too_few,
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


@pytest.mark.parametrize(("rank", "share"), [(90, 0.9), (95, 0.95), (99, 0.99)])
def test_a_percentile_is_said_from_the_number_of_samples_that_the_binomial_rule_asks(rank: int, share: float) -> None:
    enough = next(n for n in range(1, 1000) if stats.binom.cdf(1, n, 1 - share) <= 0.01)
    assert ENOUGH[rank] == enough
    assert too_few(enough, rank) == ""
    assert too_few(enough - 1, rank) == f"{enough - 1} calls, {enough} needed"


def ranked(calls: list[float], rank: int) -> float:
    """A percentile by sorting."""
    ordered = sorted(calls)
    place = (len(ordered) - 1) * rank / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def test_a_median_and_its_interval_equal_a_slow_loop() -> None:
    measured = slots(1.0, noise=0.3, sessions=3, rounds=7, calls=5)
    of_session = [[float(call) for slot in measured if slot.session == s for call in slot.wall_ms] for s in range(3)]
    each = [math.log(ranked(calls, 50)) for calls in of_session]
    error = statistics.stdev(each) / math.sqrt(3)
    every = [call for calls in of_session for call in calls]
    value = ranked(every, 50)
    found = percentile_interval(measured, 50)
    low, high = (value * math.exp(sign * 4.302652729911275 * error) for sign in (-1, 1))  # t of 2 degrees, 95 %
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(max(low, min(every)))
    assert found.high == pytest.approx(min(high, max(every)))


@pytest.mark.parametrize("rank", [90, 95, 99])
def test_a_high_percentile_is_that_of_all_calls(rank: int) -> None:
    measured = slots(1.0, noise=0.3, sessions=3, rounds=7, calls=5)
    found = percentile_interval(measured, rank)
    assert found.value == pytest.approx(ranked([float(call) for slot in measured for call in slot.wall_ms], rank))
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("rank", [90, 99])
@pytest.mark.parametrize("sessions", [3, 5, 10])
def test_where_sessions_alone_differ_the_interval_is_the_exact_one_of_a_normal_quantile(
    rank: int, sessions: int
) -> None:
    """Each process has one pace and nothing beside it, so that a percentile of calls is one of paces. Its exact limits
    are known: mean + s / sqrt(k) times a quantile of the non-central t (Hahn and Meeker 1991, sec. 4.4). But the
    percentile that was seen is always inside.
    """
    paces = np.random.default_rng(1).standard_normal(sessions)
    paces = 0.1 * (paces - paces.mean()) / paces.std(ddof=1)
    found = percentile_interval(
        [Slot(s, 0, np.full(9, math.exp(pace)), 1.0, 1.0) for s, pace in enumerate(paces)], rank
    )
    towards = stats.norm.ppf(rank / 100) * math.sqrt(sessions)
    low, high = stats.nct.ppf([0.025, 0.975], sessions - 1, towards) * 0.1 / math.sqrt(sessions)
    seen = math.log(found.value)
    assert math.log(found.low) == pytest.approx(min(low, seen), abs=0.006)
    assert math.log(found.high) == pytest.approx(max(high, seen), rel=0.05)  # its tail is drawn


def test_an_interval_of_a_median_stays_among_what_was_measured() -> None:
    """Sessions that were disturbed, each otherwise, say little; a median outside of all calls they do not say."""
    paces = (6.27, 2.35, 4.15)
    disturbed = [
        Slot(s.session, s.round, s.wall_ms * paces[s.session], 1.0, 1.0) for s in slots(1.0, noise=0.1, sessions=3)
    ]
    found, calls = percentile_interval(disturbed, 50), np.concatenate([slot.wall_ms for slot in disturbed])
    assert calls.min() <= found.low < found.value < found.high <= calls.max()
    assert percentile_interval(disturbed, 99).high > calls.max(), "of a tail nobody has seen the end"


@pytest.mark.parametrize(("sessions", "moves"), [(3, 0.0), (3, 0.02), (5, 0.1), (10, 0.02)])
def test_percentile_intervals_cover_a_known_distribution_as_often_as_they_say(sessions: int, moves: float) -> None:
    """Calls, rounds and sessions are log-normal, so that their product is, and its percentiles are known."""
    rng, trials, ranks = np.random.default_rng(11), 100, (50, 90, 99)
    truth = stats.lognorm.ppf(np.array(ranks) / 100, s=math.sqrt(0.05**2 + 0.03**2 + moves**2))
    hits = np.zeros(3)
    for _ in range(trials):
        logs = [
            (
                session,
                number,
                offset + 0.03 * rng.standard_normal() + 0.05 * rng.standard_normal(1000 // 10 // sessions),
            )
            for session, offset in enumerate(moves * rng.standard_normal(sessions))
            for number in range(10)
        ]
        measured = [Slot(session, number, np.exp(log), 1.0, 1.0) for session, number, log in logs]
        found = [percentile_interval(measured, rank) for rank in ranks]
        hits += [one.low <= true <= one.high for one, true in zip(found, truth, strict=True)]
    assert (hits / trials >= 0.90).all()


def test_an_interval_needs_two_sessions() -> None:
    alone = slots(1.0, sessions=1)
    for interval in (lambda: percentile_interval(alone, 50), lambda: ratio_interval(alone, alone)):
        with pytest.raises(ValueError, match="one session tells nothing"):
            interval()


def test_a_slow_moment_of_the_machine_hits_both_sides_of_a_ratio() -> None:
    ratio = ratio_interval(slots(2.0, seed=1), slots(1.0, seed=2))
    assert ratio.value == pytest.approx(2.0, rel=0.02)
    assert 1.95 < ratio.low <= ratio.value <= ratio.high < 2.05
    assert percentile_interval(slots(2.0), 50).high > 2.0 * 1.02  # the level itself is far less certain


@pytest.mark.parametrize(("sessions", "moves"), [(3, 0.0), (3, 0.01), (3, 0.03), (10, 0.02)])
def test_intervals_of_a_speed_up_cover_the_truth_about_as_often_as_they_say(sessions: int, moves: float) -> None:
    """Each process of each session has a pace of its own, by so much as `moves` (its place in memory, its core)."""
    rng, hits, trials = np.random.default_rng(0), 0, 200
    for seed in range(trials):
        sides = []
        for side, level in enumerate((1.5, 1.0)):
            pace = np.exp(moves * rng.standard_normal(sessions))
            plain = slots(level, seed=2 * seed + side, sessions=sessions, rounds=6, calls=4)
            sides.append([Slot(s.session, s.round, s.wall_ms * pace[s.session], 1.0, 1.0) for s in plain])
        ratio = ratio_interval(*sides)
        hits += ratio.low <= 1.5 <= ratio.high
    assert hits / trials >= 0.9


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
        noise = noise_factor(slots(1.0, seed=3 * seed), slots(1.0, seed=3 * seed + 1))
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
    one, other = slots(1.0, seed=1), slots(1.1, seed=2)
    assert noise_factor(one, other) == pytest.approx(noise_factor(other, one), rel=0.005)
    assert noise_factor(one, other) == pytest.approx(1.1, rel=0.02)
    assert noise_factor(one, one) == 1.0


def test_only_shared_rounds_are_compared_and_none_is_an_error() -> None:
    first = slots(2.0, sessions=2, rounds=4)
    assert ratio_interval(first, slots(1.0, sessions=2, rounds=9)).value == pytest.approx(2.0, rel=0.05)
    elsewhere = [Slot(7, s.round, s.wall_ms, s.cpu_ms, s.thread_ms) for s in first]
    with pytest.raises(ValueError, match="share no round"):
        ratio_interval(first, elsewhere)


def test_processor_time_can_be_compared_instead() -> None:
    loaded = [Slot(s.session, s.round, 3 * s.wall_ms, s.cpu_ms, s.thread_ms) for s in slots(1.0, seed=5)]
    assert ratio_interval(slots(1.0, seed=6), loaded).value == pytest.approx(1 / 3, rel=0.05)
    assert ratio_interval(slots(1.0, seed=6), loaded, of=lambda slot: slot.cpu_ms).value == pytest.approx(1.0, rel=0.05)


def test_the_same_samples_give_the_same_interval() -> None:
    assert ratio_interval(slots(2.0), slots(1.0)) == ratio_interval(slots(2.0), slots(1.0))
    assert noise_factor(slots(2.0), slots(1.0)) == noise_factor(slots(2.0), slots(1.0))


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (7, 10), (440, 450), (1, 1)])
def test_the_ends_of_wilsons_interval_are_the_proportions_that_a_score_test_just_allows(right: int, of: int) -> None:
    for end in wilson(right, of):
        away = abs(right / of - end)
        if end in (0, 1) and away == 0:
            continue  # nothing lies beyond
        assert away == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / of))


def test_without_trials_every_proportion_is_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
