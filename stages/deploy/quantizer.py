"""The child process that quantizes one ONNX file with nncf: linear layers to INT8, everything between them float.

nncf prints progress bars to stdout, replaces the logger class of the process and imports torch; here it does so alone.
Only matrix products with weights are quantized. Patch embedding, residual additions, norms, softmax, GELU and the
products inside the attention stay float: quantizing them costs ViTs most of their accuracy and buys little time. What
the graph really became is checked afterwards, since nncf decides by patterns that an exporter's next version may no
longer match.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .child import answering, serve
from .preprocess import normalise
from .sidecar import read_sidecar

LINEAR = {"MatMul", "Gemm"}
# Operators that only move numbers: a dequantized tensor may pass them on its way to a linear layer.
MOVING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Identity", "Expand"}
SHAPE = {"Shape", "Size"}  # they read no values


def quantize(source: Path, target: Path, pixels: Path, alpha: float | None) -> dict[str, Any]:
    """Write `target`, the INT8 twin of `source`. The same arguments give the same bytes.

    pixels: .npy of uint8 [n, size, size, 3], the calibration images, shown one at a time. alpha: SmoothQuant's strength
    (0 moves no range from activations to weights, 1 all of it); None leaves it out. Returns what became of the graph.
    """
    # nncf's telemetry is on by default. NNCF_CI stops the sending, but not before a client id was made in the user's
    # home;
    # without the package that would send there is nothing to make one.
    os.environ["NNCF_CI"] = "1"
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf

    sidecar = read_sidecar(source)
    images = np.load(pixels, allow_pickle=False)
    model = onnx.load(source)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"  # nncf's scope goes by name
    kept_float = [node.name for node in model.graph.node if _multiplies(node) and not _is_linear_layer(node, model)]
    dataset = nncf.Dataset(
        range(len(images)), lambda index: {sidecar.input: normalise(images[index : index + 1], sidecar.preprocessing)}
    )
    quantized = nncf.quantize(
        model,
        dataset,
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=kept_float),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                matmul=-1 if alpha is None else alpha,
                convolution=-1,
            )
        ),
    )
    fold_scales(quantized)
    onnx.save(quantized, target)
    return describe(quantized)


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


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """quantized_nodes: how many linear layers became INT8; float_nodes: the operators that compute in float;
    astray: operators that read dequantized numbers and should not."""
    dequantized = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    linear = [
        node for node in model.graph.node if node.op_type in LINEAR and all(i in dequantized for i in node.input[:2])
    ]
    quantizing = {"QuantizeLinear", "DequantizeLinear"}
    names = {node.name for node in linear}
    rest = Counter(
        node.op_type for node in model.graph.node if node.name not in names and node.op_type not in quantizing
    )
    return {
        "quantized_nodes": len(linear),
        "float_nodes": dict(rest.most_common()),
        "astray": dict(Counter(node.op_type for node in _readers(model, dequantized) if node.name not in names)),
    }


def _readers(model: onnx.ModelProto, dequantized: set[str]) -> Iterator[onnx.NodeProto]:
    """The operators that compute with dequantized tensors, moved ones included (the graph is in topological order)."""
    carrying = set(dequantized)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", *SHAPE) or not carrying.intersection(node.input):
            continue
        if node.op_type in MOVING:
            carrying.update(node.output)
        else:
            yield node


def _multiplies(node: onnx.NodeProto) -> bool:
    return node.op_type in LINEAR or node.op_type in ("Conv", "ConvTranspose", "Einsum")


def _is_linear_layer(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """A matrix product with weights, as opposed to one of two activations and to the patch embedding."""
    return node.op_type in LINEAR and any(tensor.name in node.input for tensor in model.graph.initializer)


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    for command, stream in serve():
        with answering(stream) as content:
            content |= quantize(
                Path(command["source"]), Path(command["target"]), Path(command["pixels"]), command["alpha"]
            )


if __name__ == "__main__":
    main()
