"""Which ONNX file is meant: a file, a folder from `sievit pack`, an artifact, or what an arm of a run ships.

    model.onnx, folder/       a file, or the model.onnx of a folder
    main, random              the last file of that arm in the newest run that has made the files of all its arms
    quantize@3, main/export   an artifact, as every command names one
    5f3a91, 5f3a91/dense      a run by the beginning of its id: its main arm, or another

A file is looked up in the store by its SHA-256, so that a copy is known as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sievit.pipeline.errors import InputError

if TYPE_CHECKING:
    from sievit.pipeline.records import NodeRecord, RunRecord
    from sievit.pipeline.stage import Stage
    from sievit.pipeline.store import Artifact, Store

MODEL = "model.onnx"


@dataclass(frozen=True)
class Product:
    """An ONNX file, and the artifact that it is a file of, None for one that this store has not made."""

    asked: str
    path: Path
    artifact: Artifact | None

    @property
    def name(self) -> str:
        """As tables show it."""
        if self.artifact is None or self.asked in (self.artifact.ref, str(self.path)):
            return self.asked
        return f"{self.asked} ({self.artifact.ref})"


def find(asked: str, store: Store, stages: Sequence[Stage]) -> Product:
    """The file that a text of the command line means; what the store gives is compared with its digests first.

    Raises: InputError when it means nothing, IntegrityError when the artifact is damaged.
    """
    from sievit.pipeline import records, references
    from sievit.pipeline.diagnostics import suggest

    path = Path(asked).expanduser()
    if path.is_dir() and (path / MODEL).is_file():
        path = path / MODEL
    if path.suffix == ".onnx":
        return Product(asked, path, _known(path, store) if path.is_file() else None)
    artifact = _of_a_run(asked, store, stages)
    if artifact is None and path.exists():
        what = f"holds no {MODEL}" if path.is_dir() else "is not an .onnx file"
        raise InputError(f"{path} {what}", hint="give an .onnx file, or a folder that `sievit pack` made")
    known = [*store.stages(), *references.places(store)]
    if artifact is None and "@" not in asked and asked not in known:
        newest = _delivered(store, stages) or records.newest(store)
        names = [*(_arms(newest) if newest else ()), *known]
        raise InputError(
            f"{asked!r} is no arm, run, artifact or .onnx file",
            where=str(store.root),
            hint=suggest(asked, names, kind="names") if names else "the store is empty: `sievit run` fills it",
        )
    artifact = artifact or references.resolve(asked, store)
    if (holds := artifact.manifest.get("writes")) != "onnx":
        raise InputError(
            f"{artifact.ref} holds {holds}, not an ONNX file",
            hint="name an artifact of export or quantize, an arm, or an .onnx file",
        )
    store.verify(artifact)
    return Product(asked, artifact.file(MODEL), artifact)


def _known(path: Path, store: Store) -> Artifact | None:
    """The newest artifact that has this very file."""
    from .deploy.sidecar import sha256_of

    digest = sha256_of(path)
    holding = [
        artifact
        for artifact in store.artifacts()
        if artifact.manifest.get("writes") == "onnx"
        and digest in {each["sha256"] for each in artifact.manifest["files"].values()}
    ]
    return max(holding, key=lambda artifact: str(artifact.manifest["created"]), default=None)


def _of_a_run(asked: str, store: Store, stages: Sequence[Stage]) -> Artifact | None:
    """What an arm of a run ships; None when the text names neither."""
    from sievit.pipeline import records

    newest = _delivered(store, stages) or records.newest(store)
    if newest is not None and asked in _arms(newest):
        return _shipped(newest, asked, store, stages)
    run, slash, arm = asked.partition("/")
    if not re.fullmatch(r"[0-9a-f]{4,12}", run) or not any(each.id.startswith(run) for each in records.all_runs(store)):
        return None
    return _shipped(records.load(store, run), arm if slash else "main", store, stages)


def _delivered(store: Store, stages: Sequence[Stage]) -> RunRecord | None:
    """The newest run that has made the files of all its arms. One that failed, or a single stage, does not take the
    place of what stands; and two arms are of one run, or a comparison would be of two settings.
    """
    from sievit.pipeline.references import newest_run_with

    def last(record: RunRecord) -> list[NodeRecord]:
        return [nodes[-1] for arm in _arms(record) if (nodes := _exporting(record, arm, stages))]

    return newest_run_with(store, last)


def _exporting(record: RunRecord, arm: str, stages: Sequence[Stage]) -> list[NodeRecord]:
    """What of an arm writes ONNX files, in the order of the pipeline."""
    writing = {stage.name for stage in stages if stage.writes == "onnx"}
    return [node for node in record.nodes if node.arm == arm and node.stage in writing]


def _arms(record: RunRecord) -> list[str]:
    return list(dict.fromkeys(node.arm for node in record.nodes))


def _shipped(record: RunRecord, arm: str, store: Store, stages: Sequence[Stage]) -> Artifact:
    """The artifact of the arm's last stage that writes an ONNX file: one that is unfinished is not passed over."""
    from sievit.pipeline.diagnostics import suggest
    from sievit.pipeline.references import made

    if arm not in _arms(record):
        raise InputError(f"run {record.id} has no arm {arm!r}", hint=suggest(arm, _arms(record), kind="arms"))
    of_arm = _exporting(record, arm, stages)
    if not of_arm:
        raise InputError(f"arm {arm!r} of run {record.id} exports no ONNX file", hint="give it an export stage")
    last = of_arm[-1]
    artifact = made(last, store)
    if artifact is None:
        raise InputError(
            f"stage {last.entry!r} of arm {arm!r} has made no file in run {record.id}",
            where=record.path,
            hint=f"`sievit run {Path(record.path).name}` finishes it, or name an artifact, as export@1",
        )
    return artifact
