"""A half-precision twin holds weights and activations in fp16, computes what needs it in fp32, and never overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_benchmark
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from test_quantize import context, exported
from tiny_vision import network

from sievit.pipeline.stage import Labelled
from sievit.stages import benchmark, export
from sievit.stages.deploy.bundle import count_nodes, open_bundle
from sievit.stages.deploy.half import full_nodes, overflow, to_half
from sievit.stages.deploy.pixels import bake
from sievit.stages.deploy.predict import scores
from sievit.stages.deploy.sidecar import parse_preprocessing
from sievit.stages.vision import onnx_export
from sievit.stages.vision.vit import drops_for

PICTURES = tiny_onnx.pictures(20)
__all__ = ["exported"]


def twin(path: Path) -> Path:
    """The half-precision twin of a file with a sidecar, also with one."""
    half = path.with_name("fp16.onnx")
    to_half(path, half)
    tiny_onnx.sidecar(half, precision="fp16")
    return half


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tiny_onnx.transformer(tmp_path / "model.onnx")
    tiny_onnx.sidecar(made)
    return made


def types(path: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A model and the element type of each of its tensors."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return model, found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("pixels", [False, True])
def test_the_twin_answers_as_the_float_file_within_half_precision(path: Path, pixels: bool) -> None:
    if pixels:
        bake(path, parse_preprocessing(tiny_onnx.PREPROCESSING, "test"))
        tiny_onnx.sidecar(path)
    half = open_bundle(twin(path))
    before, after = scores(path, PICTURES), scores(half.path, PICTURES)
    assert 0 < np.abs(after - before).max() < 5e-3 * np.abs(before).max()
    assert half.signature == open_bundle(path).signature
    assert half.path.stat().st_size < 0.65 * path.stat().st_size


def test_norms_and_softmax_are_computed_in_fp32_and_stay_nodes_of_their_own_products_in_half(path: Path) -> None:
    half = twin(path)
    model, of = types(half)
    seen = {"LayerNormalization": 0, "Softmax": 0, "MatMul": 0, "Gemm": 0, "Conv": 0, "Gelu": 0, "Add": 0}
    for node in model.graph.node:
        if node.op_type in seen:
            seen[node.op_type] += 1
            wanted = TensorProto.FLOAT if node.op_type in ("LayerNormalization", "Softmax") else TensorProto.FLOAT16
            assert {of[name] for name in (*node.input, *node.output)} == {wanted}, node.name
    before = count_nodes(path)
    assert seen == {name: before[name] for name in seen}
    assert (of["input"], of["logits"]) == (TensorProto.FLOAT, TensorProto.FLOAT)


def test_pixels_are_normalised_in_fp32(path: Path) -> None:
    bake(path, parse_preprocessing(tiny_onnx.PREPROCESSING, "test"))
    tiny_onnx.sidecar(path)
    model, of = types(twin(path))
    steps = {node.name: of[node.output[0]] for node in model.graph.node if node.name.startswith("pixels_")}
    assert set(steps.values()) == {TensorProto.FLOAT} and len(steps) == 4


def test_equal_files_have_equal_twins(path: Path) -> None:
    assert twin(path).read_bytes() == twin(path).read_bytes()


def test_a_tensor_that_two_norms_read_is_cast_once_and_a_weight_of_both_precisions_is_kept_twice(
    tmp_path: Path,
) -> None:
    """x -> flat * g -> two norms of scale g: half-precision product, fp32 norms."""
    scale = numpy_helper.from_array(np.linspace(0.5, 1.5, 192, dtype=np.float32), "g")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("Mul", ["flat", "g"], ["scaled"], name="mul"),
        helper.make_node("LayerNormalization", ["scaled", "g"], ["one"], name="one", axis=-1),
        helper.make_node("LayerNormalization", ["scaled", "g"], ["two"], name="two", axis=-1, epsilon=0.5),
        helper.make_node("Add", ["one", "two"], ["logits"], name="add"),
    ]
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [scale], ["batch", 3, 8, 8], ["batch", 192])
    tiny_onnx.sidecar(path, classes=192)
    half = path.with_name("fp16.onnx")
    to_half(path, half)
    tiny_onnx.sidecar(half, classes=192, precision="fp16")
    kept = {tensor.name: tensor.data_type for tensor in onnx.load(half).graph.initializer}
    assert kept == {"g": TensorProto.FLOAT16, "g_fp32": TensorProto.FLOAT}
    assert [node.name for node in onnx.load(half).graph.node if node.name == "scaled_fp32_cast"] == ["scaled_fp32_cast"]
    np.testing.assert_allclose(scores(half, PICTURES), scores(path, PICTURES), atol=1e-2)


@pytest.mark.parametrize("method", ["attention", pytest.param("tome", marks=pytest.mark.slow)])
def test_all_that_decides_which_tokens_are_kept_is_computed_in_fp32(method: Any, tmp_path: Path) -> None:
    net = network()
    net = net.with_tokens(drops_for(net.architecture, (0,), 0.6, method))  # type: ignore[arg-type]
    onnx_export.export(net, tmp_path / "model.onnx", 20)
    to_half(tmp_path / "model.onnx", tmp_path / "fp16.onnx")
    model, of = types(tmp_path / "fp16.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    waiting = [next(node for node in model.graph.node if node.op_type == "TopK").input[0]]
    walked = set()
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if node is None or name in walked:
            continue
        walked.add(name)
        if node.op_type == "Cast":
            assert set(makers[node.input[0]].input) & weights, "rounded between the layer and the choice"
            continue
        assert of[name] != TensorProto.FLOAT16
        waiting += [read for read in node.input if read not in weights]
    operators = {makers[name].op_type for name in walked}
    assert {"MatMul", "Split"} <= operators and len(walked) > 8


# ---- overflow


def large(path: Path, by: float) -> Path:
    """flatten, then a product whose result is `by` times the weights' and a further one that takes it back."""
    up, down = np.eye(192, dtype=np.float32) * by, tiny_onnx.weights() / np.float32(by)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "up"], ["high"], name="climb"),
        helper.make_node("MatMul", ["high", "down"], ["logits"], name="head"),
    ]
    tensors = [numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")]
    tiny_onnx.sidecar(tiny_onnx.save(path, nodes, tensors, ["batch", 3, 8, 8], ["batch", 4]))
    return path


def test_the_largest_number_is_found_where_it_stands_although_the_scores_are_small(tmp_path: Path) -> None:
    path = large(tmp_path / "model.onnx", 6e4)
    worst = overflow(path, PICTURES)
    mean, std = (np.array(tiny_onnx.PREPROCESSING[name]) for name in ("mean", "std"))
    assert worst.value == pytest.approx(6e4 * np.abs((PICTURES / 255.0 - mean) / std).max(), rel=1e-5)
    assert (worst.node, worst.operator, worst.tensor) == ("climb", "MatMul", "high")
    assert np.abs(scores(path, PICTURES)).max() < 1e3


def test_a_weight_beyond_half_precision_is_named(tmp_path: Path) -> None:
    path = large(tmp_path / "model.onnx", 1.0)
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = 7e6
    weight.CopyFrom(numpy_helper.from_array(values, "down"))
    onnx.save(model, path)
    tiny_onnx.sidecar(path)
    assert (overflow(path, PICTURES).tensor in ("down", "logits")) and overflow(path, PICTURES).value >= 7e6


def test_what_a_norm_gives_out_is_looked_at_and_what_stays_in_fp32_is_not(path: Path) -> None:
    """A large norm is cast to half for the layer behind it; the logits of a softmax are read in fp32, but made in
    half."""
    model = onnx.load(path)
    gain = next(tensor for tensor in model.graph.initializer if tensor.name == "norm1_0_g")
    gain.CopyFrom(numpy_helper.from_array(np.full(32, 1e6, np.float32), gain.name))
    onnx.save(model, path)
    tiny_onnx.sidecar(path)
    names = {"norm1_0", "scores_0", "query_0_product", "key_0_product", "query_0", "key_0", "turned_0"}
    assert overflow(path, PICTURES).value > 65504 and overflow(path, PICTURES).tensor in names
    full = full_nodes(model)
    assert {model.graph.node[index].op_type for index in full} == {"LayerNormalization", "Softmax"}


@pytest.mark.parametrize(("by", "written"), [(100.0, True), (6e4, False)])
def test_a_file_that_overflows_is_not_written_and_the_metrics_say_where(
    tmp_path: Path, exported: Any, by: float, written: bool
) -> None:
    ctx = context(tmp_path, exported)
    path = large(ctx.out / "model.onnx", by)
    about: dict[str, Any] = {
        "preprocessing": tiny_onnx.PREPROCESSING, "classes": list("abcd"), "parameters": 768, "macs": 768,
        "source": {},
    }  # fmt: skip
    told = export._half(ctx, path, PICTURES, about, {"climb": "blocks.3"})
    assert (told["written"], told["node"], told["operator"]) == (written, "climb", "MatMul")
    assert (told["module"], told["limit"]) == ("blocks.3", 65504)
    assert (ctx.out / "fp16.onnx").is_file() is (ctx.out / "fp16.json").is_file() is written
    warnings = ctx.progress.warnings  # type: ignore[attr-defined]
    if written:
        assert told["top1_agreement"] == 1 and 0 < told["max_abs"] < 1 and told["images"] == 20 and not warnings
        assert open_bundle(ctx.out / "fp16.onnx").sidecar.precision == "fp16"  # type: ignore[union-attr]
    else:
        assert "MatMul climb of blocks.3 reaches" in warnings[0]


def test_small_numbers_that_are_divided_by_do_not_become_zero(tmp_path: Path) -> None:
    small = numpy_helper.from_array(np.full(192, -1e-12, np.float32), "small")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flat"),
        helper.make_node("Add", ["flat", "small"], ["logits"], name="add"),
    ]
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [small], ["batch", 3, 8, 8], ["batch", 192])
    tiny_onnx.sidecar(path, classes=192)
    to_half(path, tmp_path / "fp16.onnx")
    (kept,) = onnx.load(tmp_path / "fp16.onnx").graph.initializer
    assert (numpy_helper.to_array(kept) == np.float16(-(2.0**-24))).all()


def test_the_benchmark_takes_up_the_twin_beside_the_product_as_fp16_and_not_as_final(tmp_path: Path) -> None:
    folder = test_benchmark.made(tmp_path / "export")
    to_half(folder.file("model.onnx"), folder.file("fp16.onnx"))
    tiny_onnx.sidecar(folder.file("fp16.onnx"), classes=10, precision="fp16")
    ctx = test_benchmark.context(tmp_path, [Labelled("main", "export", folder, True, 0)])  # type: ignore[arg-type]
    found = {variant.precision: variant.final for variant in benchmark._variants(ctx)}
    assert found == {"fp16": False, "fp32": True}
