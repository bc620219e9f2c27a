"""A sweep: one pipeline under many settings, each trial an ordinary run that shares what the store has.

    runs/sweep-<id>/   sweep.json, trials/0007.json, the report; optuna.journal of a search without a storage of its own

The id stands for the recipe of the pipeline and for what is swept, so the same command goes on where a sweep was
killed: what has ended is not repeated, what was at work is taken up first and goes on from its checkpoints. Any number
of processes may work on one sweep. Each holds the lock of its trial; the kernel lets go of it when the process dies.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from . import locks
from . import manifest as manifests
from .errors import IntegrityError, Interrupted, LockedError, SievitError, Terminated, UsageError
from .manifest import sha256_of
from .records import now
from .search_space import Tried, combinations
from .stage import JSON
from .store import Store
from .study import Study

REPORTED = "report.json"  # in a sweep's folder, beside its pages: what they tell
MOST_ATTEMPTS = 3  # how often a trial that takes its process with it is begun
TrialState = Literal["waiting", "running", "done", "failed"]


@dataclass
class Trial:
    """One combination of settings and what came of it. `values`: objective -> value, low, high."""

    number: int
    settings: dict[str, JSON]
    state: TrialState = "waiting"
    attempts: int = 0
    run: str | None = None
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0
    started: str | None = None
    finished: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")


@dataclass(frozen=True)
class Question:
    """What a sweep asks. grid: every combination of `space` is tried; otherwise Optuna chooses `trials` of them.

    recipe: of the pipeline as it is without the sweep. url: the database that Optuna keeps its trials in.
    """

    pipeline: str
    path: str
    recipe: Mapping[str, Any]
    overrides: tuple[str, ...]
    space: Mapping[str, Tried]
    grid: bool
    objectives: tuple[str, ...]
    seed: int = 0
    trials: int = 0
    url: str | None = None

    @property
    def id(self) -> str:
        """The first 12 hex digits of what it asks. How many trials and where they are kept is no part of it."""
        return sha256_of([self.recipe, self.grid, self._space(), self.objectives, None if self.grid else self.seed])[
            :12
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline,
            "path": self.path,
            "overrides": list(self.overrides),
            "kind": "grid" if self.grid else "search",
            "space": dict(self._space()),
            "objectives": list(self.objectives),
            "seed": None if self.grid else self.seed,
            # A URL may hold a password: only whether it is the same is asked.
            "storage": sha256_of(self.url)[:12] if self.url else None,
        }

    def _space(self) -> list[tuple[str, JSON]]:
        return [(name, tried.as_json()) for name, tried in self.space.items()]


class Source(Protocol):
    """Where a sweep's trials come from."""

    def known(self) -> list[tuple[int, dict[str, JSON]]]:
        """(number, settings) of the trials that there are so far, in their order."""

    def new(self) -> tuple[int, dict[str, JSON]] | None:
        """One more; None: there are enough. Called by one process at a time."""

    def tell(self, trial: Trial) -> None:
        """A trial has ended."""


class Sweep:
    """The trials of a question, in the store. Creating one writes sweep.json.

    UsageError: it began with another storage.
    """

    def __init__(self, question: Question, store: Store) -> None:
        self.question = question
        self.store = store
        self.id = question.id
        self.folder = store.runs / f"sweep-{self.id}"
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        with self._lock():
            self.token, self.started = self._signed()
        self._source: Source = _Grid(question) if question.grid else _Search(self)

    def trials(self) -> list[Trial]:
        """All that are known, by their numbers."""
        return [self._read(number) or Trial(number, settings) for number, settings in self._source.known()]

    def work(self, attempt: Callable[[Trial], None], ended: Callable[[Trial], None]) -> None:
        """Take trial after trial until nothing is left that no other process works on.

        attempt: runs one and fills in run, values and gates; a SievitError or OSError of it is the trial's failure,
        Ctrl-C and SIGTERM end the sweep and leave the trial to be taken up again. ended: called after each.
        """
        while True:
            with self._next() as trial:
                if trial is None:
                    return
                self._attempt(trial, attempt)
                self._source.tell(trial)
                ended(trial)

    @contextmanager
    def _next(self) -> Iterator[Trial | None]:
        """A trial whose lock is held: one that another process has left, else a new one."""
        with ExitStack() as held:
            with self._lock():
                found = self._take(held)
            yield found

    def _take(self, held: ExitStack) -> Trial | None:
        for number, settings in self._source.known():
            trial = self._read(number) or Trial(number, settings)
            if not trial.ended and self._held(number, held):
                trial = self._read(number) or trial
                if not trial.ended:
                    return trial
                held.pop_all().close()  # it ended between the two looks
            if trial.ended:
                self._source.tell(trial)  # the process that ended it may have died before it did
        new = self._source.new()
        if new is None:
            return None
        trial = Trial(*new)
        self._write(trial)
        return trial if self._held(trial.number, held) else None

    def _attempt(self, trial: Trial, attempt: Callable[[Trial], None]) -> None:
        began = time.monotonic()
        trial.attempts += 1
        trial.state, trial.started, trial.error = "running", trial.started or now(), None
        if trial.attempts > MOST_ATTEMPTS:
            trial.state = "failed"
            trial.error = f"the process died in it {MOST_ATTEMPTS} times"
        self._write(trial)
        try:
            if trial.state == "running":
                attempt(trial)
                trial.state = "done"
        except (Interrupted, Terminated):
            trial.state, trial.attempts = "waiting", trial.attempts - 1
            raise
        except (SievitError, OSError) as error:
            trial.state, trial.error = "failed", str(error)
        finally:
            trial.seconds = round(trial.seconds + time.monotonic() - began, 3)
            if trial.ended:
                trial.finished = now()
            self._write(trial)

    def _held(self, number: int, held: ExitStack) -> bool:
        lock = self.store.lock_path(f"sweep-{self.id}-{number}")
        try:
            held.enter_context(locks.hold(lock, f"trial {number} of sweep {self.id}"))
        except LockedError:
            return False
        return True

    def _lock(self) -> Any:
        path = self.store.lock_path(f"sweep-{self.id}")
        return locks.hold(path, f"the list of trials of sweep {self.id}", wait_s=600)

    def _signed(self) -> tuple[str, str]:
        """(token, started) of sweep.json. The token keeps the sweeps of two stores apart in one database."""
        path, asked = self.folder / "sweep.json", self.question.as_json()
        try:
            there = manifests.read_json(path, "sweep.json")
            token, started = str(there["token"]), str(there["started"])
            if there["storage"] != asked["storage"]:
                raise UsageError(
                    "this sweep began with another storage",
                    where=str(path),
                    hint="give the --storage that it began with",
                )
        except (FileNotFoundError, IntegrityError, KeyError):
            token, started = uuid.uuid4().hex[:8], now()
            fields = {"schema": manifests.SCHEMA, "id": self.id, "token": token, "started": started, **asked}
            self.store.disk.replace(path, manifests.as_text(fields))
        return token, started

    def _path(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}.json"

    def _write(self, trial: Trial) -> None:
        self.store.disk.replace(self._path(trial.number), manifests.as_text(asdict(trial)))

    def _read(self, number: int) -> Trial | None:
        """None when it is absent or damaged: the trial is then made again, out of the store."""
        try:
            return Trial(**manifests.read_json(self._path(number), f"trial {number}"))
        except (FileNotFoundError, IntegrityError, TypeError):
            return None


def reported(store: Store) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, what its pages tell) of every sweep, the one that was worked on last at the end. What cannot be read is
    left out.
    """
    found = []
    for path in store.runs.glob(f"sweep-*/{REPORTED}"):
        try:
            found.append((path.parent, manifests.read_json(path, REPORTED)))
        except (FileNotFoundError, IntegrityError):
            continue
    return sorted(found, key=lambda each: (_worked_on(each[1]), each[0].name))


def _worked_on(document: Mapping[str, Any]) -> str:
    return max([str(document["started"]), *(str(trial["finished"] or "") for trial in document["trials"])])


class _Grid:
    """Every combination; they are known from the beginning."""

    def __init__(self, question: Question) -> None:
        self._all = list(enumerate(combinations(question.space)))

    def known(self) -> list[tuple[int, dict[str, JSON]]]:
        return self._all

    def new(self) -> None:
        return None

    def tell(self, trial: Trial) -> None: ...


class _Search:
    """What Optuna suggests, up to a number of trials in all processes together."""

    def __init__(self, sweep: Sweep) -> None:
        question = sweep.question
        name = f"sievit-{sweep.id}-{sweep.token}"
        self._objectives, self._most = question.objectives, question.trials
        self._study = Study(name, question.space, question.objectives, question.seed, sweep.folder, question.url)
        self._told: set[int] = set()

    def known(self) -> list[tuple[int, dict[str, JSON]]]:
        return self._study.trials()

    def new(self) -> tuple[int, dict[str, JSON]] | None:
        return self._study.ask() if self._study.count() < self._most else None

    def tell(self, trial: Trial) -> None:
        if trial.number in self._told:
            return
        values: Sequence[float] | None = None
        if trial.state == "done":
            values = [trial.values[name]["value"] for name in self._objectives]
        self._study.tell(trial.number, values)
        self._told.add(trial.number)
