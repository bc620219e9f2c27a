"""What the command line costs before it does anything: help, completion, plan, listings, and a run of what is there.

    python bench/cli.py [--artifacts 200] [--repeats 5]

Makes a store of so many artifacts with manifests as long as real ones (a curve of 60 epochs, rows, key material) and a
pipeline whose 17 stages are all in it, runs each command several times in a process of its own, and prints the least
and the median of wall and CPU seconds. The least is what the command needs; the median says how busy the machine was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / ".typing"), str(ROOT / "tests")]

from fakes import PIPELINE  # noqa: E402

from sievit.pipeline.records import load  # noqa: E402
from sievit.pipeline.store import Store  # noqa: E402

FAKE = (
    "import sys; from fakes import STAGES, BadInput; from sievit.pipeline.cli import execute; "
    "sys.exit(execute(STAGES, (BadInput,), sys.argv[1:]))"
)
REAL = "import sys; from sievit.stages.__main__ import main; sys.exit(main())"
PAYLOAD = 64 * 1024  # bytes of each further artifact
BARS = {
    "--help": 0.4,
    "plan": 0.4,
    "plan (the stages of the project)": 0.4,
    "completion": 0.4,
    "run": 1.0,
}  # wall seconds


def fill(folder: Path, artifacts: int) -> None:
    """A pipeline that was run, and as many more artifacts as are missing."""
    (folder / "pipeline.yaml").write_text(PIPELINE, encoding="utf-8")
    spent(FAKE, ["run", "--quiet"], folder, {})
    store = Store(folder / "artifacts")
    (run,) = [path.parent.name for path in store.runs.glob("*/run.json")]
    assert len(load(store, run).nodes) == 17
    model = store.resolve("train")
    curve = [
        {"epoch": float(epoch), "loss": 1 / (epoch + 1), "lr": 1e-3, "top1_calibration": 0.5} for epoch in range(60)
    ]
    kept = {name: value for name, value in model.manifest.items() if name not in ("manifest_sha256", "files", "digest")}
    for number in range(artifacts - len(store.artifacts())):
        material = {**kept["key_material"], "seed": number + 1}
        fields = {**kept, "key_material": material, "metrics": {"curve": curve, "top1": {"all": 0.9}}}
        for name in ("schema", "stage", "key", "version"):
            fields.pop(name)
        with store.draft("train", f"{number:012x}") as draft:
            (draft.out / "model.safetensors").write_bytes(bytes(PAYLOAD))
            draft.commit(fields)


def spent(program: str, arguments: list[str], folder: Path, more: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children."""
    path = os.pathsep.join([str(ROOT / ".typing"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80", **more}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # warm is with byte code, as an installation has it
    before, began = os.times(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, capture_output=True)
    after, wall = os.times(), time.monotonic() - began
    assert done.returncode == 0, done.stderr.decode()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifacts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    words = {"_SIEVIT_COMPLETE": "complete_bash", "COMP_WORDS": "sievit\nshow\ntrain\n@", "COMP_CWORD": "3"}
    with tempfile.TemporaryDirectory(prefix="sievit-bench-") as name:
        folder = Path(name)
        fill(folder, options.artifacts)
        own = folder / "own"
        own.mkdir()
        shutil.copy(ROOT / "pipeline.yaml", own / "pipeline.yaml")
        commands: dict[str, tuple[str, list[str], dict[str, str]]] = {
            "bare python": ("pass", [], {}),
            "--help": (REAL, ["--help"], {}),
            "plan (the stages of the project)": (REAL, ["plan", "own/pipeline.yaml"], {}),
            "completion": (REAL, [], words),
            "plan": (FAKE, ["plan"], {}),
            "ls": (FAKE, ["ls"], {}),
            "show": (FAKE, ["show", "train@1"], {}),
            "run": (FAKE, ["run"], {}),
            "verify": (FAKE, ["verify"], {}),
        }
        print(f"{options.artifacts} artifacts, {options.repeats} times each; seconds")
        print(f"{'':34}{'wall':>8}{'median':>8}{'CPU':>8}{'median':>8}   bar")
        for label, (program, arguments, more) in commands.items():
            taken = [spent(program, arguments, folder, more) for _ in range(options.repeats)]
            wall, cpu = zip(*taken, strict=True)
            figures = (min(wall), statistics.median(wall), min(cpu), statistics.median(cpu))
            bar = f"{BARS[label]:.1f}" if label in BARS else ""
            print(f"{label:34}" + "".join(f"{figure:8.2f}" for figure in figures) + f"   {bar}")


if __name__ == "__main__":
    main()
