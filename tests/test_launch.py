"""`launch: {processes: 2}` as a user has it, with real processes that are really killed: one error, no orphan, no half
result, and a next run that ends like one that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = """\
name: two
device: cpu
data:  {source: "builtin:digits", image_size: 32, max_train: 64, max_test: 20}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
launch: {processes: 2}
stages:
  train: {epochs: 60, batch_size: 16, mixup: 0.2, ema: 0.9, augment: {flip: false, erase: 0.2}}
"""
PATIENCE_S = 300


def project(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    return folder


def start(folder: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".typing"), "OMP_NUM_THREADS": "1", **more}
    pipe = subprocess.PIPE
    program = [sys.executable, "-m", *command]
    return subprocess.Popen(program, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def sievit(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, "sievit.stages", *arguments)
    out, error = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, error


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of a run by their rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (rank := child.environ().get("RANK")) is not None and child.ppid() == process.pid:
                found[int(rank)] = child
    return found


def until(what: str, process: subprocess.Popen[str], ready: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := ready()):
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def training(folder: Path, process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of a run, once it has made a checkpoint later than those that are there."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob("artifacts/train/.work-*/training.safetensors")}

    def newer() -> bool:
        there = folder.glob("artifacts/train/.work-*/training.safetensors")
        return any(path.stat().st_mtime_ns != before.get(path) for path in there)

    until("a checkpoint", process, newer)
    return workers(process)


def gone(processes: dict[int, psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(list(processes.values()), timeout=30)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project(tmp_path_factory.mktemp("undisturbed"))
    code, out, error = sievit(folder, "run", "--json")
    assert code == 0, error
    assert json.loads(out)["state"] == "complete", "stdout is one document, by one process"
    assert error == ""
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("artifacts/train/*/manifest.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def same_weights(folder: Path, other: Path) -> bool:
    one, two = (load_file(next(each.glob("artifacts/train/*/model.safetensors"))) for each in (folder, other))
    return all(bool((one[name] == two[name]).all()) for name in one | two)


def test_what_was_made_says_how_many_made_it_and_a_second_run_starts_none(tmp_path: Path) -> None:
    folder = project(tmp_path / "project")
    short = ("run", "--json", "--set", "train.epochs=2")
    code, out, error = sievit(folder, *short)
    assert code == 0 and error == "", error
    assert json.loads(out)["state"] == "complete", "stdout is one document, by one process"
    made = manifest(folder)
    assert made["processes"]["count"] == 2 and made["processes"]["sharding"] == "ddp"
    assert all(memory > 50 for memory in made["processes"]["peak_memory_mb"])
    assert made["ledger"]["images"] == 2 * 64 and made["command"] == f"sievit {' '.join(short)}"
    program = "import sys; from sievit.stages.__main__ import main; code = main(); assert 'torch' not in sys.modules; "
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".typing")}
    again = [sys.executable, "-c", program + "sys.exit(code)", *short]
    done = subprocess.run(again, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["stages"][0]["state"] == "cached", done.stderr


@pytest.mark.slow
def test_a_run_of_two_that_was_ended_in_every_way_ends_like_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = project(tmp_path / "project")

    process = start(folder, "sievit.stages", "run")
    there = training(folder, process)
    assert sorted(there) == [0, 1]
    there[1].kill()
    out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" not in error
    assert error.count("process 2 of 2 is gone") == 1 and "goes on from its last checkpoint" in error, error
    assert gone(there)

    process = start(folder, "sievit.stages", "run")
    there = training(folder, process)
    process.kill()
    process.communicate()
    assert gone(there), "nobody outlives the one that started them"

    process = start(folder, "sievit.stages", "run", "--json")
    there = training(folder, process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143 and error == ""
    assert json.loads(out)["error"]["message"] == "stopped in main/train by SIGTERM"
    assert gone(there)
    assert not list(folder.glob("artifacts/train/.tmp-*")) and not list(folder.glob("artifacts/train/*/manifest.json"))

    process = start(folder, "sievit.stages", "run")
    there = training(folder, process)
    there[0].kill()
    out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "process 1 of 2 was ended by SIGKILL" in error, error
    assert gone(there)

    code, _, error = sievit(folder, "run")
    assert code == 0, error
    assert same_weights(folder, undisturbed)


@pytest.mark.slow
def test_a_users_own_torchrun_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    folder = project(tmp_path / "project")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sievit.stages")
    process = start(folder, *torchrun, "train", "--json", "--set", "launch.processes=1")
    out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, error
    assert json.loads(out)["ref"] == "train@1" and manifest(folder)["processes"]["count"] == 2
    assert same_weights(folder, undisturbed)

    process = start(folder, *torchrun, "run", "--json", "--set", "launch.processes=3")
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert json.loads(out)["error"]["message"].startswith("launch asks for 3 processes, and 2 were started")
    process = start(folder, *torchrun, "ls", "--json")
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and len(json.loads(out)["artifacts"]) == 1, "what shares nothing is said once"


@contextlib.contextmanager
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    yield number


@pytest.mark.slow
def test_two_nodes_meet_and_make_one_run(undisturbed: Path, tmp_path: Path) -> None:
    folder = project(tmp_path / "project")
    with port() as number:
        text = f"{{processes: 1, nodes: 2, rendezvous: '127.0.0.1:{number}'}}"
        (folder / "pipeline.yaml").write_text(PIPELINE.replace("{processes: 2}", text))
        nodes = [start(folder, "sievit.stages", "run", "--json") for _ in range(2)]
        said = [node.communicate(timeout=PATIENCE_S) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    (document,) = [json.loads(out) for out, _ in said if out]
    assert document["state"] == "complete" and manifest(folder)["processes"]["nodes"] == 2
    assert same_weights(folder, undisturbed)


@pytest.mark.parametrize(
    ("settings", "message", "place"),
    [
        (
            ["train.mixup=0", "train.batch_size=15"],
            "15 images cannot be divided evenly among 2 processes",
            "train.batch_size=15",
        ),
        (
            ["train.mixup=0", "train.batch_size=1"],
            "more processes (2) than images in a batch (1)",
            "train.batch_size=1",
        ),
        (["train.batch_size=2"], "images are mixed in pairs, and 2 make 1 for 2 processes", "train.batch_size=2"),
        (["launch.sharding=fsdp2"], "stages.train.ema: looks at whole tensors, and fsdp2", "pipeline.yaml:7:56"),
        (["device=cuda"], "GPU", ""),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_before_anything_starts(
    settings: list[str], message: str, place: str, tmp_path: Path
) -> None:
    folder = project(tmp_path / "project")
    code, out, _ = sievit(folder, "run", "--json", *(word for one in settings for word in ("--set", one)))
    error = json.loads(out)["error"]
    assert code == 3 and message in error["message"] and place in error["where"], error
    assert not list(folder.glob("artifacts/train/*"))
