"""Post-training INT8 in the form that is fastest here, kept only where it is as good as float and faster.

The linear layers become 8-bit; patch embedding, residual additions, norms, softmax, GELU and the products inside the
attention stay float. Three schemes: `static` (nncf; ranges recorded on ticket examples when there are tickets, training
images that were kept, balanced over classes, else on the calibration split), `dynamic` (ONNX Runtime; each call takes
its own ranges) and `weights` (stored in 8 bits, multiplied in float: for size alone). Each also with attention as one
operator. Which form is fastest differs by processor and network, so all are made and timed in turn with the float file
by the benchmark's own protocol; a float file with attention as one operator takes part too, and the half-precision file
if export made one.

Whether a file is good enough is decided on the calibration split, never on the test split. Where a scheme loses more
than `max_drop`, `static` is tried with SmoothQuant (it moves the outliers of activations into the weights), and then
the half blocks that 8 bits hurt most are left float, as few as suffice.

A scheme that a quantizer refuses, or whose file does not run, is left out and told; the stage fails where none is left.

Processors without 8-bit dot products add products in pairs of 16 bits, which saturate; there the weights take 7 bits.
Activations of `static` are unsigned, which ONNX Runtime takes at every opset, and symmetric for TensorRT.

reads    an onnx file, tickets (optional)
writes   model.onnx, model.json: the product, INT8 or float;
         int8.onnx, int8.json: the best INT8 file when it was not chosen; the benchmark measures it too
papers   SmoothQuant: Xiao et al., ICML 2023, arXiv 2211.10438

    sievit quantize pipeline.yaml --set quantize.max_drop=0.005
    sievit quantize pipeline.yaml --set 'quantize.schemes=[weights]' --set quantize.min_speedup=null
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sievit.pipeline.errors import SievitError
from sievit.pipeline.stage import Config, Context, Preflight, Stage

from .forms import Candidate, Forge, reason_against
from .methods import InvalidInput
from .ranges import READS, FormFailed, calibration_images
from .vision.notes import write_whole

if TYPE_CHECKING:
    from .deploy.bundle import Bundle
    from .deploy.predict import Accuracy


class QuantizeConfig(Config):
    """What INT8 may cost, and what it must bring."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"timeout"})

    schemes: Annotated[tuple[Literal["static", "dynamic", "weights"], ...], Field(min_length=1)] = Field(
        default=("static", "dynamic"),
        description="how layers become 8-bit; all are made, the fastest good one wins (dynamic: cpu alone)",
    )
    weight_bits: Literal["auto", 7, 8] = Field(
        default="auto", description="bits of the weights; auto: 7 where this processor's 8-bit sums saturate, else 8"
    )
    fuse_attention: bool = Field(default=True, description="try attention as one operator too, on the CPU")
    max_drop: float = Field(
        default=0.01, ge=0, le=1, description="top-1 that INT8 may lose on the calibration split, a fraction"
    )
    revert_seconds: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="for finding the blocks that must stay float where INT8 loses more; 0: do not look",
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
        default="cpu", description="ONNX Runtime execution provider on which accuracy and speed are judged"
    )
    batch: int = Field(default=1, ge=1, le=4096, description="images at once when speed is judged")
    threads: int = Field(default=1, ge=1, le=1024, description="threads of one operator when speed is judged")
    seconds: float = Field(default=1.0, gt=0, le=600, description="timed calls of each file, seconds")
    timeout: float = Field(default=3600.0, ge=1, le=86_400, description="seconds after which a quantizer is ended")

    @model_validator(mode="after")
    def _each_for_what_it_can(self) -> QuantizeConfig:
        if twice := next((name for n, name in enumerate(self.schemes) if name in self.schemes[:n]), None):
            raise ValueError(f"schemes: {twice} stands there twice; name each once")
        if "weights" in self.schemes and (len(self.schemes) > 1 or self.min_speedup is not None):
            raise ValueError(
                "schemes: weights makes a file smaller and not faster; name it alone, with min_speedup: null"
            )
        if self.provider != "cpu" and "dynamic" in self.schemes and "schemes" in self.model_fields_set:
            raise ValueError(f"schemes: dynamic is for provider: cpu, not {self.provider}; set schemes: [static]")
        return self

    @property
    def tried(self) -> tuple[Literal["static", "dynamic", "weights"], ...]:
        """The schemes that the provider can run."""
        return tuple(scheme for scheme in self.schemes if scheme != "dynamic" or self.provider == "cpu")


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times as fast as the float file, with its 95 % interval; noise: ratios up to it are noise."""

    ratio: float
    low: float
    high: float
    noise: float


Decision = tuple[Candidate | None, str, dict[str, Speed]]
"""The product (None: the float file as it is), the reason, and the speed of every form."""


def run(ctx: Context) -> None:
    """Make the forms, judge them, write the product; see the module's docstring."""
    from .deploy.bundle import bytes_of, open_bundle
    from .deploy.sessions import GRAPHICS

    config: QuantizeConfig = ctx.config
    start = time.perf_counter()
    source = open_bundle(ctx.inputs["onnx"].file("model.onnx"))
    assert source.sidecar is not None  # it is required
    if (precision := source.sidecar.precision) != "fp32":
        raise InvalidInput(
            f"{source.path} is {precision} already, and quantize starts from fp32",
            "give it the fp32 file, or leave quantize out and benchmark this one",
        )
    pixels, origin = calibration_images(ctx, config.calibration_images)
    if config.provider in GRAPHICS and not source.path.with_name("fp16.onnx").is_file():
        ctx.progress.note("on a card FP16 is often the fastest form: `export: {half: true}` makes one to choose from")
    with Forge(ctx, config, source) as forge:
        before = forge.before
        schemes = _each_that_works(ctx, forge, config)
        good = [made for made in schemes if reason_against(config, before, made) is None]
        candidates = [*good, *forge.fused(good), *forge.half()]
    chosen, reason, speeds = _once(
        ctx.work, candidates, lambda: _decide(ctx, config, source, schemes, candidates, before)
    )
    best = chosen if chosen is not None and chosen.form.eight_bit else _best(schemes, candidates, before, speeds)
    precision = "int8" if best is chosen else "fp16" if chosen is not None and chosen.form.scheme else "fp32"
    drop = before.top1 - best.accuracy.top1
    speed = speeds.get(best.form.text())
    ctx.metrics |= {
        "top1": {"fp32": before.top1, "int8": best.accuracy.top1},
        "drop": drop,
        "max_drop": config.max_drop,
        "judged_on": {"split": "calibration", "images": before.images},
        "bytes": {"fp32": source.bytes, "int8": bytes_of(best.path)},
        "calibration_images": len(pixels),
        "calibrated_on": origin,
        "weight_bits": forge.bits,
        "smooth_quant": best.form.alpha,
        **best.graph,
        "form": best.form.text(),
        "left_float": list(best.left_float),
        "sensitivity": forge.sensitivity,
        "forms": [_row(made, before, speeds, chosen) for made in _each_once([*schemes, *candidates])],
        "speedup": None if speed is None else {n: getattr(speed, n) for n in ("ratio", "low", "high", "noise")},
        "chosen": precision,
        "product": "float" if chosen is None else chosen.form.text(),
        "reason": reason,
    }
    ctx.ledger |= {"seconds": time.perf_counter() - start, "images": 0}
    _write(ctx, source, best, chosen)
    if precision != "int8":
        ctx.progress.note(f"float is kept: {reason}")


def _each_that_works(ctx: Context, forge: Forge, config: QuantizeConfig) -> list[Candidate]:
    """A file of each scheme. One that a quantizer or the runtime refuses is left out, with a warning; the error of the
    first is raised where none is left.
    """
    made: list[Candidate] = []
    refused: dict[str, FormFailed] = {}
    for scheme in config.tried:
        try:
            made.append(forge.scheme(scheme))
        except FormFailed as error:
            refused[scheme] = error
    for name, reason in refused.items():
        ctx.progress.warn(f"{name} is left out: {reason.message}")
    if not made:
        raise next(iter(refused.values()))
    return made


def _once(work: Path, candidates: Sequence[Candidate], decide: Callable[[], Decision]) -> Decision:
    """What `decide` says, kept in the work folder: a resumed run must not decide anew by other timings."""
    decision = work / "decision.json"
    if not decision.is_file():
        chosen, reason, speeds = decide()
        record = {"chosen": None if chosen is None else chosen.form.text(), "reason": reason}
        told = {name: {n: getattr(speed, n) for n in Speed.__slots__} for name, speed in speeds.items()}
        write_whole(decision, record | {"speeds": told})
    kept = json.loads(decision.read_text(encoding="utf-8"))
    of_name = {made.form.text(): made for made in candidates}
    speeds = {name: Speed(**speed) for name, speed in kept["speeds"].items()}
    return of_name.get(kept["chosen"]), kept["reason"], speeds


def _decide(
    ctx: Context,
    config: QuantizeConfig,
    source: Bundle,
    schemes: Sequence[Candidate],
    candidates: Sequence[Candidate],
    before: Accuracy,
) -> Decision:
    lesser = [made for made in candidates if made.form.scheme]
    if config.min_speedup is None and lesser:
        lost = 100 * (before.top1 - lesser[0].accuracy.top1)
        return lesser[0], f"INT8 loses {lost:.1f} points of top-1; its speed was not asked for", {}
    against = [reason for made in schemes if (reason := reason_against(config, before, made))]
    if config.min_speedup is None or not candidates:
        return None, "; ".join(dict.fromkeys(against)), {}
    speeds = _speeds(ctx, config, source, candidates)
    if not speeds:
        against.append(f"{config.provider} runs none of the forms")

    def bound(made: Candidate) -> float:
        return config.min_speedup if made.form.scheme and config.min_speedup is not None else 1.0

    def ratio(made: Candidate) -> float:
        return speeds[made.form.text()].ratio

    # What is not shown to be faster is no match for what is, however high its number.
    timed = [made for made in candidates if made.form.text() in speeds]  # the others are not run by the provider
    lesser = [made for made in lesser if made in timed]
    faster = [made for made in timed if _is_faster(speeds[made.form.text()], bound(made))]
    best = max(faster, key=ratio, default=None)
    shown = max([made for made in lesser if made in faster] or lesser, key=ratio, default=None)
    if shown is not None:
        speed = speeds[shown.form.text()]
        kind = f"INT8 ({shown.form.text()})" if shown.form.eight_bit else "FP16"
        against = [f"{kind} is {_said(speed)}"]
        if shown not in faster:
            noise = f"beyond the noise of {100 * (speed.noise - 1):.1f} %"
            against = [f"{against[0]}; more than {config.min_speedup:g} and {noise} is asked"]
    if best is not None and best.form.scheme is None:
        against.append(f"float with attention as one operator is {_said(speeds[best.form.text()])}")
    return best, "; ".join(dict.fromkeys(against)), speeds


def _is_faster(speed: Speed, than: float) -> bool:
    return speed.low > than and speed.ratio > speed.noise


def _said(speed: Speed) -> str:
    return f"{speed.ratio:.2f} times as fast as float here ({speed.low:.2f} to {speed.high:.2f})"


def _best(
    schemes: Sequence[Candidate], candidates: Sequence[Candidate], before: Accuracy, speeds: dict[str, Speed]
) -> Candidate:
    """The INT8 file that is shown when none is the product: the fastest good one, else the most accurate."""
    eight = [made for made in candidates if made.form.text() in speeds and made.form.eight_bit]
    if eight:
        return max(eight, key=lambda made: speeds[made.form.text()].ratio)
    return max(schemes, key=lambda made: (not made.graph["astray"], made.accuracy.top1))


def _each_once(made: Sequence[Candidate]) -> list[Candidate]:
    return list({one.form: one for one in made}.values())


def _row(made: Candidate, before: Accuracy, speeds: dict[str, Speed], chosen: Candidate | None) -> dict[str, Any]:
    """A line of the table of forms."""
    from .deploy.bundle import bytes_of

    speed = speeds.get(made.form.text())
    return {
        "form": made.form.text(),
        "top1": made.accuracy.top1,
        "drop": before.top1 - made.accuracy.top1,
        "bytes": bytes_of(made.path),
        "left_float": list(made.left_float),
        "speedup": speed.ratio if speed else None,
        "speedup_low": speed.low if speed else None,
        "speedup_high": speed.high if speed else None,
        "chosen": made == chosen,
    }


def _speeds(ctx: Context, config: QuantizeConfig, source: Bundle, candidates: Sequence[Candidate]) -> dict[str, Speed]:
    """Float against all candidates by the benchmark's protocol, interleaved, with an A/A pair: form -> speed."""
    from .deploy.bundle import open_bundle
    from .deploy.child import ChildFailed
    from .deploy.comparison import host_state, watch
    from .deploy.latency import TWIN, Plan, Subject, measure, settings_of
    from .deploy.statistics import noise_factor, ratio_interval

    assert source.sidecar is not None
    batch = source.signature.shape[0] or config.batch
    if batch != config.batch:
        ctx.progress.note(f"speed is judged in batches of {batch}: the file takes no others")
    settings = settings_of([config.provider], [config.threads], [batch])[:1]
    image = source.sidecar.image
    files = {"fp32": source} | {made.form.text(): open_bundle(made.path) for made in candidates}
    subjects = [Subject(n, b.path, b.signature.input, b.signature.dtype, image) for n, b in files.items()]
    before, plan = watch(), Plan(seconds=config.seconds, seed=ctx.seed, placed=False)
    refused: dict[tuple[str, str], str] = {}
    try:
        results = measure(subjects, settings, plan, ctx.progress, refused=refused)
    except ChildFailed as error:
        raise SievitError(str(error), where=str(source.path), hint="`sievit doctor` tells what works here") from error
    ctx.metrics |= host_state(before, results, settings, ctx.progress)
    first = results["fp32", settings[0]].slots
    noise = noise_factor(first, results[TWIN, settings[0]].slots)
    for (name, _), reason in refused.items():
        ctx.progress.warn(f"{name} is left out: {reason}")
    found = {}
    for name in [name for name in list(files)[1:] if (name, settings[0]) in results]:
        ratio = ratio_interval(first, results[name, settings[0]].slots)
        found[name] = Speed(ratio.value, ratio.low, ratio.high, noise)
    return found


def _write(ctx: Context, source: Bundle, best: Candidate, chosen: Candidate | None) -> None:
    """The product, and the best INT8 file beside it when float is the product."""
    from .deploy.bundle import weight_files

    written = [("model", source.path if chosen is None else chosen.path)]
    written += [] if best is chosen else [("int8", best.path)]
    for stem, path in written:
        for suffix in (".onnx", ".json"):
            shutil.copyfile(path.with_suffix(suffix), ctx.out / f"{stem}{suffix}")
        for name in weight_files(path):  # a float file of more than 2 GB keeps them beside it
            (ctx.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / name, ctx.out / name)


def preflight(seen: Preflight) -> None:
    """Refuse a provider that this onnxruntime does not have or that does not start, and more threads than cores."""
    from .checkup import require_running

    require_running([seen.config.provider], [seen.config.threads], (seen.at("provider"), seen.at("threads")))


STAGE = Stage(
    name="quantize",
    version=7,
    config=QuantizeConfig,
    run=run,
    reads=READS,
    writes="onnx",
    manual=__doc__,
    packages=("onnx", "onnxruntime", "nncf"),
    uses=frozenset({"data", "device", "host", "seed"}),
    preflight=preflight,
)
