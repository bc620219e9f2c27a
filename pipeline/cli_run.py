"""The commands that make something: run, plan, init, schema, and one for each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from . import options
from .console import Console, Document, results_only
from .errors import SievitError, UsageError
from .session import DEFAULT_PIPELINE, Session, require_arm, session_of, store_of
from .starter import DIGITS, write_starter

if TYPE_CHECKING:
    from .forecast import Forecast
    from .plan import Node, Plan
    from .progress import Display
    from .records import NodeRecord, RunRecord
    from .stage import Config, Stage
    from .store import Artifact, Store


def run(
    context: typer.Context,
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    set_: options.Set,
    arm: options.Arm = None,
    only: options.Only = None,
    until: options.Until = None,
    force: options.Force = False,
    wait: options.Wait = 0.0,
    store: options.StoreFolder = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run what is not in the store yet, then write the report.

    sievit run recipes/cifar10-cpu.yaml --set data.source=~/cifar10 --until export
    """
    from . import records, runner, views

    session, place = session_of(context), store_of(store, pipeline)
    if only and until:
        raise UsageError("--only and --until exclude each other", hint="see: sievit run --help")
    planned = session.plan(pipeline, set_)
    began, began_at = time.monotonic(), records.now()
    display = _display(session.console, quiet)
    manner = runner.Manner(display, session.invalid_input, force, wait, team=session.team)
    asked: _Asked = {"until": until, "only": (only,) if only else (), "arms": (arm,) if arm else ()}
    if session.team.starts(planned.spec.launch):
        nodes = runner.ahead(planned, place, manner, **asked)
        if any(node.stage.shares for node in nodes):
            session.start(planned)
    try:
        with results_only():
            record = runner.run(planned, place, manner, **asked)
    except SievitError:
        _report_of_failure(session, planned, place, began_at)
        raise
    document = _outcome(record, planned, place, time.monotonic() - began)
    session.console.result(document, views.outcome)
    if missed := records.missed_gates(record):
        raise missed


class _Asked(TypedDict):
    """Which part of a pipeline is asked for."""

    until: str | None
    only: tuple[str, ...]
    arms: tuple[str, ...]


def _display(console: Console, quiet: bool) -> Display:
    from .progress import choose

    return choose(quiet=quiet, silent=console.json)


def _outcome(record: RunRecord, plan: Plan, store: Store, seconds: float) -> Document:
    """What `sievit run` has to say at its end."""
    page = store.runs / record.id / "report.html"
    if not (record.did_nothing and page.exists()):
        page, _ = _write_report(record, plan, store)
    measured = _measured(record, plan, store)
    return {
        "run": record.id,
        "pipeline": record.pipeline,
        "state": record.state,
        "seconds": round(seconds, 3),
        "stages": [_stage(node) for node in record.nodes if (node.arm, node.entry) in record.touched],
        "gates": [{"name": name, **gate} for name, gate in record.gates.items()],
        "rows": [row for row in measured.get("rows", ()) if row.get("final", True)],
        "over_seeds": measured.get("over_seeds", []),
        "matrix": measured.get("matrix"),
        "scenarios": measured.get("scenarios", []),
        "torch": measured.get("torch", []),
        "noise_floor": measured.get("noise_floor"),
        "disturbed": measured.get("disturbed", False),
        "host": measured.get("host"),
        "report": str(page),
    }


def _stage(node: NodeRecord) -> Document:
    names = ("arm", "entry", "stage", "state", "ref", "key", "seconds", "error")
    return {name: getattr(node, name) for name in names}


def _measured(record: RunRecord, plan: Plan, store: Store) -> Document:
    """The metrics of the stages that stand once for all arms, the first of a name; empty before they have run."""
    metrics: Document = {}
    for node in plan.nodes:
        found = record.node(node.arm, node.entry.name)
        if node.stage.across_arms and found.key and (artifact := store.find(found.stage, found.key)):
            metrics = {**artifact.metrics, **metrics}
    return metrics


def _write_report(record: RunRecord, plan: Plan, store: Store) -> tuple[Path, Path]:
    from .report.page import write

    return write(record.as_json(), store, spec_text=plan.spec.text)


def _report_of_failure(session: Session, plan: Plan, store: Store, began_at: str) -> None:
    """The report of a run that ended in an error says where and why. It must not hide that error by one of its own."""
    from . import records

    record = records.newest(store, plan.spec.name)
    if record is None or (record.finished or record.started) < began_at:
        return  # the error came before the run began
    try:
        page, _ = _write_report(record, plan, store)
    except (SievitError, OSError) as error:
        session.console.say(f"warning: the report could not be written: {error}")
        return
    session.console.say(f"report of the run so far: {page}")
    if session.console.json:
        stages = [_stage(node) for node in record.nodes]
        document = {"run": record.id, "state": record.state, "stages": stages, "report": str(page)}
        session.console.result(document, lambda _: "")


def plan(
    context: typer.Context,
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    set_: options.Set,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a run would do, and why.

    sievit plan --set prune.target.macs=0.4
    """
    from . import views
    from .forecast import forecast
    from .resolve import caveats

    session, place = session_of(context), store_of(store, pipeline)
    planned = session.plan(pipeline, set_)
    took = _durations(place)
    stages = [_forecast(each, took) for each in forecast(planned, place)]
    seconds = [each["expected_seconds"] for each in stages if each["state"] in {"run", "unknown"}]
    document = {
        "pipeline": planned.spec.name,
        "store": str(place.root),
        "stages": stages,
        "expected_seconds": None if None in seconds else round(sum(seconds), 3),
        "notes": caveats(planned),
    }
    session.console.result(document, views.plan)


def _durations(store: Store) -> dict[tuple[str, ...], float]:
    """Seconds that the newest artifact of each stage took, under (stage,) and under (stage, arm, entry)."""
    took: dict[tuple[str, ...], float] = {}
    for artifact in store.artifacts():
        seconds = float(artifact.manifest["seconds"])
        took[(artifact.kind_of_stage,)] = seconds
        took[(artifact.kind_of_stage, artifact.manifest["arm"], artifact.manifest["entry"])] = seconds
    return took


def _forecast(each: Forecast, took: dict[tuple[str, ...], float]) -> Document:
    node = each.node
    kind, arm, entry = node.stage.name, node.arm, node.entry.name
    return {
        "arm": arm,
        "entry": entry,
        "stage": kind,
        "state": each.state,
        "ref": each.ref,
        "key": each.key,
        "reasons": [change._asdict() for change in each.reasons],
        "compared_to": each.compared_to,
        "shared_with": each.shared_with,
        "waits_for": each.waits_for,
        "expected_seconds": took.get((kind, arm, entry), took.get((kind,))),
    }


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command of one stage."""

    def command(
        context: typer.Context,
        *,
        pipeline: options.Pipeline = DEFAULT_PIPELINE,
        set_: options.Set,
        arm: options.StageArm = "main",
        input_: options.Input,
        force: options.Force = False,
        wait: options.Wait = 0.0,
        store: options.StoreFolder = None,
        quiet: options.Quiet = False,
        json: options.Json = False,
        debug: options.Debug = False,
    ) -> None:
        run_stage(
            session_of(context),
            stage,
            pipeline,
            overrides=set_,
            arm=arm,
            inputs=input_,
            force=force,
            wait_s=wait,
            store=store_of(store, pipeline),
            quiet=quiet,
        )

    return command


def run_stage(
    session: Session,
    stage: Stage,
    pipeline: Path,
    *,
    overrides: Sequence[str],
    arm: str,
    inputs: Sequence[str],
    force: bool,
    wait_s: float,
    store: Store,
    quiet: bool,
) -> None:
    """Run one stage of one arm on the newest artifacts of the stages before it, and say what came out."""
    from . import runner, views

    planned = session.plan(pipeline, overrides)
    require_arm(planned, arm)
    node = _node(planned, stage, arm)
    override = _overridden(inputs)
    manner = runner.Manner(_display(session.console, quiet), session.invalid_input, force, wait_s, team=session.team)
    several = session.team.starts(planned.spec.launch) and stage.shares
    if several and runner.ahead_alone(planned, node, store, manner, inputs_override=override):
        session.start(planned)
    with results_only():
        record = runner.run_stage(planned, node, store, manner, inputs_override=override)
    found = record.node(node.arm, node.entry.name)
    document = {"run": record.id, **_stage(found), **_made(store.open(found.stage, str(found.key)))}
    session.console.result(document, views.stage_outcome)


def run_part(
    session: Session,
    part: Stage,
    config_of: Callable[[Config | None], Config],
    pipeline: Path,
    *,
    of: str,
    overrides: Sequence[str],
    arm: str,
    inputs: Sequence[str],
    force: bool,
    wait_s: float,
    store: Store,
    quiet: bool,
) -> Document:
    """Make a part of a stage's work by itself, as the arm's first stage of the kind `of` would ask for it, or a last
    stage where there is none. config_of: from the config of that stage, None where there is none.

    Returns: what came out, with the path of every file.
    """
    from . import runner
    from .plan import beside

    planned = session.plan(pipeline, overrides)
    require_arm(planned, arm)
    asking = next((node for node in planned.nodes if node.arm == arm and node.stage.name == of), None)
    config = config_of(None if asking is None else asking.entry.config)
    node = beside(planned, session.stages, arm, part, config, like=of)
    manner = runner.Manner(_display(session.console, quiet), session.invalid_input, force, wait_s)
    with results_only():
        artifact, cached = runner.run_part(planned, node, store, manner, inputs_override=_overridden(inputs))
    return {
        "arm": arm,
        "entry": node.entry.name,
        "stage": part.name,
        "state": "cached" if cached else "done",
        "ref": artifact.ref,
        "key": artifact.key,
        "seconds": 0.0 if cached else artifact.manifest["seconds"],
        **_made(artifact),
        "files": {name: str(artifact.root / name) for name in artifact.manifest["files"]},
    }


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
            raise UsageError(f"--input names {role!r} twice")
        found[role] = ref
    return found


def init(
    context: typer.Context,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="a .yaml file, or a folder to put pipeline.yaml in")
    ] = DEFAULT_PIPELINE,
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help="a folder per class, a .tar, torch/<name>, hfds/<name>")
    ] = DIGITS,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="a timm model, taken pretrained", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a commented pipeline.yaml to start from.

    sievit init flowers --data ~/photos/flowers
    """
    from . import views

    path = write_starter(target, data=data, model=model, force=force)
    session_of(context).console.result({"path": str(path)}, views.started)


def schema(context: typer.Context, json: options.Json = False, debug: options.Debug = False) -> None:
    """Print the JSON schema of pipeline.yaml, for editors."""
    from .spec import json_schema

    session = session_of(context)
    session.console.document(json_schema(session.stages))


COMMANDS: tuple[Callable[..., None], ...] = (run, plan, init, schema)
