"""Multiply-adds of an ONNX file, counted in its graph: for files that bring no sidecar to say it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import onnx
from onnx import helper

from .bundle import load_checked

# Where an operator of ONNX multiplies: the places of its two operands.
PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}  # the place of the weights


def graph_macs(path: Path, image: Sequence[int]) -> int | None:
    """Multiply-adds of one image: matrix products, those inside the attention included, and convolutions.

    image: the input's dimensions after the batch, where the file leaves them open. None where a shape that counts is
    not to be inferred, or an operator of another domain may multiply: no number is better than a part of one.
    """
    model = load_checked(path)  # in order, or the shapes of some are not inferred
    weights = {tensor.name for tensor in model.graph.initializer}
    given = next(value for value in model.graph.input if value.name not in weights)
    # A batch that is fixed stands in the constants of reshapes too: counted as it is, and divided by.
    batch = given.type.tensor_type.shape.dim[0].dim_value or 1
    for dimension, size in zip(given.type.tensor_type.shape.dim, (batch, *image), strict=True):
        dimension.dim_value = size
    del model.graph.value_info[:]  # shapes noted for another batch
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return None
    shapes: dict[str, list[int]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if all(one.HasField("dim_value") for one in dimensions):
            shapes.setdefault(value.name, [one.dim_value for one in dimensions])
    total = 0
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or any(a.HasField("g") or a.graphs for a in node.attribute):
            return None
        macs = _macs(node, shapes)
        if macs is None:
            return None
        total += macs
    return round(total / batch)


def _macs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int | None:
    """Of one operator; None where a shape is not known."""
    if node.op_type not in PRODUCTS and node.op_type not in CONVOLUTIONS:
        return None if node.op_type in ("Einsum", "Attention", "ConvTranspose", "LSTM", "GRU", "RNN") else 0
    made = shapes.get(node.output[0])
    place = CONVOLUTIONS.get(node.op_type)
    read = shapes.get(node.input[PRODUCTS[node.op_type][0] if place is None else place])
    if not made or not read:
        return None
    if place is not None:  # (out, in / groups, height, width)
        return prod(made) * prod(read[1:])
    turned = any(a.name == "transA" and helper.get_attribute_value(a) for a in node.attribute)
    return prod(made) * read[0 if turned else -1]
