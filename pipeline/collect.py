"""Garbage collection: what nobody needs any more, and what is damaged.

An artifact stays as long as a run that stays names it, an artifact that stays was made from it, or it is among the
newest of its stage. Of a sweep the trials worth having stay, which is what it was made for. Nothing is removed while a
run uses the store.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import commit, records
from . import manifest as manifests
from .errors import IntegrityError
from .sweep import reported

if TYPE_CHECKING:
    from .records import RunRecord
    from .store import Store

Kind = Literal["temporary", "checkpoints", "unused", "damaged", "run"]


@dataclass(frozen=True, slots=True)
class Removal:
    """One folder that goes: which, why, and how many bytes it holds."""

    path: Path
    kind: Kind
    why: str
    bytes: int


def collect(
    store: Store,
    *,
    keep_last: int | None = None,
    damaged: bool = False,
    checkpoints: bool = False,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove what can go, or with `dry_run` only say what would.

    Always:       what killed processes left of artifacts that they were writing.
    keep_last:    of each pipeline all runs before the newest so many whole ones, with their reports, but for what its
                  newest so many sweeps found worth having; then the artifacts that no run names, all but the newest so
                  many of each stage. None keeps runs and artifacts.
    damaged:      artifacts that do not hold against their manifest. Reads every file of the store.
    checkpoints:  work folders of stages that were stopped; they can then not be resumed.

    LockedError: a run is using the store.
    """
    if not store.root.is_dir():
        return []
    with store.for_removal():
        found = _temporary(store)
        if checkpoints:
            found += _checkpoints(store)
        if damaged:
            found += _damaged(store)
        if keep_last is not None:
            old = _old_runs(store, keep_last)
            gone = {removal.path for removal in found}
            found += [one for one in _unused(store, keep_last, {run.id for run in old}) if one.path not in gone]
            for run in old:
                folder = store.runs / run.id
                found.append(Removal(folder, "run", f"of {run.pipeline}: newer ones are kept", _size(folder)))
        if not dry_run:
            for removal in found:
                commit.remove(removal.path)
    return found


def _temporary(store: Store) -> list[Removal]:
    """The store is ours alone here, so no such folder is being written."""
    found: list[Removal] = []
    for folder in [store.root / stage for stage in store.stages()]:
        for path in sorted(folder.glob(".tmp-*")):
            found.append(Removal(path, "temporary", "left by a process that was killed", _size(path)))
        for path in sorted(folder.glob(".old-*")):
            final = path.with_name(path.name.removeprefix(".old-"))
            if final.exists():
                found.append(Removal(path, "temporary", "replaced by a newer one", _size(path)))
            else:
                commit.recover(final, store.disk)
        for path in _work(folder, finished=True):  # a kill fell between the commit and their removal
            found.append(Removal(path, "temporary", "checkpoints of a stage that has finished", _size(path)))
    return found


def _checkpoints(store: Store) -> list[Removal]:
    paths = [path for stage in store.stages() for path in _work(store.root / stage, finished=False)]
    return [Removal(path, "checkpoints", "of a stage that was stopped", _size(path)) for path in paths]


def _work(folder: Path, *, finished: bool) -> list[Path]:
    """The work folders of a stage whose artifact is there, or is not."""
    paths = sorted(folder.glob(".work-*"))
    return [path for path in paths if path.with_name(path.name.removeprefix(".work-")).exists() == finished]


def _damaged(store: Store) -> list[Removal]:
    broken = [(path, error) for path, error in store.unreadable() if not _is_newer(path)]
    for artifact in store.artifacts():
        try:
            store.verify(artifact)
        except IntegrityError as error:
            broken.append((artifact.root, error))
    return [Removal(path, "damaged", error.message, _size(path)) for path, error in broken]


def _is_newer(folder: Path) -> bool:
    """Whether a newer Sievit wrote it: that is not damage."""
    try:
        schema = manifests.read_json(folder / manifests.NAME, manifests.NAME).get("schema")
    except (IntegrityError, FileNotFoundError):
        return False
    return isinstance(schema, int) and schema > manifests.SCHEMA


def _old_runs(store: Store, keep_last: int) -> list[RunRecord]:
    """The runs before the newest `keep_last` whole ones of their pipeline. What was broken off or ran one stage since
    stays too: it may be gone on with."""
    whole: dict[tuple[str, str], int] = {}
    old: list[RunRecord] = []
    worth_having = _worth_having(store, keep_last)
    for run in reversed(records.all_runs(store)):
        pipeline = (run.pipeline, run.path)
        if whole.get(pipeline, 0) >= keep_last:
            old += [run] if run.id not in worth_having else []
        elif all(node.key is not None for node in run.nodes):
            whole[pipeline] = whole.get(pipeline, 0) + 1
    return old


def _worth_having(store: Store, keep_last: int) -> set[str]:
    """The runs on the fronts of the newest `keep_last` sweeps of each pipeline."""
    counted: dict[tuple[str, str], int] = {}
    runs: set[str] = set()
    for _, told in reversed(reported(store)):
        pipeline = (told["pipeline"], told["path"])
        counted[pipeline] = counted.get(pipeline, 0) + 1
        if counted[pipeline] <= keep_last:
            runs.update(trial["run"] for trial in told["trials"] if trial["front"])
    return runs


def _unused(store: Store, keep_last: int, old_runs: Collection[str]) -> list[Removal]:
    artifacts = store.artifacts()
    by_key = {(artifact.kind_of_stage, artifact.key): artifact for artifact in artifacts}
    stays: set[tuple[str, str]] = set()
    for run in records.all_runs(store):
        if run.id not in old_runs:
            stays.update((node.stage, node.key) for node in run.nodes if node.key is not None)
    for stage in store.stages():
        of_stage = [artifact for artifact in artifacts if artifact.kind_of_stage == stage]
        newest = of_stage[len(of_stage) - keep_last :] if keep_last < len(of_stage) else of_stage
        stays.update((artifact.kind_of_stage, artifact.key) for artifact in newest)
    todo = list(stays)
    while todo:
        artifact = by_key.get(todo.pop())
        for parent in ancestors(artifact.manifest) if artifact else ():
            if parent not in stays:
                stays.add(parent)
                todo.append(parent)
    return [
        Removal(
            artifact.root,
            "unused",
            f"{artifact.ref}: no run that is kept names it, nothing that is kept was made from it",
            _size(artifact.root),
        )
        for artifact in artifacts
        if (artifact.kind_of_stage, artifact.key) not in stays
    ]


def ancestors(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stage, key) of the artifacts that an artifact was made from."""
    entries = [one for value in manifest["inputs"].values() for one in (value if isinstance(value, list) else [value])]
    return [(one["stage"], one["key"]) for one in entries]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
