"""The benchmark against a bare loop, against itself, and beside optimum-benchmark: one file, one thread count, one run.

    python bench/latency.py [--onnx FILE] [--threads 1] [--optimum PYTHON]

The file is a DeiT-T at 224 px with random weights, unless --onnx names another. Three questions:

- Does the protocol add anything? Its worker and a plain Python loop around `session.run`, each a process on the same
  cores, take turns in random order, a slot each in a round, over three lives of both. Bar: medians within 3%.
- Does it repeat? `sievit benchmark --onnx` runs twice. Bar: medians within 3% of each other, or the tool itself said
  that they are that uncertain (its noise floor, or the intervals of its p50).
- What does optimum-benchmark say of the same file? Its figure is shown and has no bar. It lives in an environment of
  its own, whose Python --optimum names:

    python -m venv optimum
    optimum/bin/pip install optimum-benchmark "optimum[onnxruntime]<1.25" "transformers<4.49"

Also seconds until `sievit benchmark --onnx` has a first row (bar: 10) and whether it imported torch (bar: no), and how
near the default file comes to what the host's cores can do. Prints a table and, last, one line of JSON. Exit code 1
when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.child import Child
from sievit.stages.deploy.comparison import Quiet
from sievit.stages.deploy.isa import host_facts, measuring_cores
from sievit.stages.deploy.latency import Plan, Setting, Subject, load_command
from sievit.stages.deploy.peak import gflops, peak
from sievit.stages.deploy.statistics import Slot, percentile_interval, ratio_interval
from sievit.stages.deploy.variants import Variant

BAR = 0.03
SECONDS_BAR = 10.0
MODEL = "deit_tiny_patch16_224"
OPSET = 20

# What anybody would write: no warm-up rule, no rounds, no settings but the number of threads.
BARE = """
import json, os, sys, time
import numpy as np, onnxruntime as ort
path, threads, cores, shape, dtype = json.loads(sys.argv[1])
os.sched_setaffinity(0, cores)
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: np.random.default_rng(0).standard_normal(shape).astype(dtype)}
for _ in range(10):
    session.run(None, feed)
for line in sys.stdin:
    taken = []
    session.run(None, feed)
    for _ in range(int(line)):
        start = time.perf_counter()
        session.run(None, feed)
        taken.append((time.perf_counter() - start) * 1e3)
    print(json.dumps(taken), flush=True)
"""

# A folder as transformers wants it, and optimum-benchmark's own classes; their defaults but threads and batch.
OPTIMUM = """
import json, logging, os, sys
folder, threads, seconds, cores = json.loads(sys.argv[1])
os.sched_setaffinity(0, cores)
from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, ORTConfig
backend = ORTConfig(
    model=folder, task="image-classification", device="cpu", library="transformers", model_type="vit", export=False,
    session_options={"intra_op_num_threads": threads},
)
scenario = InferenceConfig(
    latency=True, memory=False, energy=False, duration=seconds, iterations=10, warmup_runs=10,
    input_shapes={"batch_size": 1},
)
report = Benchmark.launch(
    BenchmarkConfig(name="file", launcher=InlineConfig(), scenario=scenario, backend=backend)
)
print("\\n" + json.dumps([value * 1e3 for value in report.forward.latency.values]))
"""

COMMAND = """
import sys
from sievit.stages.__main__ import main
sys.argv = ["sievit", "benchmark", *sys.argv[1:]]
code = main()
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def made(path: Path) -> int:
    """Write the default file; returns its multiply-accumulates."""
    from sievit.stages.vision.network import create
    from sievit.stages.vision.onnx_export import export_shape

    architecture = create(MODEL, classes=1000, image_size=224, args={}).architecture
    export_shape(architecture, path, OPSET)
    return architecture.macs()


def against_bare(subject: Subject, threads: int, plan: Plan) -> tuple[list[Slot], list[Slot]]:
    """Slots of the worker and of the bare loop, interleaved: (ours, bare)."""
    setting, cores = Setting("cpu", threads, 1, "host"), measuring_cores(threads)
    order, rounds = random.Random(plan.seed), 20
    ours: list[Slot] = []
    bare: list[Slot] = []
    given = json.dumps([str(subject.path), threads, cores, [1, *subject.image], subject.dtype])
    for session in range(plan.sessions):
        with (
            tempfile.TemporaryDirectory() as cache,
            Child("worker", "worker") as child,
            subprocess.Popen(
                [sys.executable, "-c", BARE, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as loop,
        ):
            assert loop.stdin is not None and loop.stdout is not None
            child.ask(load_command("load", subject, setting, cache), plan.timeout_s)
            child.ask({"do": "prepare", "shape": [1, *subject.image], "io": "host"}, plan.timeout_s)
            call_ms = child.ask({"do": "warm", "limit_s": plan.warm_up_s}, plan.timeout_s)["call_ms"]
            calls = max(3, round(plan.seconds / plan.sessions / rounds * 1e3 / call_ms))
            for number in range(rounds):
                for who in order.sample(["ours", "bare"], 2):
                    if who == "ours":
                        seen = child.ask({"do": "time", "calls": calls}, plan.timeout_s)
                        walls = seen["wall_ms"]
                        ours.append(Slot(session, number, np.asarray(walls), seen["cpu_ms"], seen["thread_ms"]))
                    else:
                        loop.stdin.write(f"{calls}\n")
                        loop.stdin.flush()
                        walls = json.loads(loop.stdout.readline())
                        bare.append(Slot(session, number, np.asarray(walls), 0.0, 0.0))
            loop.stdin.close()
    return ours, bare


def told(path: Path, threads: int) -> tuple[dict[str, Any], bool]:
    """What the command says of the file, and whether it imported torch."""
    command = [sys.executable, "-c", COMMAND, "--onnx", str(path), "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr.split()[-1] == "True"


def first_row(path: Path, threads: int) -> float:
    """Seconds until the command has said a first p50."""
    command = [sys.executable, "-c", COMMAND, "--onnx", str(path), "--threads", str(threads)]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        seconds = next((time.monotonic() - begun for line in process.stdout if "p50" in line), float("inf"))
        process.terminate()
    return seconds


def uncertainty(measured: dict[str, Any]) -> float:
    """What the tool says of its own p50, as a fraction: the noise floor, or how far the interval reaches."""
    row = measured["rows"][0]
    reach = max(row["p50_high"] / row["p50_ms"], row["p50_ms"] / row["p50_low"]) - 1
    return float(max(measured["noise_floor"]["percent"] / 100, reach))


def by_optimum(python: str, path: Path, image: Sequence[int], threads: int, seconds: float) -> list[float]:
    """Milliseconds of each call as optimum-benchmark measures it."""
    channels, side, _ = image
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = onnx.load(path)
        before = open_bundle(path, sidecar_required=False).signature
        for value in [*model.graph.input, *model.graph.output]:  # the names that transformers feeds and reads
            value.name = {before.input: "pixel_values", before.output: "logits"}.get(value.name, value.name)
        for node in model.graph.node:
            for names in (node.input, node.output):
                for place, one in enumerate(names):
                    names[place] = {before.input: "pixel_values", before.output: "logits"}.get(one, one)
        onnx.save(model, folder / "model.onnx")
        config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": side,
                  "num_channels": channels, "patch_size": 16}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        size = {"height": side, "width": side}
        processor = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        given = json.dumps([name, threads, seconds, measuring_cores(threads)])
        done = subprocess.run([python, "-c", OPTIMUM, given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"optimum-benchmark failed:\n{done.stderr[-2000:]}")
    return [float(ms) for ms in json.loads(done.stdout.splitlines()[-1])]


def missed(ratio: float, runs: Sequence[dict[str, Any]], seconds: float, torch: bool) -> list[str]:
    """The bars that do not hold. ratio: our p50 over the bare loop's; runs: what the tool said twice."""
    found = []
    if abs(ratio - 1) > BAR:
        found.append(f"p50 is {ratio:.3f} times that of a bare loop, {BAR:.0%} are allowed")
    first, second = (run["rows"][0]["p50_ms"] for run in runs)
    apart, said = abs(first / second - 1), max(map(uncertainty, runs))
    if apart > max(BAR, said):
        found.append(f"two runs differ by {apart:.1%}, and say that they are {said:.1%} uncertain")
    if seconds > SECONDS_BAR:
        found.append(f"the first row came after {seconds:.1f} s, {SECONDS_BAR:.0f} are allowed")
    if torch:
        found.append("torch was imported")
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help=f"default: {MODEL} with random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0, help="timed calls of each of worker and bare loop")
    parser.add_argument("--optimum", metavar="PYTHON", help="of an environment that has optimum-benchmark")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        path = options.onnx or Path(folder) / "model.onnx"
        macs = made(path) if options.onnx is None else None
        subject = Variant("", path.name, False, open_bundle(path, sidecar_required=False)).subject(1)
        plan = Plan(seconds=options.seconds)
        ours, bare = against_bare(subject, options.threads, plan)
        answers = [told(path, options.threads) for _ in range(2)]
        seconds = first_row(path, options.threads)
        optimum = None
        if options.optimum:
            optimum = by_optimum(options.optimum, path, subject.image, options.threads, options.seconds)
        top = peak("float", Setting("cpu", options.threads, 1, "host"), plan, Quiet())
    runs = [answer[0] for answer in answers]
    torch = any(answer[1] for answer in answers)
    medians = {"worker": percentile_interval(ours, 50), "bare loop": percentile_interval(bare, 50)}
    ratio = ratio_interval(ours, bare)  # ours over bare, within rounds
    for name, found in medians.items():
        print(f"{name:<24} p50 {found.value:8.3f} ms ({found.low:.3f} to {found.high:.3f})")
    print(f"{'worker / bare loop':<24} {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})")
    for number, run in enumerate(runs):
        row = run["rows"][0]
        print(
            f"{f'sievit benchmark, run {number + 1}':<24} p50 {row['p50_ms']:8.3f} ms "
            f"({row['p50_low']:.3f} to {row['p50_high']:.3f}), noise floor {run['noise_floor']['percent']:.1f}%"
        )
    if optimum is None:
        print('optimum-benchmark        not measured: see --help, "--optimum PYTHON"')
    else:
        print(f"{'optimum-benchmark':<24} p50 {np.median(optimum):8.3f} ms of {len(optimum)} calls")
    print(f"first row after {seconds:.1f} s; torch {'was' if torch else 'was not'} imported")
    if macs:
        reached = gflops(macs, 1, medians["worker"].value)
        print(f"reached {reached:.1f} GFLOP/s, {reached / top.gflops:.0%} of {top.gflops:.1f} of a large product")
    found = missed(ratio.value, runs, seconds, torch)
    for line in found:
        print(f"missed: {line}")
    if not found:
        print("all bars hold")
    print(json.dumps({
        "host": host_facts(), "threads": options.threads, "ratio": [ratio.value, ratio.low, ratio.high],
        "p50_ms": {name: one.value for name, one in medians.items()},
        "runs": [run["rows"][0]["p50_ms"] for run in runs], "uncertainty": [uncertainty(run) for run in runs],
        "optimum_p50_ms": None if optimum is None else float(np.median(optimum)), "seconds": seconds,
        "peak_gflops": top.gflops, "missed": found,
    }))  # fmt: skip
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
