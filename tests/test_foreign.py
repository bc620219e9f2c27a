"""ONNX files as other exporters write them: what they end with, how they are fed, in which order they stand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from onnx import helper, numpy_helper
from PIL import Image
from shipped import DIGITS, Sievit, sievit
from test_adopt import run, written

from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.sidecar import read_sidecar
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
    ("operators", "scores"),
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
def test_the_sidecar_says_what_the_last_operator_makes(tmp_path: Path, operators: tuple[str, ...], scores: str) -> None:
    path = ending(tmp_path / "model.onnx", *operators)
    assert open_bundle(path, sidecar_required=False).signature.scores == scores
    tiny_onnx.sidecar(path, names=DIGITS)
    assert json.loads(path.with_suffix(".json").read_text())["scores"] == scores


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
    [("Identity", softmax), ("Softmax", softmax), ("LogSoftmax", softmax), ("Sigmoid", sigmoid)],
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
    scores = read_sidecar(adopted).scores.replace("_", " ")
    assert f"| scores | {scores} |" in (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-I", "pack/predict.py", "photo.png"], capture_output=True, text=True, check=True
    )
    shown = [(name, float(share)) for _, name, share in (line.split("\t") for line in told.stdout.splitlines())]
    assert [name for name, _ in shown] == [DIGITS[place] for place in best]
    assert [share for _, share in shown] == pytest.approx(expected[best], abs=1e-4)
