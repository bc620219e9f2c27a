"""An ONNX file from elsewhere goes through the pipeline as one of our own, or is refused before it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from shipped import DATA, DIGITS, Sievit

from sievit.pipeline.settings import DataConfig
from sievit.stages.deploy.graph_macs import graph_macs
from sievit.stages.vision.dataset import load_split

PIPELINE = """\
name: theirs
data: {{source: "builtin:digits", image_size: 8, max_test: 120, mean: [0.5, 0.4, 0.3], std: [0.2, 0.25, 0.3]}}
stages:
  adopt:     {{{adopt}}}
{rest}
"""
BENCHMARK = "  benchmark: {batch_sizes: [1], seconds: 0.2, warm_up: 0.1, attribution: false}"


@pytest.fixture
def sievit(capsys: pytest.CaptureFixture[str]) -> Sievit:
    return Sievit(capsys)


def written(folder: Path, adopt: str = "file: their.onnx", rest: str = "", data: str = "") -> Path:
    text = PIPELINE.format(adopt=adopt, rest=rest)
    path = folder / "pipeline.yaml"
    path.write_text(text.replace("mean: [0.5, 0.4, 0.3], std: [0.2, 0.25, 0.3]", data) if data else text)
    return path


def run(sievit: Sievit, path: Path, *more: str) -> Any:
    return sievit("run", str(path), "--store", str(path.parent / "store"), "--json", *more)


def adopted(path: Path) -> list[Path]:
    return sorted(one for one in (path.parent / "store" / "adopt").iterdir() if one.name != ".index")


def test_what_is_measured_of_a_file_from_elsewhere_is_what_it_answers_on_pictures_made_by_hand(
    tmp_path: Path, sievit: Sievit
) -> None:
    file = tiny_onnx.linear(tmp_path / "their.onnx", classes=10, seed=3)
    done = run(sievit, written(tmp_path, rest=BENCHMARK))
    assert done.code == 0, done.err
    (row,) = done.document["rows"]
    images = load_split(DataConfig(**DATA).model_dump(), tmp_path, "test")
    values = images.pixels(np.arange(len(images))).astype(np.float64).transpose(0, 3, 1, 2) / 255
    values = (values - np.reshape([0.5, 0.4, 0.3], (1, 3, 1, 1))) / np.reshape([0.2, 0.25, 0.3], (1, 3, 1, 1))
    session = ort.InferenceSession(file)
    logits = session.run(None, {"input": values.astype(np.float32)})[0]
    assert row["top1"] == pytest.approx(float((np.asarray(logits).argmax(1) == images.labels).mean()))
    assert (row["arm"], row["entry"], row["variant"], row["test_images"]) == ("main", "adopt", "fp32", 120)
    assert row["macs"] == 3 * 8 * 8 * 10


def test_a_moved_file_is_known_again_and_a_changed_one_is_not(tmp_path: Path, sievit: Sievit) -> None:
    file = tiny_onnx.linear(tmp_path / "their.onnx", classes=10, seed=3)
    first = run(sievit, written(tmp_path)).document["stages"]
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / "other.onnx")
    moved = run(sievit, written(tmp_path, "file: elsewhere/other.onnx")).document["stages"]
    assert [one["state"] for one in (*first, *moved)] == ["done", "cached"]
    tiny_onnx.linear(tmp_path / "elsewhere" / "other.onnx", classes=10, seed=4)
    changed = run(sievit, written(tmp_path, "file: elsewhere/other.onnx")).document["stages"]
    assert [one["state"] for one in changed] == ["done"] and changed[0]["key"] != first[0]["key"]


def test_an_adopted_file_is_quantized_like_one_of_our_own(tmp_path: Path, sievit: Sievit) -> None:
    tiny_onnx.transformer(tmp_path / "their.onnx", classes=10)
    rest = "  quantize:  {schemes: [dynamic], fuse_attention: false, min_speedup: null, max_drop: 1.0}"
    done = run(sievit, written(tmp_path, rest=rest))
    assert done.code == 0, done.err
    product = next((tmp_path / "store" / "quantize").glob("*/model.onnx"))
    counts = {node.op_type for node in onnx.load(product).graph.node}
    described = json.loads(product.with_suffix(".json").read_text())
    assert "MatMulInteger" in counts and described["precision"] == "int8"
    assert described["classes"] == list(DIGITS) and described["preprocessing"]["mean"] == [0.5, 0.4, 0.3]


def test_names_and_weights_beside_the_file_go_with_it(tmp_path: Path, sievit: Sievit) -> None:
    file = tiny_onnx.linear(tmp_path / "their.onnx", classes=10, seed=3)
    model = onnx.load(file)
    onnx.save_model(model, file, save_as_external_data=True, location="their.bin", size_threshold=0)
    (tmp_path / "names.txt").write_text("\n".join(f"the {name}" for name in DIGITS) + "\n\n", encoding="utf-8")
    asked = "file: their.onnx, weights: [their.bin], labels: names.txt"
    path = written(tmp_path, asked)
    first = run(sievit, path)
    assert first.code == 0, first.err
    (folder,) = (tmp_path / "store" / "adopt").glob("*/model.onnx")
    assert (folder.parent / "their.bin").read_bytes() == (tmp_path / "their.bin").read_bytes()
    assert json.loads(folder.with_suffix(".json").read_text())["classes"][3] == "the 3"
    held = bytearray((tmp_path / "their.bin").read_bytes())
    held[:4] = np.float32(9).tobytes()
    (tmp_path / "their.bin").write_bytes(held)
    assert [one["state"] for one in run(sievit, path).document["stages"]] == ["done"]
    (tmp_path / "names.txt").write_text("\n".join(DIGITS), encoding="utf-8")
    assert [one["state"] for one in run(sievit, path).document["stages"]] == ["done"]


def test_a_file_of_bytes_needs_no_mean_and_one_of_ours_brings_its_own(tmp_path: Path, sievit: Sievit) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    weight = numpy_helper.from_array(tiny_onnx.weights(classes=10), "weight")
    shape: list[int | str] = ["n", 8, 8, 3]
    tiny_onnx.save(tmp_path / "their.onnx", nodes, [weight], shape, ["n", 10], dtype=TensorProto.UINT8)
    done = run(sievit, written(tmp_path, data="workers: 0"))
    assert done.code == 0, done.err
    ours = tiny_onnx.linear(tmp_path / "ours.onnx", classes=10)
    tiny_onnx.sidecar(ours, names=list(DIGITS))
    unnamed = run(sievit, written(tmp_path, "file: ours.onnx", data="workers: 0"))
    assert unnamed.code == 3 and "set sidecar: ours.json" in unnamed.document["error"]["hint"]
    path = written(tmp_path, "file: ours.onnx, sidecar: ours.json", data="workers: 0")
    done = run(sievit, path)
    assert done.code == 0, done.err
    kept = [json.loads(one.read_text()) for one in (tmp_path / "store" / "adopt").glob("*/model.json")]
    assert {each["precision"] for each in kept} == {"fp32"}, "bytes go in, and floats are what it computes with"
    means = {tuple(each["preprocessing"]["mean"]) for each in kept}
    assert means == {(0.0, 0.0, 0.0), tuple(tiny_onnx.PREPROCESSING["mean"])}
    tiny_onnx.sidecar(ours, names=list(DIGITS), preprocessing=tiny_onnx.PREPROCESSING | {"crop": "none"})
    changed = run(sievit, path)
    assert changed.code == 3 and "makes pictures by" in changed.document["error"]["message"]


def test_a_batch_that_the_file_does_not_take_is_refused_before_anything_is_measured(
    tmp_path: Path, sievit: Sievit
) -> None:
    tiny_onnx.linear(tmp_path / "their.onnx", classes=10, batch=1)
    path = written(tmp_path, rest=BENCHMARK.replace("[1]", "[1, 4]"))
    done = sievit("run", str(path), "--store", str(tmp_path / "store"))
    assert done.code == 3 and "takes batches of 1 only, not of 4" in done.err, done.err
    assert run(sievit, path, "--set", "benchmark.batch_sizes=[1]").code == 0


def test_a_file_that_is_right_by_chance_alone_is_told(tmp_path: Path, sievit: Sievit) -> None:
    tiny_onnx.linear(tmp_path / "their.onnx", classes=10, seed=3)
    done = sievit("run", str(written(tmp_path)), "--store", str(tmp_path / "store"))
    assert done.code == 0 and "by chance it were 10.0%" in done.err


def infinite(path: Path) -> None:
    model = onnx.load(path)
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("adopt", "data", "at", "told"),
    [
        ("file: none.onnx", "", "adopt", "none.onnx cannot be read"),
        ("file: empty.onnx", "", "adopt", "is empty"),
        ("file: their.onnx, labels: few.txt", "", "labels", "names 2 classes, the data has 10"),
        ("file: their.onnx, labels: none.txt", "", "labels", "none.txt cannot be read"),
        ("file: their.onnx, labels: gap.txt", "", "labels", "line 2 is empty"),
        ("file: their.onnx, weights: [few.txt]", "", "weights", "keeps its weights in itself"),
        ("file: split.onnx", "", "adopt", "set weights: [split.bin]"),
        ("file: few.onnx", "", "adopt", "has 4 scores an image, the data has 10 classes"),
        ("file: nan.onnx", "", "main/adopt", "with scores that are no numbers"),
        ("file: their.onnx", "mean: [0.5, 0.5, 0.5]", "data", "data.std is not stated"),
        ("file: large.onnx", "", "data", "data.image_size is 8"),
        ("{}", "", "adopt", "file"),
    ],
)
def test_what_cannot_be_adopted_is_refused_at_its_line_and_leaves_nothing(
    tmp_path: Path, sievit: Sievit, adopt: str, data: str, at: str, told: str
) -> None:
    their = tiny_onnx.linear(tmp_path / "their.onnx", classes=10)
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    onnx.save_model(
        onnx.load(their), tmp_path / "split.onnx", save_as_external_data=True, location="split.bin", size_threshold=0
    )
    tiny_onnx.linear(tmp_path / "few.onnx", classes=4)
    tiny_onnx.linear(tmp_path / "large.onnx", size=16, classes=10)
    shutil.copy(their, tmp_path / "nan.onnx")
    infinite(tmp_path / "nan.onnx")
    text = "" if adopt == "{}" else adopt
    path = written(tmp_path, text, data=data)
    done = sievit("run", str(path), "--store", str(tmp_path / "store"))
    assert done.code == 3 and told in done.err and at in done.err, done.err
    assert at == "main/adopt" or "pipeline.yaml" in done.err, done.err  # what only its answers show has no line
    assert not list((tmp_path / "store").rglob("model.onnx"))


def test_products_are_counted_as_a_loop_over_them_does(tmp_path: Path) -> None:
    size, classes, width, blocks = 8, 5, 32, 2
    path = tiny_onnx.transformer(tmp_path / "vit.onnx", size=size, classes=classes, width=width, blocks=blocks)
    tokens = (size // 4) ** 2
    linear = 4 * width * width + 2 * width * 2 * width
    expected = tokens * width * 3 * 4 * 4 + blocks * (tokens * linear + 2 * tokens * tokens * width) + width * classes
    assert graph_macs(path, (3, size, size)) == expected


def test_macs_of_one_image_are_the_same_in_a_file_of_fixed_batch(tmp_path: Path) -> None:
    """The batch stands in the constants of its reshapes too, as exporters write them."""
    found = []
    for batch in (1, 4):
        shape = numpy_helper.from_array(np.array([batch, 192], np.int64), "shape")
        weight = numpy_helper.from_array(np.zeros((192, 10), np.float32), "w")
        nodes = [
            helper.make_node("Reshape", ["input", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ]
        path = tiny_onnx.save(tmp_path / f"{batch}.onnx", nodes, [shape, weight], [batch, 3, 8, 8], [batch, 10])
        found.append(graph_macs(path, (3, 8, 8)))
    assert found == [1920, 1920]


def test_macs_that_cannot_be_known_are_not_told(tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "vit.onnx")
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node.append(helper.make_node("BiasGelu", ["logits", "logits"], ["more"], domain="com.microsoft"))
    onnx.save(model, path)
    assert graph_macs(path, (3, 8, 8)) is None
