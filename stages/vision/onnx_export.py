"""A network as an ONNX file: the call of torch's exporter, and the cleaning of what it leaves behind."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from .architecture import Architecture, SwinArchitecture
from .attention import set_fused
from .network import Network, rebuild
from .swin import Swin
from .window_attention import CosineWindowAttention, WindowAttention

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


def check_parameters(network: Network, path: Path) -> int:
    """The float tensors of the network's file hold as many numbers as the network; single numbers, which are constants,
    do not count. Returns: how many they hold.

    The exporter writes equal tensors once and may leave zeros out, such as biases that no step has moved: then, and
    then only, the file may hold fewer, down to one of each that is not zero.
    Raises: InvalidInput when it holds more or fewer.
    """
    tensors = weights_written(network)
    distinct = {(tuple(t.shape), t.detach().cpu().numpy().tobytes()): t.numel() for t in tensors if bool(t.any())}
    least, most = sum(distinct.values()), sum(tensor.numel() for tensor in tensors)
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    found: int = sum(math.prod(t.dims) for t in initializers if t.data_type == onnx.TensorProto.FLOAT and t.dims)
    if not least <= found <= most:
        raise InvalidInput(
            f"the exported file holds {found:,} weights, the network {most:,}",
            "try another opset; if it stays, please report it with this model's name",
        )
    return found


def weights_written(network: Network) -> list[Tensor]:
    """The tensors of a network as its file has them, each in whatever arrangement. They are its parameters, except:

    a batch norm (LV-ViT's stem) becomes the bias of the convolution before it;
    a Swin's position biases stand as numbers, not as a table (V1) or a network (V2), its masks beside them;
    the queries' and values' biases of V2 are one vector, with zeros for the keys.
    """
    replaced: set[int] = set()
    written: list[Tensor] = []
    for module in network.modules():
        gone: list[Tensor] = []
        if isinstance(module, nn.BatchNorm2d):
            gone = [module.weight, module.bias]
            assert module.running_mean is not None and module.running_var is not None
            written.append(module.bias - module.running_mean * module.weight / (module.running_var + module.eps).sqrt())
        elif isinstance(module, WindowAttention):
            gone = [module.relative_position_bias_table]
        elif isinstance(module, CosineWindowAttention):
            gone = list(module.cpb_mlp.parameters())
            if module.q_bias is not None:
                gone += [module.q_bias, module.v_bias]
                written.append(torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias)))
        replaced |= {id(tensor) for tensor in gone}
    if isinstance(network, Swin):
        with network.fixed_biases():
            written += [attention.fixed for attention in network.attentions if attention.fixed is not None]
        written += network.masks
    return written + [parameter for parameter in network.parameters() if id(parameter) not in replaced]


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
