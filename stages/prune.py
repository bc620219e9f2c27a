"""Cut heads, widths inside heads, MLP units, embedding channels and whole blocks until a stated target is met: of a
ViT, a DeiT, an LV-ViT or a Swin.

Target       macs, params   the fraction that is left, counted
             size_mb        of the FP32 file, exported to see
             latency_ms, speedup   of the FP32 file on a provider, batch and threads: candidates are exported, with
                            random weights, and timed in ONNX Runtime beside the dense network's file, interleaved

             target: {speedup: 2.0, on: {provider: cpu, batch: 1, threads: 1}}

A timed target is met when the measurement lies within 5% on the right side of it (size_mb: 2%); the key then has the
host in it. Before the search it says how far each axis goes by itself.

Axes         heads    whole attention heads, in a Swin with their position biases
             qk, v    the width of queries and keys, and that of values, inside the heads
             mlp      hidden units of the MLPs
             embed    embedding channels, through the whole network; in a Swin those of every stage
             depth    whole blocks, never the last of a Swin's stage, nor one that drops tokens
Each takes a number, how hard it is pressed relative to the others (0 leaves it alone), or with it the blocks that it is
about:  axes: {mlp: 1.0, heads: {press: 0.5, blocks: [0, 1, 2]}, depth: {press: 1.0, spare: [0, 11]}}

Importance   taylor   |w * dL/dw| summed over everything that goes together, gradients from fixed calibration images
             in eval mode
             hessian  w^2 * (dL/dw)^2 likewise, a backward pass for every image
             l1       |w| likewise, no images needed
             trained  what the training before it handed on, no images needed: norms of heads and MLP units after
                      train.weights group_lasso or hoyer, movement scores after movement
             random   uniform, the control
Allocation   uniform  isomorphic ranking (Fang et al., ECCV 2024): only groups of the same topology compete; one dial
                      presses on all axes
             latency  again and again what loses least importance for each millisecond that it saves on target.on,
                      by a table of this network's blocks on this host; whole blocks are weighed like the rest
             sensitivity  likewise what raises the calibration loss least, as far as that was measured: every axis of
                      every block is cut alone (sievit sensitivity), and losses between the measured fractions are
                      interpolated. Saved are milliseconds by that table where the target is timed on the CPU, else
                      MACs. No axis is cut further than its smallest measured fraction; prune.sensitivity says how
                      finely and for how long is measured, and what that does not reach is refused
MLP and embedding widths are multiples of round_to, widths of heads of head_round_to; where time is measured, by default
of what this host's runtime rewards. What rounding left over goes back to the MLPs. The smaller network is rebuilt from
its architecture record and its weights are loaded strictly.

Cutting embedding channels changes what the LayerNorms see: expect low accuracy until `finetune`. Blocks are numbered
from 0 in order of execution, and the blocks that are left get new numbers: `finetune.tokens.blocks` means those.

Rounds       {count: 3, recover: {epochs: 2}}: several cuts, each by scores of its own and the same ratio nearer to the
             target, with a short training between them, in which labels and the network as it was given teach; the
             last cut alone is measured, and `finetune` recovers from it
Repair       ridge    what the removed MLP units and values of heads said is predicted from the kept ones, by ridge
                      regression on the calibration images (no labels), and folded into the layer that reads them
Without a train before it, it cuts the pretrained network of the model block: with repair and finetune: null a smaller
network in minutes. The classes must then be those of the weights, in their order.

reads    model (optional: else model.pretrained or model.weights); tickets (optional: their examples are the
         calibration images)
writes   model.safetensors, architecture.json, preprocessing.json, plan.json (the kept indices)
ledger   with rounds what their trainings took, as train
fails    when nothing was cut, or when the axes that are on cannot reach the target (it says how far each reaches)

    sievit prune pipeline.yaml --set prune.target.macs=0.4
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .axes import Axes, Press, check_blocks
from .importances import WITHOUT_IMAGES, Importance, Judging, check_given
from .rounds import Rounds
from .sensitivity import Effort
from .targets import Target, check_serving
from .vision.loss_settings import HANDED_ON

if TYPE_CHECKING:
    from .latencies import Table
    from .methods.allocation import Kept
    from .proposals import Outlook, Rule
    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.network import Network

    Record = Architecture | SwinArchitecture


class PruneConfig(Config):
    """Settings of the prune stage."""

    importance: Importance = Field("taylor", description="what decides which parts go first")
    target: Target = Field(description="what must be left")
    axes: Axes = Field(default_factory=Axes, description="what may be cut, and how hard")
    allocation: Literal["uniform", "latency", "sensitivity"] = Field(
        "uniform",
        description="uniform: the same share of every axis, by rank; latency: least importance lost for each "
        "millisecond saved on target.on; sensitivity: least rise of the calibration loss, as it was measured, for each "
        "millisecond where the target is timed, else for each MAC",
    )
    sensitivity: Effort = Field(
        default_factory=Effort, description="how finely and for how long allocation sensitivity measures"
    )
    round_to: int | None = Field(
        None,
        ge=1,
        le=256,
        description="MLP and embedding widths are multiples of this; null: what the host's runtime rewards where it "
        "is timed, else 8",
    )
    head_round_to: int | None = Field(
        None, ge=1, le=256, description="widths of heads are multiples of this, null likewise; odd widths are slow"
    )
    rounds: Rounds | None = Field(None, description="several cuts with a training between them; null: one cut")
    repair: Literal["ridge"] | None = Field(
        None, description="ridge: kept MLP units and values make up for removed ones, in closed form; null: no repair"
    )
    ridge: float = Field(
        1e-3,
        gt=0,
        le=1,
        description="strength of the repair's ridge, as a fraction of the mean variance of what is kept",
    )
    images: int = Field(512, ge=1, description="calibration images of gradients and repair (fewer if there are fewer)")
    calibration: Literal["ticket", "split"] = Field(
        "ticket",
        description="where they are from, the same share of every class. ticket: examples that the ticket keeps, "
        "without a ticket as split; split: the training split",
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="images a pass; importance hessian passes them back one by one",
    )

    @model_validator(mode="after")
    def _some_axis(self) -> PruneConfig:
        if not any(axis.press for axis in self.pressed().values()):
            raise ValueError("axes: every axis is 0, so nothing could be cut")
        return self

    @model_validator(mode="after")
    def _profiled(self) -> PruneConfig:
        provider = self.target.serving.provider
        if self.allocation == "latency" and provider != "cpu":
            raise ValueError(
                f"allocation: latency weighs operators, which only the provider cpu times, and target.on names "
                f"{provider}; use allocation: uniform, whose result is timed on {provider} as a whole"
            )
        return self

    def pressed(self) -> dict[str, Press]:
        """The axes in the long form."""
        return self.axes.named(0.0 if self.allocation == "uniform" else 1.0)

    @property
    def timed(self) -> bool:
        """Whether the result hangs on the host."""
        return self.target.timed or self.allocation == "latency"

    @property
    def judging(self) -> Judging:
        """What the scores depend on."""
        return Judging(**{name: getattr(self, name) for name in Judging.model_fields})

    @property
    def deepest(self) -> float:
        """The share of an axis that may go, whole blocks apart."""
        return 1 - min(self.sensitivity.fractions) if self.allocation == "sensitivity" else 1.0


def run(ctx: Context) -> None:
    """Gradients, scores, allocation, cut, in rounds where they are asked for; what was asked and what was reached."""
    from . import targets
    from .candidates import Files
    from .importances import given
    from .methods.allocation import compose
    from .proposals import look, rule_of
    from .rounds import Approach, approach
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.surgery import kept_architecture
    from .vision.weights import save_network

    config: PruneConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    network, preprocessing = given(ctx, splits)
    network, normalise, before = network.to(device), preprocessing.normaliser(device), network.architecture

    rule = rule_of(ctx, before)
    first = look(ctx, rule, network, None, splits, normalise, device)
    time = rule.table.ms if rule.table else None
    reach = targets.reach(first.scores, first.axes, before, time, rule.rounding, config.deepest)
    ctx.progress.note(f"as far as each axis goes by itself, of the MACs: {targets.summary(reach)}")
    refused = partial(targets.unreachable, config.target, reach, config.deepest)
    files = Files(ctx, before, config.target.serving)

    def outlook(current: Network, so_far: Kept | None) -> Outlook:
        return first if so_far is None else look(ctx, rule, current, so_far, splits, normalise, device)

    def partly(current: Network, so_far: Kept | None, along: float) -> tuple[Network, Kept]:
        seen = outlook(current, so_far)
        kept = seen.propose(*targets.part_way(config.target, before, files, rule.estimate, along))
        if kept is None:
            raise refused()
        return _smaller(ctx, current, kept, seen), kept

    reached = Approach(network)
    if config.rounds is not None:
        reached = approach(ctx, config.rounds, network, preprocessing, splits, device, partly)
        ctx.metrics["rounds"] = reached.told
        ctx.ledger |= reached.ledger()
    current = reached.network
    last = outlook(current, reached.kept)
    found = targets.search(
        config.target,
        last.propose,
        lambda kept: kept_architecture(current.architecture, kept),
        before,
        files,
        rule.estimate,
        refused,
    )
    kept = found.kept if reached.kept is None else compose(reached.kept, found.kept)
    _refuse_nothing(before, kept_architecture(before, kept))
    smaller = _smaller(ctx, current, found.kept, last)

    after = smaller.architecture
    save_network(smaller, ctx.out)
    preprocessing.save(ctx.out)
    # The kept indices, for a reader who wants to check the cut against the masked network.
    plan = json.dumps({"schema": 2} | kept.as_json(), sort_keys=True)
    (ctx.out / "plan.json").write_text(plan + "\n", encoding="utf-8")
    parameters = {"before": network.parameter_count(), "after": smaller.parameter_count()}
    ctx.metrics |= {
        "importance": config.importance,
        "asked": {config.target.kind: config.target.asked},
        "reached": {
            "macs": after.macs() / before.macs(),
            "params": parameters["after"] / parameters["before"],
            config.target.kind: found.reached,
        },
        "allocation": config.allocation,
        "multiples": rule.rounding,
        "feasible": [asdict(row) for row in reach],
        "candidates": found.trials,
        "before": {"macs": before.macs(), "parameters": parameters["before"]},
        "after": {"macs": after.macs(), "parameters": parameters["after"]},
        "widths": {
            "before": _widths(before),
            "after": _widths(after, kept),
            "embed": [list(before.streams), list(after.streams)],
        },
        "top1_before_cut": top1(network, splits.test, normalise, device),
        "top1_before_recovery": top1(smaller.to(device), splits.test, normalise, device),
    }
    ctx.progress.note(targets.in_words(config.target, found.reached))
    _show(ctx, rule, before, after, kept)


def _smaller(ctx: Context, network: Network, kept: Kept, seen: Outlook) -> Network:
    """Repaired where that is asked for, and cut."""
    from .vision.repair import ridge
    from .vision.surgery import cut

    if ctx.config.repair is None:
        return cut(network, kept)
    with ctx.progress.task("repair", seen.calibration.images) as task:
        views = seen.calibration.batches(task.advance)
        whole, ctx.metrics["repair"] = ridge(network, kept, views, ctx.config.ridge)
    return cut(whole, kept)


def _show(ctx: Context, rule: Rule, before: Record, after: Record, kept: Kept) -> None:
    """The widths, and where time counts the milliseconds, before and after."""
    from .vision import figures

    ctx.figure(
        "widths",
        figures.widths(_widths(before), _widths(after, kept)),
        title="Widths by block",
        caption=f"Embedding width {_in_words(before.streams)} before, {_in_words(after.streams)} after.",
    )
    if rule.table is not None:
        _show_budget(ctx, rule.table, before, after, kept)


def _show_budget(ctx: Context, table: Table, before: Record, after: Record, kept: Kept) -> None:
    """Where the milliseconds are, before and after."""
    from .vision import figures

    budget = {"before": table.budget(before), "after": table.budget(after)}
    for row, number in zip(budget["after"], kept.left, strict=True):
        row["block"] = number
    ctx.metrics["budget"] = budget | {"estimate_ms": [table.ms(before), table.ms(after)], "error": table.rates.error}
    serving = ctx.config.target.serving
    ctx.figure(
        "budget",
        figures.budget(budget["before"], budget["after"]),
        title="Milliseconds by block",
        caption=f"By the table of this host (batch {serving.batch}, threads {serving.threads}), whose rates are "
        f"{table.rates.error:.0%} off in the median; all else {table.outside_ms(before):.2g} ms before, "
        f"{table.outside_ms(after):.2g} ms after.",
    )


def coherent(seen: Preflight) -> None:
    """Refuse to rank by what the stage before it does not hand on, and rounds by what is known of the first network
    alone.
    """
    from .methods import InvalidInput

    config: PruneConfig = seen.config
    for name, what in (("importance", "trained"), ("allocation", "sensitivity")):
        if config.rounds is not None and getattr(config, name) == what:
            raise InvalidInput(
                f"{seen.at('rounds')}: {name} {what} tells of the network as it was given, and rounds change it",
                f"use another {name}, or leave rounds out",
                field=seen.at("rounds"),
            )
    made = seen.reads.get("model")
    if config.importance != "trained" or made is None:
        return
    penalty = getattr(made.config, "weights", None)
    if penalty is None or penalty.method not in HANDED_ON:
        raise InvalidInput(
            f"{seen.at('importance')}: trained is what a training hands on, and {made.entry} hands none on",
            f"read a train with weights: {{method: {HANDED_ON[0]}}} ({', '.join(HANDED_ON[1:])}), or use taylor, l1 or "
            "random",
            field=seen.at("importance"),
        )


def idle(seen: Preflight) -> dict[str, str]:
    """Settings without effect."""
    config: PruneConfig = seen.config
    found: dict[str, str] = {}
    if config.rounds is not None:
        found |= {f"rounds.recover.{name}": why for name, why in config.rounds.recover.idle().items()}
    target = config.target
    if seen.config.allocation != "sensitivity":
        found["sensitivity"] = f"allocation is {seen.config.allocation}"
    if not seen.config.timed:
        found["target.on"] = f"{target.kind} is counted, and allocation {seen.config.allocation} weighs no time"
    if seen.config.repair is None:
        found["ridge"] = "repair is null"
        if seen.config.importance in WITHOUT_IMAGES:
            why = f"importance {seen.config.importance} looks at no images, and repair is null"
            found |= dict.fromkeys(("images", "batch_size", "calibration"), why)
    return found


def preflight(seen: Preflight) -> None:
    """Refuse a device that is not there, a network that would be cut untrained, one without the importance that is
    asked for, a target that cannot be timed here, and, as far as it is known, blocks that the network does not have.
    """
    from .vision.architecture import load_architecture
    from .vision.device import check_device
    from .vision.forward import check_compiler
    from .vision.network import outline

    config: PruneConfig = seen.config
    check_device(seen.device)
    if config.timed:
        check_serving(config.target, seen.at)
    if config.rounds is not None and config.rounds.recover.compile:
        check_compiler(seen.device, seen.at("rounds.recover.compile"))
    made = seen.reads.get("model")
    check_given(seen, seen.config.importance, seen.at)
    if "model" in seen.inputs:
        architecture = load_architecture(seen.inputs["model"].root / "architecture.json")
    elif made is None or not {"model", "start"} & {*made.reads, *made.inputs}:  # what was cut before may lack blocks
        architecture = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    else:
        return
    check_blocks(config.pressed(), len(architecture.blocks), seen.at)


def _refuse_nothing(before: Architecture | SwinArchitecture, after: Architecture | SwinArchitecture) -> None:
    from .methods import InvalidInput

    if before == after:
        raise InvalidInput(
            "nothing was cut: rounding puts every width back where it was",
            "lower the target, or lower round_to and head_round_to",
        )


def _widths(architecture: Architecture | SwinArchitecture, kept: Kept | None = None) -> list[dict[str, int]]:
    """Of each block, under the numbers that the blocks had before anything was cut."""
    numbers = range(len(architecture.blocks)) if kept is None else kept.left
    return [
        {"block": number, "heads": b.heads, "qk": b.qk, "v": b.v, "mlp": b.mlp}
        for number, b in zip(numbers, architecture.blocks, strict=True)
    ]


def _in_words(widths: tuple[int, ...]) -> str:
    return ", ".join(map(str, widths))


STAGE = Stage(
    name="prune",
    version=7,
    config=PruneConfig,
    run=run,
    reads=(Reads("model", "model", optional=True), Reads("tickets", "tickets", optional=True)),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "torch-pruning"),
    uses=frozenset({"data", "model", "seed", "device"}),
    # What is counted costs nothing to reach: importance takes the time, and in rounds the trainings.
    costless=lambda config: () if config.rounds else ("target.macs", "target.params"),
    timed=lambda config: config.timed,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
