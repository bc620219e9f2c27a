"""A float file in half precision: weights and what flows between operators in fp16, input and scores as they were.

Computed in fp32 all the same: LayerNormalization and Softmax, whose sums of many terms half precision cannot hold; the
preprocessing inside the file; and all that decides which tokens are kept, from the product with weights before it,
since a rounding there keeps another token.

onnxruntime.transformers.float16 is not used: it writes the casts of outputs behind the graph, out of order, writes two
casts of one name for a tensor that two such operators read, and scores tokens in half precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .pixels import CONSTANTS
from .probe import Magnitude, float_tensors, magnitudes

LARGEST = 65504.0  # the largest number of half precision
SMALLEST = 2.0**-24
EXTERNAL_ABOVE = 2_000_000_000  # bytes of weights; protobuf cannot hold more in one file
FULL = {"LayerNormalization", "Softmax"}
LINEAR = {"MatMul", "Gemm", "Conv"}


def to_half(source: Path, target: Path) -> None:
    """Write `target`, the half-precision twin of the float file `source`; the same source gives the same bytes."""
    model = onnx.load(source)
    graph = model.graph
    floats, full = float_tensors(source), full_nodes(model)
    precisions: dict[str, set[bool]] = defaultdict(set)  # of weights: read in fp32 (True), in half (False)
    for index, node in enumerate(graph.node):
        for name in node.input:
            precisions[name].add(index in full)
    weights = [tensor for tensor in graph.initializer if tensor.name in floats]
    constants = {tensor.name for tensor in weights}
    for tensor in weights:
        values = numpy_helper.to_array(tensor)
        if precisions[tensor.name] == {True, False}:
            graph.initializer.append(numpy_helper.from_array(values, f"{tensor.name}_fp32"))
        if False in precisions[tensor.name]:
            tensor.CopyFrom(numpy_helper.from_array(_rounded(values), tensor.name))
    nodes: list[onnx.NodeProto] = []
    is_full = {value.name: True for value in graph.input}
    cast: set[str] = set()

    def read(name: str, in_full: bool) -> str:
        """The name of this tensor in the precision asked for; its cast is written before the first reader."""
        if name in constants:
            return f"{name}_fp32" if in_full and precisions[name] == {True, False} else name
        if name not in floats or is_full[name] == in_full:
            return name
        other = f"{name}_fp32" if in_full else f"{name}_fp16"
        if other not in cast:
            cast.add(other)
            to = TensorProto.FLOAT if in_full else TensorProto.FLOAT16
            nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}_cast", to=to))
        return other

    for index, node in enumerate(graph.node):
        node.input[:] = [read(name, index in full) for name in node.input]
        is_full |= dict.fromkeys(node.output, index in full)
        if index not in full:
            _retype(node)
        nodes.append(node)
    _keep_outputs(graph, nodes, [value.name for value in graph.output if not is_full[value.name]])
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # the graph owns those it had
    del graph.node[:]
    graph.node.extend(kept)
    del graph.value_info[:]  # of the types that were
    external = sum(len(tensor.raw_data) for tensor in graph.initializer) > EXTERNAL_ABOVE
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}.data")


def full_nodes(model: onnx.ModelProto) -> set[int]:
    """Places in the graph of the operators that compute in fp32."""
    nodes = model.graph.node
    weights = {tensor.name for tensor in model.graph.initializer}
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    found: set[int] = set()
    waiting = [index for index, node in enumerate(nodes) if node.op_type == "TopK" or CONSTANTS[1] in node.input]
    while waiting:
        index = waiting.pop()
        node = nodes[index]
        if index in found or (node.op_type in LINEAR and weights.intersection(node.input)):
            continue
        found.add(index)
        waiting += [makers[name] for name in node.input if name in makers]
    return found | {index for index, node in enumerate(nodes) if node.op_type in FULL}


def overflow(path: Path, pixels: NDArray[np.uint8]) -> Magnitude:
    """The largest number that a half-precision twin of this float file would have to hold, on images uint8
    [n, size, size, 3]; infinite where the float file itself is.

    Looked for in fp32, in all that such a twin makes or reads in half: a provider without half-precision kernels, such
    as the CPU, computes it in fp32 and would show nothing.
    """
    model = onnx.load(path, load_external_data=False)
    full = full_nodes(model)
    halves = [node for index, node in enumerate(model.graph.node) if index not in full]
    names = {name for node in halves for name in (*node.input, *node.output)}
    return max((found for found in magnitudes(path, pixels) if found.tensor in names), key=lambda found: found.value)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """To half precision; what is not zero stays so, since some of it is divided by."""
    small = (values != 0) & (np.abs(values) < SMALLEST)
    return np.where(small, np.copysign(SMALLEST, values), values).astype(np.float16)


def _retype(node: onnx.NodeProto) -> None:
    """An operator that states fp32 states fp16."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(attribute.t))))


def _keep_outputs(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], halves: Sequence[str]) -> None:
    """The outputs of the graph, by name, are cast back to fp32."""
    for name in halves:
        inner = f"{name}_fp16"
        for node in nodes:
            node.input[:] = [inner if read == name else read for read in node.input]
            node.output[:] = [inner if made == name else made for made in node.output]
        nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
