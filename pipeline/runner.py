"""Going through a plan: every node is either there already or is made now.

For each node: take its inputs, verify them, compute the key, look the key up. A hit is verified and used; a miss is
made under the key's lock. Keys depend on what inputs contain, so a stage that ran again to the same content re-runs
nothing below it.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import keys, records
from .alone import inputs_alone
from .errors import InputError, Interrupted, SievitError, Terminated, UsageError
from .execute import Setting, Stop, execute, stoppable
from .expectations import TO_RUN, expected
from .forecast import forecast
from .manifest import sha256_of
from .preflight import check_stages
from .progress import Ended, Ending, Silent
from .records import NodeRecord, RunRecord
from .resolve import Facts, Inputs, Place, caveats, gather, place, sources
from .team import Team
from .track import Tracking

if TYPE_CHECKING:
    from .forecast import Forecast
    from .plan import Node, Plan
    from .progress import Display
    from .store import Artifact, Store


@dataclass(frozen=True)
class Manner:
    """How stages are run, whichever they are.

    invalid_input: exceptions by which stages say that an input is wrong; they become InputError.
    force:         make everything asked for again, even where the store has it; it takes the place of what is there.
    wait_s:        how long to wait for another process that makes the same artifact.
    command:       the command line, for the record; None: that of this process.
    team:          the processes that share the work of stages; None: this one alone.
    """

    progress: Display
    invalid_input: tuple[type[Exception], ...] = ()
    force: bool = False
    wait_s: float = 0.0
    command: Sequence[str] | None = None
    team: Team | None = None


def run(
    plan: Plan,
    store: Store,
    manner: Manner,
    *,
    until: str | None = None,
    only: Sequence[str] = (),
    arms: Sequence[str] = (),
    keep_going: bool = False,
) -> RunRecord:
    """Make what the plan asks for and is not there yet; return the record of the run.

    until:      this entry and what it needs, nothing else.
    only:       these entries; what they need must have been made before.
    arms:       these arms; a stage across all arms is left out unless all are asked for or it is named.
    keep_going: after a failure, go on with what does not depend on it; the first failure is raised at the end.

    SievitError and its kin: what failed. The record on the disk says how far the run came.
    """
    wanted, chosen = select(plan, until=until, only=only, arms=arms)
    with stoppable():
        facts = Facts(plan, store, manner.progress)
        asked = {place(node) for node in chosen}
        found = forecast(plan, store, force=manner.force, facts=facts)
        to_run = _will_run(found, asked)
        check_stages(plan, to_run, store, manner.invalid_input)
        takes = expected(found, plan, store, facts) if to_run else {}
        places = [place(node) for node in chosen]
        seconds = {place(node): takes[place(node)].seconds for node in to_run}
        for note in caveats(plan):
            manner.progress.note(note)
        with store.in_use():
            pass_ = _Pass(plan, store, facts, manner)
            pass_.record.touched = asked
            with pass_.recorded(), manner.progress.run(places, seconds):
                pass_.go_through(chosen, may_make=wanted if only else None, keep_going=keep_going)
    return pass_.record


def ahead(
    plan: Plan,
    store: Store,
    manner: Manner,
    *,
    until: str | None = None,
    only: Sequence[str] = (),
    arms: Sequence[str] = (),
) -> list[Node]:
    """The nodes that `run` would make, checked as it checks them."""
    _, chosen = select(plan, until=until, only=only, arms=arms)
    asked = {place(node) for node in chosen}
    found = forecast(plan, store, force=manner.force, facts=Facts(plan, store, manner.progress))
    nodes = _will_run(found, asked)
    check_stages(plan, nodes, store, manner.invalid_input)
    return nodes


def _will_run(found: Sequence[Forecast], asked: Collection[Place]) -> list[Node]:
    return [one.node for one in found if one.state in TO_RUN and place(one.node) in asked]


def run_stage(
    plan: Plan, node: Node, store: Store, manner: Manner, *, inputs_override: Mapping[str, str] | None = None
) -> RunRecord:
    """Run one node by itself, on the newest artifacts of the stages before it.

    inputs_override: role -> artifact reference (for a role of many: references with commas between them).
    An input that is not overridden is the newest that a run record of this pipeline names for the entry, else the
    newest artifact whose manifest says that this pipeline, arm and entry made it. Which one was taken is told through
    the manner's progress.

    InputError: there is none yet. UsageError: the stage has no such role.
    """
    with stoppable():
        facts = Facts(plan, store, manner.progress)
        inputs, _ = _alone(plan, node, store, facts, inputs_override or {}, manner)
        with store.in_use():
            pass_ = _Pass(plan, store, facts, manner)
            pass_.record.touched = {place(node)}
            with pass_.recorded(), manner.progress.run([place(node)], {}):
                pass_.make(1, node, inputs, may_make=True)
    return pass_.record


def run_part(
    plan: Plan, node: Node, store: Store, manner: Manner, *, inputs_override: Mapping[str, str] | None = None
) -> tuple[Artifact, bool]:
    """(artifact of a node that stands in no pipeline file, whether it was there). As `run_stage`, but it leaves no run
    record: a run is of what the file names.
    """
    display = manner.progress
    with stoppable():
        facts = Facts(plan, store, display)
        inputs, _ = _alone(plan, node, store, facts, inputs_override or {}, manner)
        at = place(node)
        with store.in_use(), display.run([at], {}):
            started = time.monotonic()
            artifact, cached = _Pass(plan, store, facts, manner).part(node, inputs, lambda: display.begin(1, at))
            seconds = 0.0 if cached else time.monotonic() - started
            display.end(1, at, Ending("cached" if cached else "done", seconds, artifact.ref))
    return artifact, cached


def ahead_alone(
    plan: Plan, node: Node, store: Store, manner: Manner, *, inputs_override: Mapping[str, str] | None = None
) -> bool:
    """Whether `run_stage` would make something, checked as it checks it; nothing is told."""
    silent = replace(manner, progress=Silent())
    return _alone(plan, node, store, Facts(plan, store, silent.progress), inputs_override or {}, silent)[1]


def _alone(
    plan: Plan, node: Node, store: Store, facts: Facts, override: Mapping[str, str], manner: Manner
) -> tuple[Inputs, bool]:
    """(the inputs of a node that is run by itself, whether it has to be made)."""
    inputs = inputs_alone(plan, node, store, override, manner.progress)
    missing = manner.force or store.find(node.stage.name, keys.key_of(facts.material(node, inputs))) is None
    if missing:
        check_stages(plan, [node], store, manner.invalid_input, inputs)
    return inputs, missing


def select(
    plan: Plan, *, until: str | None = None, only: Sequence[str] = (), arms: Sequence[str] = ()
) -> tuple[set[Place], list[Node]]:
    """(the nodes asked for, these and all that they need in the plan's order). UsageError: no such entry or arm."""
    all_arms = list(plan.spec.arms)
    entries = list(dict.fromkeys(node.entry.name for node in plan.nodes))
    for arm in arms:
        _require(arm, all_arms, "arm")
    for entry in [*only, *([until] if until else [])]:
        _require(entry, entries, "stage")
    named = {*only, *([until] if until else [])}
    in_all_arms = not arms or set(arms) >= set(all_arms)

    def asked(node: Node) -> bool:
        if named and node.entry.name not in named:
            return False
        if node.stage.across_arms:
            return bool(named) or in_all_arms
        return in_all_arms or node.arm in arms

    wanted = {place(node) for node in plan.nodes if asked(node)}
    if not wanted:
        message = f"no arm of {', '.join(arms)} has a stage {', '.join(sorted(named))}"
        raise UsageError(message, hint="`sievit plan` shows the stages of every arm")
    needed = set(wanted)
    for node in reversed(plan.nodes):
        if place(node) in needed:
            needed.update(sources(node))
    return wanted, [node for node in plan.nodes if place(node) in needed]


def _require(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"this pipeline has no {what} {name!r}", hint=hint)


class _Pass:
    """One way through the plan: what was made, verified and recorded on it."""

    def __init__(self, plan: Plan, store: Store, facts: Facts, manner: Manner) -> None:
        self.plan = plan
        self.store = store
        self.display = manner.progress
        self.force = manner.force
        self.wait_s = manner.wait_s
        self.facts = facts
        command, team = manner.command or sys.argv, manner.team or Team()
        self.tracking = Tracking(plan.spec, manner.progress.warn)
        self.setting = Setting(plan, facts.device, manner.progress, manner.invalid_input, command, team, self.tracking)
        self.made: dict[Place, Artifact] = {}
        self.record = _new_record(plan, self.facts, self.setting.command_line)
        self._verified: set[tuple[str, str, str]] = set()
        self._fresh: set[tuple[str, str]] = set()  # made on this pass: an arm that shares it does not force it again

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the record right, however the block ends, and tell the trackers."""
        with self.tracking.run(self.record, self.store), _Recorded(self.record, self.store):
            yield

    def go_through(self, nodes: Sequence[Node], *, may_make: Collection[Place] | None, keep_going: bool) -> None:
        """Make the nodes in order. may_make: the nodes that may be made, None for all."""
        failure: SievitError | None = None
        for number, node in enumerate(nodes, 1):
            if not all(source in self.made for source in sources(node)):
                continue  # below a failure; it stays "waiting"
            try:
                inputs = gather(node, self.plan, self.made, self.store)
                self.make(number, node, inputs, may_make=may_make is None or place(node) in may_make)
            except (Interrupted, Terminated):
                raise
            except SievitError as error:
                if not keep_going:
                    raise
                self.display.warn(f"{node.arm}/{node.entry.name}: {error.message}")
                failure = failure or error
        if failure is not None:
            raise failure

    def make(self, number: int, node: Node, inputs: Inputs, *, may_make: bool) -> None:
        """Bring one node to an artifact, and say so in the record."""
        line = self.record.node(*place(node))
        started = time.monotonic()
        try:
            artifact, cached = self._reach(number, node, inputs, line, may_make)
        except BaseException as error:
            line.state = "waiting" if _is_stop(error) else "failed"
            line.error = error.message if isinstance(error, SievitError) else type(error).__name__
            how: Ended = "stopped" if _is_stop(error) else "failed"
            self.display.end(number, place(node), Ending(how, time.monotonic() - started))
            raise
        self.made[place(node)] = artifact
        line.state, line.ref, line.key, line.error = ("cached" if cached else "done"), artifact.ref, artifact.key, None
        line.finished = records.now()
        line.seconds = 0.0 if cached else round(time.monotonic() - started, 3)
        if node.stage.writes == "measurement":
            self.record.gates = records.judge(self.plan.spec.gates.model_dump(), artifact.metrics.get("gates", {}))
        if not cached:
            self.record.save(self.store)
        self.display.end(number, place(node), Ending("cached" if cached else "done", line.seconds, artifact.ref))

    def _reach(
        self, number: int, node: Node, inputs: Inputs, line: NodeRecord, may_make: bool
    ) -> tuple[Artifact, bool]:
        """(artifact, whether it was there)."""
        for artifact in inputs.artifacts():
            self._verify(artifact)
        material = self.facts.material(node, inputs)
        line.key, line.ref, line.finished = keys.key_of(material), None, None
        if not may_make:
            if hit := self._hit(node.stage.name, line.key):
                return hit, True
            label = "/".join(place(node))
            hint = f"`sievit run --until {node.entry.name}` makes it"
            raise InputError(f"{label} has not been made with these settings", where=label, hint=hint)

        def begin() -> None:
            line.state = "running"
            self.record.save(self.store)
            self.display.begin(number, place(node))

        return self._found_or_made(node, inputs, material, begin)

    def part(self, node: Node, inputs: Inputs, begin: Callable[[], None] = lambda: None) -> tuple[Artifact, bool]:
        """(artifact of a part of a stage's work, whether it was there). begin: called before it is made."""
        for artifact in inputs.artifacts():
            self._verify(artifact)
        return self._found_or_made(node, inputs, self.facts.material(node, inputs), begin)

    def _found_or_made(
        self, node: Node, inputs: Inputs, material: dict[str, Any], begin: Callable[[], None]
    ) -> tuple[Artifact, bool]:
        stage, key = node.stage.name, keys.key_of(material)
        force = self.force and (stage, key) not in self._fresh
        if not force and (hit := self._hit(stage, key)):
            return hit, True
        self.store.require_space()
        with self.store.draft(stage, key, self.wait_s, waiting=self.display.note) as draft:
            if not force and (hit := self._hit(stage, key)):  # made by the process that we waited for
                return hit, True
            begin()
            artifact = execute(node, inputs, material, draft, self.setting, self.part)
        self._fresh.add((stage, key))
        self._verify(artifact)
        return artifact, False

    def _hit(self, stage: str, key: str) -> Artifact | None:
        artifact = self.store.find(stage, key)
        if artifact is not None:
            self._verify(artifact)
        return artifact

    def _verify(self, artifact: Artifact) -> None:
        """Once a pass and artifact: everything that is relied on was read in full."""
        identity = (artifact.kind_of_stage, artifact.key, str(artifact.manifest["manifest_sha256"]))
        if identity not in self._verified:
            self.store.verify(artifact)
            self._verified.add(identity)


class _Recorded:
    """Writes the run record when a pass ends: complete, failed, or interrupted between two stages."""

    def __init__(self, record: RunRecord, store: Store) -> None:
        self.record = record
        self.store = store

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.record.state = "complete" if error is None else "interrupted" if _is_stop(error) else "failed"
        self.record.finished = records.now()
        self.record.save(self.store)


def _new_record(plan: Plan, facts: Facts, command: str) -> RunRecord:
    spec = plan.spec
    recipe = facts.recipe()
    nodes = [NodeRecord(node.arm, node.entry.name, node.stage.name) for node in plan.nodes]
    return RunRecord(
        id=sha256_of(recipe)[:12],
        pipeline=spec.name,
        path=str(spec.path.absolute()),
        started=records.now(),
        finished=None,
        state="running",
        nodes=nodes,
        spec={**recipe, "seeds": list(spec.seeds), "text": spec.text},
        command=command,
    )


def _is_stop(error: BaseException) -> bool:
    """Whether somebody wanted it to end."""
    return isinstance(error, (Interrupted, Terminated, KeyboardInterrupt, Stop))
