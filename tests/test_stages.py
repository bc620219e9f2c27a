"""All seven stages with torch, as a user runs them: one small pipeline through the command line, then what is
promised about it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tiny_vision import data, image_folder

from sievit.stages.vision.dataset import load_splits

PIPELINE = """
name: small
seed: 1
data:  {source: images, image_size: 32, test_fraction: 0.3, calibration: 0.2}
model: {name: deit_tiny_distilled_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  ticket:    {examples: {method: forgetting, keep: 0.8}, patches: {method: attention, keep: 0.6}, proxy: {epochs: 3,
             batch_size: 8}}
  train:     {epochs: 6, batch_size: 8, ema: 0.9, mixup: 0.2, weights: {strength: 1.0e-5}, keep_epochs: [1]}
  prune:     {target: {macs: 0.6}}
  finetune:  {epochs: 3, batch_size: 8, distill: {teacher: train, kind: hard}, tokens: {blocks: [1], keep: 0.75}}
  export:    {}
  quantize:  {max_drop: 0.5, min_speedup: null, schemes: [static]}
  benchmark: {batch_sizes: [1], seconds: 0.1}
arms:
  dense: {ticket: {examples: {keep: 1.0}, patches: {keep: 1.0}}, train: {weights: null}, prune: null, quantize: null}
"""
# A run on local data opens no socket: every attempt to make an internet socket is written down.
SOCKET_WATCH = """
import socket, os
_real = socket.socket
class Watched(_real):
    def __init__(self, family=-1, *rest, **more):
        if family in (-1, socket.AF_INET, socket.AF_INET6):
            with open(os.environ["SOCKET_LOG"], "a") as log:
                log.write(f"{family}\\n")
        super().__init__(family, *rest, **more)
socket.socket = Watched
"""
# The payload of these stages depends on no measurement and must be the same bit for bit.
EXACT = ("ticket", "train", "prune", "finetune", "export")


class Project:
    """A folder with images and pipeline.yaml, and the command run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        image_folder(folder / "images", per_class=24)
        (folder / "pipeline.yaml").write_text(PIPELINE)
        (folder / "watch").mkdir()
        (folder / "watch" / "sitecustomize.py").write_text(SOCKET_WATCH)
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(folder / "watch"), str(root / ".typing"), os.environ.get("PYTHONPATH", "")])
        # A home of its own and no CI: what nncf's telemetry would leave behind is seen.
        self.environment = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI", "NNCF_DEV")} | {
            "PYTHONPATH": path, "SOCKET_LOG": str(folder / "sockets.log"), "HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        (folder / "home").mkdir()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sievit.stages", *arguments]

    def sievit(self, *arguments: str, variables: Mapping[str, str] = MappingProxyType({})) -> CompletedProcess[str]:
        """Run the command to its end. variables: of the environment, besides those of every run."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def json(self, *arguments: str) -> Any:
        done = self.sievit(*arguments, "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)

    def manifests(self) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob("artifacts/*/*/manifest.json"))]

    def digests(self) -> dict[tuple[str, str, str], str]:
        return {(m["arm"], m["entry"], m["key"]): m["digest"] for m in self.manifests() if m["stage"] in EXACT}

    def folder_of(self, arm: str, entry: str) -> Path:
        found = [m for m in self.manifests() if (m["arm"], m["entry"]) == (arm, entry)]
        assert len(found) == 1
        return self.folder / "artifacts" / found[0]["stage"] / found[0]["key"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("stages") / "p")
    done = project.sievit("run", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    json.loads(done.stdout)
    return project


def manifest(project: Project, arm: str, entry: str) -> dict[str, Any]:
    return next(m for m in project.manifests() if (m["arm"], m["entry"]) == (arm, entry))


def test_every_stage_of_every_arm_left_what_it_promises(finished: Project) -> None:
    assert {(m["arm"], m["entry"]) for m in finished.manifests()} == {
        ("main", "ticket:proxy-0"),
        ("main", "quantize:ranges"),
        *(("main", e) for e in ("ticket", "train", "prune", "finetune", "export", "quantize", "benchmark")),
        *(("dense", e) for e in ("ticket", "train", "finetune", "export")),
    }
    ticket = manifest(finished, "main", "ticket")
    patches = ticket["metrics"]["patches"]
    cost = patches.pop("cost")
    assert patches == {"method": "attention", "view": "cached", "keep": 0.6, "kept_per_image": 10, "of": 16}
    assert cost["cached"] < cost["dense"] and cost["online"] == cost["cached"] + cost["selector"]
    assert ticket["metrics"]["examples"]["kept"] == -(-ticket["metrics"]["examples"]["of"] * 8 // 10)
    assert ticket["ledger"]["scoring_macs"] > 0
    assert manifest(finished, "dense", "ticket")["ledger"]["scoring_macs"] == 0
    train = manifest(finished, "main", "train")
    assert set(train["metrics"]["top1"]) == {"all", "tickets", "random"}
    assert 10 < train["ledger"]["tokens_per_image"] < 16
    assert "early/epoch-1.safetensors" in train["files"]
    prune = manifest(finished, "main", "prune")["metrics"]
    assert prune["asked"] == {"macs": 0.6}
    assert 0.5 < prune["reached"]["macs"] <= 0.6
    finetune = manifest(finished, "main", "finetune")["metrics"]
    assert finetune["policy"] == "reduced to 12 patches"
    assert finetune["macs"] < prune["after"]["macs"]
    assert manifest(finished, "main", "export")["metrics"]["parity"]["top1_agreement"] == 1


def test_tickets_hold_unique_in_range_indices_of_the_asked_number(finished: Project) -> None:
    folder = finished.folder_of("main", "ticket")
    kept, ranks = np.load(folder / "kept.npy"), np.load(folder / "ranks.npy")
    assert (np.diff(kept) > 0).all() and kept.min() >= 0 and kept.max() < len(ranks)
    assert ranks.dtype == np.uint8
    assert (np.sort(ranks, axis=1) == np.arange(16)).all()


def test_no_socket_was_opened_and_no_telemetry_left(finished: Project) -> None:
    log = finished.folder / "sockets.log"
    assert not log.exists() or log.read_text() == ""
    assert not (finished.folder / "home" / "intel").exists()


def classify(onnx_file: Path, pixels: np.ndarray) -> np.ndarray:
    """All that a user needs: onnxruntime, numpy and the sidecar."""
    sidecar = json.loads(onnx_file.with_suffix(".json").read_text())
    assert hashlib.sha256(onnx_file.read_bytes()).hexdigest() == sidecar["sha256"]
    p = sidecar["preprocessing"]
    x = pixels.astype(np.float32) * p["scale"]
    x = (x - np.array(p["mean"], np.float32)) / np.array(p["std"], np.float32)
    session = ort.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    logits = session.run([sidecar["output"]], {sidecar["input"]: x.transpose(0, 3, 1, 2).astype(np.float32)})[0]
    return np.asarray(logits.argmax(1))


def test_the_shipped_files_reach_the_printed_accuracy_in_plain_onnxruntime(finished: Project) -> None:
    raw = data("images", test_fraction=0.3, calibration=0.2)
    test = load_splits(raw, finished.folder).test
    rows = manifest(finished, "main", "benchmark")["metrics"]["rows"]
    quantized = finished.folder_of("main", "quantize")
    seen = set()
    for row in rows:
        folder = quantized if row["arm"] == "main" else finished.folder_of("dense", "export")
        files = {hashlib.sha256(f.read_bytes()).hexdigest(): f for f in folder.glob("*.onnx")}
        if row["sha256"] in files:
            right = (classify(files[row["sha256"]], test.pixels()) == test.labels).mean()
            assert row["top1"] == pytest.approx(float(right))
            seen.add((row["arm"], row["variant"]))
    assert {("main", "int8"), ("dense", "fp32")} <= seen


def test_int8_stays_within_its_stated_drop(finished: Project) -> None:
    metrics = manifest(finished, "main", "quantize")["metrics"]
    assert metrics["chosen"] == "int8"
    assert metrics["drop"] <= metrics["max_drop"]
    assert metrics["bytes"]["int8"] < metrics["bytes"]["fp32"]


def test_a_second_run_does_nothing_and_loads_no_torch(finished: Project) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.folder.glob("artifacts/*/*/*")}
    done = finished.sievit("run", variables={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    changed = [p for p, at in before.items() if p.stat().st_mtime_ns != at and "runs" not in p.parts]
    assert changed == []
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "sievit.pipeline.runner" in imported
    assert not imported & {"torch", "timm", "onnx", "onnxruntime", "nncf"}


@pytest.mark.parametrize(
    ("field", "again"),
    [
        ("finetune.epochs=4", {"finetune"}),
        ("prune.target.macs=0.5", {"prune"}),
        ("train.lr=0.002", {"train"}),
        ("ticket.patches.keep=0.5", {"ticket"}),
        ("data.image_size=64", {"ticket", "train"}),
    ],
)
def test_a_changed_field_reruns_what_depends_on_it(finished: Project, field: str, again: set[str]) -> None:
    plan = finished.json("plan", "--set", field)
    states = {(s["arm"], s["entry"]): s["state"] for s in plan["stages"]}
    first = {entry for (arm, entry), state in states.items() if arm == "main" and state == "run"}
    assert first == again - {"train"} if "ticket" in again else first == again
    order = ["ticket", "train", "prune", "finetune", "export", "quantize", "benchmark"]
    start = min(order.index(e) for e in again)
    for position, entry in enumerate(order):
        assert (states["main", entry] == "cached") == (position < start)


@pytest.mark.slow
def test_single_stages_work_on_the_newest_artifacts(finished: Project) -> None:
    pruned = finished.json("prune", "--set", "prune.target.macs=0.7")
    assert "prune" in json.dumps(pruned)
    newest = finished.json("show", "prune")
    assert newest["metrics"]["asked"] == {"macs": 0.7}
    assert newest["inputs"]["model"]["stage"] == "train"
    exported = finished.json("export", "--input", "model=prune@latest")
    assert exported
    assert finished.json("show", "export")["inputs"]["model"]["key"] == newest["key"]
    onnx = finished.folder_of("main", "quantize") / "model.onnx"
    measured = finished.json("benchmark", "--onnx", str(onnx), "--batch", "2")
    assert measured["rows"][0]["batch"] == 2


BAD_INPUT = (
    (("prune", "--set", "prune.target.macs=0.01"), "is out of reach"),
    (("ticket", "--set", "data.source=nowhere"), "nowhere"),
    (("finetune", "--set", "finetune.distill.teacher=train@99"), "train@99"),
    (("finetune", "--set", "data.image_size=64"), "32 px"),
    (("train", "--set", "train.keep_epochs=[99]"), "keep_epochs"),
    (("benchmark", "--set", "benchmark.providers=[cuda]"), "cuda"),
)
MORE_BAD_INPUT = (  # tests/test_preflight.py has these in one process
    (("train", "--set", "train.cutmix=1.0"), "cutmix"),
    (("train", "--set", "model.name=resnet18"), "no family"),
    (("finetune", "--set", "finetune.tokens.blocks=[7]"), "blocks"),
    (("finetune", "--set", "finetune.distill.teacher=ticket"), "not model"),
    (("train", "--set", "model.args.patch_size=16"), "patches"),
    (("train", "--set", "model.args.patch_size=5"), "multiple"),
    (("train", "--set", "device=cuda"), "cuda"),
)


@pytest.mark.parametrize("cases", [BAD_INPUT, pytest.param(MORE_BAD_INPUT, marks=pytest.mark.slow)])
def test_bad_input_to_a_stage_is_one_message_and_nothing_is_lost(
    finished: Project, cases: tuple[tuple[tuple[str, ...], str], ...]
) -> None:
    before = finished.digests()
    for arguments, part in cases:
        done = finished.sievit(*arguments)
        assert done.returncode == 3, (arguments, done.stdout, done.stderr)
        assert part in done.stderr
        # A config that contradicts itself says the remedy in the same line.
        assert "help:" in done.stderr or "; name epochs from 1" in done.stderr
        assert "Traceback" not in done.stderr
    assert before.items() <= finished.digests().items()
    assert not list(finished.folder.glob("artifacts/*/.tmp-*"))


def test_a_plan_that_names_a_missing_artifact_is_refused_before_anything_runs(finished: Project) -> None:
    for command in ("plan", "run"):
        done = finished.sievit(
            command, "--set", "finetune.distill.teacher=train@99", "--set", "ticket.examples.keep=0.5"
        )
        assert done.returncode == 3
        assert "train@99" in done.stderr
        assert "ticket" not in done.stdout


def killed_until_done(project: Project, kills: int, seed: int) -> int:
    """kill -9 the whole run at random moments, `kills` times at most, then let it finish. Returns how often it was
    killed.
    """
    chance = random.Random(seed)
    count = 0
    while True:
        process = subprocess.Popen(
            project.command("run", "--until", "export"),
            cwd=project.folder, env=project.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + (4 + chance.random() * 8 if count < kills else 300)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            return count
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        count += 1
        for file in project.folder.glob("artifacts/*/*/manifest.json"):
            stored = json.loads(file.read_text())["files"]
            assert all(
                hashlib.sha256((file.parent / n).read_bytes()).hexdigest() == f["sha256"] for n, f in stored.items()
            )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 15])
def test_killed_runs_end_with_the_tickets_weights_and_files_of_an_undisturbed_one(
    finished: Project, tmp_path: Path, kills: int
) -> None:
    project = Project(tmp_path / "killed")
    assert killed_until_done(project, kills, seed=kills) > 0
    expected = {key: digest for key, digest in finished.digests().items() if key in project.digests()}
    assert {entry for _, entry, _ in expected} == set(EXACT)
    assert project.digests() == expected
