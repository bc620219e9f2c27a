"""A run for programs: `--json-lines` writes one JSON object an event on stdout, the command's document the last.

Every line has `v` (1; raised when a name below changes its meaning or goes), `event` and `time` (ISO 8601, UTC).

    run        stages: [{arm, entry, expected_seconds}]        null: unknown, or it is in the store
    begin      number, arm, entry                              a stage starts to work
    progress   arm, entry, task, done, total, values           at most one a second and task, and one at its end
    note       arm, entry, text                                null before the first stage
    warning    arm, entry, text
    end        number, arm, entry, state, ref, seconds         done, cached, failed or stopped
    result     result                                          what --json prints, `error` in it after a failure

When nobody reads any more, the run goes on without a word: hours of training are worth more than who watched them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .progress import Ending, Place
from .stage import Task

VERSION = 1
EVERY_S = 1.0

Tell = Callable[[dict[str, Any]], None]


class Events:
    """The display of a command with --json-lines. tell: writes one event, as Console.event does."""

    def __init__(self, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._at: Place | None = None  # the stage that works now

    @contextmanager
    def run(self, places: Sequence[Place], expected: Mapping[Place, float | None]) -> Iterator[None]:
        stages = [{"arm": place[0], "entry": place[1], "expected_seconds": expected.get(place)} for place in places]
        self._tell({"event": "run", "stages": stages})
        yield

    def begin(self, number: int, place: Place) -> None:
        self._at = place
        self._tell({"event": "begin", "number": number, **self._place()})

    def end(self, number: int, place: Place, ending: Ending) -> None:
        self._at = place
        how = {"state": ending.state, "ref": ending.ref, "seconds": round(ending.seconds, 3)}
        self._tell({"event": "end", "number": number, **self._place(), **how})
        self._at = None

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        task = _EventTask(self._progress, self._clock, label, total)
        yield task
        task.close()

    def note(self, text: str) -> None:
        self._tell({"event": "note", **self._place(), "text": text})

    def warn(self, text: str) -> None:
        self._tell({"event": "warning", **self._place(), "text": text})

    def _progress(self, fields: dict[str, Any]) -> None:
        self._tell({"event": "progress", **self._place(), **fields})

    def _place(self) -> dict[str, str | None]:
        arm, entry = self._at or (None, None)
        return {"arm": arm, "entry": entry}


class _EventTask:
    def __init__(self, tell: Tell, clock: Callable[[], float], label: str, total: int) -> None:
        self._tell, self._clock, self._label, self._total = tell, clock, label, total
        self._done = 0
        self._values: dict[str, float] = {}
        self._told_at, self._unsaid = -math.inf, True

    def advance(self, steps: int = 1, **values: float) -> None:
        self._done += steps
        self._values.update(values)
        self._unsaid = True
        if self._clock() - self._told_at >= EVERY_S:
            self._say()

    def close(self) -> None:
        if self._unsaid:
            self._say()

    def _say(self) -> None:
        # JSON has no NaN: a loss that is none is null.
        values = {name: value if math.isfinite(value) else None for name, value in self._values.items()}
        self._tell({"task": self._label, "done": self._done, "total": self._total, "values": values})
        self._told_at, self._unsaid = self._clock(), False
