"""What an 8-bit graph is made of: its linear layers, which of them compute in 8 bits, and how one becomes float again.

Nothing of nncf is needed here: these are plain ONNX graphs, quantized by pairs (QuantizeLinear, DequantizeLinear; nncf)
or by integer products (MatMulInteger, QAttention; ONNX Runtime's dynamic quantization).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .attention_fusion import Graph, remove_unread

LINEAR = {"MatMul", "Gemm"}
INTEGER = {"MatMulInteger", "QAttention"}
QUANTIZING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
# Operators that only move numbers: a dequantized tensor may pass them on its way to a linear layer.
MOVING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Identity", "Expand"}
SHAPE = {"Shape", "Size"}  # they read no values
# A parameter's name up to the half of a block that it belongs to.
HALF = re.compile(r"(.*\.\d+\.(?:attn|mlp|self_attn|attention|intermediate))\b.*")


@dataclass(frozen=True, slots=True)
class Layer:
    """A product with weights. node: its name; group: what becomes float together, half a block or the layer alone."""

    node: str
    group: str


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name, which quantizers need to tell them apart."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def linear_layers(model: onnx.ModelProto) -> list[Layer]:
    """The products with weights, in order of execution. Nodes must have names.

    The exporter names a weight by what it did to it, and the bias that is added by the module: the group is read there.
    """
    graph = Graph(model)
    found = []
    for node in model.graph.node:
        if not is_linear_layer(node, model):
            continue
        names = [name for name in node.input if name in graph.constants]
        added = graph.only_reader(node.output[0], "Add")
        names += [] if added is None else [name for name in added.input if name in graph.constants]
        half = next((match for name in names if (match := HALF.fullmatch(name))), None)
        plain = next((name for name in names if name.endswith((".weight", ".bias"))), node.name)
        group = half[1] if half else plain.rpartition(".")[0] if plain != node.name else node.name
        found.append(Layer(node.name, group.removeprefix("body.")))
    return found


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The only number of images that a classifier takes at once; None: any."""
    weights = {tensor.name for tensor in model.graph.initializer}
    given = next(value for value in model.graph.input if value.name not in weights)
    return given.type.tensor_type.shape.dim[0].dim_value or None


def multiplies(node: onnx.NodeProto) -> bool:
    """Whether a quantizer would take this operator for one that is worth 8 bits."""
    return node.op_type in LINEAR or node.op_type in ("Conv", "ConvTranspose", "Einsum", "Attention")


def is_linear_layer(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """A matrix product with weights, as opposed to one of two activations and to the patch embedding."""
    return node.op_type in LINEAR and any(tensor.name in node.input for tensor in model.graph.initializer)


def unquantize(model: onnx.ModelProto, source: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Make linear layers of a graph with pairs float again, in the model itself, with the weights of `source`.

    nodes: names, the same in both. SmoothQuant's factor in front of a layer goes too, so scales must not be folded yet.
    """
    theirs, before = {node.name: node for node in source.graph.node}, Graph(source)
    graph = Graph(model)
    for node in [node for node in model.graph.node if node.name in nodes]:
        for place, name in enumerate(theirs[node.name].input):
            if name in before.constants:
                _restore(graph, before, name)
                node.input[place] = name
            else:
                _unrounded(graph, node, place, theirs)
        # nncf corrects the bias for what rounding moved; it may stand in an addition of its own.
        added = before.only_reader(node.output[0], "Add")
        for name in () if added is None else added.input:
            if name in before.constants:
                _restore(graph, before, name)
    remove_unread(model)


def _restore(graph: Graph, before: Graph, name: str) -> None:
    """Give a constant the value that it has in the source."""
    if name in graph.constants:
        graph.constants[name].CopyFrom(before.constants[name])
    else:
        graph.model.graph.initializer.append(before.constants[name])
        graph.constants[name] = graph.model.graph.initializer[-1]


def _unrounded(graph: Graph, node: onnx.NodeProto, place: int, theirs: Collection[str]) -> None:
    """Let `node` read what stood before the pair on the way to this input, and before a factor that nncf put there."""
    while (maker := graph.maker.get(node.input[place])) is not None and maker.op_type in MOVING:
        node, place = maker, 0
    if maker is None or maker.op_type != "DequantizeLinear":
        return
    quantize = graph.made_by(maker.input[0], "QuantizeLinear")
    if quantize is None:
        return
    before = quantize.input[0]
    factor = graph.made_by(before, "Mul")
    if factor is not None and factor.name not in theirs:
        before = next(name for name in factor.input if name not in graph.constants)
    node.input[place] = before


def fold_scales(model: onnx.ModelProto) -> int:
    """Write SmoothQuant's multiplications behind a LayerNormalization into its weight and bias; returns how many.

    Exact, and it saves a pass over the activations before every query-key-value and first MLP layer. Only where the
    norm feeds nothing but that one multiplication, and its weight and bias serve no other node.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    folded = []
    for norm in [node for node in model.graph.node if node.op_type == "LayerNormalization" and len(node.input) == 3]:
        after = readers.get(norm.output[0], [])
        if len(after) != 1 or after[0].op_type != "Mul" or norm.output[0] in outputs or len(norm.output) != 1:
            continue
        scales = [constants[name] for name in after[0].input if name in constants]
        affine = [constants[name] for name in norm.input[1:] if name in constants and len(readers[name]) == 1]
        if len(scales) != 1 or len(affine) != 2:
            continue
        scale = numpy_helper.to_array(scales[0])
        if scale.size != affine[0].dims[0] or scale.shape[-1] != scale.size:
            continue
        for tensor in affine:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * scale.reshape(-1), tensor.name))
        norm.output[0] = after[0].output[0]
        folded.append(after[0])
    for node in folded:
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for name, tensor in constants.items():
        if name not in used:  # ONNX Runtime warns of those at every start
            model.graph.initializer.remove(tensor)
    return len(folded)


def make_unsigned(model: onnx.ModelProto) -> int:
    """Write int8 activations of pairs as uint8, zero points 128 higher; returns how many QuantizeLinear it changed.

    The numbers stay what they are, and ONNX Runtime runs no pairs of int8 activations at opset 23. Weights stay int8. A
    graph whose zero points are all 0 stays as it is: it was made so, for a runtime that takes no others (TensorRT).
    """
    graph = Graph(model)
    rounding = [
        node for node in model.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) == 3 and node.input[2] in graph.constants
        and graph.constants[node.input[2]].data_type == onnx.TensorProto.INT8
    ]  # fmt: skip
    if not any(numpy_helper.to_array(graph.constants[node.input[2]]).any() for node in rounding):
        return 0
    changed = {node.output[0] for node in rounding}
    reading = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in changed]
    for node in [*rounding, *reading]:
        name = f"{node.input[2]}_unsigned"  # weights may share the old one
        if name not in graph.constants:
            point = numpy_helper.to_array(graph.constants[node.input[2]]).astype(np.int16) + 128
            model.graph.initializer.append(numpy_helper.from_array(point.astype(np.uint8), name))
            graph.constants[name] = model.graph.initializer[-1]
        node.input[2] = name
        for attribute in node.attribute:
            if attribute.name == "output_dtype" and attribute.i == onnx.TensorProto.INT8:
                attribute.i = onnx.TensorProto.UINT8
    for value in [value for value in model.graph.value_info if value.name in changed]:
        model.graph.value_info.remove(value)
    remove_unread(model)
    return len(rounding)


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """What became of a graph.

    quantized_nodes: linear layers that multiply in 8 bits (8-bit attention holds one); weight_only_nodes: those whose
    weights alone are stored so; float_nodes: operators that compute in float, by kind; astray: operators that read
    dequantized numbers or multiply integers and should not. A dequantized tensor may be moved on its way to a layer,
    which ONNX Runtime sees through. The graph is in topological order.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    carrying: set[str] = set()  # dequantized tensors, as they are or moved
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("quantized", "weight only", "float", "astray")}
    for node in model.graph.node:
        kind = node.op_type
        if kind == "DequantizeLinear":
            carrying.update(node.output)
        if kind in QUANTIZING:
            continue
        reads = carrying.intersection(node.input)
        if kind in INTEGER:
            counts["quantized" if node.input[1] in constants else "astray"][kind] += 1
        elif kind in LINEAR and set(node.input[:2]) <= carrying:
            counts["quantized"][kind] += 1
        elif kind == "MatMulNBits" or (kind in LINEAR and node.input[1] in carrying):
            counts["weight only"][kind] += 1
        else:
            counts["float"][kind] += 1
            if reads and kind in MOVING:
                carrying.update(node.output)
            elif reads and kind not in SHAPE:
                counts["astray"][kind] += 1
    return {
        "quantized_nodes": counts["quantized"].total(),
        "weight_only_nodes": counts["weight only"].total(),
        "float_nodes": dict(counts["float"].most_common()),
        "astray": dict(counts["astray"]),
    }
