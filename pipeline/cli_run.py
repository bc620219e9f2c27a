"""The commands on a whole pipeline: run, plan, schema. `cli_stage` has those of single stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import typer

from . import options
from .cli_stage import outcome_of
from .console import Document, results_only
from .errors import SievitError, UsageError
from .session import DEFAULT_PIPELINE, Session, session_of, store_of

if TYPE_CHECKING:
    from .expectations import Expected
    from .forecast import Forecast
    from .plan import Plan
    from .records import RunRecord
    from .store import Store


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
    json_lines: options.JsonLines = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run what is not in the store yet, then write the report.

    On a terminal the arms and their stages are shown as a tree with bars; elsewhere, and with TERM=dumb, as plain lines
    on stderr. NO_COLOR takes the colours. Ctrl-C stops it in order: the same command goes on from the last checkpoint.
    With --json-lines every event is a JSON object on stdout, as docs/json-lines.md has them.

        sievit run recipes/cifar10-cpu.yaml --set data.source=~/cifar10 --until export
    """
    from . import records, runner, views

    session, place = session_of(context), store_of(store, pipeline)
    if only and until:
        raise UsageError("--only and --until exclude each other", hint="see: sievit run --help")
    planned = session.plan(pipeline, set_)
    began, began_at = time.monotonic(), records.now()
    display = session.display(quiet)
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
    document = _outcome(session, record, planned, place, time.monotonic() - began)
    session.console.result(document, views.outcome)
    if missed := records.missed_gates(record):
        raise missed


class _Asked(TypedDict):
    """Which part of a pipeline is asked for."""

    until: str | None
    only: tuple[str, ...]
    arms: tuple[str, ...]


def _outcome(session: Session, record: RunRecord, plan: Plan, store: Store, seconds: float) -> Document:
    """What `sievit run` has to say at its end."""
    page, words = store.runs / record.id / "report.html", ""
    if not (record.did_nothing and page.exists()):
        from .report.page import headline

        page = _write_report(session, record, plan, store)
        words = headline(record.as_json(), store, spec_text=plan.spec.text)
    measured = _measured(record, plan, store)
    return {
        "run": record.id,
        "pipeline": record.pipeline,
        "state": record.state,
        "seconds": round(seconds, 3),
        "stages": [outcome_of(node) for node in record.nodes if (node.arm, node.entry) in record.touched],
        "gates": [{"name": name, **gate} for name, gate in record.gates.items()],
        "rows": [row for row in measured.get("rows", ()) if row.get("final", True)],
        "over_seeds": measured.get("over_seeds", []),
        "matrix": measured.get("matrix"),
        "scenarios": measured.get("scenarios", []),
        "torch": measured.get("torch", []),
        "unmeasured": measured.get("unmeasured", []),
        "noise_floor": measured.get("noise_floor"),
        "disturbed": measured.get("disturbed", False),
        "host": measured.get("host"),
        "verdict": words,
        "report": str(page),
    }


def _measured(record: RunRecord, plan: Plan, store: Store) -> Document:
    """The metrics of the stages that stand once for all arms, the first of a name; empty before they have run."""
    metrics: Document = {}
    for node in plan.nodes:
        found = record.node(node.arm, node.entry.name)
        if node.stage.across_arms and found.key and (artifact := store.find(found.stage, found.key)):
            metrics = {**artifact.metrics, **metrics}
    return metrics


def _write_report(session: Session, record: RunRecord, plan: Plan, store: Store) -> Path:
    """Write the report, and hand it to the trackers. Returns the HTML page."""
    from .report.page import write
    from .track import Tracking

    pages = write(record.as_json(), store, spec_text=plan.spec.text)
    Tracking(plan.spec, lambda text: session.console.say(f"warning: {text}")).report(record, *pages)
    return pages[0]


def _report_of_failure(session: Session, plan: Plan, store: Store, began_at: str) -> None:
    """The report of a run that ended in an error says where and why. It must not hide that error by one of its own."""
    from . import records

    record = records.newest(store, plan.spec.name)
    if record is None or (record.finished or record.started) < began_at:
        return  # the error came before the run began
    try:
        page = _write_report(session, record, plan, store)
    except (SievitError, OSError) as error:
        session.console.say(f"warning: the report could not be written: {error}")
        return
    session.console.say(f"report of the run so far: {page}")
    if session.console.json:
        stages = [outcome_of(node) for node in record.nodes]
        document = {"run": record.id, "state": record.state, "stages": stages, "report": str(page)}
        session.console.result(document, lambda _: "")


def plan(
    context: typer.Context,
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    set_: options.Set,
    check: options.Check = False,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a run would do, and why; how long it will take and how much of the disk.

    Both are told by the most alike stage that has run here: of the same settings but for seeds and names of arms, on
    inputs as large, its time scaled where epochs or steps alone are others. Where there is none, the stage took as much
    before, on other inputs, or nobody knows, and the sum says of how many. A stage that was stopped counts what is left
    of it, where its checkpoint tells. Checkpoints of the stage at work come on top of the bytes.

    With --check the stages that would run also look at images, network, device and providers, as `run` has them do
    before the first of them starts; that imports torch and takes some seconds.

        sievit plan --set prune.target.macs=0.4
        sievit plan --check
    """
    from . import views
    from .expectations import TO_RUN, Expected, expected, free_bytes, too_large
    from .forecast import forecast
    from .preflight import check_stages
    from .resolve import Facts, caveats, place

    session, artifacts = session_of(context), store_of(store, pipeline)
    planned = session.plan(pipeline, set_)
    facts = Facts(planned, artifacts)
    found = forecast(planned, artifacts, facts=facts)
    if check:
        to_make = [each.node for each in found if each.state in TO_RUN]
        with results_only():
            check_stages(planned, to_make, artifacts, session.invalid_input)
    takes = expected(found, planned, artifacts, facts)
    stages = [_forecast(each, takes.get(place(each.node), Expected())) for each in found]
    to_run = [each for each in stages if each["state"] in TO_RUN]
    free = free_bytes(artifacts.root)
    document = {
        "pipeline": planned.spec.name,
        "store": str(artifacts.root),
        "stages": stages,
        "checked": check,
        "expected_seconds": _sum(each["expected_seconds"] for each in to_run),
        "expected_bytes": _sum(each["expected_bytes"] for each in to_run),
        "without_forecast": sum(each["expected_seconds"] is None for each in to_run),
        "has_run": not artifacts.is_empty(),
        "free_bytes": free,
        "warnings": too_large(sum(each["expected_bytes"] or 0 for each in to_run), free, artifacts),
        "notes": caveats(planned),
    }
    session.console.result(document, views.plan)


def _sum(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None when none of them is."""
    found = list(values)
    known = [each for each in found if each is not None]
    return round(sum(known), 3) if known or not found else None


def _forecast(each: Forecast, takes: Expected) -> Document:
    node = each.node
    return {
        "arm": node.arm,
        "entry": node.entry.name,
        "stage": node.stage.name,
        "state": each.state,
        "ref": each.ref,
        "key": each.key,
        "reasons": [change._asdict() for change in each.reasons],
        "compared_to": each.compared_to,
        "shared_with": each.shared_with,
        "waits_for": each.waits_for,
        "resumes": _resumption(each),
        "expected_seconds": takes.seconds,
        "expected_bytes": takes.bytes,
        "expected_says": takes.says,
    }


def _resumption(each: Forecast) -> Document | None:
    if each.resumes is None:
        return None
    reached = each.resumes.reached
    return {
        "written": each.resumes.written,
        "reached": {"done": reached.done, "total": reached.total, "unit": reached.unit} if reached else None,
        "holder": each.resumes.holder,
        "says": each.resumes.says,
    }


def schema(context: typer.Context, json: options.Json = False, debug: options.Debug = False) -> None:
    """Print the JSON schema of pipeline.yaml, for editors."""
    from .spec import json_schema

    session = session_of(context)
    session.console.document(json_schema(session.stages))


COMMANDS: tuple[Callable[..., None], ...] = (run, plan, schema)
