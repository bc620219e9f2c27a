"""How far a run is, told to people: a tree with bars on a terminal, plain lines in a log, nothing for a script.

All of it goes to stderr (`events` tells the same to programs, on stdout). Names come from files and folders, so what a
terminal would obey is replaced before it is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from .diagnostics import printable
from .stage import Progress, Task

_LINE_EVERY_S = 10.0
Place = tuple[str, str]  # arm and entry of a stage
Ended = Literal["done", "cached", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stage came to an end. ref: its artifact, of one that has one; seconds: what it took, 0 when cached."""

    state: Ended
    seconds: float
    ref: str | None = None

    @property
    def outcome(self) -> str:
        """In a word or two: train@7, train@7 (cached), failed."""
        return f"{self.ref}{' (cached)' if self.state == 'cached' else ''}" if self.ref else self.state


class Display(Progress, Protocol):
    """What the runner speaks to: a stage's Progress, and the stages themselves."""

    @contextmanager
    def run(self, places: Sequence[Place], expected: Mapping[Place, float | None]) -> Iterator[None]:
        """The length of a run of these stages. expected: seconds of those that will probably work, None: unknown."""

    def begin(self, number: int, place: Place) -> None:
        """Stage `number` (from 1) starts to work."""

    def end(self, number: int, place: Place, ending: Ending) -> None:
        """Stage `number` has come to an end, whether it worked or not."""


class Silent:
    """Nothing at all: for --json, and the base of the others."""

    @contextmanager
    def run(self, places: Sequence[Place], expected: Mapping[Place, float | None]) -> Iterator[None]:
        yield

    def begin(self, number: int, place: Place) -> None: ...

    def end(self, number: int, place: Place, ending: Ending) -> None: ...

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        yield _NoTask()

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Quiet(Silent):
    """Warnings only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def warn(self, text: str) -> None:
        _print(self._stream, f"warning: {text}")


class Lines:
    """A line when a stage starts and ends, and at most one every ten seconds for a task."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stages = 0

    @contextmanager
    def run(self, places: Sequence[Place], expected: Mapping[Place, float | None]) -> Iterator[None]:
        self._stages = len(places)
        yield

    def begin(self, number: int, place: Place) -> None:
        _print(self._stream, f"[{number}/{self._stages}] {'/'.join(place)} ...")

    def end(self, number: int, place: Place, ending: Ending) -> None:
        took = f" in {duration(ending.seconds)}" if ending.seconds else ""
        _print(self._stream, f"[{number}/{self._stages}] {'/'.join(place)}: {ending.outcome}{took}")

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        task = _LineTask(self._stream, self._clock, label, total)
        yield task
        task.close()

    def note(self, text: str) -> None:
        _print(self._stream, f"  {text}")

    def warn(self, text: str) -> None:
        _print(self._stream, f"  warning: {text}")


class Notebook:
    """The Progress that a stage is given: it shows everything, and keeps notes and warnings for the manifest."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self.notes: list[dict[str, str]] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        with self._display.task(label, total) as task:
            yield task

    def note(self, text: str) -> None:
        self.notes.append({"level": "note", "text": text})
        self._display.note(text)

    def warn(self, text: str) -> None:
        self.notes.append({"level": "warning", "text": text})
        self._display.warn(text)


def choose(
    *,
    quiet: bool = False,
    silent: bool = False,
    stream: TextIO | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Display:
    """The display that fits: tree and bars on a terminal that can redraw, lines elsewhere.

    NO_COLOR takes the colours, not the bars. TERM=dumb takes the bars.
    """
    stream = stream or sys.stderr
    if silent:
        return Silent()
    if quiet:
        return Quiet(stream)
    if stream.isatty() and environment.get("TERM") not in ("dumb", "unknown"):
        from .bars import Bars

        return Bars(stream, colour=not environment.get("NO_COLOR"))
    return Lines(stream)


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def told_values(values: Mapping[str, float]) -> str:
    """loss 1.152  lr 0.001"""
    return "  ".join(f"{printable(name)} {value:.4g}" for name, value in values.items())


def _print(stream: TextIO, line: str) -> None:
    stream.write(printable(line) + "\n")
    stream.flush()


class _NoTask:
    def advance(self, steps: int = 1, **values: float) -> None: ...


class _LineTask:
    def __init__(self, stream: TextIO, clock: Callable[[], float], label: str, total: int) -> None:
        self._stream = stream
        self._clock = clock
        self._label = label
        self._total = total
        self._done = 0
        self._values: dict[str, float] = {}
        self._started = self._printed_at = clock()
        self._unsaid = True

    def advance(self, steps: int = 1, **values: float) -> None:
        self._done += steps
        self._values.update(values)
        self._unsaid = True
        if self._clock() - self._printed_at >= _LINE_EVERY_S:
            self._line()

    def close(self) -> None:
        if self._unsaid:
            self._line()

    def _line(self) -> None:
        now = self._clock()
        left = ""
        if 0 < self._done < self._total:
            left = f"  {duration((now - self._started) / self._done * (self._total - self._done))} left"
        values = f"  {told_values(self._values)}" if self._values else ""
        _print(self._stream, f"  {self._label} {self._done}/{self._total}{values}{left}")
        self._printed_at = now
        self._unsaid = False
