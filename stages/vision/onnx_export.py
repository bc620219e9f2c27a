"""A network as an ONNX file: the call of torch's exporter, and the cleaning of what it leaves behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import onnx
import torch

from ..methods import InvalidInput
from .architecture import Architecture, SwinArchitecture
from .attention import set_fused
from .network import Network
from .swin import Swin

EXTERNAL_ABOVE = 2_000_000_000  # bytes; protobuf cannot hold more in one file


def export(network: Network, path: Path, opset: int) -> None:
    """Write `path`: input "input" (batch, 3, S, S) float32 normalised, output "logits" (batch, K). Attention is left
    unfused, and a Swin's position biases become numbers.

    Raises: InvalidInput for tokens that are drawn by lot, and when the exporter refuses the network.
    """
    check_reduction(network.architecture)
    size = network.architecture.image_size
    network = network.cpu().eval()
    set_fused(network, False)
    # Two images: with one, the exporter takes the batch for a constant.
    example = torch.zeros(2, 3, size, size)
    external = sum(p.numel() * p.element_size() for p in network.parameters()) > EXTERNAL_ABOVE
    try:
        biases = network.fixed_biases() if isinstance(network, Swin) else nullcontext()
        with biases, warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")  # the exporter's own deprecations; ours would be raised by ruff and mypy
            for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir"):
                logging.getLogger(name).setLevel(logging.ERROR)
            torch.onnx.export(
                network,
                (example,),
                path,
                dynamo=True,
                opset_version=opset,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=external,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InvalidInput(
            f"torch's exporter refused {network.architecture.model}: {error}", "try another opset"
        ) from error
    clean(path)


def check_reduction(architecture: Architecture | SwinArchitecture) -> None:
    """Raises: InvalidInput for a network that drops tokens by lot."""
    if any(drop.method == "random" for drop in architecture.tokens):
        raise InvalidInput(
            "tokens.method: random is a control: a file that draws lots answers differently each time",
            "finish on tokens.method: attention or tome, or on all patches; or leave export out: export: null",
        )


def clean(path: Path) -> None:
    """Remove stack traces, source paths and names of Python classes: they differ between equal exports and tell about
    the machine.
    """
    model = onnx.load(path, load_external_data=False)
    for message in _messages(model):
        del message.metadata_props[:]
        message.doc_string = ""
    path.write_bytes(model.SerializeToString(deterministic=True))


def _messages(
    model: onnx.ModelProto,
) -> Iterable[onnx.ModelProto | onnx.GraphProto | onnx.NodeProto | onnx.TensorProto | onnx.ValueInfoProto]:
    graph = model.graph
    yield from (model, graph)
    yield from graph.node
    yield from graph.initializer
    for group in (graph.input, graph.output, graph.value_info):
        yield from group
