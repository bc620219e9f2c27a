"""What goes into an image classifier and what comes out: names, types and shapes of its graph, and what its scores are.

Exporters of others write a softmax into the file, or leave it out, and no name of an output says which. Whoever takes
a probability from the scores must know: the softmax of a softmax is nearly flat. So the graph is asked, once, when the
sidecar is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..methods import InvalidInput
from .sidecar import Scores, Sidecar

CHANNELS = (1, 3)
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.UINT8: "uint8"}
# A sigmoid's scores are a probability each, of that class alone. Networks trained so (DeiT III) are right where the
# largest is, as others are; that the scores do not add up to 1 is theirs, and nothing makes them do so.
ENDS: dict[str, Scores] = {
    **dict.fromkeys(("Softmax", "QLinearSoftmax", "Sigmoid", "QLinearSigmoid"), "probabilities"),
    "LogSoftmax": "log_probabilities",
}
# What only moves, stores or rounds the numbers that a file ends with.
PASSING = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True, slots=True)
class Signature:
    """The one input of an image classifier, and the output that holds its scores."""

    input: str
    dtype: str  # "float32", "float16" or "uint8"
    shape: tuple[int | None, ...]  # (batch, channels, height, width), of NHWC the channels last; None: any
    output: str
    output_shape: tuple[int | None, ...]
    scores: Scores  # "logits", "probabilities" or "log_probabilities", by the operator that the output ends with
    outputs: Mapping[str, tuple[int | None, ...]]  # all of them, in their order

    @property
    def layout(self) -> str:
        """NHWC where the last dimension alone can be that of the channels; else NCHW."""
        last = self.shape[3] in CHANNELS and self.shape[1] not in CHANNELS
        return "NHWC" if last else "NCHW"

    def text(self) -> str:
        """As it is shown in messages: input float32 [N,3,32,32] -> logits [N,10]."""
        return f"{self.input} {self.dtype} {_shape_text(self.shape)} -> {self.output} {_shape_text(self.output_shape)}"


def signature_of(model: onnx.ModelProto, path: Path, asked: str | None = None) -> Signature:
    """Of an image classifier: one float or uint8 input of four dimensions, the batch first. asked: which output holds
    the scores, where there are several; None: the first. Raises InvalidInput.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = list(model.graph.output)
    described = ", ".join(_value_text(value) for value in inputs) + " -> " + ", ".join(map(_value_text, outputs))
    hint = f"its signature is {described}; expected image float32 or uint8 [N,3,H,W] or [N,H,W,3] -> scores [N,classes]"
    if len(inputs) != 1:
        raise InvalidInput(f"{path} is not an image classifier: it has {len(inputs)} inputs", hint)
    if not outputs:
        raise InvalidInput(f"{path} is not an image classifier: it has no outputs", hint)
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise InvalidInput(f"{path} is not an image classifier: its input is not of float or uint8", hint)
    shape = _shape(inputs[0])
    if len(shape) != 4:
        raise InvalidInput(f"{path} is not an image classifier: its input has not four dimensions", hint)
    for size in shape:
        if size is not None and size < 1:
            raise InvalidInput(f"{path} is not an image classifier: its input has a dimension of {size}", hint)
    if tensor.elem_type == onnx.TensorProto.UINT8 and not {None, *CHANNELS} & {shape[1], shape[3]}:
        raise InvalidInput(f"{path} is not an image classifier: its pixels have neither 1 nor 3 channels", hint)
    output = outputs[0] if asked is None else next((value for value in outputs if value.name == asked), None)
    if output is None:
        names = ", ".join(value.name for value in outputs)
        raise InvalidInput(f"{path} has no output {asked!r}", f"it has {names}", field="output")
    made = {value.name: _shape(value) for value in outputs}
    scores = _scores(model.graph, output.name)
    return Signature(inputs[0].name, DTYPES[tensor.elem_type], shape, output.name, made[output.name], scores, made)


def _scores(graph: onnx.GraphProto, output: str) -> Scores:
    """What the numbers of an output are, by the operator that they come from."""
    maker = {name: node for node in graph.node for name in node.output}
    seen: set[str] = set()  # a graph that is not in order yet may go round in circles
    while output in maker and output not in seen:
        seen.add(output)
        node = maker[output]
        if node.op_type not in PASSING or not node.input:
            return ENDS.get(node.op_type, "logits")
        output = node.input[0]
    return "logits"


def check_agreement(signature: Signature, sidecar: Sidecar, path: Path) -> None:
    """Raises InvalidInput where a file is not as its sidecar says."""
    expected = (None, *sidecar.image)
    same = all(
        have is None or want is None or have == want for have, want in zip(signature.shape, expected, strict=True)
    )
    dtype = sidecar.raw.get("dtype", signature.dtype)  # older sidecars leave it to the file
    if (signature.input, signature.output, signature.dtype) != (sidecar.input, sidecar.output, dtype) or not same:
        raise InvalidInput(
            f"{path} and its sidecar disagree: the file is {signature.text()}; the sidecar says {sidecar.input} "
            f"{dtype} {_shape_text(expected)} -> {sidecar.output}",
            "take both from the same artifact",
        )
    classes = signature.output_shape[-1] if signature.output_shape else None
    if classes is not None and sidecar.classes and classes != len(sidecar.classes):
        raise InvalidInput(
            f"{path} has {classes} scores an image, its sidecar names {len(sidecar.classes)} classes",
            "take both from the same artifact",
        )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    dimensions = value.type.tensor_type.shape.dim
    return tuple(int(dim.dim_value) if dim.HasField("dim_value") else None for dim in dimensions)


def _shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ",".join("N" if size is None else str(size) for size in shape) + "]"


def _value_text(value: onnx.ValueInfoProto) -> str:
    kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    return f"{value.name} {kind} {_shape_text(_shape(value))}"
