"""The commands that read the store: ls, show, explain, diff, report, verify and gc. Only gc removes anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import completion, options
from .cli_report import report
from .console import Document
from .diagnostics import suggest
from .errors import IntegrityError, SievitError, UsageError
from .session import DEFAULT_PIPELINE, Session, require_arm, session_of, store_of, written_store

if TYPE_CHECKING:
    from .collect import Removal
    from .forecast import Forecast
    from .reasons import Reason
    from .stage import Stage
    from .store import Artifact, Store

Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="train, train@latest, train@7, train@3fa9, or main/train: of the newest whole run",
        autocompletion=completion.refs,
    ),
]


# ---- Inspect


def ls(
    context: typer.Context,
    stage: Annotated[
        str | None,
        typer.Argument(metavar="STAGE", help="only this kind", show_default=False, autocompletion=completion.stages),
    ] = None,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the artifacts, oldest first.

    sievit ls train
    """
    from . import views_store

    session, place = session_of(context), written_store(store)
    known = [each.name for each in session.stages]
    if stage is not None and stage not in known and stage not in place.stages():
        raise UsageError(f"there is no stage {stage!r}", hint=suggest(stage, known, kind="stages"))
    artifacts, unreadable = place.scan(stage)
    found = sorted(artifacts, key=lambda artifact: str(artifact.manifest["created"]))
    session.console.result(
        {"store": str(place.root), "artifacts": [listed(artifact) for artifact in found]}, views_store.artifacts
    )
    for path, error in unreadable:
        session.console.say(f"warning: {path}: {error.message}")


def show(
    context: typer.Context,
    ref: Ref,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show an artifact: lineage, settings, results, files.

    sievit show finetune@latest --json
    """
    from . import views_store
    from .references import resolve

    artifact = resolve(ref, written_store(store))
    document = {"ref": artifact.ref, "path": str(artifact.root), **artifact.manifest}
    session_of(context).console.result(document, views_store.artifact)


def explain(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="STAGE|REF",
            help="a stage of the pipeline, prune or random/prune; or an artifact, prune@2",
            autocompletion=completion.stages_and_refs,
        ),
    ],
    *,
    pipeline: options.Pipeline = DEFAULT_PIPELINE,
    set_: options.Set,
    arm: options.Arm = None,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Tell field by field why a stage would run or not.

    A stage is compared with the nearest artifact of its kind; an artifact with the one made before it.

    sievit explain prune --set prune.target.macs=0.4
    """
    from . import views_store

    session = session_of(context)
    owner, slash, entry = what.rpartition("/")
    if slash and arm is not None:
        raise UsageError(f"--arm and {what} both name an arm", hint=f"leave out --arm {arm}, or write {entry}")
    if "@" in entry:
        document = explained_artifact(store_of(store, pipeline), what)
    else:
        document = _explained_stage(session, pipeline, set_, store_of(store, pipeline), entry, owner or arm or "main")
    session.console.result(document, views_store.explanation)


def _explained_stage(
    session: Session, pipeline: Path, overrides: list[str], store: Store, entry: str, arm: str
) -> Document:
    from .forecast import forecast

    plan = session.plan(pipeline, overrides)
    forecasts = forecast(plan, store)
    wanted = {(each.node.arm, each.node.entry.name): each for each in forecasts}
    across = {each.node.entry.name: each for each in forecasts if each.node.stage.across_arms}
    found = wanted.get((arm, entry)) or across.get(entry)
    if found is None:
        require_arm(plan, arm)
        names = [name for of, name in wanted if of == arm]
        raise UsageError(f"arm {arm!r} has no stage {entry!r}", hint=suggest(entry, names, kind="stages"))
    return {"arm": arm, "entry": entry, "verdict": _verdict(found), **_compared(found.compared_to, found.reasons)}


def _verdict(found: Forecast) -> str:
    node = f"{found.node.arm}/{found.node.entry.name}"
    match found.state:
        case "cached":
            return f"{node} is in the store: {found.ref}"
        case "shared":
            return f"{node} is the same as in arm {found.shared_with}, and is made there"
        case "unknown":
            own = f", and differs from {found.compared_to} by itself:" if found.reasons else ""
            return f"{node} is not known before {found.waits_for} has run{own}"
        case _ if found.compared_to:
            return f"{node} would run{_resuming(found)}. It differs from {found.compared_to}:"
        case _:
            return f"{node} would run{_resuming(found)}: there is no {found.node.stage.name} artifact yet"


def _resuming(found: Forecast) -> str:
    return f", and {found.resumes.says}" if found.resumes is not None else ""


def explained_artifact(store: Store, ref: str) -> Document:
    """Why an artifact is another one than its predecessor."""
    from . import keys
    from .reasons import in_words
    from .references import resolve

    artifact = resolve(ref, store)
    older = [each for each in store.artifacts(artifact.kind_of_stage) if each.version < artifact.version]
    near = keys.nearest(artifact.manifest["key_material"], older)
    made = f"{artifact.ref} was made for {artifact.manifest['arm']}/{artifact.manifest['entry']}"
    if near is None:
        return {"ref": artifact.ref, "verdict": f"{made}: the first of its kind here", **_compared(None, ())}
    reasons = in_words(near[1], near[0].manifest, artifact.manifest, store.cache)
    return {
        "ref": artifact.ref,
        "verdict": f"{made}. It differs from {near[0].ref}:",
        **_compared(near[0].ref, reasons),
    }


def _compared(ref: str | None, reasons: Sequence[Reason]) -> Document:
    return {"compared_to": ref, "reasons": [each._asdict() for each in reasons]}


def diff(
    context: typer.Context,
    left: Annotated[
        str,
        typer.Argument(metavar="LEFT", help="an artifact, as train@1 or dense/train", autocompletion=completion.refs),
    ],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="another one", autocompletion=completion.refs)],
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two artifacts: config, inputs, metrics, files, and what the stage says of two of its kind.

    Two tickets: the overlap of the images that they keep, and of the patches.

    sievit diff ticket@1 ticket@2
    sievit diff dense/train main/train
    """
    from . import views_store
    from .references import resolve

    session, place = session_of(context), written_store(store)
    document = compared(resolve(left, place), resolve(right, place), session.stages, place.verify)
    session.console.result(document, views_store.difference)


def compared(
    left: Artifact, right: Artifact, stages: Sequence[Stage], verified: Callable[[Artifact], None]
) -> Document:
    """The fields in which two artifacts differ; of two of one stage also what they have in common, read from verified
    files.
    """
    from . import keys

    views_of: dict[str, Callable[[Mapping[str, Any]], Document]] = {
        "config": _settings,
        "inputs": lambda manifest: _digests(manifest["inputs"]),
        "metrics": lambda manifest: dict(manifest["metrics"]),
        "files": lambda manifest: {name: each["sha256"][:16] for name, each in manifest["files"].items()},
    }
    changes = {
        title: [
            {"field": field, "left": old, "right": new}
            for field, old, new in keys.changes(of(left.manifest), of(right.manifest))
        ]
        for title, of in views_of.items()
    }
    common: Mapping[str, Any] = {}
    for stage in stages:
        if stage.name == left.kind_of_stage == right.kind_of_stage and stage.compare is not None:
            for artifact in (left, right):
                verified(artifact)
            common = stage.compare(left, right)
    return {"left": left.ref, "right": right.ref, "changes": changes, "common": dict(common)}


def _settings(manifest: Mapping[str, Any]) -> Document:
    names = ("stage", "code_version", "config", "seed", "data", "model", "device")
    return {name: manifest.get(name) for name in names}


def _digests(inputs: Mapping[str, Any]) -> Document:
    def name(one: Mapping[str, Any]) -> str:
        return f"{one['stage']}@{one['key']}"

    return {
        role: [name(each) for each in given] if isinstance(given, list) else name(given)
        for role, given in inputs.items()
    }


# ---- Store


def verify(
    context: typer.Context,
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help="one artifact, as main/prune; default: all",
            show_default=False,
            autocompletion=completion.refs,
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="every artifact (the default without REF)")] = False,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare every stored byte with its manifest.

    Exit code 4 when something is damaged.
    """
    from . import views_store
    from .references import resolve

    if ref is not None and all_:
        raise UsageError("REF and --all exclude each other", hint="without either, all are verified")
    session, place = session_of(context), written_store(store)
    began = time.monotonic()
    checked, unreadable = ([resolve(ref, place)], []) if ref is not None else place.scan()
    damaged = [
        {"ref": f"{path.parent.name}@{path.name}", "message": error.message, "where": error.where}
        for path, error in unreadable
    ]
    count = len(checked) + len(damaged)
    for artifact in checked:
        try:
            place.verify(artifact)
        except IntegrityError as error:
            damaged.append({"ref": artifact.ref, "message": error.message, "where": error.where})
    document = {"checked": count, "damaged": damaged, "seconds": round(time.monotonic() - began, 3)}
    session.console.result(document, views_store.verification)
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {count} artifacts are damaged",
            hint="`sievit gc --damaged` removes them; the next run makes them again",
        )


def gc(
    context: typer.Context,
    keep_last: Annotated[
        int,
        typer.Option(
            "--keep-last", metavar="N", min=1, help="the newest N runs of each pipeline stay, and N of each stage"
        ),
    ] = 1,
    damaged: Annotated[bool, typer.Option("--damaged", help="remove what is damaged, needed or not")] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="also those of stopped stages, which then start anew")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove what the newest run of no pipeline needs. Asks first.

    Of the newest sweep of each pipeline the trials worth having stay too, and of the newest N with --keep-last N. The
    page of a sweep says which of its runs were collected, and keeps their numbers.

    sievit gc --keep-last 2 --dry-run
    """
    from . import views_store
    from .collect import collect

    session, place = session_of(context), written_store(store)

    def sweep(dry_run: bool) -> list[Removal]:
        newest = None if damaged else keep_last
        return collect(place, keep_last=newest, damaged=damaged, checkpoints=checkpoints, dry_run=dry_run)

    sound, unreadable = place.scan()
    planned = sweep(dry_run=True)
    if planned and not dry_run and not yes:
        if not session.console.interactive:
            raise UsageError("gc removes files, and nobody can be asked", hint="--yes removes, --dry-run only looks")
        session.console.stderr.print(views_store.collection(_collected(place, planned, dry_run=True)))
        if not typer.confirm("remove these?", err=True):
            raise SievitError("nothing was removed", hint="--dry-run looks without asking, --yes removes without")
    done = planned if dry_run or not planned else sweep(dry_run=False)
    if not dry_run and any(each.kind == "run" for each in done):
        from .report.sweep_page import write_again

        write_again(place)
    document = _collected(place, done, dry_run=dry_run) | {
        "artifacts": len(sound) + len(unreadable),
        "damaged_only": damaged,
    }
    session.console.result(document, views_store.collection)


def _collected(store: Store, removals: Sequence[Removal], *, dry_run: bool) -> Document:
    removed = [{"path": str(each.path), "kind": each.kind, "why": each.why, "bytes": each.bytes} for each in removals]
    size = sum(each.bytes for each in removals)
    return {"store": str(store.root), "dry_run": dry_run, "removed": removed, "bytes": size}


def listed(artifact: Artifact) -> Document:
    """An artifact as a line of `ls`."""
    manifest = artifact.manifest
    return {
        "ref": artifact.ref,
        "key": artifact.key,
        **{name: manifest[name] for name in ("pipeline", "arm", "entry", "created", "seconds")},
        "bytes": sum(each["bytes"] for each in manifest["files"].values()),
        "headline": headline(manifest["metrics"]),
    }


def headline(metrics: Mapping[str, Any]) -> str:
    """The one number by which an artifact of its kind is known."""
    match metrics:
        case {"top1": {"all": float(top1)}}:
            return f"top-1 {100 * top1:.1f}%"
        case {"reached": {"macs": float(macs)}}:
            return f"{100 * macs:.1f}% of MACs"
        case {"chosen": str(chosen)}:
            return f"chose {chosen}"
        case {"examples": {"kept": int(kept), "of": int(of)}}:
            return f"{kept}/{of} images"
        case {"parity": {"max_abs": float(error)}}:
            return f"parity {error:.1e}"
        case {"gates": {"speedup": float(speedup)}}:
            return f"{speedup:.2f}× as fast"
        case _:
            return ""


COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Inspect": (ls, show, explain, diff, report),
    "Store": (verify, gc),
}
