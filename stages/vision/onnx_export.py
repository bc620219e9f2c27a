"""A network as an ONNX file: the call of torch's exporter, and the cleaning of what it leaves behind."""

from __future__ import annotations

import ast
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
from .network import Network, rebuild
from .swin import Swin

EXTERNAL_ABOVE = 2_000_000_000  # bytes; protobuf cannot hold more in one file


def export(network: Network, path: Path, opset: int) -> dict[str, str]:
    """Write `path`: input "input" (batch, 3, S, S) float32 normalised, output "logits" (batch, K). Attention is left
    unfused, and a Swin's position biases become numbers.

    Returns: name of a node in the file -> the module of the body that it was made of, for those that have one.
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
    modules = _modules(path)
    clean(path)
    return modules


def export_shape(architecture: Architecture | SwinArchitecture, path: Path, opset: int) -> dict[str, str]:
    """As export, of a network with random weights: all that a file's size and latency depend on is its shape. No two
    parameters are alike, as after training: the exporter would store them once.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = rebuild(architecture)
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
        return export(network, path, opset)


def check_reduction(architecture: Architecture | SwinArchitecture) -> None:
    """Raises: InvalidInput for a network that drops tokens by lot."""
    if any(drop.method == "random" for drop in architecture.tokens):
        raise InvalidInput(
            "tokens.method: random is a control: a file that draws lots answers differently each time",
            "finish on tokens.method: attention or tome, or on all patches; or leave export out: export: null",
        )


def _modules(path: Path) -> dict[str, str]:
    """From the scopes that the exporter leaves in the file."""
    found = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        inside = [name for name in ast.literal_eval(scopes) if name.startswith("body.")]
        if inside:
            found[node.name] = inside[-1].removeprefix("body.")
    return found


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
