"""The measuring protocol: every variant in a process of its own, interleaved in random order, over several sessions.

    session (new processes)            cold start: load and first call
      setting (batch, io)              warm up until the median is steady
        round                          each variant once, in random order: one untimed call, then a slot of timed ones

Only one process works at a time; the others wait on their pipes and do not spin. The first subject is the baseline, and
it runs twice under two names: the pair measures one file against itself, and what it shows is the noise floor.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..methods import InvalidInput
from .child import Child
from .isa import measuring_cores
from .sessions import GRAPHICS, require_serving
from .statistics import Slot

TWIN = "baseline again"  # the second process of the A/A pair


class Task(Protocol):
    """One progress bar."""

    def advance(self, steps: int = 1, **values: float) -> None: ...


class Progress(Protocol):
    """Where a measurement tells how far it is; the engine's progress fits."""

    def task(self, label: str, total: int) -> AbstractContextManager[Task]: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """One file to time. image: channels, height, width; dtype of the input. provider: where it runs whatever the
    setting says, so that providers can take turns in one run.
    """

    name: str
    path: Path
    input: str
    dtype: str
    image: tuple[int, int, int]
    provider: str | None = None

    def on(self, setting: Setting) -> str:
        """The provider that it runs on in a setting."""
        return self.provider or setting.provider


@dataclass(frozen=True, slots=True)
class Setting:
    """How a file is run. io: "host" on the CPU; on a card "device" (data stays there) or "copy" (there and back)."""

    provider: str
    threads: int
    batch: int
    io: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often. seconds: timed calls of one variant in one setting, over all sessions."""

    seconds: float = 2.0
    sessions: int = 5
    warm_up_s: float = 1.0  # at most, a session and setting
    seed: int = 0
    timeout_s: float = 300.0  # of any single answer of a worker
    placed: bool = True  # find out which provider runs which operators; the CPU's own provider is the only one there


@dataclass
class Measured:
    """What was seen of one subject in one setting; lists have an entry a session."""

    slots: list[Slot] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    peak_memory_mb: list[float] = field(default_factory=list)
    steady: list[bool] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)  # provider -> operators it ran
    kernels: dict[str, int] = field(default_factory=dict)  # operators after the runtime's own fusions


Results = dict[tuple[str, Setting], Measured]


def settings_of(providers: Sequence[str], threads: Sequence[int], batch_sizes: Sequence[int]) -> list[Setting]:
    """All combinations in the order asked. Raises InvalidInput for an absent provider or more threads than cores."""
    require_serving(providers, threads)
    return [
        Setting(provider, count, batch, io)
        for provider in providers
        for count in threads
        for batch in batch_sizes
        for io in (("device", "copy") if provider in GRAPHICS else ("host",))
    ]


def measure(
    subjects: Sequence[Subject],
    settings: Sequence[Setting],
    plan: Plan,
    progress: Progress,
    *,
    after_session: Callable[[Results], None] = lambda so_far: None,
    refused: dict[tuple[str, str], str] | None = None,
) -> Results:
    """Time all subjects in all settings. The first subject is the baseline; its A/A twin is in the results as `TWIN`.

    after_session: told of all that is known whenever a session has ended. refused: filled with why a provider does not
    run a file, (name, provider) -> reason, whose settings are then missing in the results; the baseline must run
    everywhere, and every file on the CPU. None: all must.
    Raises InvalidInput when a file does not run with a provider, ChildFailed when a worker crashes or hangs.
    """
    twin = subjects[0]
    everyone = [*subjects, replace(twin, name=TWIN)]
    results: Results = {(subject.name, setting): Measured() for subject in everyone for setting in settings}
    groups = sorted(
        {(s.provider, s.threads) for s in settings}, key=lambda g: [(s.provider, s.threads) for s in settings].index(g)
    )
    asked = [provider for provider, _ in groups if plan.placed or provider != "cpu"]
    steps = len(subjects) * len(asked) + plan.sessions * len(settings) * (len(everyone) + _rounds(plan))
    with tempfile.TemporaryDirectory() as cache, progress.task("latency", steps) as task:
        for provider, threads in groups:
            group = [s for s in settings if (s.provider, s.threads) == (provider, threads)]
            able = list(everyone)
            for subject in subjects if provider in asked else ():
                try:
                    found = _placement(subject, group[0], cache, plan)
                except InvalidInput as error:
                    if refused is None or subject is twin or provider == "cpu":
                        raise
                    refused[subject.name, provider] = str(error)
                    able.remove(subject)
                    for setting in group:
                        del results[subject.name, setting]
                    task.advance(1 + plan.sessions * len(group))
                    continue
                for setting in group:
                    results[subject.name, setting].nodes = found["nodes"]
                    results[subject.name, setting].kernels = found["kernels"]
                task.advance()
            for session in range(plan.sessions):
                for _ in _session(able, group, session, plan, cache, results):
                    task.advance()
                after_session(results)
    return results


def _rounds(plan: Plan) -> int:
    """Rounds in a session: about 20, but no slot shorter than 20 ms or longer than a quarter of a second."""
    share = plan.seconds / plan.sessions
    return max(3, round(share / _slot_seconds(plan)))


def _slot_seconds(plan: Plan) -> float:
    return min(0.25, max(0.02, plan.seconds / plan.sessions / 20))


def _placement(subject: Subject, setting: Setting, cache: str, plan: Plan) -> dict[str, Any]:
    """Which provider ran which operators, from a process that ends before timing starts; also proof that it runs."""
    with Child("worker", subject.name, limited=subject.on(setting) not in GRAPHICS) as child:
        return child.ask(load_command("place", subject, setting, cache), plan.timeout_s)


def _session(
    everyone: Sequence[Subject],
    group: Sequence[Setting],
    session: int,
    plan: Plan,
    cache: str,
    results: Results,
) -> Iterator[None]:
    """One life of all workers through the settings of one provider and thread count; yields after each step."""
    order = random.Random(f"{plan.seed}/{group[0]}/{session}")
    with ExitStack() as stack:
        children = {
            subject.name: stack.enter_context(
                Child("worker", subject.name, limited=subject.on(group[0]) not in GRAPHICS)
            )
            for subject in order.sample(list(everyone), len(everyone))
        }
        for child in children.values():  # they import side by side, and are idle when the first one loads
            child.send({"do": "ready"})
        for child in children.values():
            child.receive("start", plan.timeout_s)
        cold: dict[str, float] = {}
        for setting in sorted(group, key=lambda one: one.batch):  # memory once taken stays, and is read as a peak
            calls: dict[str, int] = {}
            for subject in order.sample(list(everyone), len(everyone)):
                into, child = results[subject.name, setting], children[subject.name]
                calls[subject.name] = _prepare(child, subject, setting, plan, cache, cold, into)
                yield
            for number in range(_rounds(plan)):
                for subject in order.sample(list(everyone), len(everyone)):
                    command = {"do": "time", "calls": calls[subject.name]}
                    seen = children[subject.name].ask(command, plan.timeout_s)
                    walls = np.asarray(seen["wall_ms"], dtype=np.float64)
                    slot = Slot(session, number, walls, seen["cpu_ms"], seen["thread_ms"])
                    results[subject.name, setting].slots.append(slot)
                yield
            for subject in everyone:
                seen = children[subject.name].ask({"do": "memory"}, plan.timeout_s)
                results[subject.name, setting].peak_memory_mb.append(seen["peak_memory_mb"])


def _prepare(
    child: Child,
    subject: Subject,
    setting: Setting,
    plan: Plan,
    cache: str,
    cold: dict[str, float],
    into: Measured,
) -> int:
    """Load, first call, warm-up; returns how many calls fill a slot."""
    loaded = child.ask(load_command("load", subject, setting, cache), plan.timeout_s)
    cold[subject.name] = loaded.get("load_ms", cold.get(subject.name, 0.0))
    into.load_ms.append(cold[subject.name])
    prepare = {"do": "prepare", "shape": [setting.batch, *subject.image], "io": setting.io}
    into.first_ms.append(child.ask(prepare, plan.timeout_s)["first_ms"])
    warmed = child.ask({"do": "warm", "limit_s": plan.warm_up_s}, plan.timeout_s)
    into.steady.append(warmed["steady"])
    call_ms = float(warmed["call_ms"])
    return max(1, min(1000, round(_slot_seconds(plan) * 1e3 / max(call_ms, 1e-3))))


def load_command(do: str, subject: Subject, setting: Setting, cache: str) -> dict[str, Any]:
    """What a worker is told to open a file; do: "load", "place" or "trace"."""
    return {
        "do": do,
        "path": str(subject.path.absolute()),
        "provider": subject.on(setting),
        "threads": setting.threads,
        "cores": measuring_cores(setting.threads),
        "input": {"name": subject.input, "dtype": subject.dtype},
        "shape": [setting.batch, *subject.image],
        "cache": cache,
    }
