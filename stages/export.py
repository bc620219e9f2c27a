"""Write the network as ONNX, with all that is needed to use it, and prove that the file answers as the network does.

torch's dynamo exporter, dynamic batch (the example batch is 2, so that 1 is not specialised), weights inside the file
below 2 GB. Attention is written as plain MatMul and Softmax, which graph optimisers and quantizers recognise. Token
reduction is exported with its counts as constants, merging as a product with a one-hot matrix; tokens drawn by lot, the
control, are refused. Paths and source lines that the exporter would leave in the file are removed: equal networks give
equal bytes.

With `input: pixels` the file takes raw pictures, uint8 [N, S, S, 3], and scales and normalises them itself; resize and
crop stay with its user. Else the sidecar tells how the input is made. Either way the sidecar holds the preprocessing
and its digest, and every evaluation of the file reads it there.

The gate (parity): on held-out images (the calibration split), at batch 1 and N, ONNX Runtime's logits lie within
`tolerance` of torch's and name the same class, with torch's fused attention and without; each side makes its input of
the pixels by its own preprocessing. With token reduction the file keeps the same tokens in every block; only tokens
whose scores are as good as equal may be exchanged. A file that misses it is not handed on.

With `half` a twin in half precision is written as well, for cards; the benchmark measures it as fp16. A CPU computes
it in fp32 and gains nothing. LayerNorm, softmax and the scores of tokens are computed in fp32, input and logits keep
their types. It is written only if every number that it would hold on the held-out images, looked up in the float file,
fits; else the metrics name the operator whose number does not.

The weights of the file are counted: as many numbers as the network has, or the file is refused. A Swin's position
biases stand in it as numbers, batch norms in the convolutions before them; the count allows for these alone.

reads    model
writes   model.onnx, model.json (input, preprocessing, classes, precision, size, MACs, digests);
         fp16.onnx, fp16.json with `half`

    sievit export pipeline.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from .vision.architecture import Architecture, SwinArchitecture


class ExportConfig(Config):
    """Settings of the export stage."""

    opset: int = Field(20, ge=18, le=22, description="ONNX operator set; quantizers have trouble with 23 and above")
    input: Literal["normalised", "pixels"] = Field(
        "normalised", description="what the file takes: float32 [N, 3, S, S], or pixels, uint8 [N, S, S, 3]"
    )
    tolerance: float = Field(
        1e-3, gt=0, le=1, description="largest difference of a logit between torch and ONNX Runtime"
    )
    images: int = Field(256, ge=2, description="held-out images for the parity gate (fewer if there are fewer)")
    batch: int = Field(8, ge=2, le=1024, description="the larger of the two batch sizes that parity is checked at")
    half: bool = Field(False, description="also write fp16.onnx, for cards; a CPU gains nothing by it")


def run(ctx: Context) -> None:
    """Export, clean, describe, compare."""
    from .deploy.bundle import bytes_of, count_nodes, write_sidecar
    from .deploy.pixels import bake
    from .deploy.sidecar import parse_preprocessing
    from .parity import parity
    from .vision.dataset import load_split
    from .vision.onnx_export import check_parameters, export
    from .vision.preprocessing import load
    from .vision.weights import load_network

    config: ExportConfig = ctx.config
    artifact = ctx.inputs["model"]
    network, preprocessing = load_network(artifact.root), load(artifact.root)
    architecture = network.architecture
    path = ctx.out / "model.onnx"
    described = parse_preprocessing(preprocessing.deployed(), f"preprocessing of {artifact.ref}")
    about: dict[str, Any] = {
        "preprocessing": described.as_json(),
        "classes": preprocessing.classes,
        "parameters": network.parameter_count(),
        "macs": architecture.macs(),
        "source": {"stage": artifact.kind_of_stage, "key": artifact.key, "digest": artifact.digest},
    }
    with ctx.progress.task("exporting", 3 if config.half else 2) as task:
        modules = export(network, path, config.opset)
        in_file = check_parameters(network, path)
        if config.input == "pixels":
            bake(path, described)
        write_sidecar(path, precision="fp32", **about)
        task.advance()
        pixels = load_split(ctx.data.model_dump(), ctx.base, "calibration").fewer(config.images).pixels()
        compared = parity(network, path, preprocessing, pixels, config.batch, config.tolerance)
        task.advance()
        nodes = count_nodes(path)
        ctx.metrics |= {
            "parity": compared,
            "nodes": nodes,
            "input": config.input,
            "preprocessing_sha256": described.sha256,
            "opset": config.opset,
            "bytes": bytes_of(path),
            "parameters": network.parameter_count(),
            "parameters_in_file": in_file,
            "macs": architecture.macs(),
        }
        _check_nodes(architecture, nodes)
        _check_parity(config, compared)
        if config.half:
            ctx.metrics["half"] = _half(ctx, path, pixels, about, modules)
            task.advance()


def _half(
    ctx: Context, path: Path, pixels: NDArray[np.uint8], about: Mapping[str, Any], modules: Mapping[str, str]
) -> dict[str, Any]:
    """Write fp16.onnx and its sidecar beside the float file, unless a number on the held-out images does not fit;
    returns what is told of it. modules: node -> module of the network.
    """
    import numpy as np

    from .deploy.bundle import bytes_of, write_sidecar
    from .deploy.half import LARGEST, overflow, to_half
    from .deploy.isa import usable_cores
    from .deploy.predict import scores

    worst = overflow(path, pixels)
    told: dict[str, Any] = {
        "written": False,
        "largest": worst.value if np.isfinite(worst.value) else None,
        "limit": LARGEST,
        "node": worst.node,
        "operator": worst.operator,
        "module": modules.get(worst.node),
    }
    place = f"{worst.operator} {worst.node}" + (f" of {told['module']}" if told["module"] else "")
    if not worst.value <= LARGEST:
        reason = f"{place} reaches {worst.value:.3g} on the held-out images, where half precision ends at {LARGEST:g}"
        ctx.progress.warn(f"fp16.onnx is not written: {reason}")
        return told
    half = path.with_name("fp16.onnx")
    to_half(path, half)
    sidecar = write_sidecar(half, precision="fp16", **about)
    cores = len(usable_cores())
    before, after = scores(path, pixels, threads=cores), scores(half, pixels, threads=cores)
    if not np.isfinite(after).all():
        half.unlink()
        sidecar.unlink()
        ctx.progress.warn(f"fp16.onnx is not written: it answers with numbers that are none (largest at {place})")
        return told
    return told | {
        "written": True,
        "bytes": bytes_of(half),
        "max_abs": float(np.abs(after - before).max()),
        "top1_agreement": float((after.argmax(1) == before.argmax(1)).mean()),
        "images": len(pixels),
    }


def _check_parity(config: ExportConfig, compared: dict[str, Any]) -> None:
    """The gate."""
    from sievit.pipeline.errors import GateError

    sets = compared["kept_sets"]
    if sets is not None and sets["wrong"]:
        raise GateError(
            f"the ONNX file keeps other tokens than the network on {sets['wrong']} of {compared['images']} images, "
            "and their scores are no ties",
            hint="try another opset; if it stays, please report it with this model's name",
        )
    if not compared["max_abs"] <= config.tolerance or compared["top1_agreement"] < 1:
        raise GateError(
            f"the ONNX file answers otherwise than the network: logits differ by up to {compared['max_abs']:.2e} "
            f"(allowed {config.tolerance:.0e}), the class agrees on {compared['top1_agreement']:.2%} of "
            f"{compared['images']} images",
            hint="try another opset; if it stays, please report it with this model's name",
        )


def _check_nodes(architecture: Architecture | SwinArchitecture, nodes: dict[str, int]) -> None:
    """A LayerNorm taken apart into primitive nodes overflows in half precision and is slow: it must be a node of its
    own.
    """
    from .methods import InvalidInput

    expected = 2 * len(architecture.blocks)
    if nodes.get("LayerNormalization", 0) < expected:
        raise InvalidInput(
            f"the exported file has {nodes.get('LayerNormalization', 0)} LayerNormalization nodes, at least "
            f"{expected} were expected",
            "this torch and opset take LayerNorm apart; use opset 20",
        )


def coherent(seen: Preflight) -> None:
    """Refuse a network that drops tokens by lot."""
    from .methods import InvalidInput

    made = seen.reads.get("model")
    while made is not None and not hasattr(made.config, "tokens"):
        made = made.reads.get("model")  # prune hands on what it was given
    if made is None or made.config.tokens is None or made.config.tokens.method != "random":
        return
    raise InvalidInput(
        f"{made.entry}.tokens.method: random is a control: a file that draws lots answers differently each time",
        "use attention or tome, finish on all patches (finetune), or leave export out: export: null",
        field=made.at("tokens.method"),
    )


STAGE = Stage(
    name="export",
    version=3,
    config=ExportConfig,
    run=run,
    reads=(Reads("model", "model"),),
    writes="onnx",
    manual=__doc__,
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    uses=frozenset({"data"}),
    coherent=coherent,
)
