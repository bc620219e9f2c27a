"""ONNX files as other exporters write them: what they end with, how they are fed, in which order they stand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_onnx
from onnx import helper, numpy_helper
from PIL import Image
from shipped import DIGITS, Sievit, sievit
from test_adopt import run, written

from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.eight_bit import Form, Workshop, ranges_on
from sievit.stages.deploy.graph_macs import graph_macs
from sievit.stages.deploy.half import to_half
from sievit.stages.deploy.predict import scores
from sievit.stages.deploy.quantized_graph import describe
from sievit.stages.deploy.sidecar import read_sidecar
from sievit.stages.deploy.variants import Variant
from sievit.stages.methods import InvalidInput

__all__ = ["sievit"]


def ending(path: Path, *operators: str, **attributes: Any) -> Path:
    """The linear classifier of ten classes with these operators behind it; attributes are the first one's."""
    tiny_onnx.linear(path, classes=10, seed=3)
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "h0"
    for index, operator in enumerate(operators):
        name = "logits" if index == len(operators) - 1 else f"h{index + 1}"
        given = attributes if index == 0 else {"to": onnx.TensorProto.FLOAT} if operator == "Cast" else {}
        inputs = [f"h{index}", "kept"] if operator == "Reshape" else [f"h{index}"]
        model.graph.node.append(helper.make_node(operator, inputs, [name], **given))
    if "Reshape" in operators:
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 10], np.int64), "kept"))
    onnx.save(model, path)
    return path


def logits(pixels: np.ndarray) -> np.ndarray:
    """Of the linear classifier, float64 [n, 10]."""
    pre = tiny_onnx.PREPROCESSING
    values = ((pixels.astype(np.float64) / 255 - pre["mean"]) / pre["std"]).transpose(0, 3, 1, 2)
    return np.asarray(values.reshape(len(pixels), -1) @ tiny_onnx.weights(classes=10, seed=3).astype(np.float64))


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-scores)))


# ---- what a file ends with


@pytest.mark.parametrize(
    ("operators", "kind"),
    [
        (("Relu",), "logits"),
        (("Softmax",), "probabilities"),
        (("Sigmoid",), "probabilities"),
        (("LogSoftmax",), "log_probabilities"),
        (("Softmax", "Identity"), "probabilities"),
        (("LogSoftmax", "Cast", "Reshape"), "log_probabilities"),
        (("Softmax", "Relu"), "logits"),
    ],
)
def test_the_sidecar_says_what_the_last_operator_makes(tmp_path: Path, operators: tuple[str, ...], kind: str) -> None:
    path = ending(tmp_path / "model.onnx", *operators)
    assert open_bundle(path, sidecar_required=False).signature.scores == kind
    tiny_onnx.sidecar(path, names=DIGITS)
    assert json.loads(path.with_suffix(".json").read_text())["scores"] == kind


def test_a_sidecar_from_before_scores_were_told_apart_means_logits(tmp_path: Path) -> None:
    path = ending(tmp_path / "model.onnx", "Softmax")
    card = tiny_onnx.sidecar(path, names=DIGITS)
    told = json.loads(card.read_text())
    del told["scores"]
    card.write_text(json.dumps(told))
    assert read_sidecar(path).scores == "logits"
    card.write_text(json.dumps(told | {"scores": "odds"}))
    with pytest.raises(InvalidInput, match="scores 'odds' are not known"):
        read_sidecar(path)


@pytest.mark.parametrize(
    ("operator", "probabilities"),
    [("Softmax", softmax), ("LogSoftmax", softmax), ("Sigmoid", sigmoid)],
)
def test_the_probabilities_of_an_adopted_file_are_its_own(
    tmp_path: Path, sievit: Sievit, operator: str, probabilities: Any
) -> None:
    """`sievit predict`, and the program in a pack, against the classifier's product by hand. A softmax of what went
    through one already would be nearly flat.
    """
    ending(tmp_path / "their.onnx", operator)
    done = run(sievit, written(tmp_path))
    assert done.code == 0, done.err
    pixels = tiny_onnx.pictures(1)
    Image.fromarray(pixels[0]).save(tmp_path / "photo.png")
    expected = probabilities(logits(pixels))[0]
    best = np.argsort(-expected, kind="stable")[:5]
    (adopted,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    (answer,) = sievit("predict", str(adopted), "photo.png", "--json").lines
    assert [each["index"] for each in answer["classes"]] == best.tolist()
    assert [each["probability"] for each in answer["classes"]] == pytest.approx(expected[best], abs=1e-4)
    assert sievit("pack", str(adopted), "--output", "pack").code == 0
    kind = read_sidecar(adopted).scores.replace("_", " ")
    assert f"| scores | {kind} |" in (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-I", "pack/predict.py", "photo.png"], capture_output=True, text=True, check=True
    )
    shown = [(name, float(share)) for _, name, share in (line.split("\t") for line in told.stdout.splitlines())]
    assert [name for name, _ in shown] == [DIGITS[place] for place in best]
    assert [share for _, share in shown] == pytest.approx(expected[best], abs=1e-4)


# ---- what a file computes in


def test_a_file_of_half_precision_between_fp32_ends_is_told_as_what_it_is_and_not_quantized(
    tmp_path: Path, sievit: Sievit
) -> None:
    tiny_onnx.transformer(tmp_path / "float.onnx", classes=10)
    to_half(tmp_path / "float.onnx", tmp_path / "their.onnx")
    bundle = open_bundle(tmp_path / "their.onnx", sidecar_required=False)
    assert bundle.signature.dtype == "float32" and Variant("", "", True, bundle).precision == "fp16"
    done = run(sievit, written(tmp_path, rest="  quantize: {schemes: [dynamic]}"))
    assert done.code == 3 and "is fp16 already, and quantize starts from fp32" in done.document["error"]["message"]


def attending(path: Path) -> Path:
    """The tiny transformer with the operator Attention of opset 23 in the place of products and softmax."""
    tiny_onnx.transformer(path, classes=10)
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if not node.name.startswith(("turned_", "scores_", "mixing_"))]
    for node in nodes:
        if node.name.startswith("mixed_"):
            inputs = [f"{name}_{node.name[-1]}" for name in ("query", "key", "value")]
            attention = helper.make_node("Attention", inputs, node.output, q_num_heads=1, kv_num_heads=1, scale=1.0)
            node.CopyFrom(attention)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import[0].version = 23
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("scheme", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_attention_as_one_operator_of_onnx_stays_float_and_the_file_runs(
    tmp_path: Path, scheme: Literal["static", "dynamic"]
) -> None:
    path = attending(tmp_path / "model.onnx")
    tiny_onnx.sidecar(path, names=DIGITS)
    np.save(tmp_path / "pixels.npy", tiny_onnx.pictures(16))
    ranges = ranges_on(tmp_path / "pixels.npy", path, tmp_path, 8, 300.0)
    with Workshop(path, tmp_path, 8, 300.0, ranges) as workshop:
        made = workshop.make(Form(scheme))
    assert made is not None
    told = describe(onnx.load(made))
    assert told["quantized_nodes"] == 2 * 6 + 1
    assert told["astray"] == {} and told["float_nodes"]["Attention"] == 2
    ort.InferenceSession(made, providers=["CPUExecutionProvider"])


# ---- in which order it stands, and what else comes out


def shuffled(path: Path) -> Path:
    """The operators of a file back to front, those of its branches too."""
    model = onnx.load(path)
    for graph in [*(a.g for node in model.graph.node for a in node.attribute if a.HasField("g")), model.graph]:
        nodes = list(reversed(graph.node))
        del graph.node[:]
        graph.node.extend(nodes)
    onnx.save(model, path)
    return path


def branching(path: Path) -> Path:
    """logits = 2 * relu(x w) if the first of them is positive, else -relu(x w), each branch of two operators."""
    branches = {}
    for name, factor in (("then_branch", 2.0), ("else_branch", -1.0)):
        nodes = [
            helper.make_node("Relu", ["product"], [f"{name}_relu"]),
            helper.make_node("Mul", [f"{name}_relu", f"{name}_factor"], [f"{name}_made"]),
        ]
        made = helper.make_tensor_value_info(f"{name}_made", onnx.TensorProto.FLOAT, ["batch", 10])
        factors = numpy_helper.from_array(np.float32(factor), f"{name}_factor")
        branches[name] = helper.make_graph(nodes, name, [], [made], [factors])
    tiny_onnx.linear(path, classes=10, seed=3)
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "product"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.node.extend([
        helper.make_node("ReduceMax", ["product"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["logits"], **branches),
    ])  # fmt: skip
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("make", [branching, lambda path: tiny_onnx.transformer(path, classes=10)])
def test_a_file_whose_operators_stand_out_of_order_is_put_in_order_and_answers_as_before(
    tmp_path: Path, sievit: Sievit, make: Any
) -> None:
    straight = make(tmp_path / "straight.onnx")
    their = shuffled(make(tmp_path / "their.onnx"))
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(onnx.load(their))
    done = run(sievit, written(tmp_path))
    assert done.code == 0, done.err
    (adopted,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    onnx.checker.check_model(onnx.load(adopted), full_check=True)
    if make is not branching:  # what runs of a branch is not known
        assert graph_macs(their, (3, 8, 8)) == graph_macs(straight, (3, 8, 8)) is not None
    batch = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    first, second = (
        ort.InferenceSession(one, providers=["CPUExecutionProvider"]).run(None, {"input": batch})[0]
        for one in (straight, adopted)
    )
    np.testing.assert_array_equal(first, second)


def test_a_file_out_of_order_that_has_its_weights_beside_it_is_refused_and_one_in_order_stays_byte_for_byte(
    tmp_path: Path, sievit: Sievit
) -> None:
    their = shuffled(tiny_onnx.linear(tmp_path / "their.onnx", classes=10))
    model = onnx.load(their)
    onnx.save_model(model, their, save_as_external_data=True, location="their.bin", size_threshold=0)
    with pytest.raises(InvalidInput, match="topologically sorted") as error:
        open_bundle(their, sidecar_required=False)
    assert "save it with its weights inside" in error.value.hint
    tiny_onnx.linear(their, classes=10)
    assert run(sievit, written(tmp_path)).code == 0
    (adopted,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    assert adopted.read_bytes() == their.read_bytes()


def features_first(path: Path) -> Path:
    """features [N, 192] and logits [N, 10], of which the features have a product of their own."""
    tiny_onnx.linear(path, classes=10, seed=3)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(192, dtype=np.float32), "eye"))
    model.graph.node.append(helper.make_node("MatMul", ["flat", "eye"], ["features"], name="own"))
    features = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["batch", 192])
    logits = model.graph.output.pop()
    model.graph.output.extend([features, logits])
    onnx.save(model, path)
    return path


def test_the_output_that_holds_the_scores_is_asked_for_by_name_and_adopted_alone(
    tmp_path: Path, sievit: Sievit
) -> None:
    features_first(tmp_path / "their.onnx")
    unnamed = run(sievit, written(tmp_path))
    assert unnamed.code == 3 and "has 192 scores an image, the data has 10" in unnamed.document["error"]["message"]
    assert unnamed.document["error"]["hint"] == "its outputs are features, logits; set output: logits"
    wrong = sievit("run", str(written(tmp_path, "file: their.onnx, output: scores")), "--store", "store")
    assert wrong.code == 3 and "has no output 'scores'" in wrong.err and "it has features, logits" in wrong.err
    assert "output: scores" in wrong.err, "the line of the file is shown"
    done = run(sievit, written(tmp_path, "file: their.onnx, output: logits"))
    assert done.code == 0, done.err
    (adopted,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    model = onnx.load(adopted)
    assert [value.name for value in model.graph.output] == ["logits"]
    assert {node.name for node in model.graph.node} == {"flatten", "head"}
    told = json.loads(adopted.with_suffix(".json").read_text())
    assert (told["output"], told["parameters"]) == ("logits", 192 * 10)
    pixels = tiny_onnx.pictures(3)
    np.testing.assert_allclose(scores(adopted, pixels), logits(pixels), rtol=1e-4, atol=1e-3)


def test_float_images_with_the_channels_last_are_fed_so(tmp_path: Path, sievit: Sievit) -> None:
    """Their file takes [N, 8, 8, 3], as TensorFlow's do, and answers as the one that takes [N, 3, 8, 8]."""
    tiny_onnx.linear(tmp_path / "their.onnx", classes=10, seed=3)
    model = onnx.load(tmp_path / "their.onnx")
    turn = helper.make_node("Transpose", ["images"], ["input"], perm=[0, 3, 1, 2])
    nodes = [turn, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    taken = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 8, 8, 3])
    model.graph.input[0].CopyFrom(taken)
    onnx.save(model, tmp_path / "their.onnx")
    done = run(sievit, written(tmp_path))
    assert done.code == 0, done.err
    (adopted,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    assert read_sidecar(adopted).layout == "NHWC"
    pixels = tiny_onnx.pictures(3)
    np.testing.assert_allclose(scores(adopted, pixels), logits(pixels), rtol=1e-4, atol=1e-3)
