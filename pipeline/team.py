"""Several processes that share the work of a run.

The first is the engine: it plans, holds locks, shows progress, commits and reports. The others follow. They are told of
each stage whose function shares its work, run that function beside the first on the same inputs, and throw away what it
leaves. A part of such a stage's work is met by all at the same place of the function: the first tells them to run it
too, or that its artifact is there. What goes between processes here is JSON; tensors are the stages' own affair.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from . import host
from .console import unheard
from .errors import InputError, SievitError, Terminated
from .progress import Notebook, Silent
from .settings import DataConfig, LaunchConfig, ModelConfig
from .stage import Config, Context, Labelled, Part, Stage
from .store import Artifact, Store

if TYPE_CHECKING:
    from .plan import Node
    from .resolve import Inputs

Document = dict[str, Any]
_Config = TypeVar("_Config", bound=Config)

_BROKEN_S = 5.0  # for a process that ended to be missed by its parent, after a connection to it broke
_GOING_S = 0.5  # for the launcher, which ends all processes when one is gone, to have asked this one too
_REPORT_S = 10.0


class Channel(Protocol):
    """How the processes reach each other. rank: 0 is the engine."""

    rank: int
    size: int
    nodes: int

    def tell(self, message: Document) -> None:
        """To all others; they hear messages in order."""

    def hear(self) -> Document:
        """The next message of the first process, however long it takes."""

    def report(self, number: int, word: Document) -> None:
        """Leave word for the first process, of the job of that number."""

    def reports(self, number: int, wait_s: float) -> dict[int, Document]:
        """Rank -> its word, of those that leave it within the time."""

    def gone(self) -> list[int]:
        """The ranks of this machine's other processes that have ended."""

    @property
    def orphaned(self) -> bool:
        """Whether the process that started this one has ended."""

    def open(self, number: int, device: str) -> None:
        """Get ready to exchange tensors, all at once. Whatever fails is what the stages raise for wrong inputs."""

    def close(self) -> None:
        """Undo open. Whoever waits for tensors of this process fails."""

    def broke(self, error: BaseException) -> bool:
        """Whether an error says no more than that another process is not there."""


class Elsewhere(Exception):
    """The command ran in processes of its own, which have said all there was to say."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Team:
    """The processes of a command, as the first of them sees them; by default it is alone.

    start: runs the command in as many processes as are asked for, on a device, and returns its exit code; None where
    that cannot be.
    """

    def __init__(self, channel: Channel | None = None, start: Callable[[LaunchConfig, str], int] | None = None) -> None:
        self._channel = channel
        self._start = start
        self._number = self._outermost = self._depth = 0  # of jobs; within how many

    @property
    def size(self) -> int:
        return 1 if self._channel is None else self._channel.size

    @property
    def nodes(self) -> int:
        return 1 if self._channel is None else self._channel.nodes

    def starts(self, launch: LaunchConfig) -> bool:
        """Whether the processes of a pipeline are still to be started."""
        return self._channel is None and launch.total > 1

    def start(self, launch: LaunchConfig, device: str) -> int:
        """Run this command in as many processes. Raises: SievitError for what none of them could say."""
        if self._start is None:
            raise SievitError(
                "this program cannot start processes", hint="use the command `sievit`, or leave launch out"
            )
        return self._start(launch, device)

    @contextmanager
    def at_work(self, stage: Stage, job: Callable[[], Document], device: str, hint: str) -> Iterator[list[Document]]:
        """Around a stage's function: if its work can be shared, the others run it too. Yields a list that holds their
        reports in the end. job: what they must know of it. hint: what to do after one of them has failed.
        """
        reports: list[Document] = []
        channel = self._channel
        if channel is None or not stage.shares:
            yield reports
            return
        self._number += 1
        number = self._number
        self._outermost = self._outermost if self._depth else number
        channel.tell({"do": "run", "number": number, **job()})
        self._depth += 1
        try:
            if self._depth == 1:
                channel.open(number, device)
            yield reports
        except BaseException as error:
            told = self._told(channel, error, hint)
            if self._depth == 1:
                channel.tell({"do": "over"})
            if told is not None:
                raise told from error
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                channel.close()
        reports += channel.reports(number, _REPORT_S).values()

    def there(self, artifact: Artifact, *, made: bool) -> None:
        """Tell of a part of the work in hand that it is there."""
        if self._channel is not None and self._depth:
            self._channel.tell({"do": "take", "artifact": _name(artifact), "made": made})

    def end(self, code: int) -> None:
        """Tell that the command is over, and with which exit code."""
        if self._channel is not None:
            self._channel.tell({"do": "end", "code": code})

    def _told(self, channel: Channel, error: BaseException, hint: str) -> SievitError | None:
        """What really happened where a stage failed because another process was not there, or was stopped because of
        that.
        """
        broke = channel.broke(error)
        if not broke and isinstance(error, Exception):
            return None
        with _unstoppable() as unstoppable:
            deadline = time.monotonic() + (_BROKEN_S if broke else 0.0)
            while not channel.orphaned:
                words = channel.reports(self._outermost, 0.0)
                roots = [(rank, word) for rank, word in words.items() if "error" in word and not word["broke"]]
                if roots:
                    return _of(*roots[0], self.size, hint)
                if ended := channel.gone():
                    time.sleep(_GOING_S)
                    unstoppable.pop_all()
                    who = f"process {ended[0] + 1} of {self.size}"
                    return SievitError(f"{who} is gone: it was killed, or the system had no memory left", hint=hint)
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)
        return Terminated("the process that started this one has ended", hint=hint)


def _of(rank: int, word: Document, size: int, hint: str) -> SievitError:
    """A report of another process as the error of this one."""
    kind = InputError if word["code"] == InputError.exit_code else SievitError
    error = kind(f"{word['error']} (process {rank + 1} of {size})", where=word["where"], hint=word["hint"] or hint)
    error.add_note(f"there:\n{word['trace']}")
    return error


@contextmanager
def _unstoppable() -> Iterator[contextlib.ExitStack]:
    """Let no signal interrupt the search for a cause. A caller that empties the stack keeps it so."""
    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                undo.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        yield undo


def job(node: Node, inputs: Inputs, work: Path, base: Path, device: str, sharding: str) -> Document:
    """What the others need to know to run a stage's function."""
    labelled = [one for ones in inputs.many.values() for one in ones]
    return {
        "stage": node.stage.name,
        # Only what was written: whether it was is a part of what some settings mean.
        "config": node.entry.config.model_dump(mode="json", exclude_unset=True),
        "data": node.data.model_dump(mode="json", exclude_unset=True),
        "model": node.model.model_dump(mode="json", exclude_unset=True),
        "seed": node.seed,
        "device": device,
        "sharding": sharding,
        "arm": node.arm,
        "entry": node.entry.name,
        "base": str(base.absolute()),
        "work": str(work.absolute()),
        "inputs": {role: _name(artifact) for role, artifact in inputs.single.items()},
        "many": [
            {"arm": one.arm, "entry": one.entry, "artifact": _name(one.artifact), "final": one.final, "seed": one.seed}
            for one in labelled
        ],
        "references": inputs.texts,
    }


def follow(channel: Channel, stages: Sequence[Stage], invalid_input: tuple[type[Exception], ...] = ()) -> int:
    """Help the first process until it says that the command is over. Returns: its exit code."""
    kinds = {stage.name: stage for stage in stages}
    while (message := channel.hear())["do"] != "end":
        if message["do"] == "run":  # else about a job that failed here before
            _Helper(channel, message, invalid_input).help(kinds[message["stage"]])
    return int(message["code"])


class _Over(Exception):
    """The first process has given up the job."""


class _Helper:
    """One job, in a process that follows."""

    def __init__(self, channel: Channel, message: Document, invalid_input: tuple[type[Exception], ...]) -> None:
        self.channel, self.message, self.invalid_input = channel, message, invalid_input

    def help(self, stage: Stage) -> None:
        """Run the stage's function; report what went wrong, which ends this job and not this process."""
        try:
            with unheard():
                self.channel.open(self.message["number"], self.message["device"])
                self._run(stage, _of_json(stage.config, self.message["config"]), self.message)
        except _Over:
            pass
        except Exception as error:
            self.channel.report(self.message["number"], self._told(error))
        finally:
            self.channel.close()

    def _run(self, stage: Stage, config: Config, message: Document) -> None:
        cpu = host.cpu_seconds()
        host.reset_peak_memory()
        with tempfile.TemporaryDirectory(prefix="sievit-") as scratch:
            stage.run(self._context(config, message, Path(scratch)))
        spent = {"peak_memory_mb": host.peak_memory_mb(), "cpu_seconds": host.cpu_seconds() - cpu}
        self.channel.report(message["number"], spent)

    def _context(self, config: Config, message: Document, out: Path) -> Context:
        return Context(
            config=config,
            data=_of_json(DataConfig, message["data"]),
            model=_of_json(ModelConfig, message["model"]),
            seed=message["seed"],
            device=message["device"],
            sharding=message["sharding"],
            arm=message["arm"],
            entry=message["entry"],
            base=Path(message["base"]),
            out=out,
            work=Path(message["work"]),
            inputs={role: _open(name) for role, name in message["inputs"].items()},
            many=[Labelled(**one | {"artifact": _open(one["artifact"])}) for one in message["many"]],
            references=message["references"],
            progress=Notebook(Silent()),
            part=self._part,
        )

    def _part(
        self, stage: Stage, config: Config, *, role: str, model: ModelConfig | None = None, reads: Sequence[str] = ()
    ) -> Part:
        while (message := self.channel.hear())["do"] == "run":
            self._run(stage, config, message)
        if message["do"] != "take":
            raise _Over
        return Part(_open(message["artifact"]), made=message["made"])

    def _told(self, error: Exception) -> Document:
        import traceback

        known = isinstance(error, (SievitError, *self.invalid_input))
        wrong = isinstance(error, (InputError, *self.invalid_input))
        return {
            "error": str(error) if known else f"{type(error).__name__}: {error}",
            "broke": self.channel.broke(error),
            "code": InputError.exit_code if wrong else SievitError.exit_code,
            "where": str(getattr(error, "where", "")),
            "hint": str(getattr(error, "hint", "")),
            "trace": "".join(traceback.format_exception(error)),
        }


def _of_json(kind: type[_Config], fields: Document) -> _Config:
    return kind.model_validate_json(json.dumps(fields))


def _name(artifact: Artifact) -> list[str]:
    return [str(artifact.root.absolute()), artifact.kind_of_stage, artifact.key]


def _open(name: Sequence[str]) -> Artifact:
    """An artifact that the first process has verified. InputError: this machine does not see its folder."""
    folder, stage, key = name
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            "a process does not see the folder of an artifact",
            where=folder,
            hint="all nodes must share the folder of artifacts, under the same path",
        )
    return Store(root.parent.parent).open(stage, key)


def spent(reports: Sequence[Mapping[str, Any]], own: Mapping[str, float]) -> dict[str, Any]:
    """What all processes took together, and each of them of memory; own: of the first."""
    every = [own, *reports]
    return {
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in every), 3),
        "memory_mb": [round(one["peak_memory_mb"], 1) for one in every],
    }
