"""`sievit predict`: the right classes, a word for every image, and no file that takes the tool down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from shipped import Sievit, classifier, sievit, store

from sievit.pipeline.store import Store
from sievit.stages import predict
from sievit.stages.deploy.child import ChildFailed
from sievit.stages.deploy.scorer import scorer

__all__ = ["sievit", "store"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of the network's own size, one in a folder below."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, pixels in zip(("a.png", "b.PNG", "more/c.bmp"), tiny_onnx.pictures(3), strict=True):
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def expected(seed: int = 1, count: int = 3) -> np.ndarray:
    """Probabilities [count, 10] of the pictures above, by the definition."""
    pre = tiny_onnx.PREPROCESSING
    pixels = tiny_onnx.pictures(count).astype(np.float64) / 255
    inputs = ((pixels - pre["mean"]) / pre["std"]).transpose(0, 3, 1, 2).reshape(count, -1)
    scores = inputs @ tiny_onnx.weights(classes=10, seed=seed).astype(np.float64)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def test_the_likeliest_classes_come_first_with_their_probabilities(sievit: Sievit, store: Store, photos: Path) -> None:
    answer = sievit("predict", "main", str(photos), "--top", "3", "--json")
    assert answer.code == 0 and answer.err == ""
    assert [Path(line["image"]).name for line in answer.lines] == ["a.png", "b.PNG", "c.bmp"]
    for line, shares in zip(answer.lines, expected(), strict=True):
        best = np.argsort(-shares)[:3]
        assert [each["index"] for each in line["classes"]] == best.tolist()
        assert [each["class"] for each in line["classes"]] == [str(index) for index in best]
        assert [each["probability"] for each in line["classes"]] == pytest.approx(shares[best], abs=1e-5)


def test_the_table_says_what_the_json_says(sievit: Sievit, store: Store, photos: Path) -> None:
    answer = sievit("predict", "main", "photos/a.png", "--top", "2")
    first, second = np.argsort(-expected()[0])[:2]
    head, one, two = answer.out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    assert one.split()[-2:] == [str(first), f"{100 * expected()[0][first]:.1f}%"]
    assert two.split()[0] == str(second)


def test_more_images_than_fit_into_memory_keep_their_order(
    sievit: Sievit, store: Store, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    whole = sievit("predict", "main", str(photos), str(photos / "a.png"), "--json").lines
    assert [Path(line["image"]).name for line in whole] == ["a.png", "b.PNG", "c.bmp", "a.png"]
    assert [line["classes"][0]["index"] for line in whole] == [*expected().argmax(1), expected()[0].argmax()]


def test_what_cannot_be_read_is_told_by_name_and_the_rest_is_answered(
    sievit: Sievit, store: Store, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"no image at all")
    (photos / "empty.png").write_bytes(b"")
    (photos / "notes.txt").write_text("not looked at")
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    arguments = [str(photos), "nothing", "nowhere.png", "pipe.png"]
    wrong = {
        str(photos / "broken.jpg"): "not an image in one of the formats",
        str(photos / "empty.png"): "the file is empty",
        "nothing": "the folder holds no image",
        "nowhere.png": "cannot be opened (No such file or directory)",
        "pipe.png": "neither a file nor a folder",
    }
    answer = sievit("predict", "main", *arguments)
    assert answer.code == 3
    for name, why in wrong.items():
        assert f"error: {name}: {why}" in answer.err
    assert "5 of 8 could not be classified" in answer.err and "notes.txt" not in answer.err
    assert all(name in answer.out for name in ("a.png", "b.PNG", "c.bmp"))
    *lines, last = sievit("predict", "main", *arguments, "--json").lines
    assert {
        line["image"]: why for line in lines if "error" in line for why in [line["error"]["message"]]
    }.keys() == wrong.keys()
    assert sum("classes" in line for line in lines) == 3
    assert last["error"]["code"] == 3


def test_a_folder_that_may_not_be_read_is_told(
    sievit: Sievit, store: Store, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def closed(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    answer = sievit("predict", "main", str(photos))
    assert answer.code == 3 and "more: the folder cannot be read (Permission denied)" in answer.err
    assert "a.png" in answer.out and "b.PNG" in answer.out


def test_nothing_of_the_training_side_is_imported(store: Store, photos: Path, tmp_path: Path) -> None:
    program = (
        "import sys, json; from sievit.stages.__main__ import main; sys.argv[1:] = json.loads(sys.argv[1]); "
        "code = main(); "
        "print(code, {name.partition('.')[0] for name in sys.modules} & {'torch', 'torchvision', 'timm', 'nncf'})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = json.dumps(["predict", "main", str(photos), "--json"])
    told = subprocess.run(
        [sys.executable, "-c", program, arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert told.stdout.splitlines()[-1] == "0 set()", told.stderr
    assert len(told.stdout.splitlines()) == 4


def test_a_label_file_of_another_length_is_refused_even_where_the_graph_leaves_it_open(
    sievit: Sievit, photos: Path, tmp_path: Path
) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["logits"])]
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [], ["batch", 3, 8, 8], ["batch", "classes"])
    tiny_onnx.sidecar(path)
    answer = sievit("predict", "model.onnx", str(photos))
    assert answer.code == 3 and "scores of shape [192] for an image, its sidecar names 4 classes" in answer.err


def test_a_file_without_its_sidecar_is_refused(sievit: Sievit, photos: Path, tmp_path: Path) -> None:
    tiny_onnx.linear(tmp_path / "bare.onnx")
    answer = sievit("predict", "bare.onnx", str(photos))
    assert answer.code == 3 and "has no sidecar bare.json" in answer.err


def test_scores_that_overflow_are_no_answer(sievit: Sievit, photos: Path, tmp_path: Path) -> None:
    path = classifier(tmp_path / "model")
    tensor = numpy_helper.from_array(np.full((192, 10), np.float32(3e38)), "weight")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    tiny_onnx.save(path, nodes, [tensor], ["batch", 3, 8, 8], ["batch", 10])
    tiny_onnx.sidecar(path, names=list("0123456789"))
    answer = sievit("predict", str(path), str(photos / "a.png"))
    assert answer.code == 3 and "are no numbers" in answer.err and answer.out == ""


def endless(path: Path) -> Path:
    """A model whose loop has no end."""

    def value(name: str, kind: int, shape: list[int] | None) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)],
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    nodes = [
        helper.make_node("Loop", ["", "yes", "input"], ["looped"], body=body),
        helper.make_node("Flatten", ["looped"], ["logits"]),
    ]
    tiny_onnx.save(path, nodes, [yes], ["batch", 3, 8, 8], ["batch", 192])
    tiny_onnx.sidecar(path, names=[str(index) for index in range(192)])
    return path


def test_a_model_that_never_ends_is_ended_with_a_message(tmp_path: Path) -> None:
    path = endless(tmp_path / "model.onnx")
    with (
        scorer(path, first_s=2.0, each_s=0.0) as score,
        pytest.raises(ChildFailed, match="no answer to scores within 2 s"),
    ):
        score(tiny_onnx.pictures(1))


def test_a_model_that_asks_for_a_terabyte_fails_alone(sievit: Sievit, photos: Path, tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([1 << 38], np.int64), "shape")
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceSum", ["huge", "axis"], ["sum"]),
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Add", ["flat", "sum"], ["logits"]),
    ]
    path = tiny_onnx.save(tmp_path / "model.onnx", nodes, [shape, axis], ["batch", 3, 8, 8], ["batch", 192])
    tiny_onnx.sidecar(path, names=[str(index) for index in range(192)])
    answer = sievit("predict", "model.onnx", str(photos))
    assert answer.code == 1 and answer.out == ""
    assert "alloc" in answer.err.lower() or "memory" in answer.err.lower()
    assert "Traceback" not in answer.err and "help: " in answer.err
