"""PyTorch beside the files: what is timed is the network, and a reference never decides anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmark import Folder, Listening, context, made
from tiny_vision import network

from sievit.pipeline.report.sections import torch_reference as section
from sievit.pipeline.stage import Labelled
from sievit.stages import torch_reference
from sievit.stages.benchmark import STAGE, BenchmarkConfig, idle, run
from sievit.stages.deploy.latency import Plan, Setting
from sievit.stages.methods import InvalidInput
from sievit.stages.torch_reference import load, reference_rows
from sievit.stages.vision.weights import save_network


@pytest.fixture
def model(tmp_path: Path) -> Folder:
    (tmp_path / "model").mkdir()
    save_network(network(embed_dim=48, depth=1), tmp_path / "model")
    return Folder(tmp_path / "model")


def command(model: Folder, tmp_path: Path, mode: str, batch: int = 3) -> dict[str, Any]:
    return {"folder": str(model.root), "mode": mode, "threads": torch.get_num_threads(), "device": "cpu",
            "batch": batch, "cache": str(tmp_path), "cores": []}  # fmt: skip


def test_the_timed_call_is_the_networks_own_forward_pass(model: Folder, tmp_path: Path) -> None:
    call, first_ms = load(command(model, tmp_path, "eager"))
    net = torch_reference_network(model)
    side = net.architecture.image_size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(call(), net(images))
    assert first_ms > 0


def torch_reference_network(model: Folder) -> Any:
    from sievit.stages.vision.weights import load_network

    return load_network(model.root)


def test_compiled_is_torch_compile_for_this_batch_alone(
    model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def compiled(net: Any, *, dynamic: bool) -> Any:
        asked.append(dynamic)
        return lambda images: net(images) + 1000

    monkeypatch.setattr(torch, "compile", compiled)
    call, _ = load(command(model, tmp_path, "compiled"))
    answer = call()
    assert isinstance(answer, torch.Tensor) and answer.min() > 900 and asked == [False]


def test_a_compilation_that_fails_says_what_to_do(
    model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(net: Any, *, dynamic: bool) -> Any:
        def call(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InvalidInput, match=r"torch\.compile does not work here: RuntimeError: no C\+\+ compiler"
    ) as error:
        load(command(model, tmp_path, "compiled"))
    assert "benchmark.torch.modes: [eager]" in error.value.hint


def test_only_providers_with_a_device_of_torch_have_rows(model: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"p50_ms": 1.0}
    monkeypatch.setattr(torch_reference, "_timed", lambda *arguments: row)
    settings = [Setting("cpu", 1, 1, "host"), Setting("cuda", 1, 1, "device"), Setting("cuda", 1, 1, "copy"),
                Setting("openvino", 1, 1, "host")]  # fmt: skip
    rows = reference_rows({"a": model.root, "b": model.root}, ["eager"], settings, Plan(), Listening())
    assert [(r["network"], r["provider"], r["io"]) for r in rows] == [
        ("a", "cpu", "host"), ("b", "cpu", "host"), ("a", "cuda", "device"), ("b", "cuda", "device"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_network_is_timed_in_a_process_of_its_own_every_session(model: Folder) -> None:
    plan, progress = Plan(seconds=0.1, sessions=2, warm_up_s=0.05), Listening()
    (row,) = reference_rows({"train": model.root}, ["eager"], [Setting("cpu", 1, 1, "host")], plan, progress)
    assert (row["network"], row["mode"], row["provider"], row["batch"]) == ("train", "eager", "cpu", 1)
    assert row["p50_low"] <= row["p50_ms"] <= row["p50_high"]
    assert row["torch"] == torch.__version__.partition("+")[0]
    assert row["samples"] >= 2 * torch_reference.ROUNDS
    assert progress.steps == progress.total == 2


def test_the_stage_hands_over_the_networks_that_are_named_and_keeps_them_out_of_its_rows(
    model: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def rows(networks: Any, modes: Any, settings: Any, plan: Any, progress: Any) -> list[dict[str, Any]]:
        given.append((networks, modes, settings))
        return [{"network": "dense/train"}]

    monkeypatch.setattr(torch_reference, "reference_rows", rows)
    many = [Labelled("main", "export", made(tmp_path / "a"), True, 0)]  # type: ignore[arg-type]
    asked = {"networks": ("finetune", "dense/train"), "modes": ("eager",)}
    ctx = context(tmp_path, many, batch_sizes=(1,), seconds=0.05, torch=asked)
    assert STAGE.references(ctx.config) == {"torch 0": "finetune", "torch 1": "dense/train"}
    ctx.inputs = {"torch 0": model, "torch 1": model}  # type: ignore[dict-item]
    run(ctx)
    networks = {"finetune": model.root, "dense/train": model.root}
    assert given == [(networks, ("eager",), [Setting("cpu", 1, 1, "host")])]
    assert ctx.metrics["torch"] == [{"network": "dense/train"}]
    assert [(r["arm"], r["variant"]) for r in ctx.metrics["rows"]] == [("main", "fp32")]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"networks": ()}, "at least 1 item"),
        ({"networks": ("train", "train")}, "networks: train stands there twice"),
        ({"networks": ("timm:deit_tiny_patch16_224",)}, "is no stage of this pipeline and no artifact"),
        ({"networks": ("train",), "modes": ("scripted",)}, "eager"),
    ],
)
def test_what_torch_cannot_time_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(torch=asked)  # type: ignore[arg-type]


def test_no_network_is_read_unless_one_is_named_and_openvino_alone_has_none_to_compare_with() -> None:
    assert STAGE.references(BenchmarkConfig()) == {}
    config = BenchmarkConfig(providers=("openvino",), torch={"networks": ("train",)})  # type: ignore[arg-type]
    assert "torch" in idle(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert "torch" not in idle(SimpleNamespace(config=BenchmarkConfig()))  # type: ignore[arg-type]


def test_the_report_shows_a_reference_without_a_verdict() -> None:
    row = {"network": "dense/train", "mode": "compiled", "provider": "cpu", "batch": 1, "threads": 1, "p50_ms": 2.0,
           "p50_low": 1.9, "p50_high": 2.1, "first_ms": 9000.0, "peak_memory_mb": 740.0}  # fmt: skip
    found = section({"torch": [row]})
    assert found is not None
    assert found.rows == (("dense/train", "compiled", "cpu, batch 1, 1 thread", "2.00 (1.90–2.10)", "9,000", "740"),)
    assert section({}) is None
