"""A file that takes raw pixels answers as the same file does behind its preprocessing, wherever files are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_onnx
from onnx import TensorProto, helper
from PIL import Image
from test_benchmark import Folder, context
from tiny_vision import network

from sievit.pipeline.stage import Labelled
from sievit.stages.benchmark import benchmark_files, run
from sievit.stages.deploy import preprocess
from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.eight_bit import Form, Workshop, ranges_on
from sievit.stages.deploy.pixels import bake
from sievit.stages.deploy.predict import scores
from sievit.stages.deploy.quantized_graph import describe
from sievit.stages.deploy.sidecar import parse_preprocessing, read_sidecar
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.decode import PICTURE, to_square
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.preprocessing import Preprocessing, load

CARD = parse_preprocessing(tiny_onnx.PREPROCESSING, "test")


def pair(folder: Path, make: Any = tiny_onnx.linear) -> tuple[Path, Path]:
    """A file of normalised input and its twin of pixels, both with sidecars."""
    plain, raw = make(folder / "plain.onnx"), make(folder / "raw.onnx")
    bake(raw, CARD)
    for path in (plain, raw):
        tiny_onnx.sidecar(path)
    return plain, raw


def test_a_file_of_pixels_answers_as_its_twin_behind_the_preprocessing(tmp_path: Path) -> None:
    plain, raw = pair(tmp_path)
    pictures = tiny_onnx.pictures(33)
    np.testing.assert_allclose(scores(raw, pictures, batch=8), scores(plain, pictures), rtol=1e-5, atol=1e-4)
    session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    (alone,) = session.run(None, {"pixels": pictures})
    normal = (pictures / 255.0 - np.array(CARD.mean)) / np.array(CARD.std)
    expected = normal.transpose(0, 3, 1, 2).reshape(33, -1) @ tiny_onnx.weights().astype(np.float64)
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-3)


def test_a_network_whose_stem_pads_with_zeros_answers_the_same_at_the_borders(tmp_path: Path) -> None:
    """Where a fold into the first convolution would fail: LV-ViT pads its input by 3 pixels."""
    net = network("lv-vit")
    plain, raw = (tmp_path / f"{name}.onnx" for name in ("plain", "raw"))
    export(net, plain, 20)
    raw.write_bytes(plain.read_bytes())
    card = parse_preprocessing({"size": 32, "mean": [0.2, 0.9, 0.5], "std": [0.1, 0.3, 0.5]}, "test")
    bake(raw, card)
    pictures = tiny_onnx.pictures(4, size=32)
    first, second = (ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (plain, raw))
    expected = first.run(None, {"input": preprocess.normalise(pictures, card)})[0]
    np.testing.assert_allclose(second.run(None, {"pixels": pictures})[0], expected, rtol=1e-5, atol=1e-5)


def test_the_sidecar_of_a_file_of_pixels_says_so_and_its_batch_stays_free(tmp_path: Path) -> None:
    plain, raw = pair(tmp_path)
    told = json.loads(raw.with_suffix(".json").read_text())
    assert (told["layout"], told["dtype"], told["input"]) == ("NHWC", "uint8", "pixels")
    opened = open_bundle(raw)
    assert opened.signature.text() == "pixels uint8 [N,8,8,3] -> logits [N,4]"
    assert opened.sidecar is not None and opened.sidecar.image == (8, 8, 3)
    other = read_sidecar(plain)
    assert (other.layout, other.dtype, other.image) == ("NCHW", "float32", (3, 8, 8))
    assert other.preprocessing.sha256 == opened.sidecar.preprocessing.sha256


def test_baking_gives_equal_bytes_for_equal_files(tmp_path: Path) -> None:
    contents = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        contents.add(pair(tmp_path / name)[1].read_bytes())
    assert len(contents) == 1


def test_the_benchmark_feeds_a_file_of_pixels(tmp_path: Path) -> None:
    plain, raw = pair(tmp_path)
    raw.with_suffix(".json").unlink()
    rows = benchmark_files([plain, raw], batch_sizes=(3,), seconds=0.05)["rows"]
    assert [row["variant"] for row in rows] == ["fp32", "fp32"], "bytes go in, and floats are what it computes with"


@pytest.mark.parametrize("form", [pytest.param(Form("static"), marks=pytest.mark.slow), Form("dynamic")], ids=Form.text)
def test_a_file_of_pixels_becomes_the_8_bit_file_that_its_twin_becomes(form: Form, tmp_path: Path) -> None:
    plain, raw = pair(tmp_path, tiny_onnx.transformer)
    np.save(tmp_path / "pixels.npy", tiny_onnx.pictures(16))
    answers = []
    for path in (plain, raw):
        folder = tmp_path / path.stem
        folder.mkdir()
        ranges = ranges_on(tmp_path / "pixels.npy", path, folder, 8, 300.0)
        with Workshop(path, folder, 8, 300.0, ranges) as workshop:
            target = workshop.make(form)
        assert target is not None
        told = describe(onnx.load(target))
        assert told["quantized_nodes"] == 13 and told["astray"] == {}
        tiny_onnx.sidecar(target, precision="int8")
        answers.append(scores(target, tiny_onnx.pictures(16)))
    np.testing.assert_allclose(answers[1], answers[0], atol=0.05 * np.abs(answers[0]).max())


@pytest.mark.parametrize(("shape", "layout"), [([1, 8, 8, 3], "NHWC"), ([1, 3, 8, 8], "NCHW"), ([1, 8, 8, 1], "NHWC")])
def test_pixels_of_a_foreign_file_may_stand_in_either_order(tmp_path: Path, shape: list[int], layout: str) -> None:
    opened = open_bundle(foreign(tmp_path / "a.onnx", shape), sidecar_required=False)
    assert opened.signature.layout == layout


@pytest.mark.parametrize("shape", [[1, 8, 8, 4], [1, 5, 8, 8]])
def test_pixels_of_neither_one_nor_three_channels_are_refused_with_the_signature(
    tmp_path: Path, shape: list[int]
) -> None:
    with pytest.raises(InvalidInput, match="neither 1 nor 3 channels") as error:
        open_bundle(foreign(tmp_path / "a.onnx", shape), sidecar_required=False)
    assert "uint8 [N,3,H,W] or [N,H,W,3]" in error.value.hint


def foreign(path: Path, shape: list[int]) -> Path:
    cast = [helper.make_node("Cast", ["input"], ["logits"], to=TensorProto.FLOAT)]
    return tiny_onnx.save(path, cast, [], shape, shape, dtype=TensorProto.UINT8)


def test_one_channel_of_bytes_is_the_mean_of_three() -> None:
    card = parse_preprocessing({"size": 8, "mean": [0.5], "std": [0.5]}, "test")
    pictures = tiny_onnx.pictures(2)
    grey = np.rint(pictures.astype(np.float64).mean(axis=3)).astype(np.uint8)
    np.testing.assert_array_equal(preprocess.normalise(pictures, card, "uint8", "NHWC"), grey[..., None])
    np.testing.assert_array_equal(preprocess.normalise(pictures, card, "uint8"), grey[:, None])


# ---- one preprocessing


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (9, 31), (5, 6)])
def test_the_data_and_the_sidecar_make_the_same_picture(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    card = parse_preprocessing({**PICTURE, "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}, "test")
    np.testing.assert_array_equal(preprocess.fit(pixels, card), to_square(Image.fromarray(pixels), 8))


def test_torch_and_the_sidecar_normalise_alike() -> None:
    import torch

    record = Preprocessing(8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("a", "b"))
    pictures = tiny_onnx.pictures(3)
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    theirs = record.normaliser(torch.device("cpu"))(scaled).numpy()
    card = parse_preprocessing(record.deployed(), "test")
    np.testing.assert_allclose(preprocess.normalise(pictures, card), theirs, rtol=1e-5, atol=1e-6)


CHANGES = {"size": 9, "scale": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "bicubic", "crop": "none"}


@pytest.mark.parametrize("name", [*CHANGES, "crop_pct"])
def test_every_part_of_the_preprocessing_is_in_its_digest(name: str) -> None:
    changed = parse_preprocessing({**tiny_onnx.PREPROCESSING, name: (CHANGES | {"crop_pct": 0.9})[name]}, "test")
    assert changed.sha256 != CARD.sha256
    integers = parse_preprocessing({**tiny_onnx.PREPROCESSING, "crop_pct": 1}, "test")
    assert integers.sha256 == CARD.sha256


def test_a_preprocessing_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    card = tiny_onnx.sidecar(path)
    told = json.loads(card.read_text())
    told["preprocessing"]["mean"] = [0.485, 0.456, 0.406]
    card.write_text(json.dumps(told))
    with pytest.raises(InvalidInput, match="not what preprocessing_sha256 was taken of"):
        open_bundle(path)


def test_a_sidecar_from_before_layouts_of_pixels_is_still_read(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    card = tiny_onnx.sidecar(path)
    told = json.loads(card.read_text())
    for name in ("dtype", "preprocessing_sha256"):
        del told[name]
    card.write_text(json.dumps(told))
    opened = open_bundle(path)
    assert opened.sidecar is not None and (opened.sidecar.layout, opened.sidecar.dtype) == ("NCHW", "float32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "NHWC"}, "and its sidecar disagree"),
        ({"layout": "CHWN"}, "layout 'CHWN'"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"dtype": "uint8"}, "and its sidecar disagree"),
        ({"layout": "NHWC", "dtype": "uint8"}, "and its sidecar disagree"),
    ],
)
def test_a_sidecar_that_states_another_input_is_refused(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    card = tiny_onnx.sidecar(path)
    card.write_text(json.dumps(json.loads(card.read_text()) | fields))
    with pytest.raises(InvalidInput, match=message):
        open_bundle(path)


def test_a_file_whose_users_feed_other_pictures_than_the_test_split_has_is_not_measured(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx", classes=10)
    tiny_onnx.sidecar(path, classes=10, preprocessing={**tiny_onnx.PREPROCESSING, "resize": "bicubic"})
    ctx = context(tmp_path, [Labelled("main", "export", Folder(tmp_path), True, 0)])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="makes pictures by resize bicubic, the data by resize bilinear"):
        run(ctx)


def test_a_network_that_learned_from_pictures_made_otherwise_is_refused(tmp_path: Path) -> None:
    Preprocessing(8, (0.5,), (0.5,), ("a", "b")).save(tmp_path)
    assert load(tmp_path).image_size == 8
    record = json.loads((tmp_path / "preprocessing.json").read_text())
    (tmp_path / "preprocessing.json").write_text(json.dumps(record | {"resize": "bicubic"}))
    with pytest.raises(InvalidInput, match=r"learned from pictures made by .*bicubic"):
        load(tmp_path)
