"""Measure accuracy and latency of every arm's file, all interleaved, from the very files that are shipped.

Each file (and the INT8 file that `quantize` made but did not choose) gets a process of its own with pinned threads.
In each round every file runs once, in random order; rounds are repeated over several sessions with new processes.
Speed-ups are ratios within a round against the dense arm's file. They and p50, p90, p95 and p99 have 95 % intervals
from how sessions differ (more `sessions` make them narrower); those above p50 are of processes like the measured ones
and reach as far as slower ones may have gone. The baseline runs twice: what that pair shows is the
noise floor, and a difference inside it is called no difference. p90 is said from 64 calls on, p95 from 130, p99 from
662 (raise `seconds` for more), and a row without one says so. Top-1 has its Wilson interval.
Under several seeds every file of every seed is a row of its own; `over_seeds` and the gates hold their means.

A provider that is not installed or does not start is an error, and so is one that leaves matrix products of the
baseline, or as the first provider of what an arm ships, to another one: never a silent fall-back. Any other file that a
provider does not run is told as not measured there. On a card, rows with io "device" keep data there, rows with io
"copy" carry it there and back.

`scenarios`: offline doubles the batch until two sizes in a row bring no more than the noise. server lets single images
come at random (Poisson, one queue, first come, first served) and bisects for the highest rate at which 99 % are
answered within `server_p99_ms`, waiting included. Both are measured of the baseline and the final files.

`attribution` tells where the time of the baseline and of each final file goes, from ONNX Runtime's own profile of
further calls: by kind of operator, by block, by module. Its sum stands beside p50: time between operators is in p50
alone, and writing each operator down lengthens it, much where operators are small. On the CPU provider only.

`torch` names networks that are timed in PyTorch too, eager and by torch.compile, each in a process of its own: a
reference, never a product. They take no turns with the files, and so no verdict is spoken.

`peak_share` of a row is how near its p50 comes to what this host's cores can do: operations a second (two for each
multiply-add) over those of a large matrix product in ONNX Runtime, float for float files and 8 bit for 8-bit ones; on
a card half precision for FP16.

`flips` lays every final file beside the dense one, image by image: which test images it loses and wins, by pairs of
classes, with McNemar's p. 24 images of the main arm are kept as pictures of at most 96 pixels a side, half of them
lost, half won, at even distances through the test split. `between_arms` lays the final files of every two arms beside
each other: by how much one is right more often, and whether that is chance (McNemar's test, over seeds a paired t).

reads    the onnx files of all arms, the test split; the networks that `torch` names
writes   samples.npz (every timed call), spread.json (its percentiles), rows.json, flips.json and flips/

    sievit benchmark pipeline.yaml
    sievit benchmark --onnx model.onnx --provider cpu --batch 1
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sievit.pipeline.errors import SievitError
from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .deploy.providers import Provider
from .methods import InvalidInput
from .torch_reference import TorchReference

if TYPE_CHECKING:
    from .deploy.accuracies import RunBy
    from .deploy.bundle import Bundle
    from .deploy.latency import Plan, Progress, Results, Setting
    from .deploy.variants import Variant

Scenario = Literal["single", "offline", "server"]


class BenchmarkConfig(Config):
    """What is measured, and for how long."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"timeout"})

    providers: Annotated[tuple[Provider, ...], Field(min_length=1)] = Field(
        default=("cpu",), description="ONNX Runtime execution providers; the first one decides the gates"
    )
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1)] = Field(
        default=(1, 8), description="images at once; the first one decides the gates"
    )
    threads: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1)] = Field(
        default=(1,), description="threads of one operator, pinned to as many cores; the first one decides the gates"
    )
    seconds: float = Field(
        default=2.0, gt=0, le=3600, description="timed calls of one file in one setting, seconds, over all sessions"
    )
    sessions: int = Field(default=5, ge=3, le=50, description="lives of the processes; intervals are taken over them")
    warm_up: float = Field(default=1.0, ge=0.05, le=600, description="seconds of warm-up at most, in each session")
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)] = Field(
        default=("single",),
        description="single: one call after the other, always; offline: best throughput over batch sizes; server: "
        "highest rate of queries at random times that are answered within server_p99_ms",
    )
    offline_batch: int = Field(default=64, ge=1, le=4096, description="largest batch that offline tries")
    server_p99_ms: float | None = Field(
        default=None, gt=0, le=3_600_000, description="the latency that 99 % of the queries of server must keep, ms"
    )
    server_seconds: float = Field(
        default=60.0, gt=0, le=86_400, description="trials of server for one file, seconds at most"
    )
    attribution: bool = Field(
        default=True, description="tell which operators and blocks of the baseline and the final files take the time"
    )
    timeout: float = Field(default=300.0, ge=1, le=86_400, description="seconds after which a silent process is ended")
    torch: TorchReference | None = Field(
        default=None, description="networks to time in PyTorch too, as a reference; they take no part in verdicts"
    )

    @model_validator(mode="after")
    def _each_once(self) -> BenchmarkConfig:
        for name in ("providers", "batch_sizes", "threads", "scenarios"):
            values = getattr(self, name)
            if twice := next((value for n, value in enumerate(values) if value in values[:n]), None):
                raise ValueError(f"{name}: {twice} stands there twice; name each once")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> BenchmarkConfig:
        if "single" not in self.scenarios:
            raise ValueError("scenarios: single is what all else is compared with; add it")
        if "server" in self.scenarios and self.server_p99_ms is None:
            raise ValueError("scenarios: server needs a bound; set server_p99_ms, which 99 % of the queries must keep")
        return self


def run(ctx: Context) -> None:
    """Measure all files; see the module's docstring."""
    from .deploy.accuracies import accuracies, check_classes
    from .deploy.attribution import attributed
    from .deploy.between_arms import between_arms
    from .deploy.flips import keep_flips, pairs_of
    from .deploy.latency import Plan, settings_of
    from .deploy.over_seeds import over_seeds
    from .deploy.scenarios import offline_rows, server_rows
    from .deploy.variants import require_batches
    from .vision.dataset import load_split

    config: BenchmarkConfig = ctx.config
    settings = settings_of(config.providers, config.threads, config.batch_sizes)
    variants = _variants(ctx)
    require_batches(variants, config.batch_sizes)
    baseline = _baseline(variants)
    images = load_split(ctx.data.model_dump(), ctx.base, "test")
    check_classes(variants, images.classes)
    plan = Plan(config.seconds, config.sessions, config.warm_up, ctx.seed, config.timeout)
    metrics, results, run_by = _timed(variants, baseline, settings, plan, ctx.progress)
    for variant in variants:
        if variant.final and not run_by(variant, settings[0]):
            first = settings[0].provider
            why = {one["provider"]: one["reason"] for one in metrics["unmeasured"] if one["file"] == variant.name}
            raise InvalidInput(
                f"{variant.name} is what the arm ships, and {first} decides: {why[first]}",
                f"set quantize.provider: {first} too, or name another provider first",
            )
    found, answered = accuracies(variants, images, settings, run_by, ctx.progress)
    for row in metrics["rows"]:
        one = found[row["sha256"], row["provider"]]
        row |= {"top1": one.top1, "top1_low": one.low, "top1_high": one.high, "test_images": one.images}
    metrics["test_images"] = len(images)
    metrics["over_seeds"] = over_seeds(metrics["rows"])
    metrics["between_arms"] = between_arms(variants, images.labels, answered)
    metrics["gates"] = _gates(metrics["rows"], settings[0], baseline)
    metrics["flips"] = keep_flips(ctx.out, pairs_of(variants, baseline), images, answered)
    shown = [baseline, *(variant for variant in variants if variant.final and variant is not baseline)]
    metrics["scenarios"] = []
    if "offline" in config.scenarios:
        metrics["scenarios"] += offline_rows(shown, settings, config.offline_batch, plan, ctx.progress, run_by)
    if "server" in config.scenarios and config.server_p99_ms is not None:
        bound, seconds = config.server_p99_ms, config.server_seconds
        metrics["scenarios"] += server_rows(shown, settings, bound, seconds, plan, ctx.progress, run_by)
    if config.torch is not None:
        metrics["torch"] = _torch(ctx, config.torch, settings, plan)
    if config.attribution:
        metrics["attribution"] = attributed(shown, settings, metrics["rows"], plan, ctx.progress)
    ctx.metrics |= metrics
    _keep(ctx, results, settings[0])


def benchmark_files(
    files: Sequence[Path],
    providers: Sequence[str] = ("cpu",),
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    seconds: float = 2.0,
    progress: Progress | None = None,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """Latency of ONNX files from anywhere, the first one being the baseline. No torch, no pipeline, no accuracy.

    Needs one float or uint8 image input; noise is fed. Returns the metrics of the benchmark stage, with `file` in each
    row; files of equal content are timed once. timeout_s: a file that is silent for longer is given up. Raises
    InvalidInput for files that are not image classifiers or do not run, SievitError for a crash.
    """
    from .deploy.attribution import attributed
    from .deploy.bundle import open_bundle
    from .deploy.latency import Plan, settings_of
    from .deploy.variants import Variant, require_batches

    if not files:
        raise InvalidInput("no file to measure", "name at least one .onnx file")
    settings = settings_of(providers, threads, batch_sizes)
    variants: list[Variant] = []
    names = [Path(path).name for path in files]
    for path in files:
        label = Path(path).name if names.count(Path(path).name) == 1 else str(path)
        variants.append(Variant("", label, False, open_bundle(Path(path), sidecar_required=False)))
    require_batches(variants, batch_sizes)
    plan = Plan(seconds=seconds, timeout_s=timeout_s)
    metrics, _, _ = _timed(variants, variants[0], settings, plan, progress, told_early=True)
    metrics["attribution"] = attributed(variants, settings, metrics["rows"], plan, progress)
    return metrics


def _variants(ctx: Context) -> list[Variant]:
    """Every file of every arm; one that stands twice in an arm (quantize kept float) is one variant. Raises
    InvalidInput for one whose pictures are made otherwise than the test split's.
    """
    from .deploy.bundle import open_bundle
    from .deploy.variants import Variant

    found: dict[tuple[str, str], Variant] = {}
    for labelled in ctx.many:
        for name in ("int8.onnx", "fp16.onnx", "model.onnx"):
            path = labelled.artifact.file("model.onnx").with_name(name)
            if name != "model.onnx" and not path.is_file():
                continue
            bundle = open_bundle(path)
            _check_pictures(bundle)
            key = labelled.arm, bundle.sha256
            before = found.get(key)
            if before is None or not before.final:
                final = labelled.final and name == "model.onnx"
                found[key] = Variant(labelled.arm, labelled.entry, final, bundle, labelled.family, labelled.seed)
    if not found:
        raise InvalidInput("there is no ONNX file to measure", "run `export` in at least one arm")
    return list(found.values())


def _check_pictures(bundle: Bundle) -> None:
    """The test split is resized and cut by the data set's one rule; a sidecar that asks for another would be measured
    on pictures that its users never feed.
    """
    from .vision.decode import PICTURE

    assert bundle.sidecar is not None
    asked = bundle.sidecar.preprocessing.as_json()
    if other := {name: asked[name] for name in PICTURE if asked[name] != PICTURE[name]}:
        told = ", ".join(f"{name} {value}" for name, value in other.items())
        raise InvalidInput(
            f"the sidecar of {bundle.path} makes pictures by {told}, the data by "
            + ", ".join(f"{name} {PICTURE[name]}" for name in other),
            "export it again: one model has one preprocessing",
        )


def _baseline(variants: Sequence[Variant]) -> Variant:
    """The dense arm's final file, else the first FP32 file of the main arm."""
    for variant in variants:
        if variant.arm == "dense" and variant.final:
            return variant
    return next((v for v in variants if v.arm == "main" and v.precision == "fp32"), variants[0])


def _timed(
    variants: Sequence[Variant],
    baseline: Variant,
    settings: Sequence[Setting],
    plan: Plan,
    progress: Progress | None,
    *,
    told_early: bool = False,
) -> tuple[dict[str, Any], Results, RunBy]:
    """Latency rows of all variants (settings outermost), noise floor, host facts, and what the host did meanwhile; the
    raw results; and whether a file runs in a setting. One that a provider does not run has no rows there, and is told
    under `unmeasured`, unless it is the baseline.

    told_early: each file's median in each setting is noted as soon as a session has it.
    """
    from .deploy.child import ChildFailed
    from .deploy.comparison import Quiet, first_medians, host_state, latency_row, noise_floors, watch
    from .deploy.latency import measure
    from .deploy.peak import peaks, share

    progress = progress or Quiet()
    early = first_medians(progress, plan.sessions)
    files = {v.bundle.sha256: v.subject(settings[0].batch) for v in [baseline, *variants]}
    subjects = list(files.values())
    before, refused = watch(), dict[tuple[str, str], str]()
    tell = early if told_early else lambda seen: None
    try:
        results = measure(subjects, settings, plan, progress, after_session=tell, refused=refused)
    except ChildFailed as error:
        raise SievitError(str(error), hint="see the log; measure the other files without this one") from error
    for (name, provider), reason in refused.items():
        progress.warn(f"{name} is not measured on {provider}: {reason}")

    def run_by(variant: Variant, setting: Setting) -> bool:
        return (files[variant.bundle.sha256].name, setting) in results

    state = host_state(before, results, settings, progress)
    floors = noise_floors(results, subjects[0].name, settings)
    rows = [
        v.whole() | latency_row(files[v.bundle.sha256], setting, results, subjects[0].name, floors[setting])
        for setting in settings
        for v in variants
        if run_by(v, setting)
    ]
    found = peaks(rows, settings, plan, progress)
    for row in rows:
        row |= share(row, found)
    metrics = {
        "rows": rows,
        "unmeasured": [
            {"file": v.name, "provider": provider, "reason": reason}
            for (name, provider), reason in refused.items()
            for v in variants
            if files[v.bundle.sha256].name == name
        ],
        "peaks": [one.as_json() for one in found],
        "baseline": {"arm": baseline.arm, "entry": baseline.entry, "variant": baseline.precision},
        "noise_floor": floors[settings[0]].as_json(),
        "noise_floors": [floor.as_json() for floor in floors.values()],
        "protocol": {"seconds": plan.seconds, "sessions": plan.sessions, "warm_up_s": plan.warm_up_s},
        **state,
    }
    return metrics, results, run_by


def _torch(ctx: Context, asked: TorchReference, settings: Sequence[Setting], plan: Plan) -> list[dict[str, Any]]:
    """Reference rows in PyTorch."""
    from .deploy.child import ChildFailed
    from .torch_reference import reference_rows

    networks = {name: ctx.inputs[role].root for role, name in _references(ctx.config).items()}
    try:
        return reference_rows(networks, asked.modes, settings, plan, ctx.progress)
    except ChildFailed as error:
        raise SievitError(str(error), hint="leave benchmark.torch out") from error


def _references(config: BenchmarkConfig) -> dict[str, str]:
    names = () if config.torch is None else config.torch.networks
    return {f"torch {number}": name for number, name in enumerate(names)}


def _gates(rows: Sequence[dict[str, Any]], setting: Setting, baseline: Variant) -> dict[str, float]:
    """Main arm's final files against the dense arm's, in one setting; {} without a dense arm.

    Under several seeds: the mean of the accuracy lost, each seed against its own dense file, and the geometric mean of
    the speed-ups. One bad seed does not miss a gate, and one good one does not pass it.
    """
    if baseline.family != "dense" or not baseline.final:
        return {}
    first = [row for row in rows if all(row[name] == value for name, value in asdict(setting).items())]
    shipped, dense = ([row for row in first if row["final"] and row["family"] == name] for name in ("main", "dense"))
    if not shipped:
        return {}
    drops = [theirs["top1"] - ours["top1"] for ours, theirs in zip(shipped, dense, strict=True)]
    return {"accuracy_drop": fmean(drops), "speedup": geometric_mean([row["speedup"] for row in shipped])}


def _keep(ctx: Context, results: Results, first: Setting) -> None:
    """Payload."""
    import numpy as np

    from .deploy.comparison import percentiles, raw_samples

    np.savez_compressed(ctx.out / "samples.npz", **raw_samples(results))
    (ctx.out / "rows.json").write_text(json.dumps(ctx.metrics["rows"], indent=1) + "\n", encoding="utf-8")
    setting = f"{first.provider}, batch {first.batch}, {first.threads} thread{'s' * (first.threads != 1)}"
    spread = {
        name: np.concatenate([slot.wall_ms for slot in measured.slots])
        for (name, at), measured in results.items()
        if at == first
    }
    curves = {"setting": setting, "files": [{"file": name, "ms": percentiles(ms)} for name, ms in spread.items()]}
    (ctx.out / "spread.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")


def idle(seen: Preflight) -> dict[str, str]:
    """Attribution without the CPU, and settings of scenarios that are not asked for."""
    config: BenchmarkConfig = seen.config
    found = {}
    if "cpu" not in config.providers:
        found["attribution"] = "operators are told apart on the provider cpu alone, and providers has no cpu"
    if config.torch is not None and not {"cpu", "cuda"} & set(config.providers):
        found["torch"] = "PyTorch is timed where providers has cpu or cuda"
    for name, scenario in (("offline_batch", "offline"), ("server_p99_ms", "server"), ("server_seconds", "server")):
        if scenario not in config.scenarios:
            found[name] = f"scenarios has no {scenario}"
    return found


def preflight(seen: Preflight) -> None:
    """Refuse a provider that this onnxruntime does not have or that does not start, and more threads than cores."""
    from .checkup import require_running

    require_running(seen.config.providers, seen.config.threads, (seen.at("providers"), seen.at("threads")))


STAGE = Stage(
    name="benchmark",
    version=8,
    config=BenchmarkConfig,
    run=run,
    reads=(Reads("files", "onnx", many=True),),
    writes="measurement",
    manual=__doc__,
    packages=("onnxruntime", "numpy", "torch"),
    uses=frozenset({"data", "device", "host", "seed"}),
    across_arms=True,
    references=_references,
    idle=idle,
    preflight=preflight,
)
