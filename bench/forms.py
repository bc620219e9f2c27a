"""What each form of a file gains on this host: float and 8-bit, attention plain or as one operator, dense and cut.

    python bench/forms.py [--model deit_tiny_patch16_224 deit_small_patch16_224] [--seconds 6] [--threads 1]
                          [--provider openvino]

Random weights: latency depends on shapes alone. Four networks a model: dense; half of the multiply-accumulates by
taking out every other block; half by halving heads and MLPs; and the first of these with token reduction (keep 0.7 at
three blocks). Every form of each is timed in one interleaved run beside the dense FP32 file in ONNX Runtime's default,
by the project's own protocol, with an A/A pair; --provider has the float and the static files run on another provider
of the same host too, in the same run. Prints a table, how many billion operations a second each file reaches
and what share that is of this host's large matrix product, and, last, one line of JSON.

Exit code 1 when the best form of the cut network with token reduction is not 4 times (DeiT-S) or 3.2 times (DeiT-T) as
fast as dense FP32, or 6 and 4.8 times where another provider was tried: what the project promises on a processor with
8-bit dot products. Elsewhere it is only told.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sievit.pipeline.progress import Silent
from sievit.stages.deploy.bundle import open_bundle, write_sidecar
from sievit.stages.deploy.eight_bit import DOT_PRODUCTS, Form, Workshop, ranges_on, weight_bits
from sievit.stages.deploy.isa import instruction_sets, processor_name
from sievit.stages.deploy.latency import TWIN, Plan, Subject, measure, settings_of
from sievit.stages.deploy.peak import Kind, gflops, peak
from sievit.stages.deploy.statistics import noise_factor, percentile_interval, ratio_interval
from sievit.stages.vision.architecture import Architecture
from sievit.stages.vision.network import create
from sievit.stages.vision.onnx_export import export_shape
from sievit.stages.vision.vit import drops_for

BARS = {"deit_small_patch16_224": (4.0, 6.0), "deit_tiny_patch16_224": (3.2, 4.8)}  # on the CPU's own provider; on any
FORMS = (
    Form(None),
    Form(None, "fused"),
    Form(None, "whole"),
    Form("static"),
    Form("static", "fused"),
    Form("dynamic"),
    Form("dynamic", "fused"),
    Form("dynamic", "whole"),
)
ELSEWHERE = (Form(None), Form("static"))  # the others are made of operators of the CPU's own provider
KEEP, OPSET, CALIBRATION = 0.7, 20, 8
JUDGED = "half the blocks, tokens"


@dataclass(frozen=True, slots=True)
class Row:
    """One file. speedup: dense FP32 over it, by p50, with the 95 % interval."""

    model: str
    network: str
    form: str
    provider: str
    macs: int
    megabytes: float
    p50_ms: float
    speedup: float
    low: float
    high: float


def networks(dense: Architecture) -> Iterator[tuple[str, Architecture]]:
    """The four networks of a model, by name."""
    depth = len(dense.blocks)
    fewer = dense.cut([block if number % 2 == 0 else None for number, block in enumerate(dense.blocks)], dense.streams)
    narrow = [replace(block, heads=max(1, block.heads // 2), mlp=block.mlp // 2) for block in dense.blocks]
    thirds = tuple(number * len(fewer.blocks) // 4 for number in (1, 2, 3))
    yield "dense", dense
    yield "half the heads and MLPs", dense.cut(narrow, dense.streams)
    yield "half the blocks", fewer
    yield JUDGED, fewer.with_tokens(drops_for(fewer, thirds, KEEP))
    assert depth >= 8


def files(model: str, folder: Path) -> Iterator[tuple[str, Form, Architecture, Path]]:
    """Every form of every network, the dense float file first."""
    dense = create(model, classes=1000, image_size=224, args={}).architecture
    assert isinstance(dense, Architecture)
    pixels = folder / "pixels.npy"
    shape = (CALIBRATION, dense.image_size, dense.image_size, 3)
    np.save(pixels, np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8))
    preprocessing = {"size": dense.image_size, "mean": [0.5] * 3, "std": [0.25] * 3}
    for number, (name, architecture) in enumerate(networks(dense)):
        work = folder / f"{model}-{number}"
        work.mkdir()
        source = work / "model.onnx"
        export_shape(architecture, source, OPSET)
        write_sidecar(
            source, preprocessing=preprocessing, classes=[str(n) for n in range(1000)], precision="fp32", parameters=0,
            macs=architecture.macs(), source={},
        )  # fmt: skip
        ranges = ranges_on(pixels, source, work, weight_bits(), 3600.0)
        with Workshop(source, work, weight_bits(), 3600.0, ranges) as workshop:
            for form in FORMS:
                if (path := workshop.make(form)) is not None:
                    yield name, form, architecture, path


def rows_of(model: str, options: argparse.Namespace) -> tuple[list[Row], float]:
    """All files of a model in one run, and the factor below which ratios are noise."""
    with tempfile.TemporaryDirectory() as folder:
        made = list(files(model, Path(folder)))
        made = [(*one, "cpu") for one in made] + [
            (*one, provider) for one in made if one[1] in ELSEWHERE for provider in options.provider
        ]
        subjects = []
        for name, form, architecture, path, provider in made:
            signature = open_bundle(path, sidecar_required=False).signature
            image = (3, architecture.image_size, architecture.image_size)
            label = f"{name}/{form.text()}/{provider}"
            subjects.append(Subject(label, path, signature.input, signature.dtype, image, provider))
        setting = settings_of(["cpu"], [options.threads], [options.batch])[0]
        results = measure(subjects, [setting], Plan(options.seconds, options.sessions), Silent())
        base = results[subjects[0].name, setting].slots
        rows = []
        for subject, (name, form, architecture, path, provider) in zip(subjects, made, strict=True):
            slots = results[subject.name, setting].slots
            ratio = ratio_interval(base, slots)
            p50, size = percentile_interval(slots, 50).value, path.stat().st_size / 1e6
            measured = (p50, ratio.value, ratio.low, ratio.high)
            rows.append(Row(model, name, form.text(), provider, architecture.macs(), size, *measured))
        return rows, noise_factor(base, results[TWIN, setting].slots)


def show(rows: list[Row], peaks: dict[str, float], batch: int) -> None:
    titles = f"{'MACs':>7} {'MB':>6} {'p50 ms':>8} {'times':>6} {'95% interval':>14} {'of peak':>8}"
    print(f"{'network':26} {'form':26} {titles}")
    for row in rows:
        form = row.form if row.provider == "cpu" else f"{row.form}, {row.provider}"
        share = gflops(row.macs, batch, row.p50_ms) / peaks["float" if row.form.startswith("float") else "int8"]
        print(
            f"{row.network:26} {form:26} {row.macs / 1e9:6.2f}G {row.megabytes:6.1f} {row.p50_ms:8.2f} "
            f"{row.speedup:6.2f} {f'{row.low:.2f} to {row.high:.2f}':>14} {share:8.0%}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(BARS))
    parser.add_argument("--provider", nargs="+", default=[], choices=["openvino", "cuda", "tensorrt"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="timed calls of each file")
    parser.add_argument("--sessions", type=int, default=3)
    options = parser.parse_args()
    exact = bool(DOT_PRODUCTS & set(instruction_sets()))
    kinds: tuple[Kind, ...] = ("float", "int8")
    setting, plan = settings_of(["cpu"], [options.threads], [1])[0], Plan(options.seconds)
    peaks = {kind: peak(kind, setting, plan, Silent()).gflops for kind in kinds}
    print(f"{processor_name()}, {', '.join(instruction_sets())}; {weight_bits()}-bit weights")
    print(f"large matrix product: float {peaks['float']:.0f} GFLOP/s, 8-bit {peaks['int8']:.0f} GOP/s")
    everything: list[dict[str, Any]] = []
    missed = []
    for model in options.model:
        rows, noise = rows_of(model, options)
        print(f"\n{model}, batch {options.batch}, {options.threads} threads; A/A noise {noise - 1:.1%}")
        show(rows, peaks, options.batch)
        judged = [row for row in rows if row.network == JUDGED]
        for among, bar in zip(({"cpu"}, {"cpu", *options.provider}), BARS.get(model, (None, None)), strict=True):
            best = max((row for row in judged if row.provider in among), key=lambda row: row.speedup)
            asked = f" (asked: {bar:g})" if bar else ""
            print(f"best of '{JUDGED}' on {' or '.join(sorted(among))}: {best.form}, {best.speedup:.2f} times{asked}")
            if bar and best.speedup < bar:
                missed.append(model)
            if not options.provider:
                break
        everything += [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
    if missed and not exact:
        print("this processor has no 8-bit dot products: what was missed is not judged")
    print(json.dumps({"host": processor_name(), "flags": instruction_sets(), "peaks": peaks, "rows": everything}))
    return 1 if missed and exact else 0


if __name__ == "__main__":
    sys.exit(main())
