"""The child process that quantizes one ONNX file: linear layers to 8 bits, everything between them float.

nncf (static: ranges recorded on images; weights alone) prints progress bars to stdout, replaces the logger class of the
process and imports torch; ONNX Runtime's dynamic quantization (ranges of each call) logs as it likes. Here they do so
alone. Only matrix products with weights are quantized. Patch embedding, residual additions, norms, softmax, GELU and
the products inside the attention stay float: quantizing them costs ViTs most of their accuracy and buys little time.
What the graph really became is checked afterwards, since quantizers decide by patterns that an exporter's next version
may no longer match.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .attention_fusion import remove_unread
from .child import answering, serve
from .preprocess import normalise
from .quantized_graph import fixed_batch, is_linear_layer, multiplies, name_nodes
from .sidecar import read_sidecar


def static(source: Path, target: Path, pixels: Path, alpha: float | None, bits: int, symmetric: bool) -> None:
    """Write `target`, the INT8 twin of `source` with pairs of QuantizeLinear and DequantizeLinear, SmoothQuant's
    factors not folded yet. The same arguments give the same bytes.

    pixels: .npy of uint8 [n, size, size, 3], the calibration images, shown one at a time. alpha: SmoothQuant's strength
    (0 moves no range from activations to weights, 1 all of it); None leaves it out. bits: of the weights, 7 or 8.
    symmetric: zero points of activations are 0, the one form that TensorRT takes.
    """
    nncf = _nncf()
    sidecar = read_sidecar(source)
    images = np.load(pixels, allow_pickle=False)
    model = _named(source)
    pre, form = sidecar.preprocessing, (sidecar.dtype, sidecar.layout)
    batch = fixed_batch(model) or 1  # filled with one image: a range is that of the images, whatever the batch
    dataset = nncf.Dataset(
        range(len(images)),
        lambda index: {sidecar.input: normalise(images[index : index + 1].repeat(batch, axis=0), pre, *form)},
    )
    fix = nncf.quantization.advanced_parameters.OverflowFix
    quantized = nncf.quantize(
        model,
        dataset,
        subset_size=len(images),
        preset=nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_kept_float(model)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=fix.ENABLE if bits == 7 else fix.DISABLE,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                matmul=-1 if alpha is None else alpha,
                convolution=-1,
            ),
        ),
    )
    onnx.save(quantized, target)


def dynamic(source: Path, target: Path, bits: int, kept_float: Collection[str]) -> None:
    """Write `target`: weights in 8 bits, activations rounded in each call by their own range, so no calibration. The
    same arguments give the same bytes. bits: of the weights, 7 or 8. kept_float: names of nodes.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = _named(source)
    # Only the runtime's own Attention holds weights; the quantizer takes ONNX's for the same.
    plain = [node.name for node in model.graph.node if node.op_type == "Attention" and not node.domain]
    del model.graph.value_info[:]  # the exporter notes shapes of weights, and a transposed one contradicts
    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=["MatMul", "Gemm", "Attention"],
        per_channel=True,
        reduce_range=bits == 7,
        weight_type=QuantType.QInt8,
        # A Gemm becomes a MatMul of another name before that is looked at.
        nodes_to_exclude=[*plain, *(name for kept in kept_float for name in (kept, f"{kept}_MatMul"))],
        # Shape inference knows no com.microsoft operators; all that is quantized is float32.
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


def weights(source: Path, target: Path) -> None:
    """Write `target`: weights in 8 bits with a scale for every 32 numbers of a column, multiplied in float
    (MatMulNBits).
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = _named(source)
    _without_gemm(model)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def _without_gemm(model: onnx.ModelProto) -> None:
    """Write every Gemm with transposed weights as MatMul and Add, which is what the weights' quantizer knows."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for place in reversed(range(len(model.graph.node))):
        node = model.graph.node[place]
        plain = {"alpha": 1, "beta": 1, "transA": 0, "transB": 1}
        given = plain | {"transB": 0} | {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Gemm" or given != plain or len(node.input) < 3:
            continue
        turned, product = f"{node.name}_turned", f"{node.name}_product"
        weight = numpy_helper.to_array(constants[node.input[1]])
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), turned))
        parts = [helper.make_node("MatMul", [node.input[0], turned], [product], name=node.name)]
        parts += [helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias")]
        del model.graph.node[place]
        for part in reversed(parts):
            model.graph.node.insert(place, part)
    remove_unread(model)


def _named(source: Path) -> onnx.ModelProto:
    model = onnx.load(source)
    name_nodes(model)  # scopes go by name
    return model


def _kept_float(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if multiplies(node) and not is_linear_layer(node, model)]


def _nncf() -> Any:
    """nncf's telemetry is on by default. NNCF_CI stops the sending, but not before a client id was made in the user's
    home; without the package that would send there is nothing to make one.
    """
    os.environ["NNCF_CI"] = "1"
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf

    return nncf


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    for command, stream in serve():
        with answering(stream):
            source, target = Path(command["source"]), Path(command["target"])
            match command["do"]:
                case "static":
                    pixels, symmetric = Path(command["pixels"]), command["symmetric"]
                    static(source, target, pixels, command["alpha"], command["bits"], symmetric)
                case "dynamic":
                    dynamic(source, target, command["bits"], command["kept_float"])
                case "weights":
                    weights(source, target)
                case other:
                    raise ValueError(f"unknown command {other}")


if __name__ == "__main__":
    main()
