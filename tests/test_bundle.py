"""What is deployed: the bundle classifies with ONNX Runtime, numpy and a JSON file, and bad files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from sievit.stages.deploy import predict, preprocess
from sievit.stages.deploy.bundle import bytes_of, count_nodes, open_bundle
from sievit.stages.deploy.sidecar import parse_preprocessing, read_sidecar
from sievit.stages.deploy.variants import Variant
from sievit.stages.methods import InvalidInput


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    tiny_onnx.sidecar(path)
    return path


def test_a_bundle_classifies_with_onnxruntime_numpy_and_its_json_alone(bundle: Path) -> None:
    script = """
import json, sys, numpy as np, onnxruntime
path, images = sys.argv[1], np.load(sys.argv[2])
card = json.load(open(path.replace(".onnx", ".json")))
pre = card["preprocessing"]
x = images.astype(np.float32) * np.float32(pre["scale"])
x = (x - np.float32(pre["mean"])) / np.float32(pre["std"])
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
scores = session.run([card["output"]], {card["input"]: np.ascontiguousarray(x.transpose(0, 3, 1, 2))})[0]
print(json.dumps([card["classes"][i] for i in scores.argmax(1)]))
"""
    images = tiny_onnx.pictures(20)
    np.save(bundle.parent / "images.npy", images)
    told = subprocess.run(
        [sys.executable, "-c", script, str(bundle), str(bundle.parent / "images.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = predict.scores(bundle, images).argmax(axis=1)
    assert json.loads(told.stdout) == [f"class {index}" for index in ours]


def test_scores_equal_a_product_written_in_numpy(bundle: Path) -> None:
    images = tiny_onnx.pictures(33)
    mean, std = (np.array(tiny_onnx.PREPROCESSING[name], dtype=np.float64) for name in ("mean", "std"))
    normal = (images / 255.0 - mean) / std
    expected = normal.transpose(0, 3, 1, 2).reshape(33, -1) @ tiny_onnx.weights().astype(np.float64)
    np.testing.assert_allclose(predict.scores(bundle, images, batch=8), expected, rtol=1e-4, atol=1e-3)


def test_batches_of_any_size_give_the_same_scores(bundle: Path) -> None:
    images = tiny_onnx.pictures(10)
    whole = predict.scores(bundle, images, batch=64)
    np.testing.assert_allclose(predict.scores(bundle, images, batch=3), whole, rtol=1e-5, atol=1e-5)
    fetched = predict.scores(bundle, lambda start, stop: images[start:stop], 10, batch=4)
    np.testing.assert_allclose(fetched, whole, rtol=1e-5, atol=1e-5)


def test_a_file_of_fixed_batch_classifies_a_set_that_it_does_not_divide(tmp_path: Path, bundle: Path) -> None:
    fixed = tiny_onnx.linear(tmp_path / "fixed.onnx", batch=4)
    tiny_onnx.sidecar(fixed)
    images = tiny_onnx.pictures(10)
    np.testing.assert_allclose(predict.scores(fixed, images), predict.scores(bundle, images), rtol=1e-5, atol=1e-5)


def test_accuracy_counts_right_answers_and_never_a_nan() -> None:
    scored = np.array([[1, 0], [0, 1], [0, 1], [np.nan, 2]], dtype=np.float32)
    found = predict.accuracy(scored, np.array([0, 1, 0, 1]))
    assert (found.correct, found.images, found.top1) == (2, 4, 0.5)
    assert found.low < 0.5 < found.high


def test_deploying_imports_no_torch(bundle: Path) -> None:
    script = (
        "import sys, numpy, pathlib; from sievit.stages.deploy import predict\n"
        f"predict.scores(pathlib.Path({str(bundle)!r}), numpy.zeros((1, 8, 8, 3), numpy.uint8))\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'timm', 'onnx', 'nncf', 'matplotlib', 'pydantic')))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (9, 31)])
def test_pictures_of_other_sizes_are_fitted_as_pillow_would(shape: tuple[int, int]) -> None:
    card = parse_preprocessing(tiny_onnx.PREPROCESSING, "test")
    height, width = shape
    picture = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    scale = 8 / min(height, width)
    wide, high = round(width * scale), round(height * scale)
    resized = Image.fromarray(picture).resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - 8) // 2, (high - 8) // 2
    expected = np.asarray(resized)[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(preprocess.fit(picture, card), expected)


def test_a_uint8_network_gets_the_bytes_themselves() -> None:
    card = parse_preprocessing(tiny_onnx.PREPROCESSING, "test")
    images = tiny_onnx.pictures(2)
    np.testing.assert_array_equal(preprocess.normalise(images, card, "uint8"), images.transpose(0, 3, 1, 2))


def test_images_of_the_wrong_size_or_type_are_refused_with_what_is_expected() -> None:
    card = parse_preprocessing(tiny_onnx.PREPROCESSING, "test")
    for wrong in (tiny_onnx.pictures(1, size=9), tiny_onnx.pictures(1).astype(np.float32)):
        with pytest.raises(InvalidInput) as error:
            preprocess.normalise(wrong, card)
        assert "[n,8,8,3]" in error.value.hint


def test_the_sidecar_says_what_the_file_is(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.signature.text() == "input float32 [N,3,8,8] -> logits [N,4]"
    assert opened.sidecar is not None
    assert opened.sidecar.sha256 == opened.sha256
    assert (opened.opset, opened.parameters) == (20, 768)
    assert count_nodes(bundle) == {"Flatten": 1, "MatMul": 1}
    before = bundle.with_suffix(".json").read_bytes()
    tiny_onnx.sidecar(bundle)
    assert bundle.with_suffix(".json").read_bytes() == before


def test_one_flipped_bit_in_a_weight_is_refused(bundle: Path) -> None:
    content = bytearray(bundle.read_bytes())
    content[content.rindex(tiny_onnx.weights().tobytes()[:64]) + 2] ^= 1
    bundle.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"is not the file that model\.json describes"):
        open_bundle(bundle)


SPOILED: dict[str, Callable[[dict[str, object]], object]] = {
    "schema 2 is not known": lambda card: card.update(schema=2),
    "classes must be a list": lambda card: card.update(classes="ten"),
    "mean must be a list": lambda card: card["preprocessing"].update(mean="0.5"),  # type: ignore[attr-defined]
    "std more than 0": lambda card: card["preprocessing"].update(std=[1, 0, 1]),  # type: ignore[attr-defined]
    "crop 'left' is not one of": lambda card: card["preprocessing"].update(crop="left"),  # type: ignore[attr-defined]
    "sha256 is missing": lambda card: card.pop("sha256"),
    "names 3 classes": lambda card: card.update(classes=["a", "b", "c"]),
    "and its sidecar disagree": lambda card: card.update(input="pixels"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_spoiled_sidecar_is_refused_by_the_field_that_is_wrong(bundle: Path, message: str) -> None:
    path = bundle.with_suffix(".json")
    card = json.loads(path.read_text())
    SPOILED[message](card)
    path.write_text(json.dumps(card))
    with pytest.raises(InvalidInput, match=message):
        open_bundle(bundle)


def test_a_missing_or_unreadable_sidecar_is_refused(bundle: Path) -> None:
    path = bundle.with_suffix(".json")
    path.write_text("{")
    with pytest.raises(InvalidInput, match="is not JSON"):
        read_sidecar(bundle)
    path.unlink()
    with pytest.raises(InvalidInput, match="has no sidecar"):
        open_bundle(bundle)
    assert open_bundle(bundle, sidecar_required=False).sidecar is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 64, b"<!doctype html><html></html>", np.random.default_rng(0).bytes(500), b"half"],
    ids=["empty", "zeros", "a web page", "noise", "half a file"],
)
def test_what_is_no_onnx_file_is_refused_before_it_is_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_onnx.linear(tmp_path / "whole.onnx").read_bytes()[:800] if content == b"half" else content)
    with pytest.raises(InvalidInput):
        open_bundle(path, sidecar_required=False)
    with pytest.raises(InvalidInput, match="does not exist"):
        open_bundle(tmp_path / "absent.onnx", sidecar_required=False)


def external(folder: Path, **entries: str) -> Path:
    """A linear classifier whose weights stand in another file, with these external_data entries."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[192, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    return tiny_onnx.save(folder / "model.onnx", nodes, [tensor], ["batch", 3, 8, 8], ["batch", 4])


def test_weights_in_a_plain_file_of_the_same_folder_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "model.data").write_bytes(tiny_onnx.weights().tobytes())
    opened = open_bundle(external(tmp_path, location="model.data"), sidecar_required=False)
    assert opened.parameters == 768


def test_an_answer_does_not_hang_on_the_other_images_where_ranges_are_taken_from_a_whole_batch(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).integers(-90, 90, (192, 4)).astype(np.int8), "w")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["values", "scale"], ["logits"]),
    ]
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [weight], ["n", 3, 8, 8], ["n", 4])
    tiny_onnx.sidecar(path)
    pixels = tiny_onnx.pictures(6)
    pixels[:5] //= 64  # the last one sets the range of all
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = preprocess.normalise(pixels, read_sidecar(path).preprocessing)
    together = session.run(None, {"input": inputs})[0]
    alone = np.concatenate([session.run(None, {"input": one[None]})[0] for one in inputs])
    assert not np.allclose(together, alone)
    assert np.array_equal(predict.scores(path, pixels), alone)


def test_the_size_of_a_file_is_with_the_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.data").write_bytes(tiny_onnx.weights().tobytes())
    (tmp_path / "other.data").write_bytes(b"not of this file")
    opened = open_bundle(external(tmp_path, location="model.data"), sidecar_required=False)
    whole = (tmp_path / "model.onnx").stat().st_size + 768 * 4
    assert opened.weights == ("model.data",)
    assert opened.bytes == bytes_of(opened.path) == whole
    tiny_onnx.sidecar(opened.path)
    assert Variant("a", "export", True, open_bundle(opened.path)).whole()["bytes"] == whole


OUTSIDE = [
    {"location": "../secret"},
    {"location": "sub/../../secret"},
    {"location": "/proc/self/environ"},
    {"location": ""},
    {"location": "link"},
    {"location": "folder/secret"},
    {"location": "hard"},
    {"location": "inside\0.x"},
    {"location": "*/_ORT_MEM_ADDR_/*"},
    {"location": "inside", "offset": "-8"},
    {"location": "inside", "offset": "4000"},
    {"location": "inside", "length": "1000000000000000"},
    {"location": "inside", "length": "many"},
    {"location": "inside", "basepath": "/"},
    {"location": "absent"},
    {"location": "folder"},
]


@pytest.mark.parametrize("entries", OUTSIDE, ids=str)
def test_weights_that_lead_out_of_the_folder_are_refused(tmp_path: Path, entries: dict[str, str]) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(tiny_onnx.weights().tobytes())
    (inner / "inside").write_bytes(secret.read_bytes())
    (inner / "link").symlink_to(secret)
    (inner / "folder").symlink_to(tmp_path)
    (inner / "hard").hardlink_to(secret)
    with pytest.raises(InvalidInput):
        open_bundle(external(inner, **entries), sidecar_required=False)


def test_operators_of_a_foreign_domain_are_refused_even_in_a_branch(tmp_path: Path) -> None:
    nodes = [helper.make_node("Magic", ["input"], ["logits"], domain="evil")]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, [], ["b", 3, 8, 8], ["b", 4], domains=[("evil", 1)])
    with pytest.raises(InvalidInput, match="operators of the domain 'evil'"):
        open_bundle(path, sidecar_required=False)
    branch = helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)])
    yes = numpy_helper.from_array(np.array(True), "yes")
    choice = helper.make_node("If", ["yes"], ["logits"], then_branch=branch, else_branch=branch)
    path = tiny_onnx.save(tmp_path / "b.onnx", [choice], [yes], ["b", 3, 8, 8], ["b", 4], domains=[("evil", 1)])
    with pytest.raises(InvalidInput, match="operators of the domain 'evil'"):
        open_bundle(path, sidecar_required=False)


@pytest.mark.parametrize("opset", [5, 99])
def test_an_unknown_opset_is_refused(tmp_path: Path, opset: int) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["logits"])]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, [], ["b", 3, 8, 8], ["b", 192], opset=opset)
    with pytest.raises(InvalidInput, match=f"opset {opset}"):
        open_bundle(path, sidecar_required=False)


def test_what_is_no_image_classifier_is_refused_with_its_signature(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["logits"])]
    tokens = tiny_onnx.save(tmp_path / "a.onnx", nodes, [], ["batch", 77], ["batch", 77])
    with pytest.raises(InvalidInput) as error:
        open_bundle(tokens, sidecar_required=False)
    assert "input float [N,77] -> logits float [N,77]" in error.value.hint
    cast = [helper.make_node("Cast", ["input"], ["logits"], to=TensorProto.FLOAT)]
    ids = tiny_onnx.save(tmp_path / "b.onnx", cast, [], [1, 3, 8, 8], [1, 3, 8, 8], dtype=TensorProto.INT64)
    with pytest.raises(InvalidInput, match="not of float or uint8"):
        open_bundle(ids, sidecar_required=False)


def test_a_graph_with_a_missing_input_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["input", "nowhere"], ["logits"])]
    path = tiny_onnx.save(tmp_path / "a.onnx", nodes, [], ["b", 3, 8, 8], ["b", 3, 8, 8])
    with pytest.raises(InvalidInput, match="not a valid ONNX model"):
        open_bundle(path, sidecar_required=False)


def test_counting_includes_branches(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["x"])],
        "branch",
        [],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    choice = helper.make_node("If", ["yes"], ["logits"], then_branch=body, else_branch=body)
    path = tiny_onnx.save(tmp_path / "a.onnx", [choice], [yes], ["b", 3, 8, 8], ["b", 192])
    assert count_nodes(path) == {"Flatten": 2, "If": 1}
    assert onnx.load(path).graph.name == "tiny"
