"""Look inside a file: a copy that also gives out what some of its tensors hold is run, and removed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .isa import usable_cores
from .preprocess import normalise
from .sessions import open_session
from .sidecar import Sidecar, read_sidecar


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The largest absolute value that a tensor reached. node: who made it, or whose weights it is."""

    node: str
    operator: str
    tensor: str
    value: float


def kept_indices(path: Path, pixels: NDArray[np.uint8], batch: int = 64) -> list[NDArray[np.int64]]:
    """Of every TopK of a file with a sidecar, in order of execution: the indices that it chose, [n, K], for images
    uint8 [n, size, size, 3].
    """
    names = [node.output[1] for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "TopK"]
    given_out = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names]
    parts = []
    with _opened(path, [], given_out) as session:
        for inputs in _inputs(read_sidecar(path), pixels, batch):
            parts.append(session.run(names, inputs))
    return [np.concatenate(chosen) for chosen in zip(*parts, strict=True)]


def magnitudes(path: Path, pixels: NDArray[np.uint8], batch: int = 8) -> list[Magnitude]:
    """Of every float tensor that a node of a file with a sidecar makes or reads as weights, in order of execution.
    pixels: uint8 [n, size, size, 3]. A NaN counts as infinite.
    """
    model, floats = onnx.load(path), float_tensors(path)
    made = [(node, name) for node in model.graph.node for name in node.output if name in floats]
    nodes, given_out = [], []
    for index, (_, name) in enumerate(made):
        size, most = f"probe_size_{index}", f"probe_most_{index}"
        nodes += [
            helper.make_node("Abs", [name], [size]),
            helper.make_node("ReduceMax", [size], [most], keepdims=0),
        ]
        given_out.append(helper.make_tensor_value_info(most, TensorProto.FLOAT, []))
    reached = np.zeros(len(made))
    with _opened(path, nodes, given_out) as session:
        for inputs in _inputs(read_sidecar(path), pixels, batch):
            found = np.asarray(session.run([value.name for value in given_out], inputs), dtype=np.float64)
            reached = np.maximum(reached, np.nan_to_num(found, nan=np.inf))
    readers = {name: node for node in reversed(model.graph.node) for name in node.input}
    weights = [
        Magnitude(readers[tensor.name].name, readers[tensor.name].op_type, tensor.name, _largest(tensor))
        for tensor in model.graph.initializer
        if tensor.name in floats and tensor.name in readers
    ]
    outputs = zip(made, reached.tolist(), strict=True)
    return [*weights, *(Magnitude(node.name, node.op_type, name, value) for (node, name), value in outputs)]


def float_tensors(path: Path) -> set[str]:
    """Names of all tensors of float32 in a file, weights and inputs included."""
    # Without weights of a file of their own: more than 2 GB is not taken.
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    stated = [*inferred.value_info, *inferred.input, *inferred.output]
    floats = {value.name for value in stated if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}


def _largest(tensor: onnx.TensorProto) -> float:
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))


@contextmanager
def _opened(
    path: Path, nodes: Sequence[onnx.NodeProto], outputs: Sequence[onnx.ValueInfoProto]
) -> Iterator[ort.InferenceSession]:
    model = onnx.load(path, load_external_data=False)
    model.graph.node.extend(nodes)
    model.graph.output.extend(outputs)
    copy = path.with_name(f"{path.stem}-probe.onnx")  # beside it, where weights in a file of their own are looked for
    copy.write_bytes(model.SerializeToString())
    try:
        yield open_session(copy, threads=len(usable_cores()))
    finally:
        copy.unlink()


def _inputs(sidecar: Sidecar, pixels: NDArray[np.uint8], batch: int) -> Iterator[dict[str, NDArray[np.generic]]]:
    for start in range(0, len(pixels), batch):
        part = pixels[start : start + batch]
        yield {sidecar.input: normalise(part, sidecar.preprocessing, sidecar.dtype, sidecar.layout)}
