"""The commands of single stages, and what all of them have in common: their options, stated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .console import Document, results_only
from .errors import UsageError
from .session import DEFAULT_PIPELINE, Session, require_arm, session_of, store_of

if TYPE_CHECKING:
    from .plan import Node, Plan
    from .records import NodeRecord
    from .stage import Config, Stage
    from .store import Artifact, Store


@dataclass(frozen=True)
class Asked:
    """What the options of a stage command say."""

    pipeline: Path = DEFAULT_PIPELINE
    overrides: Sequence[str] = ()
    arm: str = "main"
    inputs: Sequence[str] = ()
    force: bool = False
    wait_s: float = 0.0
    folder: Path | None = None
    quiet: bool = False

    @property
    def store(self) -> Store:
        return store_of(self.folder, self.pipeline)


def _asked(
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    set_: options.Set,
    arm: options.StageArm = "main",
    input_: options.Input,
    force: options.Force = False,
    wait: options.Wait = 0.0,
    store: options.StoreFolder = None,
    quiet: options.Quiet = False,
    json_lines: options.JsonLines = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> Asked:
    """The options of every stage command. What the last three say is the console's to know."""
    return Asked(pipeline, set_, arm, input_, force, wait, store, quiet)


def with_stage_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command(context, asked, *, its own options) as Typer takes it: PIPELINE, its own options, then those of every
    stage command.
    """
    shared = inspect.signature(_asked, eval_str=True).parameters
    context, _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def typed(context: typer.Context, **given: Any) -> None:
        asked = _asked(**{name: given.pop(name) for name in shared})
        command(context, asked, **given)

    first, *others = shared.values()
    parameters = [context, first, *own, *others]
    typed.__doc__ = command.__doc__
    typed.__name__ = command.__name__
    typed.__annotations__ = {one.name: one.annotation for one in parameters}
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return typed


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command of one stage."""

    def command(context: typer.Context, asked: Asked) -> None:
        run_stage(session_of(context), stage, asked)

    return with_stage_options(command)


def run_stage(session: Session, stage: Stage, asked: Asked) -> None:
    """Run one stage of one arm on the newest artifacts of the stages before it, and say what came out."""
    from . import runner, views

    planned, store = session.plan(asked.pipeline, asked.overrides), asked.store
    require_arm(planned, asked.arm)
    node = _node(planned, stage, asked.arm)
    override = _overridden(asked.inputs)
    display = session.display(asked.quiet)
    manner = runner.Manner(display, session.invalid_input, asked.force, asked.wait_s, team=session.team)
    several = session.team.starts(planned.spec.launch) and stage.shares
    if several and runner.ahead_alone(planned, node, store, manner, inputs_override=override):
        session.start(planned)
    with results_only():
        record = runner.run_stage(planned, node, store, manner, inputs_override=override)
    found = record.node(node.arm, node.entry.name)
    document = {"run": record.id, **outcome_of(found), **_made(store.open(found.stage, str(found.key)))}
    session.console.result(document, views.stage_outcome)


def run_part(
    session: Session, part: Stage, config_of: Callable[[Config | None], Config], asked: Asked, *, of: str
) -> Document:
    """Make a part of a stage's work by itself, as the arm's first stage of the kind `of` would ask for it, or a last
    stage where there is none. config_of: from the config of that stage, None where there is none.

    Returns: what came out, with the path of every file.
    """
    from . import runner
    from .plan import beside

    planned = session.plan(asked.pipeline, asked.overrides)
    require_arm(planned, asked.arm)
    asking = next((node for node in planned.nodes if node.arm == asked.arm and node.stage.name == of), None)
    config = config_of(None if asking is None else asking.entry.config)
    node = beside(planned, session.stages, asked.arm, part, config, like=of)
    manner = runner.Manner(session.display(asked.quiet), session.invalid_input, asked.force, asked.wait_s)
    override = _overridden(asked.inputs)
    with results_only():
        artifact, cached = runner.run_part(planned, node, asked.store, manner, inputs_override=override)
    return {
        "arm": asked.arm,
        "entry": node.entry.name,
        "stage": part.name,
        "state": "cached" if cached else "done",
        "ref": artifact.ref,
        "key": artifact.key,
        "seconds": 0.0 if cached else artifact.manifest["seconds"],
        **_made(artifact),
        "files": {name: str(artifact.root / name) for name in artifact.manifest["files"]},
    }


def outcome_of(node: NodeRecord) -> Document:
    """How a stage of a run came out."""
    names = ("arm", "entry", "stage", "state", "ref", "key", "seconds", "error")
    return {name: getattr(node, name) for name in names}


def _made(artifact: Artifact) -> Document:
    manifest = artifact.manifest
    return {"path": str(artifact.root), "metrics": manifest["metrics"], "ledger": manifest["ledger"]}


def _node(plan: Plan, stage: Stage, arm: str) -> Node:
    """The node that a stage command means: the entry named like the stage, else the only one of its kind."""
    of_kind = [node for node in plan.nodes if node.stage.name == stage.name and (stage.across_arms or node.arm == arm)]
    named = [node for node in of_kind if node.entry.name == stage.name]
    if len(chosen := named or of_kind) == 1:
        return chosen[0]
    if not chosen:
        raise UsageError(f"arm {arm!r} has no {stage.name} stage", where=str(plan.spec.path), hint="see: sievit plan")
    names = [node.entry.name for node in chosen]
    raise UsageError(
        f"arm {arm!r} has {len(names)} {stage.name} stages: {', '.join(names)}",
        where=str(plan.spec.path),
        hint=f"sievit run --arm {arm} --only {names[0]}",
    )


def _overridden(inputs: Sequence[str]) -> dict[str, str]:
    """`role=REF` texts as a mapping."""
    found: dict[str, str] = {}
    for text in inputs:
        role, equals, ref = text.partition("=")
        if not (role and equals and ref):
            raise UsageError(f"--input {text!r} is not ROLE=REF", hint="such as --input model=train@3")
        if role in found:
            raise UsageError(f"--input names {role!r} twice", hint="keep one of the two")
        found[role] = ref
    return found
