"""Offline and server: queues against a slow loop and M/D/1 theory, searches on made-up hosts; no clock is looked at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from test_benchmark import Listening, context, made, subject

from sievit.pipeline.report.sections import scenarios as section
from sievit.pipeline.stage import Labelled
from sievit.stages.benchmark import BenchmarkConfig, idle, run
from sievit.stages.deploy.latency import TWIN, Measured, Plan, Setting
from sievit.stages.deploy.scenarios import LASTING, TRIALS, batches, highest_rate, offline, server
from sievit.stages.deploy.statistics import ENOUGH, Slot
from sievit.stages.deploy.worker import answer_queries

HOST = Setting("cpu", 1, 1, "host")


class Clock:
    """Time that passes when somebody works or sleeps. Looking takes a nanosecond, for else no wait would ever end."""

    def __init__(self, services: list[float]) -> None:
        self.now, self.services, self.slept = 100.0, iter(services), 0.0

    def __call__(self) -> float:
        self.now += 1e-9
        return self.now

    def work(self) -> None:
        self.now += next(self.services)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds


class Skipping(Clock):
    """The same, where the last moment before an arrival passes at once."""

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now


def answered(arrivals: list[float], services: list[float], bound_ms: float = 1e12) -> dict[str, Any]:
    clock = Clock(services)
    return answer_queries(clock.work, arrivals, bound_ms, clock, clock.sleep)


def test_queries_wait_for_those_before_them_as_in_a_slow_loop() -> None:
    """Queries come a thousand times faster than they are answered: all waiting is behind others."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1.5e-6, 300)).tolist()
    services = rng.exponential(2e-3, 300).tolist()
    expected, free = [], 0.0
    for arrival, service in zip(arrivals, services, strict=True):
        free = max(free, arrival) + service
        expected.append((free - arrival) * 1e3)
    assert answered(arrivals, services)["latency_ms"] == pytest.approx(expected, rel=1e-4)


def test_a_server_that_is_free_does_not_begin_before_the_query_is_there() -> None:
    clock = Skipping([0.004] * 3)
    found = answer_queries(clock.work, [1.0, 2.0, 2.001], 1e9, clock, clock.sleep)
    assert found["latency_ms"] == pytest.approx([4, 4, 7], abs=0.5)
    assert clock.slept == pytest.approx(2.0, abs=0.02), "the core is given away in between"


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_mean_wait_of_poisson_queries_is_that_of_an_m_d_1_queue(load: float) -> None:
    """Pollaczek-Khinchine: with calls of constant length s and load r, queries wait r s / (2 (1 - r)) on average."""
    service, queries = 1.0, 40_000
    arrivals = np.cumsum(np.random.default_rng(1).exponential(service / load, queries)).tolist()
    clock = Skipping([service] * queries)
    found = answer_queries(clock.work, arrivals, 1e12, clock, clock.sleep)
    waits = np.array(found["latency_ms"]) / 1e3 - service
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)
    assert found["done"] is True


def test_a_trial_ends_when_its_p99_can_no_longer_keep_the_bound() -> None:
    late = {5, 50, 90, 120}
    services = [0.02 if n in late else 0.001 for n in range(200)]
    arrivals = [0.1 * n for n in range(200)]
    clock = Skipping(services)
    found = answer_queries(clock.work, arrivals, 10.0, clock, clock.sleep)
    assert found["done"] is False and len(found["latency_ms"]) == 121
    # Of 200 the 99th percentile lies between the second and the third largest: three misses still may keep the bound.
    clock = Skipping([0.02 if n in late - {120} else 0.001 for n in range(200)])
    assert answer_queries(clock.work, arrivals, 10.0, clock, clock.sleep)["done"] is True


# ---- the search for a rate


def host(capacity: float, bound: float, asked: list[tuple[float, int]]) -> Any:
    """p99 grows without end towards the capacity, and is `bound` at 0.7 of it."""

    def trial(rate: float, queries: int) -> float:
        asked.append((rate, queries))
        return bound * 0.3 / (1 - rate / capacity)

    return trial


def test_the_highest_rate_under_the_bound_is_found_with_enough_queries_in_every_trial() -> None:
    asked: list[tuple[float, int]] = []
    found = highest_rate(host(200.0, 50.0, asked), 50.0, 200.0, seconds=1e9)
    assert found.rate is not None and found.p99_ms is not None
    assert 140 - 200 / 2**TRIALS <= found.rate <= 140
    assert found.p99_ms <= 50 and found.unsaid == ""
    assert len(asked) == TRIALS == len(found.tried)
    for rate, queries in asked:
        assert queries >= ENOUGH[99] and queries >= LASTING / (1 - rate / 200) ** 2


def test_trials_that_would_take_too_long_are_left_out_and_that_is_said() -> None:
    asked: list[tuple[float, int]] = []
    found = highest_rate(host(200.0, 50.0, asked), 50.0, 200.0, seconds=15.0)
    assert sum(queries / rate for rate, queries in asked) <= 15
    assert 0 < len(asked) < TRIALS
    assert found.rate == max(rate for rate, _ in asked if rate <= 140)
    assert "queries at" in found.unsaid and "were left" in found.unsaid
    none = highest_rate(host(200.0, 50.0, asked), 50.0, 200.0, seconds=1.0)
    assert none.rate is none.p99_ms is None and none.unsaid


def test_a_bound_that_a_lone_call_misses_has_no_rate() -> None:
    found = highest_rate(lambda rate, queries: math.inf, 5.0, 200.0, seconds=1e9)
    assert found.rate is None
    assert found.unsaid == "p99 was above 5 ms at every rate down to 1.56/s"
    assert found.as_json(5.0)["tried"][0] == [100.0, None], "JSON has no infinity"


# ---- offline


def test_batches_are_powers_of_two_up_to_the_limit() -> None:
    assert batches(64) == [1, 2, 4, 8, 16, 32, 64]
    assert batches(5) == [1, 2, 4]
    assert batches(1) == [1]


def timed(ms: dict[str, Any], asked: list[tuple[int, list[str]]], noise: float = 1.0) -> Any:
    """A made-up host: name -> milliseconds of a call by batch size. noise: how much slower the baseline's twin is."""

    def measure(subjects: Any, settings: Any, plan: Any, progress: Any) -> Any:
        (at,) = settings
        asked.append((at.batch, [one.name for one in subjects]))
        results = {}
        for name, own in [*((s.name, s.name) for s in subjects), (TWIN, subjects[0].name)]:
            level = ms[own](at.batch) * (noise if name == TWIN else 1.0)
            walls = np.full(10, level)
            slots = [Slot(session, number, walls, level, level) for session in range(3) for number in range(3)]
            results[name, at] = Measured(slots=slots)
        return results

    return measure


def test_the_batch_doubles_until_throughput_grows_no_more() -> None:
    asked: list[tuple[int, list[str]]] = []
    ms = {"a": lambda batch: 4.0 + batch + (100 if batch > 16 else 0), "b": lambda batch: float(batch)}
    subjects = [subject(Path("a.onnx"), name) for name in "ab"]
    first, second = offline(subjects, HOST, 64, {}, Plan(), Listening(), timed(ms, asked))
    assert asked == [(2**power, ["a", "b"] if power < 3 else ["a"]) for power in range(7)]
    assert first.batch == 16 and first.tried[16].value == pytest.approx(16 / 20 * 1e3)
    assert not first.as_json()["limited"]
    assert second.tried.keys() == {1, 2, 4}


def test_one_batch_that_somebody_disturbed_does_not_end_the_search() -> None:
    ms = {"a": lambda batch: 4.0 + batch + (50 if batch == 2 else 0)}
    asked: list[tuple[int, list[str]]] = []
    (found,) = offline([subject(Path("a"))], HOST, 16, {}, Plan(), Listening(), timed(ms, asked))
    assert [batch for batch, _ in asked] == [1, 2, 4, 8, 16] and found.batch == 16


def test_growth_inside_the_noise_is_no_growth_and_growth_at_the_limit_is_said() -> None:
    ms = {"a": lambda batch: 4.0 + batch}
    asked: list[tuple[int, list[str]]] = []
    (found,) = offline([subject(Path("a"))], HOST, 64, {}, Plan(), Listening(), timed(ms, asked, noise=1.3))
    rates = [batch / (4 + batch) for batch in (1, 2, 4, 8, 16)]
    stops = next(n for n in range(1, 5) if rates[n] <= 1.3 * rates[n - 1])
    assert asked[-1][0] == 2 ** (stops + 1)
    (found,) = offline([subject(Path("a"))], HOST, 4, {}, Plan(), Listening(), timed(ms, []))
    assert found.as_json()["limited"]


def test_a_file_of_a_fixed_batch_is_tried_at_that_one_alone() -> None:
    asked: list[tuple[int, list[str]]] = []
    ms = {"a": lambda batch: 1.0 + batch, "b": lambda batch: 1.0 + batch}
    subjects = [subject(Path("a"), "a"), subject(Path("b"), "b")]
    _, second = offline(subjects, HOST, 2, {"b": 3}, Plan(), Listening(), timed(ms, asked))
    assert asked == [(1, ["a"]), (2, ["a"]), (3, ["b"])]
    assert second.batch == 3 and not second.as_json()["limited"]


# ---- stage, settings, report


@pytest.mark.slow
def test_the_stage_runs_both_scenarios_on_the_final_files(tmp_path: Path) -> None:
    many = [Labelled("main", "export", made(tmp_path / "a"), True, 0)]  # type: ignore[arg-type]
    settings = {"scenarios": ("single", "offline", "server"), "offline_batch": 2, "server_p99_ms": 50.0}
    ctx = context(tmp_path, many, batch_sizes=(1,), seconds=0.1, server_seconds=0.5, warm_up=0.05, **settings)
    run(ctx)
    off, srv = ctx.metrics["scenarios"]
    assert (off["scenario"], srv["scenario"], off["arm"], srv["provider"]) == ("offline", "server", "main", "cpu")
    assert [batch for batch, _ in off["tried"]] == [1, 2]
    assert off["throughput_low"] <= off["throughput"] <= off["throughput_high"]
    assert len(srv["tried"]) >= 1 and (srv["throughput"] is None or srv["p99_ms"] <= 50)


def test_a_real_worker_answers_poisson_queries(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "a.onnx")
    found = server(subject(path), HOST, 1000.0, 1.0, Plan(warm_up_s=0.1), Listening())
    assert found.rate is not None and found.p99_ms is not None and found.p99_ms > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenarios": ("offline",)}, "single is what all else is compared with"),
        ({"scenarios": ("single", "server")}, "server needs a bound; set server_p99_ms"),
        ({"scenarios": ("single", "single")}, "stands there twice"),
    ],
)
def test_scenarios_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**settings)


def test_settings_of_scenarios_that_are_not_asked_for_are_without_effect() -> None:
    from types import SimpleNamespace

    def told(**settings: Any) -> set[str]:
        return set(idle(SimpleNamespace(config=BenchmarkConfig(**settings))))  # type: ignore[arg-type]

    assert told() == {"offline_batch", "server_p99_ms", "server_seconds"}
    assert told(scenarios=("single", "offline")) == {"server_p99_ms", "server_seconds"}
    assert told(scenarios=("single", "offline", "server"), server_p99_ms=5.0) == set()


def test_the_report_shows_throughput_rate_and_what_ended_a_search() -> None:
    own = {"arm": "main", "entry": "export", "variant": "int8", "provider": "cpu", "threads": 1, "io": "host"}
    rows = [
        own | {"scenario": "offline", "batch": 16, "throughput": 800.0, "throughput_low": 790.0,
               "throughput_high": 810.0, "tried": [], "unsaid": "", "limited": True},
        own | {"scenario": "server", "batch": 1, "throughput": None, "throughput_low": None, "throughput_high": None,
               "p99_ms": None, "bound_ms": 5.0, "tried": [], "unsaid": "p99 was above 5 ms", "limited": False},
    ]  # fmt: skip
    found = section({"scenarios": rows})
    assert found is not None
    assert found.rows == (
        ("main INT8", "offline", "cpu, batch 16, 1 thread", "800 (790–810)", "–"),
        ("main INT8", "server", "cpu, batch 1, 1 thread", "–", "–"),
    )
    assert found.remarks == (
        "main INT8, offline: throughput still grew at batch 16.",
        "main INT8, server: p99 was above 5 ms.",
    )
    assert "stays within 5.00\u202fms" in found.about
    assert section({"scenarios": []}) is None and section({}) is None
