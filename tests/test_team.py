"""Several processes as the engine sees them: who runs what, whose results are kept, how a failure is told. The
processes here are threads, which cannot be killed; tests/test_launch.py has real ones.
"""

from __future__ import annotations

import json
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import STAGES, TRAIN, BadInput

from sievit.pipeline import team as teams
from sievit.pipeline.errors import InputError, SievitError, SpecError, Terminated
from sievit.pipeline.plan import make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.session import _of_processes
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Config, Context, Stage
from sievit.pipeline.store import Store
from sievit.pipeline.team import Team, follow

PIPELINE = "name: small\nlaunch: {processes: 2}\nstages: {ticket: {}, train: {epochs: 2}, prune: {}}\n"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run that loses its launcher ignores signals to its end, which here is not the end of the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Broken(RuntimeError):
    """The other process is not there."""


class Wire:
    """What two threads share."""

    def __init__(self) -> None:
        self.messages: queue.Queue[str] = queue.Queue()
        self.words: dict[tuple[int, int], dict[str, Any]] = {}
        self.meeting = threading.Barrier(2)
        self.opened: list[tuple[int, int, str]] = []


class End:
    """One end of it. `ended` stands for a process that was killed."""

    size, nodes, orphaned = 2, 1, False

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank
        self.ended: list[int] = []

    def tell(self, message: dict[str, Any]) -> None:
        self.wire.messages.put(json.dumps(message))

    def hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.wire.messages.get(timeout=20))
        return message

    def report(self, number: int, word: dict[str, Any]) -> None:
        self.wire.words[number, self.rank] = json.loads(json.dumps(word))

    def reports(self, number: int, wait_s: float) -> dict[int, dict[str, Any]]:
        while wait_s and (number, 1) not in self.wire.words:
            threading.Event().wait(0.01)
        return {1: self.wire.words[number, 1]} if (number, 1) in self.wire.words else {}

    def gone(self) -> list[int]:
        return self.ended

    def open(self, number: int, device: str) -> None:
        self.wire.opened.append((self.rank, number, device))
        self.wire.meeting.reset() if self.wire.meeting.broken else None

    def close(self) -> None:
        return

    def broke(self, error: BaseException) -> bool:
        return isinstance(error, Broken)


@contextmanager
def two(stages: Sequence[Stage]) -> Iterator[tuple[End, Wire]]:
    """The first process's end, while the other one follows."""
    wire = Wire()
    code: list[int] = []
    other = threading.Thread(target=lambda: code.append(follow(End(wire, 1), stages, (BadInput,))), daemon=True)
    other.start()
    first = End(wire, 0)
    yield first, wire
    Team(first).end(6)
    other.join(timeout=20)
    assert code == [6], "who follows ends with the exit code of the first"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Store]:
    monkeypatch.setattr(teams, "_BROKEN_S", 0.2)
    monkeypatch.setattr(teams, "_GOING_S", 0.0)
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)

    def run_in_two(stages: Sequence[Stage], channel: End, store: str = "artifacts", **more: Any) -> Store:
        place = Store(tmp_path / store)
        plan = make_plan(load_pipeline(path, stages), stages)
        run(plan, place, Manner(Silent(), (BadInput,), command=[], team=Team(channel)), **more)
        return place

    return run_in_two


def sharing(function: Callable[[Context], None]) -> list[Stage]:
    """The fakes, with a train stage that shares its work."""
    return [replace(stage, run=function, shares=True) if stage is TRAIN else stage for stage in STAGES]


def test_who_follows_runs_the_same_function_on_the_same_inputs_and_leaves_nothing(make: Callable[..., Store]) -> None:
    seen: list[tuple[Any, ...]] = []

    def both(ctx: Context) -> None:
        inputs = {role: artifact.digest for role, artifact in ctx.inputs.items()}
        seen.append(
            (ctx.config, ctx.data, ctx.model, ctx.seed, ctx.arm, ctx.entry, ctx.base, ctx.work, inputs, ctx.out)
        )
        (ctx.out / "payload.txt").write_text("of " + threading.current_thread().name)
        ctx.progress.note("to be seen once")

    with two(stages := sharing(both)) as (channel, wire):
        store = make(stages, channel)
    one, other = seen
    assert one[:-1] == other[:-1] and one[-1] != other[-1]
    for mine, theirs in zip(one[:3], other[:3], strict=True):
        assert mine.model_fields_set == theirs.model_fields_set, "what was left to its default still is"
    assert wire.opened == [(0, 1, "cpu"), (1, 1, "cpu")] or wire.opened == [(1, 1, "cpu"), (0, 1, "cpu")]
    train = store.resolve("train")
    assert (train.root / "payload.txt").read_text() == "of MainThread"
    assert [note["text"] for note in train.manifest["notes"]] == ["to be seen once"]
    assert train.manifest["processes"]["count"] == 2 and len(train.manifest["processes"]["peak_memory_mb"]) == 2
    assert store.resolve("prune").manifest["processes"]["count"] == 1
    assert not one[-1].exists() and not other[-1].exists()


PART = Stage("piece", 1, Config, lambda ctx: None, (), "model", "A part.", shares=True)


def test_a_part_is_run_by_all_or_taken_by_all(make: Callable[..., Store]) -> None:
    ran: list[str] = []
    got: list[tuple[str, bool]] = []

    def piece(ctx: Context) -> None:
        ran.append(threading.current_thread().name)
        (ctx.out / "piece.txt").write_text("x")

    def whole(ctx: Context) -> None:
        for role in ("a", "b"):
            part = ctx.part(replace(PART, run=piece), Config(), role=role)
            got.append((part.artifact.ref, part.made))
        (ctx.out / "payload.txt").write_text("x")

    with two(stages := sharing(whole)) as (channel, _):
        make(stages, channel)
    assert len(ran) == 2 and len(set(ran)) == 2
    assert sorted(got) == [("piece@1", False)] * 2 + [("piece@1", True)] * 2


def meeting(wire: Wire) -> None:
    """As a collective: fails when the other is not there."""
    try:
        wire.meeting.wait(timeout=0.5)
    except threading.BrokenBarrierError as error:
        raise Broken("connection closed") from error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BadInput("image 7 is broken"), InputError, "image 7 is broken (process 2 of 2)"),
        (ZeroDivisionError("no images"), SievitError, "ZeroDivisionError: no images (process 2 of 2)"),
    ],
)
def test_the_error_of_another_process_is_the_error_of_the_run(
    error: Exception, kind: type[SievitError], text: str, make: Callable[..., Store]
) -> None:
    wires: list[Wire] = []

    def fails(ctx: Context) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise error
        meeting(wires[0])

    with two(stages := sharing(fails)) as (channel, wire):
        wires.append(wire)
        with pytest.raises(SievitError) as caught:
            make(stages, channel)
    assert type(caught.value) is kind and caught.value.message == text
    assert caught.value.where.startswith("main/train") and caught.value.hint
    assert "there:" in caught.value.__notes__[0] and type(error).__name__ in caught.value.__notes__[0]


def test_an_error_of_all_is_told_as_that_of_the_first_and_the_next_job_is_shared_again(
    make: Callable[..., Store],
) -> None:
    def fails(ctx: Context) -> None:
        raise BadInput("the loss is nan at step 3")

    with two(stages := sharing(fails)) as (channel, _):
        for store in ("a", "b"):
            with pytest.raises(InputError) as caught:
                make(stages, channel, store)
            assert caught.value.message == "the loss is nan at step 3"


def test_a_process_that_is_gone_is_named_and_one_that_is_there_is_not(make: Callable[..., Store]) -> None:
    wires: list[Wire] = []

    def alone(ctx: Context) -> None:
        if threading.current_thread() is threading.main_thread():
            raise Broken("connection closed")

    with two(stages := sharing(alone)) as (channel, wire):
        wires.append(wire)
        with pytest.raises(SievitError, match="failed with Broken: connection closed"):
            make(stages, channel)
        channel.ended = [1]
        with pytest.raises(SievitError, match="process 2 of 2 is gone") as caught:
            make(stages, channel)
        assert "goes on from its last checkpoint" in caught.value.hint
        channel.orphaned = True
        with pytest.raises(Terminated, match="the process that started this one has ended"):
            make(stages, channel)


def test_as_many_processes_as_there_are_or_a_refusal_at_its_line(tmp_path: Path) -> None:
    there = Team(End(Wire(), 0))
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("processes: 2", "processes: 4"))
    with pytest.raises(SpecError, match="launch asks for 4 processes, and 2 were started") as caught:
        _of_processes(load_pipeline(path, STAGES), there)
    assert caught.value.where == f"{path}:2:10"
    path.write_text(PIPELINE.replace("launch: {processes: 2}\n", ""))
    assert _of_processes(load_pipeline(path, STAGES), there).launch.total == 2
    assert _of_processes(load_pipeline(path, STAGES), Team()).launch.total == 1


def test_the_number_of_processes_is_in_no_key(make: Callable[..., Store], tmp_path: Path) -> None:
    def both(ctx: Context) -> None:
        (ctx.out / "payload.txt").write_text("x")

    with two(stages := sharing(both)) as (channel, _):
        store = make(stages, channel)
    plan = make_plan(load_pipeline(tmp_path / "pipeline.yaml", stages, ["launch.processes=1"]), stages)
    assert run(plan, store, Manner(Silent(), command=[])).did_nothing


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("{nodes: 2}", "several nodes must know where to meet"),
        ("{rendezvous: 'a:1'}", "has no effect on one machine"),
        ("{nodes: 2, rendezvous: 'no port'}", "rendezvous"),
        ("{sharding: fsdp2}", "there is one"),
        ("{processes: 0}", "processes"),
        ("{workers: 2}", "workers"),
    ],
)
def test_a_launch_block_that_cannot_be_meant_is_refused_at_its_line(launch: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("{processes: 2}", launch))
    with pytest.raises(SpecError, match=message) as caught:
        load_pipeline(path, STAGES)
    assert caught.value.where.startswith(f"{path}:2:")
