"""How many calibration images static INT8 needs: accuracy and distance to the float file against their number.

    python bench/calibration.py --onnx artifacts/export/<key>/model.onnx [--pipeline pipeline.yaml] [--draws 3]

For every number of images and every draw of them (the training split, balanced over classes, which is what tickets are
made of): the file is quantized by nncf, then answers the whole test split. Printed is the mean divergence of its
answers from the float file's (nats), the largest of the draws, and top-1, each draw by itself. Last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from sievit.pipeline.plan import make_plan
from sievit.pipeline.spec import load_pipeline
from sievit.stages.__main__ import STAGES
from sievit.stages.deploy.block_sensitivity import divergence
from sievit.stages.deploy.bundle import open_bundle, write_sidecar
from sievit.stages.deploy.eight_bit import Form, Workshop, ranges_on, weight_bits
from sievit.stages.deploy.predict import accuracy, log_probabilities, scores
from sievit.stages.ranges import balanced
from sievit.stages.vision.dataset import load_split

COUNTS = (4, 16, 64, 256, 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True, help="a float file with its sidecar")
    parser.add_argument("--pipeline", type=Path, default=Path("pipeline.yaml"), help="whose data are taken")
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    data = make_plan(load_pipeline(options.pipeline, STAGES), STAGES).spec.data.model_dump()
    train, test = (load_split(data, options.pipeline.resolve().parent, name) for name in ("train", "test"))
    source = open_bundle(options.onnx)
    assert source.sidecar is not None
    expected = scores(options.onnx, test.pixels())
    rows = []
    print(f"float: top-1 {accuracy(expected, test.labels).top1:.2%} of {len(test)} images; {weight_bits()}-bit weights")
    print(f"{'images':>7} {'divergence':>11} {'largest':>9}  top-1 of each draw")
    for count in (count for count in COUNTS if count <= len(train)):
        far, right = [], []
        for draw in range(options.draws):
            with tempfile.TemporaryDirectory() as folder:
                chosen = balanced(train.labels, np.arange(len(train)), count, draw)
                np.save(Path(folder) / "pixels.npy", train.pixels(chosen))
                pixels, bits = Path(folder) / "pixels.npy", weight_bits()
                ranges = ranges_on(pixels, options.onnx, Path(folder), bits, 3600.0)
                with Workshop(options.onnx, Path(folder), bits, 3600.0, ranges) as workshop:
                    path = workshop.make(Form("static"))
                assert path is not None
                write_sidecar(
                    path, preprocessing=source.sidecar.raw["preprocessing"], classes=source.sidecar.classes,
                    precision="int8", parameters=source.sidecar.parameters, macs=source.sidecar.macs,
                    source={}, scores=source.sidecar.scores,
                )  # fmt: skip
                answered = scores(path, test.pixels())
            first, second = (log_probabilities(one, source.sidecar.scores) for one in (expected, answered))
            far.append(float(divergence(first, second).mean()))
            right.append(accuracy(answered, test.labels).top1)
        rows.append({"images": count, "divergence": far, "top1": right})
        each = ", ".join(f"{value:.2%}" for value in right)
        print(f"{count:>7} {np.mean(far):>11.5f} {max(far):>9.5f}  {each}", flush=True)
    print(json.dumps({"file": source.sha256, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
