"""The benchmark: what it promises about its table, its processes and its refusals. No test looks at a time itself."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from sievit.pipeline import views
from sievit.pipeline.errors import SievitError
from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context, Labelled
from sievit.stages import benchmark
from sievit.stages.benchmark import BenchmarkConfig, benchmark_files, run
from sievit.stages.deploy import child, isa, latency, predict, sessions, worker
from sievit.stages.deploy.child import Child, ChildFailed
from sievit.stages.deploy.comparison import first_medians, host_state, watch
from sievit.stages.deploy.latency import TWIN, Measured, Plan, Setting, Subject
from sievit.stages.deploy.predict import accuracy, scores
from sievit.stages.deploy.statistics import Slot
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.dataset import load_split

QUICK = Plan(seconds=0.2, sessions=3, warm_up_s=0.1, timeout_s=60)
DATA = DataConfig(source="builtin:digits", image_size=8, max_test=120)


@dataclass
class Listening:
    """A progress that remembers what it was told."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    steps: int = 0
    total: int = 0

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Listening]:
        self.total += total
        yield self

    def advance(self, steps: int = 1, **values: float) -> None:
        self.steps += steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Folder:
    """As much of an artifact as a stage sees."""

    root: Path
    kind_of_stage: str = "export"
    key: str = "0" * 12
    digest: str = "0" * 64
    ref: str = "made@1"

    def file(self, name: str) -> Path:
        return self.root / name


def made(folder: Path, *, seed: int = 0, work: int = 0, precision: str = "fp32", name: str = "model") -> Folder:
    folder.mkdir(parents=True, exist_ok=True)
    path = tiny_onnx.linear(folder / f"{name}.onnx", classes=10, seed=seed, work=work)
    tiny_onnx.sidecar(path, classes=10, precision=precision)
    return Folder(folder)


def context(tmp_path: Path, many: list[Labelled], **config: Any) -> Context:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    return Context(
        config=BenchmarkConfig(**({"seconds": 0.2, "warm_up": 0.1, "attribution": False} | config)),
        data=DATA,
        model=ModelConfig(),
        seed=0,
        device="cpu",
        arm="main",
        entry="benchmark",
        base=tmp_path,
        out=out,
        work=work,
        inputs={},
        many=many,
        references={},
        progress=Listening(),  # type: ignore[arg-type]
    )


def test_the_stage_measures_every_file_of_every_arm_once_and_compares_with_dense(tmp_path: Path) -> None:
    export, dense = made(tmp_path / "export", seed=1), made(tmp_path / "dense", seed=2, work=4)
    quantized = made(tmp_path / "quantize", seed=1)  # float was kept: the same bytes as export's
    made(tmp_path / "quantize", seed=3, precision="int8", name="int8")
    many = [
        Labelled("main", "export", export, False, 0),  # type: ignore[arg-type]
        Labelled("main", "quantize", quantized, True, 0),  # type: ignore[arg-type]
        Labelled("dense", "export", dense, True, 0),  # type: ignore[arg-type]
    ]
    ctx = context(tmp_path, many, batch_sizes=(1, 2))
    run(ctx)
    rows = ctx.metrics["rows"]
    names = [(row["arm"], row["entry"], row["variant"], row["final"], row["batch"]) for row in rows]
    assert sorted(names) == sorted(
        (arm, entry, variant, final, batch)
        for batch in (1, 2)
        for arm, entry, variant, final in (
            ("main", "quantize", "fp32", True),
            ("main", "quantize", "int8", False),
            ("dense", "export", "fp32", True),
        )
    )
    assert ctx.metrics["baseline"] == {"arm": "dense", "entry": "export", "variant": "fp32"}
    images = load_split(DATA.model_dump(), tmp_path, "test")
    for row in rows:
        folder = {"main": quantized, "dense": dense}[row["arm"]]
        path = folder.file("int8.onnx" if row["variant"] == "int8" else "model.onnx")
        assert row["top1"] == accuracy(scores(path, images.pixels()), images.labels).top1
        assert row["top1_low"] <= row["top1"] <= row["top1_high"]
        assert row["test_images"] == len(images)
        assert row["p50_low"] <= row["p50_ms"] <= row["p50_high"]
        for rank, needed in (("p90", 64), ("p95", 130), ("p99", 662)):
            if row["samples"] < needed:
                assert [row[f"{rank}_{part}"] for part in ("ms", "low", "high")] == [None] * 3
                assert row[f"{rank}_unsaid"] == f"{row['samples']} calls, {needed} needed"
            else:
                assert row[f"{rank}_low"] <= row[f"{rank}_ms"] <= row[f"{rank}_high"]
                assert row[f"{rank}_unsaid"] == ""
        assert row["bytes"] == path.stat().st_size
        assert row["gflops"] == pytest.approx(2 * 768 * row["batch"] / (row["p50_ms"] * 1e6))
        kind = "int8" if row["variant"] == "int8" else "float"
        (peak,) = [one["gflops"] for one in ctx.metrics["peaks"] if one["kind"] == kind]
        assert row["peak_share"] == pytest.approx(row["gflops"] / peak)
        assert row["samples"] > 0
        assert (row["verdict"] == "baseline") == (row["arm"] == "dense")
    first = {(row["arm"], row["final"]): row for row in rows if row["batch"] == 1}
    assert ctx.metrics["gates"] == {
        "accuracy_drop": first["dense", True]["top1"] - first["main", True]["top1"],
        "speedup": pytest.approx(first["main", True]["speedup"]),
    }
    assert json.loads((ctx.out / "rows.json").read_text()) == json.loads(json.dumps(rows))
    with np.load(ctx.out / "samples.npz", allow_pickle=False) as samples:
        assert f"{TWIN}/cpu/t1/b1/host" in samples.files
        kept = samples["dense/export/fp32/cpu/t1/b1/host"]
    spread = json.loads((ctx.out / "spread.json").read_text())
    assert spread["setting"] == "cpu, batch 1, 1 thread"
    curves = {one["file"]: one["ms"] for one in spread["files"]}
    assert set(curves) == {"dense/export/fp32", "main/quantize/fp32", "main/quantize/int8", TWIN}
    assert curves["dense/export/fp32"] == pytest.approx(np.percentile(kept[:, 2], range(101)), rel=1e-3)
    assert len(kept) == first["dense", True]["samples"]
    assert set(kept[:, 0]) == set(range(5))
    assert float(np.median(kept[:, 2])) == pytest.approx(first["dense", True]["p50_ms"], rel=1e-5)
    pair = [scores(f.file("model.onnx"), images.pixels()).argmax(1) == images.labels for f in (dense, quantized)]
    lost, won = int((pair[0] & ~pair[1]).sum()), int((pair[1] & ~pair[0]).sum())
    (flips,) = ctx.metrics["flips"]
    assert (flips["arm"], flips["entry"], flips["against"]["arm"]) == ("main", "quantize", "dense")
    assert (flips["images"], flips["lost"], flips["won"]) == (len(images), lost, won)
    (beside,) = ctx.metrics["between_arms"]
    assert (beside["arm"], beside["against"], beside["images"]) == ("main", "dense", len(images))
    assert beside["difference"] == pytest.approx((won - lost) / len(images)) and beside["p"] == flips["p"]
    kept_flips = json.loads((ctx.out / "flips.json").read_text())
    assert kept_flips["files"][0]["lost"] == lost
    for one in kept_flips["shown"]:
        right = {role: one[role] == images.classes[images.labels[one["index"]]] for role in ("dense", "final")}
        assert right == {"dense": one["flip"] == "lost", "final": one["flip"] == "won"}
        assert one["truth"] == images.classes[images.labels[one["index"]]]
        assert (ctx.out / one["file"]).read_bytes()[:3] == b"\xff\xd8\xff"
    assert len(kept_flips["shown"]) == min(24, lost + won) > 0
    assert "attribution" not in ctx.metrics, "it was left out"
    json.dumps(ctx.metrics, allow_nan=False)


def test_gates_and_the_summary_over_seeds_hold_means_with_each_seed_against_its_own_dense_file(tmp_path: Path) -> None:
    many = [
        Labelled(name, "export", made(tmp_path / name, seed=number), True, seed)  # type: ignore[arg-type]
        for number, (name, seed) in enumerate(
            [("main", 3), ("dense", 3), ("main@seed5", 5), ("dense@seed5", 5)], start=1
        )
    ]
    ctx = context(tmp_path, many, batch_sizes=(1,), seconds=0.1)
    run(ctx)
    rows = {row["arm"]: row for row in ctx.metrics["rows"]}
    assert [(row["family"], row["seed"]) for row in rows.values()] == [(m.family, m.seed) for m in many]
    drops = [rows[f"dense{at}"]["top1"] - rows[f"main{at}"]["top1"] for at in ("", "@seed5")]
    speedups = [rows[f"main{at}"]["speedup"] for at in ("", "@seed5")]
    assert ctx.metrics["gates"]["accuracy_drop"] == pytest.approx(sum(drops) / 2)
    assert ctx.metrics["gates"]["speedup"] == pytest.approx((speedups[0] * speedups[1]) ** 0.5)
    main, dense = ctx.metrics["over_seeds"]
    assert (main["arm"], main["seeds"], main["speedup"]) == ("main", [3, 5], speedups)
    top1 = [rows["dense"]["top1"], rows["dense@seed5"]["top1"]]
    assert dense["top1_mean"] == pytest.approx(sum(top1) / 2)
    # Student's t with one degree of freedom: 12.706 standard errors, and that of two numbers is half their distance.
    reach = 12.7062047 * abs(top1[0] - top1[1]) / 2
    assert dense["top1_low"] == pytest.approx(max(0.0, dense["top1_mean"] - reach))
    assert dense["top1_high"] == pytest.approx(min(1.0, dense["top1_mean"] + reach))
    assert top1[0] != top1[1]


@pytest.mark.slow
def test_without_a_dense_arm_the_float_file_is_the_baseline_and_there_are_no_gates(tmp_path: Path) -> None:
    many = [
        Labelled("main", "export", made(tmp_path / "a", seed=1), False, 0),  # type: ignore[arg-type]
        Labelled("main", "quantize", made(tmp_path / "b", seed=2, precision="int8"), True, 0),  # type: ignore[arg-type]
    ]
    ctx = context(tmp_path, many, batch_sizes=(1,))
    run(ctx)
    assert ctx.metrics["baseline"] == {"arm": "main", "entry": "export", "variant": "fp32"}
    assert ctx.metrics["gates"] == {}


def test_a_file_for_other_classes_than_the_test_split_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    tiny_onnx.sidecar(tiny_onnx.linear(folder / "model.onnx"))
    ctx = context(tmp_path, [Labelled("main", "export", Folder(folder), True, 0)])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="tells 4 classes apart, the test split has 10"):
        run(ctx)


@pytest.mark.slow
def test_any_onnx_file_is_measured_without_torch_and_without_a_sidecar(tmp_path: Path) -> None:
    tiny_onnx.linear(tmp_path / "a.onnx")
    tiny_onnx.linear(tmp_path / "b.onnx", seed=1)
    script = f"""
import json, pathlib, sys
from sievit.stages.benchmark import benchmark_files
folder = pathlib.Path({str(tmp_path)!r})
found = benchmark_files([folder / "a.onnx", folder / "b.onnx"], seconds=0.2)
heavy = [name for name in ("torch", "timm", "nncf", "torchvision", "matplotlib") if name in sys.modules]
print(json.dumps([found, heavy], allow_nan=False))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found, heavy = json.loads(told.stdout)
    assert heavy == []
    assert [(row["file"], row["variant"], row["top1"], row["parameters"]) for row in found["rows"]] == [
        ("a.onnx", "fp32", None, 768),
        ("b.onnx", "fp32", None, 768),
    ]
    assert found["rows"][0]["nodes"] == {"CPUExecutionProvider": 2}
    assert found["host"]["onnxruntime"] == ort.__version__


@pytest.mark.slow
def test_files_of_one_name_are_told_apart_and_equal_files_share_a_measurement(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "model.onnx" for folder in ("one", "two", "three")]
    for path, seed in zip(paths, (0, 1, 0), strict=True):
        path.parent.mkdir()
        tiny_onnx.linear(path, seed=seed)
    rows = benchmark_files(paths, seconds=0.1)["rows"]
    assert [row["entry"] for row in rows] == [str(path) for path in paths]
    assert rows[0]["sha256"] == rows[2]["sha256"] != rows[1]["sha256"]
    # Two measurements agree in one figure by chance, in all of them only when they are the same measurement.
    measured = ("p50_ms", "p50_low", "p50_high", "cpu_ms", "load_ms", "first_ms", "samples")
    first, other, same = ([row[name] for name in measured] for row in rows)
    assert first == same != other
    assert [row["verdict"] == "baseline" for row in rows] == [True, False, True]


def test_a_file_that_cannot_be_fed_is_refused_with_its_signature(tmp_path: Path) -> None:
    fixed = tiny_onnx.linear(tmp_path / "fixed.onnx", batch=2)
    with pytest.raises(InvalidInput, match=r"takes batches of 2 only, not of 1: input float32 \[2,3,8,8\]"):
        benchmark_files([fixed])
    nodes = [helper.make_node("GlobalAveragePool", ["input"], ["logits"])]
    shape: list[int | str] = ["batch", 3, "height", "width"]
    free = tiny_onnx.save(tmp_path / "open.onnx", nodes, [], shape, ["batch", 3, 1, 1])
    with pytest.raises(InvalidInput, match="leaves its image size open"):
        benchmark_files([free])
    with pytest.raises(InvalidInput, match="no file to measure"):
        benchmark_files([])


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "openvino"])
def test_an_absent_provider_is_refused_and_says_what_to_install(tmp_path: Path, provider: str) -> None:
    if sessions.PROVIDERS[provider][0] in ort.get_available_providers():
        pytest.skip(f"{provider} is installed here")
    with pytest.raises(InvalidInput, match=f"provider {provider} is not in the installed onnxruntime") as error:
        benchmark_files([tiny_onnx.linear(tmp_path / "a.onnx")], providers=(provider,))
    assert re.search(r"pip install '?onnxruntime-(gpu|openvino)", error.value.hint)


def test_more_threads_than_cores_are_refused(tmp_path: Path) -> None:
    cores = len(isa.usable_cores())
    with pytest.raises(InvalidInput, match=f"{cores + 1} threads were asked for"):
        benchmark_files([tiny_onnx.linear(tmp_path / "a.onnx")], threads=(cores + 1,))


def test_heavy_operators_on_another_provider_are_an_error(tmp_path: Path) -> None:
    def event(op: str, provider: str) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{op}_kernel_time", "args": {"op_name": op, "provider": provider}}

    profile = tmp_path / "profile.json"
    events = [event("MatMul", "CUDAExecutionProvider"), event("Shape", "CPUExecutionProvider")]
    profile.write_text(json.dumps(events))
    found = sessions.placement(profile, "cuda")
    assert found.nodes == {"CUDAExecutionProvider": 1, "CPUExecutionProvider": 1}
    profile.write_text(json.dumps([*events, event("Softmax", "CPUExecutionProvider")]))
    with pytest.raises(InvalidInput, match="1 Softmax ran on another provider"):
        sessions.placement(profile, "cuda")
    with pytest.raises(InvalidInput, match="1 MatMul, 1 Softmax ran on another provider"):
        sessions.placement(profile, "tensorrt")


def subject(path: Path, name: str = "a") -> Subject:
    return Subject(name, path, "input", "float32", (3, 8, 8))


def test_a_file_may_have_a_provider_of_its_own_and_one_that_is_absent_is_refused(tmp_path: Path) -> None:
    here, setting = subject(tiny_onnx.linear(tmp_path / "a.onnx")), Setting("cpu", 1, 1, "host")
    own = replace(here, provider="openvino")
    assert latency.load_command("load", own, setting, "")["provider"] == "openvino"
    assert latency.load_command("load", here, setting, "")["provider"] == "cpu"
    if "OpenVINOExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(InvalidInput, match="provider openvino is not in the installed onnxruntime"):
            latency.measure([here, own], [setting], QUICK, Listening())


def test_a_file_that_a_further_provider_does_not_run_loses_its_rows_there_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO is the CPU's own provider in disguise here, which refuses one file."""
    dense, main = made(tmp_path / "dense", seed=2), made(tmp_path / "quantize", seed=1)
    made(tmp_path / "quantize", seed=3, precision="int8", name="int8")
    many = [
        Labelled("main", "quantize", main, True, 0),  # type: ignore[arg-type]
        Labelled("dense", "export", dense, True, 0),  # type: ignore[arg-type]
    ]
    place = latency._placement

    def picky(subject: Subject, setting: Setting, cache: str, plan: Plan) -> dict[str, Any]:
        if subject.name in refused and setting.provider == "openvino":
            raise InvalidInput("2 QAttention ran on another provider")
        return place(subject, setting, cache, plan)

    monkeypatch.setattr(latency, "_placement", picky)
    monkeypatch.setattr(latency, "require_serving", lambda *_: None)
    monkeypatch.setattr(Subject, "on", lambda *_: "cpu")
    judged: list[str] = []

    def open_session(path: Path, *, provider: str, threads: int) -> ort.InferenceSession:
        judged.append(provider)
        return sessions.open_session(path)

    monkeypatch.setattr(predict, "open_session", open_session)
    refused = ["main/quantize/int8"]
    asked: dict[str, Any] = {"batch_sizes": (1,), "seconds": 0.05, "sessions": 3, "warm_up": 0.05}
    ctx = context(tmp_path, many, providers=("cpu", "openvino"), **asked)
    run(ctx)
    rows = {(row["arm"], row["variant"], row["provider"]) for row in ctx.metrics["rows"]}
    every = {("main", "fp32"), ("main", "int8"), ("dense", "fp32")}
    assert rows == {(*one, provider) for one in every for provider in ("cpu", "openvino")} - {
        ("main", "int8", "openvino")
    }
    assert all(row["top1"] is not None for row in ctx.metrics["rows"])
    assert judged == ["cpu"] * 3 + ["openvino"] * 2, "the first provider's answers are what images are lost and won by"
    reason = "2 QAttention ran on another provider"
    assert ctx.metrics["unmeasured"] == [{"file": refused[0], "provider": "openvino", "reason": reason}]
    assert f"{refused[0]} is not measured on openvino: {reason}" in ctx.progress.warnings  # type: ignore[attr-defined]
    assert ctx.metrics["gates"].keys() == {"accuracy_drop", "speedup"}
    assert "openvino" in measurement_of(ctx.metrics) and reason in measurement_of(ctx.metrics)

    for file in ("dense/export/fp32", "main/quantize/fp32"):  # the baseline; what main ships, and no provider before it
        refused[:] = [file]
        again = tmp_path / file.replace("/", "-")
        again.mkdir()
        with pytest.raises(InvalidInput, match="2 QAttention ran on another provider"):
            run(context(again, many, providers=("openvino",), **asked))


def test_of_several_providers_that_do_not_run_what_is_shipped_the_first_ones_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Labelled("main", "export", made(tmp_path / "export"), True, 0)]  # type: ignore[arg-type]
    both = [{"file": "main/export/fp32", "provider": name, "reason": f"not on {name}"} for name in ("cuda", "openvino")]
    monkeypatch.setattr(latency, "require_serving", lambda *_: None)
    monkeypatch.setattr(benchmark, "_timed", lambda *_: ({"unmeasured": both}, {}, lambda *_: False))
    with pytest.raises(InvalidInput, match="openvino decides: not on openvino"):
        run(context(tmp_path, many, providers=("openvino", "cuda")))


def measurement_of(metrics: dict[str, Any]) -> str:
    """What a terminal shows of it."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(views.measurement(metrics))
    return console.export_text()


def test_tensorrt_is_asked_in_its_own_words_and_no_two_files_share_an_engine(tmp_path: Path) -> None:
    paths = [tiny_onnx.linear(tmp_path / f"{name}.onnx", seed=seed) for seed, name in enumerate("ab")]
    cache = tmp_path / "engines"
    kept = set()
    for path in paths:
        for batch in (1, 8):
            (name, options), *others = sessions._chain("tensorrt", path, 1, {"input": (batch, 3, 8, 8)}, cache)
            assert name == "TensorrtExecutionProvider"
            assert others == ["CUDAExecutionProvider", "CPUExecutionProvider"]
            assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
            for end in ("min", "opt", "max"):
                assert options[f"trt_profile_{end}_shapes"] == f"input:{batch}x3x8x8"
            assert not options.keys() & {"trt_int8_enable", "trt_fp16_enable"}, "the file is float"
            assert Path(options["trt_engine_cache_path"]).is_dir()
            kept.add(options["trt_engine_cache_path"])
    assert len(kept) == 4
    again = sessions._chain("tensorrt", paths[0], 1, {"input": (8, 3, 8, 8)}, cache)[0][1]
    assert again["trt_engine_cache_path"] in kept, "the second process of a file finds what the first one built"


@pytest.mark.parametrize(
    ("kind", "allowed"), [(TensorProto.INT8, {"trt_int8_enable"}), (TensorProto.FLOAT16, {"trt_fp16_enable"})]
)
def test_tensorrt_may_compute_in_what_the_file_holds(kind: int, allowed: set[str], tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [1]) for end in "xy"]
    constants = [numpy_helper.from_array(np.float32(1), "s"), numpy_helper.from_array(np.int8(0), "z")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    if kind == TensorProto.FLOAT16:
        constants = [numpy_helper.from_array(np.float16(2), "h")]
        nodes = [helper.make_node("Cast", ["x"], ["c"], to=kind), helper.make_node("Mul", ["c", "h"], ["m"])]
        nodes += [helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT)]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    onnx.save(model, tmp_path / "m.onnx")
    options = sessions._chain("tensorrt", tmp_path / "m.onnx", 1, None, None)[0][1]
    assert options == dict.fromkeys(allowed, "True")


def test_why_a_provider_does_not_start_is_what_it_wrote_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    missing = "cannot open shared object file: No such file or directory"
    lines = [
        f"Failed to load libcublasLt.so.13: libcublasLt.so.13: {missing}",
        f"\x1b[1;31m[E:onnxruntime:Default] FAIL : with error: libcudnn.so.9: {missing}\x1b[m",
    ]
    with sessions._listening(heard):
        os.write(2, "\n".join(lines).encode())  # native code does not go through sys.stderr
    assert sessions._why(heard) == "not found: libcublasLt.so.13, libcudnn.so.9"
    assert "libcudnn.so.9" in capfd.readouterr().err, "a log still has it"
    heard = ["[E:onnxruntime:Default, x.cc:1 f] CUDA failure 35: CUDA driver version is insufficient"]
    assert sessions._why(heard) == heard[0]
    assert sessions._why([], "/onnxruntime_src/x.cc:729 no TensorRT") == "no TensorRT"
    assert sessions._why([]) == "it does not say why"


def test_variants_are_interleaved_in_random_order_with_the_baseline_twice(tmp_path: Path) -> None:
    subjects = [subject(tiny_onnx.linear(tmp_path / f"{name}.onnx", seed=i), name) for i, name in enumerate("ab")]
    settings = latency.settings_of(["cpu"], [1], [1, 3])
    progress = Listening()
    results = latency.measure(subjects, settings, QUICK, progress)
    assert set(results) == {(name, setting) for name in ("a", "b", TWIN) for setting in settings}
    for measured in results.values():
        seen = [(slot.session, slot.round) for slot in measured.slots]
        assert seen == sorted(set(seen))
        assert {session for session, _ in seen} == {0, 1, 2}
        assert len(measured.load_ms) == len(measured.first_ms) == len(measured.peak_memory_mb) == 3
        assert all((slot.wall_ms > 0).all() and slot.cpu_ms > 0 for slot in measured.slots)
    assert progress.steps == progress.total


def test_a_first_median_of_every_file_is_told_after_the_first_session_and_no_second_one(tmp_path: Path) -> None:
    subjects = [subject(tiny_onnx.linear(tmp_path / f"{name}.onnx", seed=i), name) for i, name in enumerate("ab")]
    progress, known = Listening(), []
    tell = first_medians(progress, QUICK.sessions)

    def after_session(results: latency.Results) -> None:
        tell(results)
        known.append(len(progress.notes))

    settings = latency.settings_of(["cpu"], [1], [1])
    results = latency.measure(subjects, settings, QUICK, progress, after_session=after_session)
    assert known == [2, 2, 2]
    for note, name in zip(progress.notes, "ab", strict=True):
        first = [slot.wall_ms for slot in results[name, settings[0]].slots if slot.session == 0]
        assert note == (
            f"{name}, cpu, batch 1, threads 1, host: p50 {np.median(np.concatenate(first)):.3g} ms after the first "
            "of 3 sessions"
        )


def test_a_worker_runs_on_as_many_cores_as_threads(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "a.onnx")
    with Child("worker", "a") as process:
        command = latency.load_command("load", subject(path), Setting("cpu", 1, 1, "host"), str(tmp_path))
        process.ask(command, 60)
        assert os.sched_getaffinity(process._process.pid) == set(isa.measuring_cores(1))
    assert len(isa.measuring_cores(1)) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bound_call_computes_what_a_plain_one_does(tmp_path: Path, batch: int) -> None:
    """The calls that a card is timed with, here on the CPU's memory."""
    session = sessions.open_session(tiny_onnx.linear(tmp_path / "a.onnx"))
    inputs = worker.random_input([batch, 3, 8, 8], "float32")
    (plain,) = worker.bind(session, "input", inputs, "host")()  # type: ignore[misc]
    bound = worker.bind(session, "input", inputs, "device", "cpu")
    for _ in range(2):
        (output,) = bound().copy_outputs_to_cpu()  # type: ignore[attr-defined]
        np.testing.assert_array_equal(output, plain)


def test_a_model_cannot_set_the_threads_of_its_own_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    monkeypatch.setattr(child, "__package__", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "asks.py").write_text(
        "import os; from sievit.stages.deploy.child import serve, answering\n"
        "for command, stream in serve():\n"
        "    with answering(stream) as content: content['env'] = os.environ.get('ORT_LOAD_CONFIG_FROM_MODEL')\n"
    )
    with own_child(monkeypatch, "asks") as process:
        assert process.ask({"do": "tell"}, 30) == {"env": None}


def own_child(monkeypatch: pytest.MonkeyPatch, module: str) -> Child:
    """A child that runs a top-level module of a test."""
    real = subprocess.Popen

    def popen(arguments: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        return real([module if part == f".{module}" else part for part in arguments], **kwargs)

    monkeypatch.setattr(child.subprocess, "Popen", popen)
    return Child(module, module)


MISBEHAVING = """
import os, signal, sys, time
from sievit.stages.deploy.child import serve, answering
for command, stream in serve():
    with answering(stream) as content:
        print("chatter of a library")
        print("a last word", file=sys.stderr, flush=True)
        match command["do"]:
            case "crash": os.kill(os.getpid(), signal.SIGSEGV)
            case "hang": time.sleep(1000)
            case "raise": raise RuntimeError("out of luck")
            case "hog": bytearray(1 << 50)
"""


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("crash", r"its process ended during crash \(signal SIGSEGV\).*a last word"),
        ("hang", r"no answer to hang within 1 s"),
        ("raise", r"raise failed: RuntimeError: out of luck"),
        ("hog", r"hog failed: MemoryError"),
    ],
)
def test_a_child_that_misbehaves_gives_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str, message: str
) -> None:
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.setattr(child, "__package__", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    with own_child(monkeypatch, "misbehaving") as process:
        assert process.ask({"do": "nothing"}, 30) == {}  # chatter on stdout is not taken for an answer
        with pytest.raises(ChildFailed, match=message):
            process.ask({"do": do}, 1 if do == "hang" else 30)
    assert process._process.poll() is not None


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    tiny_onnx.linear(tmp_path / "a.onnx")
    script = """
import time
from sievit.stages.deploy.child import Child
children = [Child("worker", str(i)) for i in range(2)]
for child in children:
    child.ask({"do": "ready"}, 60)
print(*[child._process.pid for child in children], flush=True)
time.sleep(1000)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.05)


def test_a_model_that_never_ends_is_ended(tmp_path: Path) -> None:
    def value(name: str, kind: int, shape: list[int] | None) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)],
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    loop = helper.make_node("Loop", ["", "yes", "input"], ["logits"], body=body)
    path = tiny_onnx.save(tmp_path / "loop.onnx", [loop], [yes], ["batch", 3, 8, 8], ["batch", 3, 8, 8])
    plan = Plan(seconds=0.2, warm_up_s=0.1, timeout_s=3)
    with pytest.raises(ChildFailed, match="no answer to place within 3 s"):
        latency.measure([subject(path)], latency.settings_of(["cpu"], [1], [1]), plan, Listening())


def test_a_model_that_asks_for_a_terabyte_fails_alone(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([1 << 38], np.int64), "shape")
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceSum", ["huge", "axis"], ["sum"]),
        helper.make_node("Add", ["input", "sum"], ["logits"]),
    ]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, [shape, axis], ["batch", 3, 8, 8], ["batch", 3, 8, 8])
    with pytest.raises((SievitError, InvalidInput)) as error:
        benchmark_files([path], seconds=0.2)
    assert "alloc" in str(error.value).lower() or "memory" in str(error.value).lower()


@pytest.mark.parametrize(
    ("pattern", "steady"), [([1.0], True), ([1.0, 3.0, 9.0, 27.0, 81.0], False)], ids=["even", "ever slower"]
)
def test_warm_up_ends_when_the_median_is_steady_or_at_its_limit(
    monkeypatch: pytest.MonkeyPatch, pattern: list[float], steady: bool
) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        now[0] += 0.004 * pattern[min(calls[0] // 10, len(pattern) - 1)]
        calls[0] += 1

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    found = worker.warm_up(call, limit_s=1.0)
    assert found["steady"] is steady
    assert found["calls"] == calls[0]
    assert (calls[0] == 30) is steady


def test_a_busy_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("cpu", 1, 1, "host")

    def state(thread_ms: float, busy: float) -> tuple[dict[str, Any], Listening]:
        progress = Listening()
        monkeypatch.setattr("sievit.stages.deploy.comparison.busy_cores", lambda: busy)
        slot = Slot(0, 0, np.full(10, 1.0), thread_ms, thread_ms)
        results = {("a", setting): Measured(slots=[slot], steady=[True])}
        return host_state(watch(), results, [setting], progress), progress

    quiet, said = state(0.99, 0.1)
    assert (quiet["disturbed"], quiet["disturbed_reason"], said.warnings) == (False, "", [])
    pushed, said = state(0.7, 0.1)
    assert pushed["disturbed"]
    assert "had a core for 70% of the time" in said.warnings[0]
    crowded, _ = state(0.99, 1.4)
    assert crowded["disturbed_reason"] == "other processes kept 1.4 cores busy"


def test_others_on_a_card_that_is_measured_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi is a script here."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("sievit.stages.deploy.comparison.busy_cores", lambda: 0.0)

    def state(answer: str, code: int, provider: str) -> dict[str, Any]:
        program.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {code}\n")
        program.chmod(0o755)
        setting = Setting(provider, 1, 1, "device")
        results = {("a", setting): Measured(slots=[Slot(0, 0, np.full(9, 1.0), 1.0, 1.0)], steady=[True])}
        return host_state(watch(), results, [setting], Listening())

    assert state("3\\n61\\n", 0, "cuda")["disturbed_reason"] == "others kept a card at work for 61% of the time"
    assert not state("3\\n61\\n", 0, "cpu")["disturbed"], "it is not measured"
    assert not state("0\\n5\\n", 0, "cuda")["disturbed"]
    for answer, code in (("[N/A]\\n", 0), ("61\\n", 9)):
        assert state(answer, code, "cuda")["host"]["other_busy_card"] is None


def test_tensorrt_sees_batches_of_one_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_onnx.linear(tmp_path / "a.onnx", classes=10)
    tiny_onnx.sidecar(path, classes=10)
    pixels = tiny_onnx.pictures(10, size=8)
    expected, seen = scores(path, pixels), []

    class Watched:
        def __init__(self, path: Path, **_: Any) -> None:
            self.session = sessions.open_session(path)
            self.get_inputs = self.session.get_inputs

        def run(self, names: list[str], feed: dict[str, Any]) -> Any:
            seen.append(len(feed["input"]))
            return self.session.run(names, feed)

    monkeypatch.setattr(predict, "open_session", Watched)
    for batch, sizes in ((4, [4, 4, 4]), (64, [10])):
        seen.clear()
        np.testing.assert_allclose(scores(path, pixels, provider="tensorrt", batch=batch), expected, rtol=1e-5)
        assert seen == sizes


def test_heat_and_a_changing_pace_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("cpu", 1, 1, "host")
    monkeypatch.setattr("sievit.stages.deploy.comparison.busy_cores", lambda: 0.0)

    def state(*pace: float, throttled: tuple[int | None, int | None] = (None, None)) -> dict[str, Any]:
        counts = iter(throttled)
        monkeypatch.setattr("sievit.stages.deploy.comparison.times_throttled", lambda: next(counts))
        slots = [Slot(number, 0, np.full(10, wall), wall, wall) for number, wall in enumerate(pace)]
        results = {(name, setting): Measured(slots=slots, steady=[True]) for name in ("a", "b")}
        return host_state(watch(), results, [setting], Listening())

    assert not state(1.0, 1.05)["disturbed"] and state(1.0, 1.05)["drift"] == pytest.approx(1.05)
    assert state(1.0, 1.05, 1.3)["disturbed_reason"] == "one session was 30% slower than another on the same files"
    assert not state(1.0, throttled=(7, 7))["disturbed"]
    assert state(1.0, throttled=(7, 9))["disturbed_reason"] == "cores were slowed down for heat 2 times"


def test_throttling_is_counted_over_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "CORES", tmp_path)
    assert isa.times_throttled() is None
    for core, count in enumerate((3, 4)):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    assert isa.times_throttled() == 7


def test_host_facts_name_processor_cores_and_instruction_sets() -> None:
    facts = isa.host_facts()
    assert facts["processor"]
    assert 1 <= facts["physical_cores"] <= facts["usable_cores"] <= facts["logical_cores"]
    assert facts["memory_gb"] > 0
    assert set(facts["instruction_sets"]) <= set(isa.FLAGS)
    json.dumps(facts, allow_nan=False)
