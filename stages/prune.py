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

Repair       ridge    what the removed MLP units and values of heads said is predicted from the kept ones, by ridge
                      regression on the calibration images (no labels), and folded into the layer that reads them
Without a train before it, it cuts the pretrained network of the model block: with repair and finetune: null a smaller
network in minutes. The classes must then be those of the weights, in their order.

reads    model (optional: else model.pretrained or model.weights); tickets (optional: their examples are the
         calibration images)
writes   model.safetensors, architecture.json, preprocessing.json, plan.json (the kept indices)
fails    when nothing was cut, or when the axes that are on cannot reach the target (it says how far they reach)

    sievit prune pipeline.yaml --set prune.target.macs=0.4
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage, Task

from .vision.loss_settings import HANDED_ON
from .vision.recipe import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from .methods.allocation import Kept, Pressure, Scores
    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.dataset import Splits
    from .vision.network import Network
    from .vision.preprocessing import Normaliser, Preprocessing


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
    from .vision.repair import ridge
    from .vision.surgery import cut, kept_architecture, score
    from .vision.trained_importance import judged
    from .vision.weights import save_network

    config: PruneConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    network, preprocessing = _given(ctx, splits)
    network, normalise, before = network.to(device), preprocessing.normaliser(device), network.architecture

    calibration = _Calibration(ctx, splits, normalise, device)
    if config.importance == "taylor":
        calibration.gradients(network)
    elif config.importance == "hessian":
        calibration.squared_gradients(network)
    with ctx.progress.task("scoring and cutting", 2) as task:
        if config.importance == "trained":
            artifact = ctx.inputs["model"]
            scores = score(judged(network, artifact.root, f"model {artifact.ref}"), "taylor", ctx.seed)
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
        _refuse_nothing(before, kept_architecture(before, kept))
        network.zero_grad()
        task.advance()
    whole = network
    if config.repair == "ridge":
        with ctx.progress.task("repair", calibration.images) as task:
            whole, ctx.metrics["repair"] = ridge(network, kept, calibration.batches(task), config.ridge)
    smaller = cut(whole, kept)

    after = smaller.architecture
    save_network(smaller, ctx.out)
    preprocessing.save(ctx.out)
    _save_plan(ctx, kept)
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
        "top1_before_cut": top1(network, splits.test, normalise, device),
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


def idle(seen: Preflight) -> dict[str, str]:
    """Settings without effect."""
    found = {}
    if seen.config.repair is None:
        found["ridge"] = "repair is null"
        if seen.config.importance in ("l1", "trained", "random"):
            why = f"importance {seen.config.importance} looks at no images, and repair is null"
            found |= dict.fromkeys(("images", "batch_size", "calibration"), why)
    return found


def preflight(seen: Preflight) -> None:
    """Refuse a network that would be cut untrained, one without the importance that is asked for, and, as far as it is
    known, blocks that it does not have.
    """
    from .methods import InvalidInput
    from .vision.architecture import load_architecture
    from .vision.network import outline
    from .vision.trained_importance import check_handed_on

    made = seen.reads.get("model")
    alone = made is None and "model" not in seen.inputs
    if alone and seen.config.importance == "trained":
        raise InvalidInput(
            f"{seen.at('importance')}: trained is what a training hands on, and no stage before it trains",
            "put a train before it, or use taylor, hessian, l1 or random",
            field=seen.at("importance"),
        )
    if alone and not (seen.model.pretrained or seen.model.weights is not None):
        raise InvalidInput(
            f"{seen.at('target')}: no stage before it writes a model, and the one of the model block is untrained",
            "put train before it, or name weights: model.pretrained or model.weights",
            field=seen.at("target"),
        )
    if "model" in seen.inputs:
        given = seen.inputs["model"]
        architecture = load_architecture(given.root / "architecture.json")
        if seen.config.importance == "trained":
            try:
                check_handed_on(given.root, f"model {given.ref}")
            except InvalidInput as error:
                error.field = seen.at("importance")
                raise
    elif made is None or not {"model", "start"} & {*made.reads, *made.inputs}:  # what was cut before may lack blocks
        architecture = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    else:
        return
    _check_blocks(seen.config, len(architecture.blocks), seen.at)


def _given(ctx: Context, splits: Splits) -> tuple[Network, Preprocessing]:
    """The model that it reads, else the pretrained one of the model block as it is."""
    from .vision.model_block import begin
    from .vision.preprocessing import check, load
    from .vision.weights import load_network

    classes = splits.train.classes
    if "model" in ctx.inputs:
        source = ctx.inputs["model"].root
        network, preprocessing = load_network(source), load(source)
        check(preprocessing, classes, ctx.data.image_size, f"model {ctx.inputs['model'].ref}")
        return network, preprocessing
    network, preprocessing = begin(ctx.model, ctx.data, classes, ctx.base, trained_head=True)
    return network.eval(), preprocessing


class _Calibration:
    """The images that gradients and repair see: of the ticket's examples or of the training split, the same share of
    every class, in eval mode and without augmentation.
    """

    def __init__(self, ctx: Context, splits: Splits, normalise: Normaliser, device: torch.device) -> None:
        import numpy as np

        from .vision import tickets
        from .vision.dataset import SPLIT_SEED, at_most

        self.ctx, self.normalise, self.device = ctx, normalise, device
        loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None
        tickets.check(loaded, splits, None, 0.0)
        chosen = None if ctx.config.calibration == "split" else loaded
        members = np.arange(len(splits.train)) if chosen is None else chosen.kept
        members = at_most(splits.train.labels, members, ctx.config.images, np.random.default_rng(SPLIT_SEED))
        self.pixels, self.labels = splits.train.pixels(members), splits.train.labels[members]
        self.images = len(members)

    def batches(self, task: Task, size: int | None = None) -> Iterator[torch.Tensor]:
        """Normalised images (B, 3, S, S), the task advanced by each batch once it is used."""
        import numpy as np
        import torch

        size = size or self.ctx.config.batch_size
        for start in range(0, self.images, size):
            part = np.ascontiguousarray(self.pixels[start : start + size])
            yield self.normalise(torch.from_numpy(part).to(self.device).permute(0, 3, 1, 2).float().div_(255.0))
            task.advance(len(part))

    def gradients(self, network: Network, size: int | None = None, each: Callable[[], None] = lambda: None) -> None:
        """dL/dw of the plain cross-entropy, summed over the images. each: called after every batch of `size`."""
        import torch

        network.eval()
        seen = 0
        with self.ctx.progress.task("gradients", self.images) as task:
            for views in self.batches(task, size):
                target = torch.from_numpy(self.labels[seen : seen + len(views)]).to(self.device)
                torch.nn.functional.cross_entropy(network(views), target, reduction="sum").backward()
                seen += len(views)
                each()

    def squared_gradients(self, network: Network) -> None:
        """In the place of the gradients the mean over the images of each one's squared gradient."""
        squares = {parameter: parameter.detach().new_zeros(parameter.shape) for parameter in network.parameters()}

        def square() -> None:
            for parameter, total in squares.items():
                if parameter.grad is not None:
                    total.addcmul_(parameter.grad, parameter.grad)
                    parameter.grad = None

        self.gradients(network, 1, square)
        for parameter, total in squares.items():
            parameter.grad = total / self.images


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
    reads=(Reads("model", "model", optional=True), Reads("tickets", "tickets", optional=True)),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "torch-pruning"),
    uses=frozenset({"data", "model", "seed", "device"}),
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
