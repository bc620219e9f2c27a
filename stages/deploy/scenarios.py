"""Scenarios beyond one call after the other, as MLPerf Inference has them (Reddi et al., ISCA 2020): offline, how many
images a second in batches of any size; server, how many a second may come one by one at random and be answered in time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .child import Child
from .latency import TWIN, Measured, Plan, Progress, Setting, Subject, load_command, measure
from .sessions import GRAPHICS
from .statistics import ENOUGH, Interval, noise_factor, percentile_interval
from .variants import Variant, distinct

TRIALS = 7  # halvings: the rate is found to a 128th of what back-to-back calls reach
PATIENCE = 2
# A queue at load r forgets how it began after some 1 / (1 - r)^2 calls; a trial lasts so many times that.
LASTING = 4


@dataclass
class Offline:
    """Images a second by batch size, in the order tried. stalled: how many of the last ones brought no more."""

    tried: dict[int, Interval] = field(default_factory=dict)
    stalled: int = 0

    @property
    def batch(self) -> int:
        """The best one."""
        return max(self.tried, key=lambda batch: self.tried[batch].value)

    def as_json(self) -> dict[str, Any]:
        best = self.tried[self.batch]
        return {
            "scenario": "offline",
            "batch": self.batch,
            "throughput": best.value,
            "throughput_low": best.low,
            "throughput_high": best.high,
            "tried": [[batch, found.value] for batch, found in self.tried.items()],
            "unsaid": "",
            "limited": self.stalled == 0,
        }


@dataclass(frozen=True, slots=True)
class Server:
    """The highest rate of a bisection, queries a second, and p99 at it. unsaid: why there is none, or why it is coarse.

    tried: (rate, p99 in ms) of each trial; p99 is infinite where the trial was given up.
    """

    rate: float | None
    p99_ms: float | None
    unsaid: str
    tried: tuple[tuple[float, float], ...]

    def as_json(self, bound_ms: float) -> dict[str, Any]:
        return {
            "scenario": "server",
            "batch": 1,
            "throughput": self.rate,
            "throughput_low": None,
            "throughput_high": None,
            "p99_ms": self.p99_ms,
            "bound_ms": bound_ms,
            "tried": [[rate, p99 if math.isfinite(p99) else None] for rate, p99 in self.tried],
            "unsaid": self.unsaid,
            "limited": False,
        }


def offline_rows(
    variants: Sequence[Variant],
    settings: Sequence[Setting],
    limit: int,
    plan: Plan,
    progress: Progress,
    runs: Callable[[Variant, Setting], bool] = lambda variant, setting: True,
) -> list[dict[str, Any]]:
    """A row for each file, provider, thread count and place of the data, where it runs."""
    rows: list[dict[str, Any]] = []
    for setting in _places(settings):
        chosen = [variant for variant in distinct(variants) if runs(variant, setting)]
        subjects = [variant.subject(setting.batch) for variant in chosen]
        fixed = {s.name: batch for s, v in zip(subjects, chosen, strict=True) if (batch := v.fixed_batch) is not None}
        found = offline(subjects, setting, limit, fixed, plan, progress)
        rows += [v.short() | _at(setting) | one.as_json() for v, one in zip(chosen, found, strict=True)]
    return rows


def server_rows(
    variants: Sequence[Variant],
    settings: Sequence[Setting],
    bound_ms: float,
    seconds: float,
    plan: Plan,
    progress: Progress,
    runs: Callable[[Variant, Setting], bool] = lambda variant, setting: True,
) -> list[dict[str, Any]]:
    """The same; a file that takes larger batches only has no row, which is noted."""
    rows: list[dict[str, Any]] = []
    chosen = distinct(variants)
    for variant in chosen:
        if variant.fixed_batch not in (None, 1):
            progress.note(f"{variant.name} takes batches of {variant.fixed_batch} only: no server scenario")
    for setting in _places(settings):
        for variant in (one for one in chosen if one.fixed_batch in (None, 1) and runs(one, setting)):
            found = server(variant.subject(setting.batch), setting, bound_ms, seconds, plan, progress)
            rows.append(variant.short() | _at(setting) | found.as_json(bound_ms))
    return rows


def _places(settings: Sequence[Setting]) -> list[Setting]:
    return [setting for setting in settings if setting.batch == settings[0].batch]


def _at(setting: Setting) -> dict[str, Any]:
    return {"provider": setting.provider, "threads": setting.threads, "io": setting.io}


def batches(limit: int) -> list[int]:
    """1, 2, 4 and so on up to `limit`."""
    return [2**power for power in range(limit.bit_length())]


def offline(
    subjects: Sequence[Subject],
    setting: Setting,
    limit: int,
    fixed: Mapping[str, int],
    plan: Plan,
    progress: Progress,
    timed: Callable[..., Mapping[tuple[str, Setting], Measured]] = measure,
) -> list[Offline]:
    """Throughput of each file at doubling batch sizes, all interleaved, until two of them in a row bring no more than
    the noise: one may fall into somebody else's load.

    fixed: name -> the only batch size that file takes. timed: how batches of one size are measured. `limited` is said
    of a file whose throughput still grew at `limit`.
    """
    found = {subject.name: Offline() for subject in subjects}
    doubling = batches(limit)
    for batch in sorted({*doubling, *fixed.values()}):
        free = [s for s in subjects if s.name not in fixed and batch in doubling and found[s.name].stalled < PATIENCE]
        asked = free + [s for s in subjects if fixed.get(s.name) == batch]
        if not asked:
            continue
        at = replace(setting, batch=batch)
        results = timed(asked, [at], plan, progress)
        noise = noise_factor(results[asked[0].name, at].slots, results[TWIN, at].slots)
        for subject in asked:
            ms = percentile_interval(results[subject.name, at].slots, 50)
            own = found[subject.name]
            before = max((reached.value for reached in own.tried.values()), default=0.0)
            own.tried[batch] = Interval(*(1e3 * batch / end for end in (ms.value, ms.high, ms.low)))
            grew = own.tried[batch].value > before * noise and subject.name not in fixed
            own.stalled = 0 if grew else own.stalled + 1
    return [found[subject.name] for subject in subjects]


def server(
    subject: Subject, setting: Setting, bound_ms: float, seconds: float, plan: Plan, progress: Progress
) -> Server:
    """The highest Poisson rate of single images at which one file answers 99 % within `bound_ms`, waiting included.

    seconds: of all trials together. Raises InvalidInput when the file does not run, ChildFailed when a worker crashes.
    """
    at = replace(setting, batch=1)
    with (
        Child("worker", subject.name, limited=at.provider not in GRAPHICS) as child,
        tempfile.TemporaryDirectory() as cache,
        progress.task(f"server: {subject.name}", TRIALS) as task,
    ):
        child.ask(load_command("load", subject, at, cache), plan.timeout_s)
        child.ask({"do": "prepare", "shape": [1, *subject.image], "io": at.io}, plan.timeout_s)
        call_ms = child.ask({"do": "warm", "limit_s": plan.warm_up_s}, plan.timeout_s)["call_ms"]

        def trial(rate: float, queries: int) -> float:
            command = {"do": "queries", "rate": rate, "queries": queries, "seed": plan.seed, "bound_ms": bound_ms}
            answered = child.ask(command, plan.timeout_s + 2 * queries / rate)
            task.advance()
            return float(np.percentile(answered["latency_ms"], 99)) if answered["done"] else math.inf

        return highest_rate(trial, bound_ms, 1e3 / call_ms, seconds)


def highest_rate(trial: Callable[[float, int], float], bound_ms: float, capacity: float, seconds: float) -> Server:
    """Bisection between 0 and `capacity`, the rate of back-to-back calls, at which a queue has no steady state.

    trial(rate, queries): p99 in ms of so many queries at that rate a second. Each has enough queries for a p99, and for
    the queue to forget that it began empty. Trials that would take more than `seconds` in all are left out; it is said.
    """
    low, high, spent = 0.0, capacity, 0.0
    best: float | None = None
    tried: list[tuple[float, float]] = []
    for _ in range(TRIALS):
        rate = (low + high) / 2
        queries = max(ENOUGH[99], math.ceil(LASTING / (1 - rate / capacity) ** 2))
        if spent + queries / rate > seconds:
            lasting = (
                f"{queries} queries at {rate:.3g}/s take {queries / rate:.3g} s, {seconds - spent:.3g} s were left"
            )
            return Server(low or None, best, lasting, tuple(tried))
        spent += queries / rate
        p99 = trial(rate, queries)
        tried.append((rate, p99))
        if p99 <= bound_ms:
            low, best = rate, p99
        else:
            high = rate
    missed = "" if low else f"p99 was above {bound_ms:g} ms at every rate down to {high:.3g}/s"
    return Server(low or None, best, missed, tuple(tried))
