"""Cut heads, widths inside heads, MLP units, embedding channels and whole blocks until a stated share of MACs or
parameters is left: of a ViT, a DeiT, an LV-ViT or a Swin.

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
Ranking is isomorphic (Fang et al., ECCV 2024): only groups of the same topology compete. One dial presses on all axes
and is bisected until the target is met; MLP and embedding widths are multiples of round_to, widths of heads of
head_round_to, what rounding left over goes back to the MLPs. The smaller network is rebuilt from its architecture
record and its weights are loaded strictly.

Cutting embedding channels changes what the LayerNorms see: expect low accuracy until `finetune`. Blocks are numbered
from 0 in order of execution, and the blocks that are left get new numbers: `finetune.tokens.blocks` means those.

reads    model; tickets (optional: their examples are the calibration images)
writes   model.safetensors, architecture.json, preprocessing.json, plan.json (the kept indices)
fails    when nothing was cut, or when the axes that are on cannot reach the target (it says how far they reach)

    sievit prune pipeline.yaml --set prune.target.macs=0.4
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .vision.loss_settings import HANDED_ON
from .vision.recipe import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

    from .methods.allocation import Kept, Pressure, Scores
    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.dataset import Splits
    from .vision.network import Network
    from .vision.preprocessing import Preprocessing


class Target(Settings):
    """What must be left, as a fraction of the network before the cut. Exactly one."""

    macs: float | None = Field(None, gt=0, lt=1, description="fraction of the multiply-accumulates kept")
    params: float | None = Field(None, gt=0, lt=1, description="fraction of the parameters kept")

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.macs is None) == (self.params is None):
            raise ValueError("give exactly one of macs and params")
        return self


class Press(Settings):
    """How hard an axis is pressed, and in which blocks."""

    press: float = Field(ge=0, le=1, description="relative to the other axes; 0 leaves the axis alone")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="the only blocks that it is about, numbered from 0; null: all"
    )
    spare: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="blocks that it leaves alone")

    @model_validator(mode="after")
    def _one_list(self) -> Press:
        if self.blocks is not None and self.spare:
            raise ValueError("spare: contradicts blocks, which names the only ones; give one of the two")
        return self


Pressed = Annotated[float, Field(ge=0, le=1)] | Press


class Axes(Settings):
    """How hard each axis is pressed, relative to the others: 0 leaves it alone; or {press: 1.0, blocks: [0, 1]}."""

    heads: Pressed = Field(1.0, description="whole attention heads")
    qk: Pressed = Field(0.5, description="width of queries and keys inside heads")
    v: Pressed = Field(0.5, description="width of values inside heads")
    mlp: Pressed = Field(1.0, description="hidden units of the MLPs")
    embed: float = Field(0.5, ge=0, le=1, description="embedding channels, through the whole network")
    depth: Pressed = Field(0.0, description="whole blocks; at equal MACs they save more time than widths do")

    def named(self) -> dict[str, Press]:
        """Every axis in the long form."""
        return {name: axis if isinstance(axis, Press) else Press(press=axis) for name, axis in self}


class PruneConfig(Config):
    """Settings of the prune stage."""

    importance: Literal["taylor", "hessian", "l1", "trained", "random"] = Field(
        "taylor", description="what decides which parts go first"
    )
    target: Target = Field(description="what must be left")
    axes: Axes = Field(Axes(), description="what may be cut, and how hard")
    round_to: int = Field(8, ge=1, le=256, description="MLP and embedding widths are multiples of this")
    head_round_to: int = Field(
        8, ge=1, le=256, description="widths of heads are multiples of this; odd widths are slow"
    )
    images: int = Field(512, ge=1, description="calibration images for the gradients (fewer if there are fewer)")
    batch_size: int = Field(64, ge=1, description="images a backward pass")

    @model_validator(mode="after")
    def _some_axis(self) -> PruneConfig:
        if not any(axis.press for axis in self.axes.named().values()):
            raise ValueError("axes: every axis is 0, so nothing could be cut")
        return self


def run(ctx: Context) -> None:
    """Gradients, scores, allocation, cut, then what was asked and what was reached."""
    from .methods.allocation import allocate
    from .vision import figures
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.preprocessing import check, load
    from .vision.surgery import cut, kept_architecture, score
    from .vision.trained_importance import judged
    from .vision.weights import load_network, save_network

    config: PruneConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    source = ctx.inputs["model"].root
    network, preprocessing = load_network(source).to(device), load(source)
    check(preprocessing, splits.train.classes, ctx.data.image_size, f"model {ctx.inputs['model'].ref}")
    before = network.architecture

    if config.importance in ("taylor", "hessian"):
        _accumulate_gradients(ctx, network, splits, preprocessing, device)
    with ctx.progress.task("scoring and cutting", 2) as task:
        if config.importance == "trained":
            scores = score(judged(network, source, f"model {ctx.inputs['model'].ref}"), "taylor", ctx.seed)
        else:
            scores = score(network, config.importance, ctx.seed)
        task.advance()
        axes = _pressure(ctx, before)
        cost, full = _cost(config, before)
        asked = config.target.macs or config.target.params or 0.0
        rounding = {"round_to": config.round_to, "head_round_to": config.head_round_to}
        kept = allocate(scores, lambda k: cost(kept_architecture(before, k)), asked * full, axes, **rounding)
        if kept is None:
            raise _unreachable(ctx, scores, axes, before, rounding)
        smaller = cut(network, kept)
        task.advance()

    after = smaller.architecture
    _refuse_nothing(before, after)
    save_network(smaller, ctx.out)
    preprocessing.save(ctx.out)
    _save_plan(ctx, kept)
    normalise = preprocessing.normaliser(device)
    parameters = {"before": network.parameter_count(), "after": smaller.parameter_count()}
    ctx.metrics |= {
        "importance": config.importance,
        "asked": config.target.model_dump(exclude_none=True),
        "reached": {"macs": after.macs() / before.macs(), "params": parameters["after"] / parameters["before"]},
        "before": {"macs": before.macs(), "parameters": parameters["before"]},
        "after": {"macs": after.macs(), "parameters": parameters["after"]},
        "widths": {
            "before": _widths(before),
            "after": _widths(after, kept),
            "embed": [list(before.streams), list(after.streams)],
        },
        "top1_before_recovery": top1(smaller.to(device), splits.test, normalise, device),
    }
    kind, share = next(iter(ctx.metrics["asked"].items()))
    ctx.progress.note(f"asked for {share:.1%} of the {kind}, reached {ctx.metrics['reached'][kind]:.1%}")
    ctx.figure(
        "widths",
        figures.widths(_widths(before), _widths(after, kept)),
        title="Widths by block",
        caption=f"Embedding width {_in_words(before.streams)} before, {_in_words(after.streams)} after.",
    )


def _pressure(ctx: Context, architecture: Architecture | SwinArchitecture) -> Pressure:
    """The axes with the blocks that they are about. Raises: InvalidInput for a block that the network does not have."""
    from .methods.allocation import Axis, Pressure

    depth = len(architecture.blocks)
    _check_blocks(ctx.config, depth)
    axes = {}
    for name, axis in ctx.config.axes.named().items():
        about = range(depth) if axis.blocks is None else axis.blocks
        axes[name] = Axis(axis.press, None if name == "embed" else frozenset(about) - frozenset(axis.spare))
    return Pressure(**axes)


def _check_blocks(config: PruneConfig, depth: int, at: Callable[[str], str] = str) -> None:
    from .methods import InvalidInput

    for name, axis in config.axes.named().items():
        for field, blocks in (("blocks", axis.blocks or ()), ("spare", axis.spare)):
            if blocks and max(blocks) >= depth:
                raise InvalidInput(
                    f"prune.axes.{name}.{field}: {list(blocks)} for a network of {depth} blocks",
                    f"use numbers from 0 to {depth - 1}",
                    field=at(f"axes.{name}.{field}"),
                )


def coherent(seen: Preflight) -> None:
    """Refuse to rank by what the stage before it does not hand on."""
    from .methods import InvalidInput

    made = seen.reads.get("model")
    if seen.config.importance != "trained" or made is None:
        return
    penalty = getattr(made.config, "weights", None)
    if penalty is None or penalty.method not in HANDED_ON:
        raise InvalidInput(
            f"{seen.at('importance')}: trained is what a training hands on, and {made.entry} hands none on",
            f"read a train with weights: {{method: {HANDED_ON[0]}}} ({', '.join(HANDED_ON[1:])}), or use taylor, l1 or "
            "random",
            field=seen.at("importance"),
        )


def preflight(seen: Preflight) -> None:
    """Refuse blocks that the network does not have, as far as it is known, and one without the importance asked for."""
    from .methods import InvalidInput
    from .vision.architecture import load_architecture
    from .vision.network import outline
    from .vision.trained_importance import check_handed_on

    if "model" in seen.inputs:
        given = seen.inputs["model"]
        architecture = load_architecture(given.root / "architecture.json")
        if seen.config.importance == "trained":
            try:
                check_handed_on(given.root, f"model {given.ref}")
            except InvalidInput as error:
                error.field = seen.at("importance")
                raise
    elif seen.reads["model"].reads.get("model") is None:  # a train: another prune before it may remove blocks
        architecture = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    else:
        return
    _check_blocks(seen.config, len(architecture.blocks), seen.at)


def _accumulate_gradients(
    ctx: Context, network: Network, splits: Splits, preprocessing: Preprocessing, device: torch.device
) -> None:
    """dL/dw of the plain cross-entropy, summed over the calibration images: eval mode, no augmentation."""
    import numpy as np
    import torch

    config: PruneConfig = ctx.config
    pixels, labels = _calibration(ctx, splits)
    normalise = preprocessing.normaliser(device)
    network.eval()
    with ctx.progress.task("gradients", len(labels)) as task:
        for start in range(0, len(labels), config.batch_size):
            part = slice(start, start + config.batch_size)
            views = (
                torch.from_numpy(np.ascontiguousarray(pixels[part])).to(device).permute(0, 3, 1, 2).float().div_(255.0)
            )
            answers = network(normalise(views))
            target = torch.from_numpy(labels[part]).to(device)
            torch.nn.functional.cross_entropy(answers, target, reduction="sum").backward()
            task.advance(len(target))


def _calibration(ctx: Context, splits: Splits) -> tuple[np.ndarray, np.ndarray]:
    """Images for the gradients: of the ticket's examples, else of the training split; the same share of every class."""
    import numpy as np

    from .vision import tickets
    from .vision.dataset import SPLIT_SEED, at_most

    loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None
    tickets.check(loaded, splits, None, 0.0)
    members = np.arange(len(splits.train)) if loaded is None else loaded.kept
    members = at_most(splits.train.labels, members, ctx.config.images, np.random.default_rng(SPLIT_SEED))
    return splits.train.pixels(members), splits.train.labels[members]


def _cost(
    config: PruneConfig, dense: Architecture | SwinArchitecture
) -> tuple[Callable[[Architecture | SwinArchitecture], float], float]:
    """The cost function of the target, and its value for the dense network."""
    from .vision.network import rebuild

    if config.target.macs is not None:
        return (lambda a: float(a.macs())), float(dense.macs())

    def parameters(architecture: Architecture | SwinArchitecture) -> float:
        return float(rebuild(architecture, device="meta").parameter_count())

    return parameters, parameters(dense)


def _unreachable(
    ctx: Context,
    scores: Scores,
    axes: Pressure,
    before: Architecture | SwinArchitecture,
    rounding: dict[str, int],
) -> Exception:
    from .methods import InvalidInput
    from .methods.allocation import at_dial
    from .vision.surgery import kept_architecture

    cost, full = _cost(ctx.config, before)
    least = cost(kept_architecture(before, at_dial(scores, 1.0, axes, **rounding))) / full
    kind = "macs" if ctx.config.target.macs is not None else "params"
    return InvalidInput(
        f"target {kind}: the axes that are on can go down to {least:.1%} of the {kind}, not further",
        "raise the target, press harder on an axis (prune.axes), or lower round_to",
    )


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


def _save_plan(ctx: Context, kept: Kept) -> None:
    """The kept indices, for a reader who wants to check the cut against the masked network; null: a block is gone."""
    blocks = [
        None
        if b is None
        else {"heads": b.heads.tolist(), "qk": b.qk.tolist(), "v": b.v.tolist(), "mlp": b.mlp.tolist()}
        for b in kept.blocks
    ]
    embed = [channels.tolist() for channels in kept.embed]
    text = json.dumps({"schema": 2, "embed": embed, "blocks": blocks}, sort_keys=True)
    (ctx.out / "plan.json").write_text(text + "\n", encoding="utf-8")


STAGE = Stage(
    name="prune",
    version=4,
    config=PruneConfig,
    run=run,
    reads=(Reads("model", "model"), Reads("tickets", "tickets", optional=True)),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "torch-pruning"),
    uses=frozenset({"data", "seed", "device"}),
    coherent=coherent,
    preflight=preflight,
)
