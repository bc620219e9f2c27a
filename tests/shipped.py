"""A store of two small classifiers of digits as a run would have left it, and the command line on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_onnx

from sievit.pipeline.cli import execute
from sievit.pipeline.records import NodeRecord, RunRecord
from sievit.pipeline.settings import DataConfig
from sievit.pipeline.store import Artifact, Store
from sievit.stages.__main__ import COMMANDS, FURTHER, STAGES
from sievit.stages.methods import InvalidInput

DIGITS = tuple("0123456789")
DATA = DataConfig(source="builtin:digits", image_size=8, max_test=120).model_dump(mode="json")
MODEL = {"name": "deit_tiny_patch16_224", "pretrained": False, "weights": None, "args": {}}
DENSE, MAIN, TRAIN, BENCHMARK, RUN = "d" * 12, "a" * 12, "7" * 12, "b" * 12, "5f3a91000000"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Sievit:
    """The console script, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Answer:
        self.capsys.readouterr()
        code = execute(STAGES, (InvalidInput,), arguments, commands=COMMANDS, further=FURTHER)
        return Answer(code, *self.capsys.readouterr())


def classifier(folder: Path, seed: int = 0, classes: tuple[str, ...] = DIGITS, **fields: Any) -> Path:
    """A linear classifier with its sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tiny_onnx.linear(folder / "model.onnx", classes=len(classes), seed=seed)
    tiny_onnx.sidecar(path, names=list(classes), **fields)
    return path


def commit(store: Store, stage: str, key: str, arm: str, writes: str, **fields: Any) -> Artifact:
    """An artifact; files: name -> bytes, of an onnx one a seed of its weights."""
    files = fields.pop("files", {"rows.json": b"[]"} if writes == "measurement" else {})
    with store.draft(stage, key) as draft:
        for name, content in files.items():
            (draft.out / name).write_bytes(content)
        if writes == "onnx":
            path = tiny_onnx.linear(draft.out / "model.onnx", classes=10, seed=fields.pop("weights"))
            tiny_onnx.sidecar(path, names=DIGITS, precision="int8" if stage == "quantize" else "fp32")
        common: dict[str, Any] = {"key_material": {}, "inputs": {}, "metrics": {}, "ledger": {}, "seed": 0}
        made = {"created": "2026-11-01T10:00:00+00:00", "pipeline": "digits", "entry": stage, "arm": arm}
        return draft.commit({**common, **made, "data": DATA, "model": MODEL, "writes": writes, **fields})


def row(sha256: str, **fields: Any) -> dict[str, Any]:
    """A row of a benchmark."""
    return {
        "arm": "main", "entry": "quantize", "variant": "int8", "sha256": sha256, "provider": "cpu", "batch": 1,
        "threads": 1, "io": "host", "top1": 0.914, "top1_low": 0.9, "top1_high": 0.925, "test_images": 120,
        "p50_ms": 1.23, "p50_low": 1.2, "p50_high": 1.26, "p90_ms": 1.5, "p90_low": 1.4, "p90_high": 1.6,
        "p99_ms": None, "p99_low": None, "p99_high": None, "p99_unsaid": "300 calls, 662 needed",
        "speedup": 2.5, "speedup_low": 2.4, "speedup_high": 2.6, "verdict": "faster", "peak_memory_mb": 50.0,
        "bytes": 1, "parameters": 1, "macs": 1, **fields,
    }  # fmt: skip


def measurement(rows: list[dict[str, Any]], processor: str = "Test CPU 9000") -> dict[str, Any]:
    """Metrics of a benchmark."""
    return {
        "rows": rows,
        "baseline": {"arm": "dense", "entry": "export", "variant": "fp32"},
        "noise_floor": {"percent": 3.2},
        "host": {"processor": processor, "usable_cores": 2, "onnxruntime": "1.31.1"},
        "disturbed": False,
        "disturbed_reason": "",
        "protocol": {"seconds": 2.0},
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sievit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sievit:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    return Sievit(capsys)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """export@1 of arm dense, quantize@1 of arm main (made from train@1), benchmark@1 of both, and their run."""
    store = Store(tmp_path / "artifacts")
    train = commit(store, "train", TRAIN, "main", "model", files={"model.safetensors": b"weights"})
    given = {"ref": train.ref, "stage": "train", "key": TRAIN, "digest": train.digest, "arm": "main", "entry": "train"}
    dense = commit(store, "export", DENSE, "dense", "onnx", weights=0)
    main = commit(store, "quantize", MAIN, "main", "onnx", weights=1, inputs={"model": given})
    rows = [
        row(digest(dense.file("model.onnx")), arm="dense", entry="export", verdict="baseline", p50_ms=7.77),
        row(digest(main.file("model.onnx"))),
    ]
    commit(store, "benchmark", BENCHMARK, "main", "measurement", metrics=measurement(rows))
    nodes = [
        NodeRecord(arm, artifact.kind_of_stage, artifact.kind_of_stage, "done", artifact.ref, artifact.key, 1.0, "now")
        for arm, artifact in (("main", train), ("main", main), ("dense", dense))
    ]
    path = str(tmp_path / "pipeline.yaml")
    RunRecord(RUN, "digits", path, "2026-11-01T10:00:00", "2026-11-01T11:00:00", "complete", nodes).save(store)
    return store
