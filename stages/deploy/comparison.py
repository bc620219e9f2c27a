"""From measured slots to a table: a row for each file and setting, ratios to the baseline, noise floor, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .isa import busy_card, busy_cores, graphics_cards, host_facts, times_throttled
from .latency import TWIN, Progress, Results, Setting, Subject
from .sessions import GRAPHICS
from .statistics import Interval, Slot, noise_factor, percentile_interval, ratio_interval, too_few, verdict

# Below this share of its wall time on a core, the calling thread was pushed aside by others.
QUIET_SHARE = 0.9
STEADY_PACE = 0.1  # sessions that differ by more show a clock or neighbours that changed
BUSY_CARD = 0.05  # of the time
CHANGING = {"ondemand", "conservative", "powersave", "schedutil"}  # governors that leave a busy core a lower clock


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What the baseline measured against itself shows in one setting. factor: ratios up to it are noise."""

    setting: Setting
    ratio: Interval
    factor: float

    def as_json(self) -> dict[str, Any]:
        """The floor made symmetric: ratios from ratio_low to ratio_high are noise."""
        return {
            "provider": self.setting.provider,
            "threads": self.setting.threads,
            "batch": self.setting.batch,
            "io": self.setting.io,
            "ratio": self.ratio.value,
            "ratio_low": 1 / self.factor,
            "ratio_high": self.factor,
            "percent": 100 * (self.factor - 1),
        }


def noise_floors(results: Results, baseline: str, settings: Sequence[Setting]) -> dict[Setting, NoiseFloor]:
    """The A/A pair of each setting."""
    floors = {}
    for setting in settings:
        pair = results[baseline, setting].slots, results[TWIN, setting].slots
        floors[setting] = NoiseFloor(setting, ratio_interval(*pair), noise_factor(*pair))
    return floors


def latency_row(
    subject: Subject, setting: Setting, results: Results, baseline: str, floor: NoiseFloor
) -> dict[str, Any]:
    """Latency, throughput, cold start, memory and the speed-up of one file in one setting. Times in ms.

    Percentiles have 95 % intervals, _low and _high. Where there are too few calls to say one, all three are None and
    _unsaid tells why. cpu_ms is the processor time of a call over all threads; speedup_cpu compares that, and is the
    steadier of the two on a busy machine.
    """
    measured = results[subject.name, setting]
    median = percentile_interval(measured.slots, 50)
    row: dict[str, Any] = {
        "provider": setting.provider,
        "batch": setting.batch,
        "threads": setting.threads,
        "io": setting.io,
        "p50_ms": median.value,
        "p50_low": median.low,
        "p50_high": median.high,
        **_tails(measured.slots),
        "samples": sum(len(slot.wall_ms) for slot in measured.slots),
        "throughput": setting.batch / median.value * 1e3,
        "cpu_ms": float(np.median([slot.cpu_ms for slot in measured.slots])),
        "load_ms": float(np.median(measured.load_ms)),
        "first_ms": float(np.median(measured.first_ms)),
        "peak_memory_mb": max(measured.peak_memory_mb),
        "steady": all(measured.steady),
        "nodes": measured.nodes,
        "kernels": measured.kernels,
    }
    if subject.name == baseline:
        return row | {
            "speedup": 1.0,
            "speedup_low": 1.0,
            "speedup_high": 1.0,
            "speedup_cpu": 1.0,
            "verdict": "baseline",
        }
    first = results[baseline, setting].slots
    ratio = ratio_interval(first, measured.slots)
    return row | {
        "speedup": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "speedup_cpu": ratio_interval(first, measured.slots, of=lambda slot: slot.cpu_ms).value,
        "verdict": verdict(ratio, floor.factor),
    }


def _tails(slots: Sequence[Slot]) -> dict[str, Any]:
    """p90, p95 and p99 with their intervals, or why they are not said."""
    calls = sum(len(slot.wall_ms) for slot in slots)
    row: dict[str, Any] = {}
    for rank in (90, 95, 99):
        reason = too_few(calls, rank)
        found = None if reason else percentile_interval(slots, rank)
        row |= {
            f"p{rank}_ms": found.value if found else None,
            f"p{rank}_low": found.low if found else None,
            f"p{rank}_high": found.high if found else None,
            f"p{rank}_unsaid": reason,
        }
    return row


def first_medians(progress: Progress, sessions: int) -> Callable[[Results], None]:
    """For `measure` to call after each session: notes the median of each file and setting once, when it is there."""
    told = {TWIN}

    def tell(results: Results) -> None:
        for (name, setting), measured in results.items():
            about = f"{name}, {setting.provider}, batch {setting.batch}, threads {setting.threads}, {setting.io}"
            if measured.slots and not told & {name, about}:
                told.add(about)
                ms = float(np.median(np.concatenate([slot.wall_ms for slot in measured.slots])))
                progress.note(f"{about}: p50 {ms:.3g} ms after the first of {sessions} sessions")

    return tell


def processor_share(results: Results, settings: Sequence[Setting]) -> float | None:
    """The share of wall time that the calling threads had a core, over all CPU settings; None without one.

    Well below 1 means that other processes ran on the measuring cores.
    """
    wall = busy = 0.0
    for (_, setting), measured in results.items():
        if setting not in settings or setting.io != "host":
            continue
        for slot in measured.slots:
            wall += float(slot.wall_ms.sum())
            busy += min(slot.thread_ms * len(slot.wall_ms), float(slot.wall_ms.sum()))
    return busy / wall if wall else None


def drift(results: Results, settings: Sequence[Setting]) -> float | None:
    """How many times as long the slowest session took as the quickest, the same files in the same settings: the
    geometric mean over all of them, of medians. 1 is a steady host; None with less than two sessions.
    """
    logs: dict[int, list[float]] = {}
    for (_, setting), measured in results.items():
        if setting not in settings:
            continue
        of_session: dict[int, list[NDArray[np.float64]]] = {}
        for slot in measured.slots:
            of_session.setdefault(slot.session, []).append(slot.wall_ms)
        for session, walls in of_session.items():
            logs.setdefault(session, []).append(float(np.log(np.median(np.concatenate(walls)))))
    if len(logs) < 2:
        return None
    means = [float(np.mean(values)) for values in logs.values()]
    return float(np.exp(max(means) - min(means)))


def raw_samples(results: Results) -> dict[str, Any]:
    """Every timed call: column arrays of session, round and wall_ms for each "subject/provider/threads/batch/io"."""
    arrays: dict[str, Any] = {}
    for (name, setting), measured in results.items():
        stem = f"{name}/{setting.provider}/t{setting.threads}/b{setting.batch}/{setting.io}"
        arrays[stem] = np.concatenate([_columns(slot) for slot in measured.slots])
    return arrays


def percentiles(ms: NDArray[np.float64]) -> list[float]:
    """The latencies that 0, 1, ... 100 % of the calls take at most, to four digits."""
    return [float(f"{value:.4g}") for value in np.quantile(ms, np.linspace(0, 1, 101))]


def _columns(slot: Slot) -> NDArray[np.float32]:
    count = len(slot.wall_ms)
    return np.column_stack([np.full(count, slot.session), np.full(count, slot.round), slot.wall_ms]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Watch:
    """The host just before a measurement."""

    facts: dict[str, Any]
    busy: float | None  # cores that others kept busy
    throttled: int | None  # how often cores were slowed down for heat, since boot
    card: float | None = None  # share of the time that others kept a graphics card at work


class Quiet:
    """A progress that says nothing."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Quiet]:
        yield self

    def advance(self, steps: int = 1, **values: float) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def watch() -> Watch:
    """Look at the host for a moment."""
    return Watch(host_facts(), busy_cores(), times_throttled(), busy_card())


def host_state(before: Watch, results: Results, settings: Sequence[Setting], progress: Progress) -> dict[str, Any]:
    """Host facts, and whether others disturbed the measurement, which is also said to `progress`.

    Disturbed: other processes kept more than half a core busy before or after, or a card that is measured at work
    before; the calling threads had a core for less than 90 % of their wall time, cores were slowed down for heat, or
    the same files changed their pace by more than 10 % from session to session. Ratios within a round survive that;
    milliseconds do not.
    """
    after = busy_cores()
    share = processor_share(results, settings)
    reasons = []
    busiest = max((value for value in (before.busy, after) if value is not None), default=0.0)
    if busiest > 0.5:
        reasons.append(f"other processes kept {busiest:.1f} cores busy")
    if share is not None and share < QUIET_SHARE:
        reasons.append(f"the measuring threads had a core for {share:.0%} of the time")
    hot = times_throttled()
    if hot is not None and before.throttled is not None and hot > before.throttled:
        reasons.append(f"cores were slowed down for heat {hot - before.throttled} times")
    pace = drift(results, settings)
    if pace is not None and pace > 1 + STEADY_PACE:
        reasons.append(f"one session was {pace - 1:.0%} slower than another on the same files")
    if before.facts.get("governor") in CHANGING:
        progress.note(f"the governor {before.facts['governor']} changes the clock with the load: set performance")
    host = before.facts | {"onnxruntime": ort.__version__, "other_busy_cores": before.busy}
    if any(setting.provider in GRAPHICS for setting in settings):
        host |= {"graphics_cards": graphics_cards(), "other_busy_card": before.card}
        if before.card is not None and before.card > BUSY_CARD:
            reasons.append(f"others kept a card at work for {before.card:.0%} of the time")
    if reasons:
        progress.warn(f"the host was busy while measuring: {', '.join(reasons)}; repeat it on a quiet machine")
    if unsteady := sorted({name for (name, _), seen in results.items() if not all(seen.steady)}):
        progress.note(f"warm-up ended at its time limit before the median was steady: {', '.join(unsteady)}")
    return {
        "host": host,
        "disturbed": bool(reasons),
        "disturbed_reason": ", ".join(reasons),
        "processor_share": share,
        "drift": pace,
    }
