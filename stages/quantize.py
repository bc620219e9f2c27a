"""Post-training INT8 with nncf, kept only where it is as good as float and faster on this machine.

The linear layers become 8-bit; patch embedding, residual additions, norms, softmax, GELU and the products inside the
attention stay float. Calibrated on ticket examples when there are tickets (training images that were kept, balanced
over classes), else on the calibration split. Whether INT8 is good enough is decided on the calibration split, never on
the test split; whether it is faster, by the benchmark's own protocol on both files in turn.

SmoothQuant moves the outliers of activations into the weights, at the cost of a multiplication before each layer. With
`smooth_quant: auto` it is tried only if the file without it loses more than `max_drop`.

reads    an onnx file, tickets (optional)
writes   model.onnx, model.json: the product, INT8 or the float file as it was;
         int8.onnx, int8.json: the INT8 file when it was made but not chosen; the benchmark measures it too
papers   SmoothQuant: Xiao et al., ICML 2023, arXiv 2211.10438

    sievit quantize pipeline.yaml --set quantize.max_drop=0.005
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sievit.pipeline.errors import SievitError
from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .methods import InvalidInput
from .vision.notes import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .deploy.bundle import Bundle
    from .deploy.predict import Accuracy

# Half way: nncf's own 0.95 costs more accuracy than the outliers it removes (docs: onnx-details, outlier stress test).
SMOOTH = 0.5


class QuantizeConfig(Config):
    """What INT8 may cost, and what it must bring."""

    max_drop: float = Field(
        default=0.01, ge=0, le=1, description="top-1 that INT8 may lose on the calibration split, a fraction"
    )
    calibration_images: int = Field(
        default=256, ge=1, le=100_000, description="images whose ranges are recorded; fewer if there are fewer"
    )
    smooth_quant: Literal["auto", "off"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto", description="strength of SmoothQuant; auto: 0.5, only if INT8 without it loses too much"
    )
    min_speedup: float | None = Field(
        default=1.0, gt=0, description="INT8 must be faster than this times float, or float stays; null: do not measure"
    )
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] = Field(
        default="cpu", description="ONNX Runtime execution provider on which speed is judged"
    )
    batch: int = Field(default=1, ge=1, le=4096, description="images at once when speed is judged")
    threads: int = Field(default=1, ge=1, le=1024, description="threads of one operator when speed is judged")
    seconds: float = Field(default=1.0, gt=0, le=600, description="timed calls of each file, seconds")
    timeout: float = Field(default=3600.0, ge=1, le=86_400, description="seconds after which nncf's process is ended")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An INT8 file that was made."""

    path: Path
    alpha: float | None  # SmoothQuant's strength; None: without
    graph: dict[str, Any]  # quantized_nodes, float_nodes, astray
    accuracy: Accuracy


def run(ctx: Context) -> None:
    """Make INT8, judge it, write the product; see the module's docstring."""
    from .deploy.bundle import open_bundle

    config: QuantizeConfig = ctx.config
    start = time.perf_counter()
    source = open_bundle(ctx.inputs["onnx"].file("model.onnx"))
    sidecar = source.sidecar
    if sidecar is None or sidecar.precision != "fp32":
        raise InvalidInput(f"{source.path} is not a float file", "let quantize read the artifact of export")
    pixels, origin = _calibration(ctx, config)
    before, best = _candidates(ctx, config, source, pixels)
    drop = before.top1 - best.accuracy.top1
    ctx.metrics |= {
        "top1": {"fp32": before.top1, "int8": best.accuracy.top1},
        "drop": drop,
        "max_drop": config.max_drop,
        "judged_on": {"split": "calibration", "images": before.images},
        "bytes": {"fp32": source.path.stat().st_size, "int8": best.path.stat().st_size},
        "calibration_images": len(pixels),
        "calibrated_on": origin,
        "smooth_quant": best.alpha,
        **best.graph,
    }
    chosen, reason = _choose(ctx, config, source, best, drop)
    ctx.metrics |= {"chosen": chosen, "reason": reason}
    ctx.ledger |= {"seconds": time.perf_counter() - start, "images": 0}
    _write(ctx, source, best, chosen)
    if chosen == "fp32":
        ctx.progress.note(f"float is kept: {reason}")


def _candidates(
    ctx: Context, config: QuantizeConfig, source: Bundle, pixels: NDArray[np.uint8]
) -> tuple[Accuracy, Candidate]:
    """The float file's accuracy, and the first INT8 file that is good enough, else the most accurate one."""
    import numpy as np

    from .vision.dataset import load_split

    calibration = ctx.work / "calibration.npy"
    np.save(calibration, pixels, allow_pickle=False)
    judge = load_split(ctx.data.model_dump(), ctx.base, "calibration")
    before = _accuracy(source.path, judge, ctx)
    alphas: list[float | None] = [None]
    match config.smooth_quant:
        case "auto":
            alphas = [None, SMOOTH]
        case float() as strength:
            alphas = [strength]
    made: list[Candidate] = []
    for alpha in alphas:
        target = ctx.work / f"int8-{'plain' if alpha is None else alpha}.onnx"
        graph = _quantized(ctx, config, source.path, target, calibration, alpha)
        _sidecar(target, source, ctx)
        made.append(Candidate(target, alpha, graph, _accuracy(target, judge, ctx)))
        if before.top1 - made[-1].accuracy.top1 <= config.max_drop and not graph["astray"]:
            return before, made[-1]
    return before, max(made, key=lambda candidate: (not candidate.graph["astray"], candidate.accuracy.top1))


def _quantized(
    ctx: Context, config: QuantizeConfig, source: Path, target: Path, pixels: Path, alpha: float | None
) -> dict[str, Any]:
    from .deploy.child import Child, ChildFailed

    command = {"do": "quantize", "source": str(source.absolute()), "target": str(target.absolute())}
    label = "INT8" if alpha is None else f"INT8, SmoothQuant {alpha:g}"
    with ctx.progress.task(label, 1) as task, Child("quantizer", "nncf", limited=False) as child:
        try:
            graph = child.ask(command | {"pixels": str(pixels.absolute()), "alpha": alpha}, config.timeout)
        except ChildFailed as error:
            raise SievitError(
                f"{error}", where=str(source), hint="leave quantize out (quantize: null), or export with opset 20"
            ) from error
        task.advance()
    return graph


def _choose(
    ctx: Context, config: QuantizeConfig, source: Bundle, best: Candidate, drop: float
) -> tuple[Literal["int8", "fp32"], str]:
    """The decision and its reason, kept in the work folder: a resumed run must not decide anew by other timings."""
    decision = ctx.work / "decision.json"
    if decision.is_file():
        kept = json.loads(decision.read_text(encoding="utf-8"))
        ctx.metrics["speedup"] = kept["speedup"]
        return kept["chosen"], kept["reason"]
    chosen, reason, speed = _decide(ctx, config, source, best, drop)
    write_whole(decision, {"chosen": chosen, "reason": reason, "speedup": speed})
    ctx.metrics["speedup"] = speed
    return chosen, reason


def _decide(
    ctx: Context, config: QuantizeConfig, source: Bundle, best: Candidate, drop: float
) -> tuple[Literal["int8", "fp32"], str, dict[str, float] | None]:
    if best.graph["astray"]:
        names = ", ".join(f"{count} {name}" for name, count in best.graph["astray"].items())
        return "fp32", f"nncf quantized more than linear layers ({names})", None
    if not best.graph["quantized_nodes"]:
        return "fp32", "nncf found no linear layer to quantize", None
    if drop > config.max_drop:
        told = f"{100 * drop:.1f} points of top-1 on the calibration split"
        return "fp32", f"INT8 loses {told}, {100 * config.max_drop:.1f} are allowed", None
    if config.min_speedup is None:
        return "int8", f"INT8 loses {100 * drop:.1f} points of top-1; its speed was not asked for", None
    speed = _speedup(ctx, config, source, best)
    said = f"{speed['ratio']:.2f} times as fast as float here ({speed['low']:.2f} to {speed['high']:.2f})"
    if speed["low"] <= config.min_speedup or speed["ratio"] <= speed["noise"]:
        needed = f"more than {config.min_speedup:g} and beyond the noise of {100 * (speed['noise'] - 1):.1f} % is asked"
        return "fp32", f"INT8 is {said}; {needed}", speed
    return "int8", f"INT8 is {said}", speed


def _speedup(ctx: Context, config: QuantizeConfig, source: Bundle, best: Candidate) -> dict[str, float]:
    """Float against INT8 by the benchmark's protocol, interleaved, with an A/A pair."""
    from .deploy.bundle import open_bundle
    from .deploy.child import ChildFailed
    from .deploy.comparison import host_state, watch
    from .deploy.latency import TWIN, Plan, Subject, measure, settings_of
    from .deploy.statistics import noise_factor, ratio_interval

    settings = settings_of([config.provider], [config.threads], [config.batch])[:1]
    int8 = open_bundle(best.path)
    assert source.sidecar is not None
    pre = source.sidecar.preprocessing
    image = (len(pre.mean), pre.size, pre.size)
    subjects = [
        Subject(name, bundle.path, bundle.signature.input, bundle.signature.dtype, image)
        for name, bundle in (("fp32", source), ("int8", int8))
    ]
    before = watch()
    try:
        results = measure(subjects, settings, Plan(seconds=config.seconds, seed=ctx.seed), ctx.progress)
    except ChildFailed as error:
        raise SievitError(str(error), where=str(source.path)) from error
    ctx.metrics |= host_state(before, results, settings, ctx.progress)
    first = results["fp32", settings[0]].slots
    ratio = ratio_interval(first, results["int8", settings[0]].slots)
    noise = noise_factor(ratio_interval(first, results[TWIN, settings[0]].slots))
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "noise": noise}


def _calibration(ctx: Context, config: QuantizeConfig) -> tuple[NDArray[np.uint8], str]:
    """Calibration images, uint8 [n, size, size, 3], balanced over classes, and where they come from."""
    import numpy as np

    from .vision.dataset import load_split

    tickets = ctx.inputs.get("tickets")
    images = load_split(ctx.data.model_dump(), ctx.base, "calibration" if tickets is None else "train")
    kept = np.arange(len(images))
    if tickets is not None:
        kept = np.load(tickets.file("kept.npy"), allow_pickle=False)
        if kept.ndim != 1 or not len(kept) or kept.min() < 0 or kept.max() >= len(images):
            raise InvalidInput(
                f"the tickets do not belong to this training split of {len(images)} images",
                "make them on the same data",
            )
    chosen = balanced(images.labels, kept, config.calibration_images, ctx.seed)
    return images.pixels(chosen), "calibration split" if tickets is None else "ticket examples"


def balanced(labels: NDArray[np.int64], members: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """At most `count` of `members` (indices into labels), class by class in turn, ascending; repeatable."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.sort(members))
    of_label = labels[shuffled]
    turn = np.empty(len(shuffled), dtype=np.int64)
    for label in np.unique(of_label):
        places = np.flatnonzero(of_label == label)
        turn[places] = np.arange(len(places))
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:count]])


def _accuracy(path: Path, images: Any, ctx: Context) -> Accuracy:
    import numpy as np

    from .deploy.isa import usable_cores
    from .deploy.predict import accuracy, scores

    with ctx.progress.task(f"accuracy of {path.name}", len(images)) as task:
        scored = scores(
            path,
            lambda start, stop: images.pixels(np.arange(start, stop)),
            len(images),
            threads=len(usable_cores()),
            done=task.advance,
        )
    return accuracy(scored, images.labels)


def _sidecar(target: Path, source: Bundle, ctx: Context) -> None:
    from .deploy.bundle import open_bundle, write_sidecar

    assert source.sidecar is not None
    artifact = ctx.inputs["onnx"]
    write_sidecar(
        target,
        preprocessing=source.sidecar.raw["preprocessing"],
        classes=source.sidecar.classes,
        precision="int8",
        parameters=source.sidecar.parameters,
        macs=source.sidecar.macs,
        opset=open_bundle(target, sidecar_required=False).opset,
        source={"stage": artifact.kind_of_stage, "key": artifact.key, "digest": artifact.digest},
    )


def _write(ctx: Context, source: Bundle, best: Candidate, chosen: Literal["int8", "fp32"]) -> None:
    """The product, and the INT8 file beside it when float is the product."""
    product = best.path if chosen == "int8" else source.path
    written = [("model", product)] + ([("int8", best.path)] if chosen == "fp32" else [])
    for stem, path in written:
        for suffix in (".onnx", ".json"):
            shutil.copyfile(path.with_suffix(suffix), ctx.out / f"{stem}{suffix}")


def preflight(seen: Preflight) -> None:
    """Refuse a provider that this onnxruntime does not have."""
    from .deploy.sessions import require_provider

    if seen.config.min_speedup is None:
        return
    try:
        require_provider(seen.config.provider)
    except InvalidInput as error:
        error.field = seen.at("provider")
        raise


STAGE = Stage(
    name="quantize",
    version=1,
    config=QuantizeConfig,
    run=run,
    reads=(Reads("onnx", "onnx"), Reads("tickets", "tickets", optional=True)),
    writes="onnx",
    manual=__doc__,
    packages=("onnx", "onnxruntime", "nncf"),
    uses=frozenset({"data", "device", "host", "seed"}),
    preflight=preflight,
)
