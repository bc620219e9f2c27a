"""The dense file of a run through Olive's ONNX passes, beside what Sievit makes of it: accuracy, size, p50, in one run.

    sievit run pipeline.yaml
    python bench/olive.py --store artifacts --olive PYTHON

Olive lives in an environment of its own, whose Python --olive names:

    python -m venv olive
    olive/bin/pip install olive-ai onnxruntime requests

It is given the dense arm's ONNX file, as its documentation has it: its optimisation for transformers, that with dynamic
8-bit quantization, and that with static 8-bit quantization on the calibration images that Sievit gets too. Sievit's
rows are the forms that `quantize` makes of the same dense file, and the main arm's product, which was also trained on
tickets, pruned and taught. All files are timed in one interleaved run by the project's protocol and answer the same
test images. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sievit.pipeline.progress import Silent
from sievit.pipeline.store import Artifact, Store
from sievit.stages.__main__ import STAGES
from sievit.stages.deploy.bundle import Bundle, open_bundle, write_sidecar
from sievit.stages.deploy.eight_bit import Form, Workshop, ranges_on, weight_bits
from sievit.stages.deploy.isa import instruction_sets, processor_name
from sievit.stages.deploy.latency import TWIN, Plan, Subject, measure, settings_of
from sievit.stages.deploy.predict import accuracy, scores
from sievit.stages.deploy.preprocess import normalise
from sievit.stages.deploy.statistics import noise_factor, percentile_interval, ratio_interval
from sievit.stages.products import find
from sievit.stages.ranges import balanced
from sievit.stages.vision.dataset import load_splits

FORMS = (Form("static"), Form("dynamic"), Form("dynamic", "fused"), Form("dynamic", "whole"))
OPTIMISE = {"type": "OrtTransformersOptimization", "model_type": "vit"}
DYNAMIC = {"type": "OnnxDynamicQuantization"}
STATIC = {"type": "OnnxStaticQuantization", "data_config": "calibration"}
WORKFLOWS: dict[str, list[dict[str, Any]]] = {
    "Olive, optimised": [OPTIMISE],
    "Olive, dynamic": [OPTIMISE, DYNAMIC],
    "Olive, static": [OPTIMISE, STATIC],
}
# What runs in Olive's environment: argv holds a workflow as JSON.
RUN = "import json, sys; from olive import run; run(json.loads(sys.argv[1]))"
# How Olive is told of calibration images: a module that it imports.
DATA = """\
import numpy as np
from olive.data.registry import Registry


class Inputs:
    def __init__(self, file, name):
        self.inputs, self.name = np.load(file), name

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {self.name: self.inputs[index]}, 0


@Registry.register_dataset()
def calibration_inputs(file, name, **_):
    return Inputs(file, name)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One file. speedup: the dense FP32 file's p50 over its own, with the 95 % interval."""

    file: str
    top1: float
    megabytes: float
    p50_ms: float
    speedup: float
    low: float
    high: float


def by_olive(python: Path, name: str, dense: Bundle, folder: Path, inputs: Path) -> Path:
    """What Olive makes of the dense file; its output is shown when it fails."""
    assert dense.sidecar is not None
    out = folder / name.replace(", ", "-")
    (folder / "calibration_data.py").write_text(DATA, encoding="utf-8")
    loading = {"type": "calibration_inputs", "file": str(inputs), "name": dense.sidecar.input}
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(dense.path.absolute())},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "data_configs": [
            {
                "name": "calibration",
                "user_script": str(folder / "calibration_data.py"),
                "load_dataset_config": loading,
                "dataloader_config": {"batch_size": 1},
            }
        ],
        "passes": {f"pass{number}": each for number, each in enumerate(WORKFLOWS[name])},
        "host": "here",
        "target": "here",
        "evaluate_input_model": False,
        "output_dir": str(out),
        "cache_dir": str(out / "cache"),
        "no_artifacts": True,
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", RUN, json.dumps(workflow)],
        env=environment | {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    made = out / "model.onnx"
    if done.returncode or not made.is_file():
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return made


def described(path: Path, dense: Bundle, precision: str) -> Bundle:
    """With a sidecar of the dense file's preprocessing beside it."""
    known = dense.sidecar
    assert known is not None
    write_sidecar(
        path, preprocessing=known.raw["preprocessing"], classes=known.classes, precision=precision,
        parameters=known.parameters, macs=known.macs, source={},
    )  # fmt: skip
    return open_bundle(path)


def shipped(store: Store, arm: str) -> tuple[Artifact, Bundle]:
    """The last file of an arm in the newest run."""
    product = find(arm, store, STAGES)
    assert product.artifact is not None
    return product.artifact, open_bundle(product.path)


def rows_of(files: dict[str, Bundle], test: Any, options: argparse.Namespace) -> tuple[list[Row], float]:
    """All files in one run, the dense one first, and the factor below which ratios are noise."""
    setting = settings_of(["cpu"], [options.threads], [options.batch])[0]
    subjects = []
    for name, bundle in files.items():
        assert bundle.sidecar is not None
        signature = bundle.signature
        subjects.append(Subject(name, bundle.path, signature.input, signature.dtype, bundle.sidecar.image))
    results = measure(subjects, [setting], Plan(options.seconds), Silent())
    base = results[subjects[0].name, setting].slots
    rows = []
    for name, bundle in files.items():
        slots = results[name, setting].slots
        ratio = ratio_interval(base, slots)
        top1 = accuracy(scores(bundle.path, test.pixels()), test.labels).top1
        p50 = percentile_interval(slots, 50).value
        rows.append(Row(name, top1, bundle.path.stat().st_size / 1e6, p50, ratio.value, ratio.low, ratio.high))
    return rows, noise_factor(base, results[TWIN, setting].slots)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("artifacts"))
    parser.add_argument("--olive", type=Path, required=True, metavar="PYTHON", help="of an environment that has Olive")
    parser.add_argument("--base", type=Path, default=Path(), help="folder that data.source is meant from")
    parser.add_argument("--images", type=int, default=128, help="calibration images, for both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="timed calls of each file")
    options = parser.parse_args()
    store = Store(options.store)
    artifact, dense = shipped(store, "dense")
    _, main_file = shipped(store, "main")
    assert dense.sidecar is not None
    splits = load_splits(artifact.manifest["data"], options.base.absolute())
    train = splits["train"]
    chosen = balanced(train.labels, np.arange(len(train)), options.images, 0)
    files = {"dense, FP32": dense}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        pixels, inputs = folder / "pixels.npy", folder / "inputs.npy"
        np.save(pixels, train.pixels(chosen))
        known = dense.sidecar
        np.save(inputs, normalise(train.pixels(chosen), known.preprocessing, known.dtype, known.layout))
        for name in WORKFLOWS:
            path = by_olive(options.olive.absolute(), name, dense, folder, inputs)
            files[name] = described(path, dense, "fp32" if name == "Olive, optimised" else "int8")
        ranges = ranges_on(pixels, dense.path, folder, weight_bits(), 3600.0)
        with Workshop(dense.path, folder, weight_bits(), 3600.0, ranges) as workshop:
            for form in FORMS:
                if (path_or_none := workshop.make(form)) is not None:
                    files[f"Sievit, {form.text()}"] = described(path_or_none, dense, "int8")
        files["Sievit, main arm's product"] = main_file
        rows, noise = rows_of(files, splits["test"], options)
    print(f"{processor_name()}, {', '.join(instruction_sets())}; batch {options.batch}, {options.threads} threads")
    print(f"{len(splits['test'])} test images; A/A noise {noise - 1:.1%}")
    print(f"{'file':34} {'top-1':>7} {'MB':>6} {'p50 ms':>8} {'times':>6} {'95% interval':>14}")
    for row in rows:
        print(
            f"{row.file:34} {row.top1:7.1%} {row.megabytes:6.2f} {row.p50_ms:8.3f} {row.speedup:6.2f} "
            f"{f'{row.low:.2f} to {row.high:.2f}':>14}"
        )
    told = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
    print(json.dumps({"host": processor_name(), "noise": noise, "rows": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
