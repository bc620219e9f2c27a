"""Write the network as ONNX, with all that is needed to use it, and prove that the file answers as the network does.

torch's dynamo exporter, dynamic batch (the example batch is 2, so that 1 is not specialised), weights inside the file
below 2 GB. Attention is written as plain MatMul and Softmax, which graph optimisers and quantizers recognise. Token
reduction is exported with its counts as constants, merging as a product with a one-hot matrix; tokens drawn by lot, the
control, are refused. Paths
and source lines that the exporter would leave in the file are removed: equal networks give equal bytes.

The gate: on held-out images (the calibration split), at batch 1 and N, ONNX Runtime's logits lie within `tolerance`
of torch's and name the same class. A file that misses it is not handed on.

reads    model
writes   model.onnx, model.json (preprocessing, classes, precision, size, MACs, digest of the file)

    sievit export pipeline.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.network import Network
    from .vision.preprocessing import Preprocessing


class ExportConfig(Config):
    """Settings of the export stage."""

    opset: int = Field(20, ge=18, le=22, description="ONNX operator set; quantizers have trouble with 23 and above")
    tolerance: float = Field(
        1e-3, gt=0, le=1, description="largest difference of a logit between torch and ONNX Runtime"
    )
    images: int = Field(256, ge=2, description="held-out images for the parity gate (fewer if there are fewer)")
    batch: int = Field(8, ge=2, le=1024, description="the larger of the two batch sizes that parity is checked at")


def run(ctx: Context) -> None:
    """Export, clean, describe, compare."""
    from sievit.pipeline.errors import GateError

    from .deploy.bundle import count_nodes, write_sidecar
    from .vision.attention import set_fused
    from .vision.dataset import load_split
    from .vision.onnx_export import export
    from .vision.preprocessing import load
    from .vision.weights import load_network

    config: ExportConfig = ctx.config
    artifact = ctx.inputs["model"]
    network, preprocessing = load_network(artifact.root), load(artifact.root)
    architecture = network.architecture
    path = ctx.out / "model.onnx"
    with ctx.progress.task("exporting", 2) as task:
        export(network, path, config.opset)
        task.advance()
        # Against the fused path, the one that trained: parity then covers both.
        set_fused(network, True)
        held_out = load_split(ctx.data.model_dump(), ctx.base, "calibration")
        parity = _parity(config, network, path, preprocessing, held_out.pixels()[: config.images])
        task.advance()
    nodes = count_nodes(path)
    write_sidecar(
        path,
        preprocessing=_sidecar_preprocessing(preprocessing),
        classes=preprocessing.classes,
        precision="fp32",
        parameters=network.parameter_count(),
        macs=architecture.macs(),
        opset=config.opset,
        source={"stage": artifact.kind_of_stage, "key": artifact.key, "digest": artifact.digest},
    )
    ctx.metrics |= {
        "parity": parity,
        "nodes": nodes,
        "fused_attention": "Attention" in nodes or "MultiHeadAttention" in nodes,
        "opset": config.opset,
        "bytes": path.stat().st_size,
        "parameters": network.parameter_count(),
        "macs": architecture.macs(),
    }
    _check_nodes(architecture, nodes)
    if not parity["max_abs"] <= config.tolerance or parity["top1_agreement"] < 1:
        raise GateError(
            f"the ONNX file answers otherwise than the network: logits differ by up to {parity['max_abs']:.2e} "
            f"(allowed {config.tolerance:.0e}), the class agrees on {parity['top1_agreement']:.2%} of "
            f"{parity['images']} images",
            hint="try another opset; if it stays, please report it with this model's name",
        )


def _parity(
    config: ExportConfig, network: Network, path: Path, preprocessing: Preprocessing, pixels: np.ndarray
) -> dict[str, Any]:
    """Largest difference of the logits and share of equal classes, over batches of 1 and of N."""
    import numpy as np
    import onnxruntime as ort
    import torch

    network.eval()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    normalise = preprocessing.normaliser(torch.device("cpu"))
    images = normalise(torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255.0))
    with torch.inference_mode():
        expected = network(images).numpy()
    worst, disagreements, compared = 0.0, 0, 0
    batches = [images[i : i + 1] for i in range(min(32, len(images)))]
    starts = list(range(min(32, len(images)))) + list(range(0, len(images), config.batch))
    batches += list(images.split(config.batch))
    for start, batch in zip(starts, batches, strict=True):
        answer = session.run(None, {"input": batch.numpy()})[0]
        wanted = expected[start : start + len(batch)]
        worst = float(np.maximum(worst, np.abs(answer - wanted).max()))  # keeps NaN, which max() would lose
        # A class may only differ where torch's own two best logits are closer than the allowed difference.
        top = np.sort(wanted, axis=1)
        clear = top[:, -1] - top[:, -2] > config.tolerance
        disagreements += int(((answer.argmax(1) != wanted.argmax(1)) & clear).sum())
        compared += len(batch)
    return {
        "max_abs": worst,
        "images": len(images),
        "top1_agreement": 1 - disagreements / compared,
        "batches": [1, config.batch],
    }


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


def _sidecar_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "resize": "bilinear",
        "size": preprocessing.image_size,
        "crop": "center",
        "crop_pct": 1.0,
        "scale": 1 / 255,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


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
    version=1,
    config=ExportConfig,
    run=run,
    reads=(Reads("model", "model"),),
    writes="onnx",
    manual=__doc__,
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    uses=frozenset({"data"}),
    coherent=coherent,
)
