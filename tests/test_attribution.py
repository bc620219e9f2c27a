"""Where a file's milliseconds go: against the exporter's own scopes and hand-made profiles, never against a clock."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny_onnx
import torch
from onnx import helper, numpy_helper
from report_run import Bench, measurement, row
from test_benchmark import context, made
from timm import create_model
from tiny_vision import network, swin

from sievit.pipeline.report import page
from sievit.pipeline.report.sections import by_block, by_kind
from sievit.pipeline.stage import Labelled
from sievit.stages.benchmark import BenchmarkConfig, benchmark_files, idle, run
from sievit.stages.deploy.attribution import ATTENTION, ATTRIBUTED_ON, PRODUCTS, Origins, attribute, block_of, origins
from sievit.stages.deploy.node_times import NodeTime
from sievit.stages.deploy.sessions import node_times
from sievit.stages.vision.onnx_export import export


@pytest.mark.parametrize("family", ["deit", "swin"])
def test_nodes_are_given_to_the_modules_that_the_exporter_knew_they_came_from(family: str, tmp_path: Path) -> None:
    """The exporter's scopes are the oracle: they are taken out of the file, and names of weights have to do."""
    net = swin(embed_dim=32, depths=[1, 1]) if family == "swin" else network(embed_dim=48, depth=2)
    scopes = export(net, tmp_path / "model.onnx", 20)
    found = origins(tmp_path / "model.onnx")
    ours = ("qkv", "proj", "fc1", "fc2", "norm1")
    layers = {node: scope for node, scope in scopes.items() if scope.rpartition(".")[2] in ours}
    assert len(layers) >= 2 * 8, "four products with their biases in each of two blocks"
    assert {node: found.modules.get(node) for node in layers} == layers


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_blocks_whose_tensors_are_equal_have_the_nodes_that_were_made_of_them(dynamo: bool, tmp_path: Path) -> None:
    """A fresh network, exported by torch itself: norms and biases of all blocks are alike, and are stored once."""
    net = create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=3, num_heads=3, num_classes=4).eval()
    path, example = tmp_path / "a.onnx", torch.zeros(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (example,), path, dynamo=dynamo, opset_version=18, external_data=False, verbose=False)
    graph, found = onnx.load(path).graph, origins(path)
    layers = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.name not in found.mixing]
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len([tensor for tensor in graph.initializer if tensor.name.endswith("norm1.weight")]) == 1, "stored once"
    for nodes, each in ((layers, 4), (norms, 2)):
        places = [block_of(found.modules[node.name]) for node in nodes]
        assert places == [block for block in ("blocks.0", "blocks.1", "blocks.2") for _ in range(each)] + [""]
    mixing = [node for node in graph.node if node.name in found.mixing]
    assert [found.modules[node.name] for node in mixing] == [f"blocks.{n // 2}.attn" for n in range(6)]
    kinds = attribute([NodeTime(node.name, node.op_type, 1.0) for node in mixing], found).kinds
    assert kinds == {ATTENTION: 6.0}


@pytest.mark.parametrize(
    ("name", "scopes", "module"),
    [
        ("/blocks/blocks.1/mlp/fc1/MatMul", "", "blocks.1.mlp.fc1"),
        ("/layers/layers.0/blocks/blocks.1/norm1/Add", "", "layers.0.blocks.1.norm1"),
        ("/vit/encoder/layer.3/attention/MatMul", "", "vit.encoder.layer.3.attention"),
        ("/encoder/layers/encoder_layer_0/mlp/mlp.0/MatMul", "", "encoder.layers.encoder_layer_0.mlp.0"),
        ("node_7", "['', 'body', 'body.blocks', 'body.blocks.0', 'linear']", "blocks.0"),
        ("node_7", "['', 'expand']", "head"),
        ("node_7", "['_empty_nn_module_stack_from_metadata_hook', 'sym_size_int_1']", "head"),
        ("node_7", "[[[", "head"),
        ("/MatMul", "", "head"),
        ("MatMul_7", "", "head"),
    ],
)
def test_scopes_of_a_node_come_before_the_name_of_its_weight(
    tmp_path: Path, name: str, scopes: str, module: str
) -> None:
    weight = numpy_helper.from_array(tiny_onnx.weights(), "head.weight")
    flatten = helper.make_node("Flatten", ["input"], ["flat"], name="flatten")
    product = helper.make_node("MatMul", ["flat", "head.weight"], ["logits"], name=name)
    if scopes:
        helper.set_model_props(product, {"pkg.torch.onnx.name_scopes": scopes})
    path = tiny_onnx.save(tmp_path / "a.onnx", [flatten, product], [weight], ["batch", 3, 8, 8], ["batch", 4])
    assert origins(path).modules[name] == module


def test_a_weight_that_several_nodes_read_tells_the_module_of_none(tmp_path: Path) -> None:
    shared = numpy_helper.from_array(tiny_onnx.weights()[:, 0], "blocks.0.norm.bias")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
        helper.make_node("Add", ["flat", "blocks.0.norm.bias"], ["once"], name="first"),
        helper.make_node("Add", ["once", "blocks.0.norm.bias"], ["logits"], name="second"),
    ]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, [shared], ["batch", 3, 8, 8], ["batch", 192])
    assert origins(path).modules == {}


def test_products_of_two_activations_are_attention_and_those_with_weights_are_not(tmp_path: Path) -> None:
    path = tiny_onnx.transformer(tmp_path / "a.onnx", blocks=2)
    assert origins(path).mixing == {f"{name}_{block}" for name in ("scores", "mixed") for block in (0, 1)}


def test_a_weight_stored_anew_is_told_by_the_bias_that_is_added_after_it(tmp_path: Path) -> None:
    """As 8-bit files have it: quantized weight without a module's name, product in integers, scaling, bias."""
    import numpy as np

    def constant(name: str, value: Any) -> Any:
        return numpy_helper.from_array(np.asarray(value), name)

    weights = [
        constant("val_7", np.ones((192, 4), np.int8)),
        constant("scale", np.float32(0.5)),
        constant("blocks.3.mlp.fc1.bias", np.zeros(4, np.float32)),
    ]
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["q", "s", "z"], name="quantize"),
        helper.make_node("MatMulInteger", ["q", "val_7", "z"], ["sum"], name="product"),
        helper.make_node("Cast", ["sum"], ["float"], name="cast", to=1),
        helper.make_node("Mul", ["float", "scale"], ["scaled"], name="rescale"),
        helper.make_node("Add", ["scaled", "blocks.3.mlp.fc1.bias"], ["logits"], name="add"),
    ]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, weights, ["batch", 3, 8, 8], ["batch", 4])
    found = origins(path)
    assert found.modules["product"] == found.modules["add"] == "blocks.3.mlp.fc1"
    assert found.mixing == set()
    assert "flatten" not in found.modules


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("blocks.11.attn.qkv", "blocks.11"),
        ("layers.0.blocks.1.mlp.fc1", "layers.0.blocks.1"),
        ("vit.encoder.layer.3.attention.output", "vit.encoder.layer.3"),
        ("encoder.layers.encoder_layer_2.self_attention", "encoder.layers.encoder_layer_2"),
        ("blocks.0.mlp.layers.2", "blocks.0"),
        ("patch_embed.proj", ""),
        ("norm", ""),
        ("", ""),
    ],
)
def test_a_block_is_found_in_the_names_that_networks_use(module: str, block: str) -> None:
    assert block_of(module) == block


FILE = Origins({"embed": "patch_embed", "conv2d": "patch_embed", "qkv": "blocks.0.attn.qkv", "up": "blocks.1.mlp.fc1",
                "norm": "norm"}, frozenset({"scores"}))  # fmt: skip
NODES = [
    NodeTime("conv2d_nchwc", "Conv", 1.0),
    NodeTime("reorder", "ReorderOutput", 2.0),
    NodeTime("qkv", "MatMul", 4.0),
    NodeTime("scores/MatMulScaleFusion/", "FusedMatMul", 8.0),
    NodeTime("soft", "Softmax", 16.0),
    NodeTime("up_quant", "DynamicQuantizeMatMul", 32.0),
    NodeTime("up", "Add", 64.0),
    NodeTime("BiasGelu", "BiasGelu", 128.0),
    NodeTime("norm", "LayerNormalization", 256.0),
    NodeTime("lottery", "Multinomial", 512.0),
]


def test_every_millisecond_is_booked_once_by_kind_by_module_and_by_block() -> None:
    """Powers of two: a sum tells which operators are in it. What has no module belongs to the operator before it."""
    found = attribute(NODES, FILE)
    assert found.kinds == {
        PRODUCTS: 1 + 4 + 32,
        ATTENTION: 8 + 16,
        "normalisation": 256,
        "activation": 128,
        "moving": 2,
        "elementwise": 64,
        "other": 512,
    }
    assert found.modules == {
        "patch_embed": 1 + 2,
        "blocks.0.attn": 4 + 8 + 16 + 32,
        "blocks.1.mlp": 64 + 128,
        "norm": 256 + 512,
    }
    assert found.blocks == {"embedding": 3, "blocks.0": 60, "blocks.1": 192, "head": 768}
    assert found.total_ms == 1023


def test_a_file_that_names_no_blocks_still_tells_kinds() -> None:
    found = attribute(NODES, Origins({}, frozenset()))
    assert found.blocks == {}
    assert found.modules == {"other": 1023}
    assert found.kinds[PRODUCTS] == 1 + 4 + 8 + 32


def test_an_operators_time_is_the_lower_quartile_of_its_calls(tmp_path: Path) -> None:
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"node_index": str(at), "op_name": op}}
        for dur in (40, 10, 20, 30)
        for at, (name, op) in enumerate([("a", "MatMul"), ("b", "Add")])
    ]
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps([*events, {"cat": "Session", "name": "a_kernel_time", "dur": 1, "args": {}}]))
    assert node_times(profile) == [("a", "MatMul", 0.02), ("b", "Add", 0.02)]


# ---- the stage


@pytest.mark.slow
def test_the_stage_attributes_the_baseline_and_the_final_files_and_no_others(tmp_path: Path) -> None:
    export, dense = made(tmp_path / "export", seed=1), made(tmp_path / "dense", seed=2, work=4)
    made(tmp_path / "quantize", seed=3)
    many = [
        Labelled("main", "export", export, False, 0),  # type: ignore[arg-type]
        Labelled("main", "quantize", export.__class__(tmp_path / "quantize"), True, 0),  # type: ignore[arg-type]
        Labelled("dense", "export", dense, True, 0),  # type: ignore[arg-type]
    ]
    ctx = context(tmp_path, many, batch_sizes=(2,), seconds=0.1, attribution=True)
    run(ctx)
    found = ctx.metrics["attribution"]
    assert (found["provider"], found["batch"], found["threads"]) == ("cpu", 2, 1)
    assert [(file["arm"], file["entry"]) for file in found["files"]] == [("dense", "export"), ("main", "quantize")]
    for file in found["files"]:
        assert set(file["kinds"]) <= {PRODUCTS, "moving"}
        assert sum(file["kinds"].values()) == pytest.approx(file["operators_ms"])
        (measured,) = [r for r in ctx.metrics["rows"] if (r["arm"], r["entry"]) == (file["arm"], file["entry"])]
        assert file["p50_ms"] == measured["p50_ms"]


def test_attribution_without_the_cpu_is_a_setting_without_effect() -> None:
    from types import SimpleNamespace

    def settings(*providers: str) -> Any:
        return SimpleNamespace(config=BenchmarkConfig(providers=providers))

    assert "attribution" not in idle(settings("cpu", "cuda"))
    assert ATTRIBUTED_ON in idle(settings("cuda"))["attribution"]


def test_files_from_elsewhere_are_attributed_by_kind(tmp_path: Path) -> None:
    path = tiny_onnx.transformer(tmp_path / "a.onnx")
    (file,) = benchmark_files([path], seconds=0.1)["attribution"]["files"]
    assert {PRODUCTS, ATTENTION, "normalisation", "activation"} <= set(file["kinds"])
    assert file["blocks"] == {}


# ---- the report

ATTRIBUTED: dict[str, Any] = {
    "provider": "cpu",
    "batch": 1,
    "threads": 1,
    "files": [
        {"arm": "dense", "entry": "export", "variant": "fp32", "final": True, "operators_ms": 2.0, "p50_ms": 2.066,
         "kinds": {PRODUCTS: 1.5, ATTENTION: 0.5}, "blocks": {"embedding": 0.5, "blocks.0": 0.8, "blocks.1": 0.6,
                                                              "head": 0.1}},
        {"arm": "main", "entry": "quantize", "variant": "int8", "final": True, "operators_ms": 0.8, "p50_ms": 0.894,
         "kinds": {PRODUCTS: 0.4, "quantizing": 0.4}, "blocks": {"embedding": 0.3, "blocks.0": 0.4, "head": 0.1}},
    ],
}  # fmt: skip


def test_the_report_shows_kinds_and_blocks_before_and_after(tmp_path: Path) -> None:
    kinds, blocks = by_kind({"attribution": ATTRIBUTED}), by_block({"attribution": ATTRIBUTED})
    assert kinds is not None and blocks is not None
    assert kinds.heads == ("Operators", "dense FP32", "main INT8")
    assert kinds.rows == (
        (PRODUCTS, "1.50 (75.0%)", "0.400 (50.0%)"),
        (ATTENTION, "0.500 (25.0%)", "–"),
        ("quantizing", "–", "0.400 (50.0%)"),
    )
    assert kinds.remarks[1] == "main INT8: operators 0.800\u202fms, p50 without a profile 0.894\u202fms."
    heavy = ATTRIBUTED | {"files": [ATTRIBUTED["files"][1] | {"p50_ms": 0.5}]}
    rough = by_kind({"attribution": heavy})
    assert rough is not None and rough.remarks[0].endswith("Writing them down took much of it: shares are rough.")
    assert "rough" not in "".join(kinds.remarks)
    assert [line[0] for line in blocks.rows] == ["embedding", "blocks.0", "blocks.1", "head"]
    assert blocks.rows[2] == ("blocks.1", "0.600", "–")
    bench = Bench(tmp_path)
    bench.add("main", "benchmark", measurement() | {"attribution": ATTRIBUTED, "gates": {}})
    html, markdown = page.write(bench.record(), bench.shelf)
    assert "Time by kind of operator" in html.read_text() and "| blocks.1 | 0.600 | – |" in markdown.read_text()


def test_a_measurement_without_operators_says_why_and_an_older_one_says_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    metrics = {"rows": [row("main", "export", "fp32", 1.0, 0.9, final=True)], "gates": {}}
    bench.add("main", "benchmark", metrics | {"attribution": {"unsaid": ATTRIBUTED_ON}})
    _, markdown = page.write(bench.record(), bench.shelf)
    assert f"No time by block: {ATTRIBUTED_ON}." in markdown.read_text()
    assert by_kind(metrics) is by_block(metrics) is None
