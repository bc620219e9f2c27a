"""ONNX files that are not what they say: each is refused with a message of its own, and none takes the tool down.

The letters are those of the project's list of bad input: files (F), weights outside (W), graphs (G), signatures (S).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from test_bundle import external

from sievit.stages.deploy import sessions
from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.methods import InvalidInput

node = helper.make_node


def relu(read: str, made: str) -> onnx.NodeProto:
    return node("Relu", [read], [made])


RELU = [relu("input", "logits")]
SHAPE = ["batch", 3, 8, 8]


def graph(
    folder: Path,
    nodes: Sequence[onnx.NodeProto] = (),
    tensors: Sequence[TensorProto] = (),
    shape: Any = None,
    **more: Any,
) -> Path:
    return tiny_onnx.save(
        folder / "model.onnx", nodes or RELU, tensors, shape or SHAPE, more.pop("output", shape or SHAPE), **more
    )


def changed(folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """A valid file after a change."""
    path = graph(folder)
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, message: str, hint: str = "") -> None:
    with pytest.raises(InvalidInput) as error:
        open_bundle(path, sidecar_required=False)
    assert re.search(message, str(error.value)), str(error.value)
    assert hint in error.value.hint and error.value.hint
    assert str(path) in str(error.value)


# ---- F: the file itself


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html></html>", "is not an ONNX file|is not an ONNX model"),
        (np.random.default_rng(0).bytes(500), "is not an ONNX file|is not an ONNX model"),
        (None, "is not an ONNX file: "),
    ],
    ids=["empty", "a web page", "noise", "half a file"],
)
def test_what_is_no_onnx_file_is_called_so(tmp_path: Path, content: bytes | None, message: str) -> None:
    whole = tiny_onnx.linear(tmp_path / "whole.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(path, message)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path, "is not a file")


# ---- W: weights outside the file

OUTSIDE = {
    "up": ({"location": "../secret"}, r"the location '\.\./secret'"),
    "up by a folder": ({"location": "sub/../../secret"}, r"the location 'sub/\.\./\.\./secret'"),
    "absolute": ({"location": "/proc/self/environ"}, "the location '/proc/self/environ'"),
    "none": ({"location": ""}, "the location ''"),
    "link": ({"location": "link"}, "a symbolic link 'link'"),
    "linked folder": ({"location": "folder/secret"}, "a symbolic link 'folder/secret'"),
    "hard link": ({"location": "hard"}, r"several names \(hard link\) 'hard'"),
    "NUL": ({"location": "inside\0.x"}, r"the location 'inside\\x00\.x'"),
    "address": ({"location": "*/_ORT_MEM_ADDR_/*"}, r"the location '\*/_ORT_MEM_ADDR_/\*'"),
    "negative": ({"location": "inside", "offset": "-8"}, r"bytes -8\+0 of a file of 3072"),
    "behind the end": ({"location": "inside", "offset": "4000"}, r"bytes 4000\+0 of a file of 3072"),
    "a petabyte": (
        {"location": "inside", "length": "1000000000000000"},
        r"bytes 0\+1000000000000000 of a file of 3072",
    ),
    "no number": ({"location": "inside", "length": "many"}, "an offset or length that is no number"),
    "too short": ({"location": "inside", "length": "8"}, "8 bytes, where its shape takes 3072"),
    "too far": ({"location": "inside", "offset": "8"}, "3064 bytes, where its shape takes 3072"),
    "short file": ({"location": "short"}, "100 bytes, where its shape takes 3072"),
    "attribute": ({"location": "inside", "basepath": "/"}, "an unknown attribute 'basepath'"),
    "dunder": ({"location": "inside", "__class__": "x"}, "an unknown attribute '__class__'"),
    "absent": ({"location": "absent"}, "weights file 'absent' is missing beside it"),
}


def folder_of_weights(tmp_path: Path) -> Path:
    inner, secret = tmp_path / "inner", tmp_path / "secret"
    inner.mkdir()
    secret.write_bytes(tiny_onnx.weights().tobytes())
    (inner / "inside").write_bytes(secret.read_bytes())
    (inner / "short").write_bytes(bytes(100))
    (inner / "link").symlink_to(secret)
    (inner / "folder").symlink_to(tmp_path)
    (inner / "hard").hardlink_to(secret)
    return inner


@pytest.mark.parametrize("case", OUTSIDE)
def test_weights_outside_are_refused_by_what_is_wrong_with_them(tmp_path: Path, case: str) -> None:
    entries, message = OUTSIDE[case]
    refused(external(folder_of_weights(tmp_path), **entries), message)


def test_a_location_that_stands_twice_is_refused_whichever_a_reader_takes(tmp_path: Path) -> None:
    for first, second in (("inside", "../secret"), ("../secret", "inside")):
        (outer := tmp_path / first.strip("./")).mkdir()
        inner = folder_of_weights(outer)
        path = external(inner, location=first)
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].external_data.add(key="location", value=second)
        path.write_bytes(model.SerializeToString())
        refused(path, "an attribute that stands there twice")


def test_weights_of_an_attribute_are_looked_at_as_well(tmp_path: Path) -> None:
    """A sparse constant, and a graph for training: no other reader needs them, and both can name a file."""
    leading = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    leading.external_data.add(key="location", value="../secret")
    sparse = node("Constant", [], ["c"])
    attribute = sparse.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(leading)
    refused(graph(tmp_path, [sparse, *RELU]), r"the location '\.\./secret'")
    hidden = changed(tmp_path, lambda model: model.training_info.add().algorithm.initializer.append(leading))
    refused(hidden, r"the location '\.\./secret'")


# ---- G: graphs


def weight(*dims: int, data: bytes = b"") -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=data)


ADD = [node("Add", ["input", "w"], ["logits"])]
GRAPHS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cycle": (
        lambda at: graph(at, [node("Add", ["input", "b"], ["a"]), relu("a", "b"), relu("b", "logits")]),
        "input 'b' of node",
    ),
    "undefined input": (
        lambda at: graph(at, [node("Add", ["input", "nowhere"], ["logits"])]),
        "input 'nowhere' of node",
    ),
    "output made twice": (
        lambda at: graph(at, [relu("input", "logits"), relu("input", "logits")]),
        "'logits' has been used as output names multiple times",
    ),
    "unknown operator": (
        lambda at: graph(at, [node("Frobnicate", ["input"], ["logits"])]),
        "No Op registered for Frobnicate",
    ),
    "unequal types": (
        lambda at: graph(at, [node("Cast", ["input"], ["i"], to=7), node("Add", ["input", "i"], ["logits"])]),
        "inconsistent type",
    ),
    "negative dimension": (lambda at: graph(at, ADD, [weight(-4)]), "Negative dimension value"),
    "a terabyte without data": (lambda at: graph(at, ADD, [weight(1 << 40)]), r"\(tensor name: w\) should contain one"),
    "product of dimensions": (lambda at: graph(at, ADD, [weight(1 << 40, 1 << 40)]), "dimension product overflow"),
    "too little data": (lambda at: graph(at, ADD, [weight(8, data=bytes(8))]), "too small for the declared shape"),
    "weight of one name": (
        lambda at: graph(at, ADD, [numpy_helper.from_array(np.zeros(8, np.float32), "w")] * 2),
        "w initializer name is not unique",
    ),
    "a version to come": (
        lambda at: changed(at, lambda model: setattr(model, "ir_version", 999)),
        "ir_version 999 is higher",
    ),
    "no version": (lambda at: changed(at, lambda model: model.ClearField("ir_version")), "not have an ir_version"),
    "no operators": (lambda at: changed(at, lambda model: model.graph.ClearField("node")), "it has no operators"),
    "opset to come": (lambda at: graph(at, opset=99), "uses opset 99 of ai.onnx"),
    "custom operator": (
        lambda at: graph(at, [node("Magic", ["input"], ["logits"], domain="evil")], domains=[("evil", 1)]),
        "uses operators of the domain 'evil'",
    ),
    "function that calls itself": (
        lambda at: calling(at, 1, last="F0"),
        "functions that call each other more than 50 deep",
    ),
    "functions that double 40 times": (
        lambda at: calling(at, 40, last="Relu"),
        "functions that expand to more than 200,000 operators",
    ),
}


def calling(folder: Path, count: int, last: str) -> Path:
    """Functions F0, F1, ... of which each calls the next one twice, and the last one `last`."""
    path = graph(folder, [node("F0", ["input"], ["logits"], domain="own")], domains=[("own", 1)])
    model = onnx.load(path)
    imports = [helper.make_opsetid("own", 1), helper.make_opsetid("", 20)]
    for index in range(count):
        then, domain = (f"F{index + 1}", "own") if index + 1 < count else (last, "own" if last == "F0" else "")
        calls = [node(then, ["x"], ["z"], domain=domain), node(then, ["z"], ["y"], domain=domain)]
        model.functions.append(helper.make_function("own", f"F{index}", ["x"], ["y"], calls, imports))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_that_cannot_run_is_refused_by_what_is_wrong_with_it(tmp_path: Path, case: str) -> None:
    make, message = GRAPHS[case]
    refused(make(tmp_path), message)


def test_a_few_functions_are_no_reason_to_refuse(tmp_path: Path) -> None:
    assert open_bundle(calling(tmp_path, 3, last="Relu"), sidecar_required=False).nodes == {"F0": 1}


# ---- S: what an image classifier takes

SIGNATURES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "of rank 2": (lambda at: graph(at, shape=["batch", 77]), "its input has not four dimensions"),
    "of zero pixels": (lambda at: graph(at, shape=["batch", 3, 0, 8]), "its input has a dimension of 0"),
    "of fewer": (lambda at: graph(at, shape=["batch", 3, -8, 8]), "its input has a dimension of -8"),
    "of indices": (
        lambda at: graph(at, [node("Cast", ["input"], ["logits"], to=1)], dtype=TensorProto.INT64),
        "input is not of float or uint8",
    ),
    "two inputs": (
        lambda at: changed(at, lambda model: model.graph.input.append(helper.make_tensor_value_info("mask", 1, [1]))),
        "it has 2 inputs",
    ),
    "no output": (lambda at: changed(at, lambda model: model.graph.ClearField("output")), "it has no outputs"),
    "four channels of bytes": (
        lambda at: graph(at, [node("Cast", ["input"], ["logits"], to=1)], shape=[1, 8, 8, 4], dtype=TensorProto.UINT8),
        "neither 1 nor 3 channels",
    ),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_another_input_is_refused_with_the_signature(tmp_path: Path, case: str) -> None:
    make, message = SIGNATURES[case]
    refused(make(tmp_path), message, hint="its signature is input")


def test_settings_in_a_models_metadata_change_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    wanted = '{"session_options": {"intra_op_num_threads": 7, "enable_profiling": true}}'
    path = changed(tmp_path, lambda model: helper.set_model_props(model, {"ort_config": wanted}))
    monkeypatch.chdir(tmp_path)
    options = sessions.open_session(path, threads=1).get_session_options()
    assert (options.intra_op_num_threads, options.enable_profiling) == (1, False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "a profile was written"
