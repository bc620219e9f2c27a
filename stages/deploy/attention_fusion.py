"""Attention as one operator of ONNX Runtime instead of some ten: fewer passes over memory, the same answer.

Two forms. `fuse_attention` puts a MultiHeadAttention behind the linear layer that makes queries, keys and values, which
stays as it is, float or 8-bit. `fuse_projection` takes that layer in as well (Attention), the form that dynamic
quantization turns into 8-bit attention (QAttention). ONNX Runtime's own optimiser looks for the graphs of other
exporters and for heads of one width; here the widths of queries and of values may differ, as pruning leaves them.

What does not match is left alone and counted: attention with a bias or a mask (Swin), with normalised queries and
keys, and projections whose parts are read elsewhere too (token reduction scores by them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
TO_HEADS, KEYS_TRANSPOSED, LAST_SWAPPED = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2)


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention in the graph: softmax(scale q k^T) v. q, k (B, T, heads * qk), v (B, T, heads * value) by name, as
    they leave the linear layer; output (B, T, heads * value). rounding: nodes that round the output to 8 bits and back.
    """

    q: str
    k: str
    v: str
    output: str
    heads: int
    qk: int
    value: int
    scale: float
    softmax: str
    rounding: tuple[onnx.NodeProto, ...] = ()


class Graph:
    """Who makes and who reads a tensor, and the constants, of a graph that is being rewritten."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = model.graph.node
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def made_by(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is one of this kind."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor, if it is the only one and of this kind."""
        readers = self.readers.get(name, [])
        single = len(readers) == 1 and name not in self.outputs
        return readers[0] if single and readers[0].op_type == kind else None

    def value(self, name: str) -> NDArray[np.generic] | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def fuse_attention(model: onnx.ModelProto) -> int:
    """Put a MultiHeadAttention in the place of every attention that matches, in the model itself; returns how many.

    com.microsoft's operator, queries and keys (B, T, D), values (B, T, E). The queries' factor becomes its scale.
    """
    graph = Graph(model)
    found = list(_attentions(graph))
    for attention in found:
        raw = f"{attention.softmax}_raw" if attention.rounding else attention.output
        node = helper.make_node(
            "MultiHeadAttention",
            [attention.q, attention.k, attention.v],
            [raw],
            name=f"{attention.softmax}_attention",
            domain=MICROSOFT,
            num_heads=attention.heads,
            scale=attention.scale,
        )
        _replace(graph, attention.output, [node, *_after(attention, raw)])
    return _finish(model, len(found))


def fuse_projection(model: onnx.ModelProto) -> dict[str, str]:
    """Put an Attention, projection included, in the place of every attention that matches, in the model itself.

    QAttention knows heads of one width and a scale of 1 / sqrt(width) only. So queries, keys and values are padded with
    zeros to the wider of them, the next layer's weights with rows of zeros, and the queries' weights carry what is left
    of the scale: the same function. Returns the name of each linear layer that went, and of the node that took it in.
    """
    graph = Graph(model)
    taken: dict[str, str] = {}
    for attention in list(_attentions(graph)):
        projection = None if attention.rounding else _projection(graph, attention)
        following = graph.only_reader(attention.output, "MatMul")
        after = None if following is None else graph.value(following.input[1])
        if projection is None or following is None or after is None:
            continue
        product, weight, bias = projection
        width = max(attention.qk, attention.value)
        factor = attention.scale * np.sqrt(width)
        stem = f"{attention.softmax}_attention"
        node = helper.make_node(
            "Attention",
            [
                product.input[0],
                graph.constant(f"{stem}_weight", _padded(weight, attention, width, factor)),
                graph.constant(f"{stem}_bias", _padded(bias[None], attention, width, factor)[0]),
            ],
            [attention.output],
            name=stem,
            domain=MICROSOFT,
            num_heads=attention.heads,
        )
        if width != attention.value:
            rows = after.reshape(attention.heads, attention.value, -1)
            wide = np.pad(rows, ((0, 0), (0, width - attention.value), (0, 0)))
            following.input[1] = graph.constant(f"{stem}_next", wide.reshape(attention.heads * width, -1))
        _replace(graph, attention.output, [node])
        taken[product.name] = stem
    _finish(model, len(taken))
    return taken


def _padded(weight: NDArray[np.float32], attention: Heads, width: int, factor: float) -> NDArray[np.float32]:
    """Columns (.., H(2 qk + value)) -> (.., 3 H width)."""
    heads, qk, value = attention.heads, attention.qk, attention.value
    parts = np.split(weight, [heads * qk, 2 * heads * qk], axis=1)
    wide = [
        np.pad(part.reshape(len(weight), heads, size), ((0, 0), (0, 0), (0, width - size))).reshape(len(weight), -1)
        for part, size in zip(parts, (qk, qk, value), strict=True)
    ]
    return np.concatenate([wide[0] * np.float32(factor), *wide[1:]], axis=1).astype(np.float32)


def _attentions(graph: Graph) -> Iterator[Heads]:
    """Every softmax(scale q k^T) v whose queries, keys and values come by reshape and transpose alone."""
    for softmax in [node for node in graph.nodes if node.op_type == "Softmax"]:
        logits = graph.made_by(softmax.input[0], "MatMul")
        weighted = graph.only_reader(softmax.output[0], "MatMul")
        if logits is None or weighted is None or weighted.input[0] != softmax.output[0]:
            continue
        queries, scale = _unscaled(graph, logits.input[0])
        q = _from_heads(graph, queries, TO_HEADS)
        swapped = _turned(graph, logits.input[1], LAST_SWAPPED)  # where the keys are read elsewhere too
        k = _from_heads(graph, *((logits.input[1], KEYS_TRANSPOSED) if swapped is None else (swapped, TO_HEADS)))
        v = _from_heads(graph, weighted.input[1], TO_HEADS)
        rounding = _rounding(graph, weighted.output[0])
        output = _to_tokens(graph, rounding[-1].output[0] if rounding else weighted.output[0])
        if q is None or k is None or v is None or output is None or q[1:] != k[1:] or q[1] != v[1]:
            continue
        yield Heads(q[0], k[0], v[0], output, q[1], q[2], v[2], scale, softmax.name or softmax.output[0], rounding)


def _unscaled(graph: Graph, name: str) -> tuple[str, float]:
    """A tensor without the constant factor that it was multiplied by."""
    product = graph.made_by(name, "Mul")
    if product is None:
        return name, 1.0
    for factor, other in (product.input, product.input[::-1]):
        value = graph.value(factor)
        if value is not None and value.size == 1:
            return other, float(value.reshape(-1)[0])
    return name, 1.0


def _from_heads(graph: Graph, name: str, order: tuple[int, ...]) -> tuple[str, int, int] | None:
    """(the tensor (B, T, H * d) that a per-head tensor was made of, H, d), through a reshape and a transpose."""
    turned = _turned(graph, name, order)
    reshaped = None if turned is None else graph.made_by(turned, "Reshape")
    shape = None if reshaped is None else graph.value(reshaped.input[1])
    if reshaped is None or shape is None or shape.size != 4:
        return None
    heads, width = int(shape[2]), int(shape[3])
    return (reshaped.input[0], heads, width) if min(heads, width) > 0 else None


def _turned(graph: Graph, name: str, order: tuple[int, ...]) -> str | None:
    """What a tensor is a transposition of, if it is in this order."""
    node = graph.made_by(name, "Transpose")
    return None if node is None or tuple(_attribute(node, "perm")) != order else node.input[0]


def _rounding(graph: Graph, name: str) -> tuple[onnx.NodeProto, ...]:
    """The pair that rounds a tensor to 8 bits with one scale, which holds in any layout; () without."""
    quantize = graph.only_reader(name, "QuantizeLinear")
    back = None if quantize is None else graph.only_reader(quantize.output[0], "DequantizeLinear")
    scale = None if quantize is None else graph.value(quantize.input[1])
    if quantize is None or back is None or scale is None or scale.size != 1:
        return ()
    return quantize, back


def _to_tokens(graph: Graph, name: str) -> str | None:
    """The tensor (B, T, H * d) that a per-head tensor (B, H, T, d) becomes."""
    turned = graph.only_reader(name, "Transpose")
    if turned is None or tuple(_attribute(turned, "perm")) != TO_HEADS:
        return None
    reshaped = graph.only_reader(turned.output[0], "Reshape")
    return None if reshaped is None else reshaped.output[0]


def _projection(
    graph: Graph, attention: Heads
) -> tuple[onnx.NodeProto, NDArray[np.float32], NDArray[np.float32]] | None:
    """The product, weight (C, N) and bias (N) of the linear layer that makes queries, keys and values for this
    attention alone.
    """
    split = graph.made_by(attention.q, "Split")
    if split is None or list(split.output) != [attention.q, attention.k, attention.v]:
        return None
    if not all(_leads_to(graph, name, attention.output) for name in split.output):
        return None
    name, bias = split.input[0], None
    if (added := graph.made_by(name, "Add")) is not None:
        which = next((place for place in (0, 1) if graph.value(added.input[place]) is not None), None)
        if which is None:
            return None
        name, bias = added.input[1 - which], graph.value(added.input[which])
    product = graph.made_by(name, "MatMul")
    weight = None if product is None else graph.value(product.input[1])
    if product is None or weight is None or weight.ndim != 2:
        return None
    columns = weight.shape[1]
    if columns != attention.heads * (2 * attention.qk + attention.value) or (bias is not None and bias.size != columns):
        return None
    given = np.zeros(columns, np.float32) if bias is None else bias.reshape(-1).astype(np.float32)
    return product, weight.astype(np.float32), given


def _after(attention: Heads, raw: str) -> list[onnx.NodeProto]:
    """The rounding of an attention, behind the node that takes its place."""
    if not attention.rounding:
        return []
    quantize, back = (onnx.NodeProto.FromString(node.SerializeToString()) for node in attention.rounding)
    quantize.name, back.name = f"{quantize.name}_moved", f"{back.name}_moved"
    quantize.input[0], quantize.output[0] = raw, f"{raw}_q"
    back.input[0], back.output[0] = f"{raw}_q", attention.output
    return [quantize, back]


def _leads_to(graph: Graph, name: str, end: str) -> bool:
    """Whether a tensor is read for the sake of `end` alone."""
    while name != end:
        readers = graph.readers.get(name, [])
        if len(readers) != 1 or name in graph.outputs:
            return False
        name = readers[0].output[0]
    return True


def _replace(graph: Graph, output: str, nodes: list[onnx.NodeProto]) -> None:
    """Let `nodes` make the tensor `output`, at the place of the node that made it."""
    old = graph.maker[output]
    place = next(index for index, other in enumerate(graph.nodes) if other is old)
    graph.nodes.remove(old)
    for node in reversed(nodes):
        graph.nodes.insert(place, node)


def _finish(model: onnx.ModelProto, done: int) -> int:
    if done:
        remove_unread(model)
        if MICROSOFT not in {entry.domain for entry in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return done


def remove_unread(model: onnx.ModelProto) -> None:
    """Take out the nodes and constants that nothing reads any more, and what was noted of their tensors."""
    graph = model.graph
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(reads(node))
            kept.append(node)
    _keep(graph.node, reversed(kept))
    _keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in wanted])
    _keep(graph.value_info, [value for value in graph.value_info if value.name in wanted])


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those of its branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for below in inner.node:
                yield from reads(below)


def _keep(field: object, kept: Iterable[object]) -> None:
    items = list(kept)
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]


def _attribute(node: onnx.NodeProto, name: str) -> Iterable[int]:
    return next((attribute.ints for attribute in node.attribute if attribute.name == name), ())
