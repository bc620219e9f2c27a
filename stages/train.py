"""Train a network on the tickets: from random or pretrained weights, on the kept examples and the kept patches of each.

Optimiser, cosine schedule, warm-up, label smoothing, mixup, cutmix, RandAugment and the weight average are timm's.
The network embeds and attends to the kept patches only, so a step costs what its tokens cost. Which patches these are
is settled by the tickets: ranks that follow the image through crop and flip, a draw of each epoch, or a selector that
looks at every view.

`weights` adds a penalty to the loss. group_lasso and hoyer push whole heads and MLP units towards zero, the groups
that `prune` removes, and hand on what they found out (prune.importance: trained). So does movement: a group lasso that
presses least on heads and units that the labels' gradients made larger so far, by -sum of lr * w * dL/dw (Sanh et al.,
NeurIPS 2020), without a mask on them. l1 and l2 push the matrices of the blocks. attention_entropy makes rows of
attention peaked. attention_log is Sparse then Prune's (2023), published with strength 0.01 on the last block: it
flattens attention, and is too small to be seen; it is there to be measured against.

`masks` sets weights of the blocks' matrices to zero, and holds them there in the optimiser's moments and in the
average: by magnitude at once or in a cubic schedule (`random` is the control, as many weights of each tensor by lot),
by drop and grow from the first step (rigl, as SViTE for ViTs), or two of every four inputs (sr_ste). What is saved has
the zeros, and the metrics the density of every tensor. Dense hardware gains nothing from zeros, but for 2:4 on sparse
tensor cores; `finetune` trains all weights again unless its masks hold. Sparse then Prune is {method: magnitude,
schedule: one_shot, begin: 1.0, mode: paper}, and `also` measures further fractions on the same trained network.
essential tries falling levels on a pretrained network, trains each for a few steps, takes the last one before accuracy
on the calibration split falls by more than the tolerance, and cuts before the first step. soup joins weak masks of
short trainings on little data before the first step (Instant Soup Pruning, as in LOTUS); where magnitudes alone answer
better on the calibration split they are taken, and it says so. hold keeps the zeros that a network came with. nncf's
own pruning goes through the same interface: nncf_magnitude (each tensor's weights over its norm, so that the tensors
keep more alike fractions) and nncf_rb (a gate on every weight, learned; the density is pulled to `keep`, not set).

`start` begins with the network of another stage or artifact in place of the model block's weights: the same timm model,
whose widths may have been cut. What it was trained to do with tokens is left behind.

With `token_labels` an LV-ViT also learns what is in each patch (Jiang et al., NeurIPS 2021): a trained network labels
every patch of every view, labels are mixed with their views by the share that each patch has of its own image, and
follow the ticket's gather; the loss is CE(class token) + weight * mean CE(kept patches). The annotator's cost is in
the ledger.

A Swin cannot embed single patches. With `patches: zero` it sees the others blanked and pays the full price, which the
ledger states; with `mosaic` it sees the kept ones packed into a smaller image. Accuracy on tickets is measured so, too.

`examples` lets the examples come and go while training. swap: a fifth is out, and every so many epochs the examples
forgotten least are exchanged for some of them (Tri-Level E-ViT, AAAI 2023). infobatch: each pass drops a share of the
examples with a loss below the mean and lets the rest of these count for all of them (Qin et al., ICLR 2024). random: a
fresh random subset a pass, the control. An epoch is then a pass of the policy; schedules end with the last step taken.

`tokens` reduces the patch tokens inside the network at chosen blocks: those that get most attention stay (EViT, ICLR
2022; with `fuse` one more token stands for the others), or those with like keys are merged (tome: ToMe, ICLR 2023).
With `ramp` fewer and fewer stay, in a few levels; the last is written into architecture.json, measured and exported.
`attention` lets each patch token attend to those only that it attends to most (Tri-Level's second level). That is a
regulariser: dense hardware gains nothing from it and computes more; it ends where `finish` begins and is not exported.

A network trained on tickets alone answers badly on whole images, so the last `finish` of the steps see all patches.
Accuracy is reported for all patches, for tickets and for random patches of the same number. `finetune` ends on what is
deployed.

`precision` runs forward and backward in bf16 or fp16; weights, losses, penalties, average and optimiser stay fp32. On a
CPU without units for them both are slower. `accumulate` sends a step's images through in parts,
for less memory; the gradient is that of all of them. `compile` is torch.compile: it takes up to minutes for each level
of tokens and each batch size, once a run. `schedule` is the learning rate's shape, `layer_decay` slows the early blocks
of a pretrained network. `stop_early` ends a training that the calibration split sees no gain in and hands on the best
epoch; only epochs count that are like the last (whole images, last tokens, last masks).

`launch: {processes: N}` of pipeline.yaml shares every step's batch among N processes; the step stays that of one.

A loss or gradient that is not finite ends the training before it reaches a weight, with the step and the layer where it
began. fp16 alone leaves such a step out, lowers its scale and goes on; how often is in the metrics.

Arms are compared at equal cost, and `budget` says which: `epochs` over the kept examples, as many `steps` as these
epochs take with all examples, or as many `macs` as the dense network takes in them, with the choice of the ticket and
of its selector inside.

reads    tickets (optional: without them, all images and all patches); with token_labels the annotator; with start the
         network to begin with
writes   model.safetensors, architecture.json, preprocessing.json, training.json (the budget and what was spent);
         early/epoch-N.safetensors for every epoch in keep_epochs; with `examples` pool.json, what each decision dropped
         and brought back; with weights group_lasso, hoyer or movement importance.safetensors, a score for every weight
         of the blocks' matrices: what prune.importance: trained reads
ledger   images (forward and backward), tokens per image, epochs, steps, MACs, seconds, peak memory on a GPU; beside
         these the annotator's forward passes (teacher_macs), those of the selector of online tickets and the trial
         trainings that look for masks (scoring_macs; scoring_seconds is of the trials)

    sievit train pipeline.yaml --set train.epochs=40
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reached, Reads, Stage

from .vision.example_settings import ExamplePolicy, check_examples
from .vision.how_far import epochs
from .vision.loss_settings import Penalty, TokenLabels, check_losses
from .vision.mask_settings import MaskSettings, check_budget, check_masks, check_room, check_start, idle_masks
from .vision.patch_settings import check_cutmix
from .vision.recipe import (
    COSTLESS,
    Recipe,
    StopEarly,
    check_compile,
    check_processes,
    check_stop,
    looks_at_whole_tensors,
)
from .vision.token_settings import Connected, Tokens, check_connected

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .vision.annotator import Annotator
    from .vision.examples import Policy
    from .vision.mask_search import Found
    from .vision.network import Network
    from .vision.penalty import Penalty as Pressing
    from .vision.preprocessing import Preprocessing
    from .vision.token_schedule import TokenSchedule
    from .vision.training import Fitted
    from .vision.trials import Trials


class TrainConfig(Recipe, Config):
    """Settings of the train stage."""

    epochs: float | None = Field(None, gt=0, le=10_000, description="passes over the kept examples; this or steps")
    start: str | None = Field(
        None, description="the network to begin with: a stage of this pipeline, an artifact (train@7); null: model"
    )
    budget: Literal["epochs", "steps", "macs"] = Field(
        "epochs",
        description="what is equal among arms: epochs over the kept examples; steps, as many as all examples would "
        "take; macs of the dense network over all examples, choosing the ticket included",
    )
    examples: ExamplePolicy | None = Field(
        None, description="lets examples come and go while training; null: every pass sees all that the tickets kept"
    )
    tokens: Tokens | None = Field(None, description="token reduction in the network; null: all patches in all blocks")
    attention: Connected | None = Field(
        None, description="attention along the strongest connections, in training only; null: along all"
    )
    weights: Penalty | None = Field(None, description="a penalty on weights or attention; null for none")
    masks: MaskSettings | None = Field(None, description="which weights are kept; null: all")
    token_labels: TokenLabels | None = Field(None, description="labels for patches, LV-ViT only; null for none")
    patches: Literal["zero", "mosaic"] | None = Field(
        None,
        description="how a Swin takes patch tickets: zero blanks the other patches and saves nothing, mosaic packs the "
        "kept ones into a smaller square image; null for a ViT, which embeds the kept ones only",
    )
    finish: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the steps, at the end, on all patches: a network trained on tickets alone answers badly "
        "on whole images, and teaches as badly",
    )
    stop_early: StopEarly | None = Field(
        None,
        description="ends training when the calibration split shows no gain, and keeps the best epoch; null: all "
        "epochs, and the last is kept",
    )
    keep_epochs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="epochs after which a copy of the raw weights is kept, for rewinding"
    )

    @model_validator(mode="after")
    def _epochs_that_come(self) -> TrainConfig:
        if self.epochs is not None and self.keep_epochs and max(self.keep_epochs) > self.epochs:
            raise ValueError(
                f"keep_epochs: names epoch {max(self.keep_epochs)}, and training ends after {self.epochs:g}; "
                "name epochs from 1 to the last"
            )
        check_examples(self.examples, self.epochs, self.budget, self.stop_early)
        if self.steps is not None and self.budget != "macs":
            check_masks(self.masks, self.steps)
        check_budget(self.masks, self.budget)
        if self.start is not None and self.start.startswith("timm:"):
            raise ValueError("start: names a stage or an artifact; a timm model is named in the model block")
        check_connected(self.attention, self.tokens)
        check_stop(self.stop_early, self.epochs, self.budget, self.keep_epochs)
        check_compile(self, self._looks)
        check_losses(self.weights, self.token_labels, self.tokens, self.attention)
        return self

    @property
    def _looks(self) -> str | None:
        """What looks into the forward while training, with its setting."""
        if self.examples is not None and self.examples.policy != "random":
            return f"examples.policy: {self.examples.policy}"
        if self.weights is not None and self.weights.of_attention:
            return f"weights.method: {self.weights.method}"
        return None


def run(ctx: Context) -> None:
    """Data and tickets, network, masks, training, then accuracy under every token policy."""
    import torch

    from .vision import budget, examples, mask_search, objective, penalty, tickets, token_schedule
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.trials import Trials

    config: TrainConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    classes = splits.train.classes
    loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None

    torch.manual_seed(ctx.seed)
    network, preprocessing = _beginning(ctx, classes)
    network = tickets.adapt(network, loaded, config.patches)
    tickets.check(loaded, splits, network.ticket_grid, config.cutmix)
    normalise = preprocessing.normaliser(device)
    pool = tickets.pool(splits.train, loaded, tickets.policy(loaded, seed=ctx.seed, device=device))
    labels = _annotator(ctx, network, classes, device)
    policy = examples.create(config.examples, pool.members, config.epochs, ctx.seed)
    schedule = token_schedule.create(network.architecture, config.tokens, config.attention, finish=config.finish)

    prices = budget.prices(network, pool, 0 if labels is None else labels.macs)
    phases = token_schedule.phases(network, schedule, pool.entering, config.finish)
    chosen = 0 if loaded is None else loaded.scoring_macs
    arm = prices.arm(phases, kept=policy.size, examples=len(splits.train), scoring=chosen)
    recipe = budget.recipe_for(config, config.budget, arm)
    budget.check_reached(recipe, policy.size, config.keep_epochs, config.examples, config.masks)

    def judge(current: Network) -> float:
        return top1(current, splits.calibration, normalise, device)

    loss = objective.create(config.token_labels, each=config.examples is not None)
    trials = Trials(pool, recipe, ctx.seed, device, normalise, loss, labels, judge, ctx.progress)
    found = mask_search.find(config.masks, network, trials)
    pressing = None if config.weights is None else penalty.create(config.weights.method, config.weights.strength)
    fitted = _fitted(ctx, trials, found, policy, schedule, pressing)
    rates = mask_search.cut_after(
        config.masks, fitted.network, ctx.seed, lambda current: top1(current, splits.test, normalise, device)
    )

    _save(ctx, fitted, preprocessing, policy, pressing, len(pool.members))
    selecting, trying = prices.selecting(fitted), prices.trying(found.images)
    annotating, before = prices.annotating(fitted.images), prices.annotating(found.images)
    beside, searching = annotating + selecting, before + trying
    spent = budget.spent(config, config.budget, arm, fitted, beside=beside, searching=searching)
    spent.save(ctx.out)
    ctx.metrics |= {
        "top1": tickets.accuracy(fitted.network, splits.test, loaded, normalise, device, seed=ctx.seed),
        "budget": asdict(spent),
        "policy": tickets.in_words(pool, config.patches, config.finish, fitted.network),
    }
    ctx.ledger |= {
        "budget": config.budget,
        "teacher_macs": annotating + before,
        "scoring_macs": selecting + trying,
        "scoring_seconds": round(found.seconds, 3),
    }
    if config.examples is not None:
        ctx.metrics["examples"] = examples.use(config.examples, len(pool.members), fitted.passes, fitted.images)
    _tell(ctx, fitted, found, rates, schedule, labels)


def _beginning(ctx: Context, classes: tuple[str, ...]) -> tuple[Network, Preprocessing]:
    """The network before the first step: that of the model block, or of `start`."""
    from .vision.model_block import begin, go_on

    start, drop_path = _named(ctx, "start"), ctx.config.drop_path
    if start is None:
        return begin(ctx.model, ctx.data, classes, ctx.base, drop_path=drop_path)
    return go_on(ctx.model, ctx.data, classes, *start, drop_path=drop_path)


def _named(given: Context | Preflight, role: str) -> tuple[Path, str] | None:
    """Folder and reference of the artifact in a role, where there is one."""
    return (given.inputs[role].root, given.inputs[role].ref) if role in given.inputs else None


def _annotator(ctx: Context, network: Network, classes: tuple[str, ...], device: torch.device) -> Annotator | None:
    """Who labels the patches, where somebody does."""
    from .vision import annotator

    settings, size, named = ctx.config.token_labels, ctx.data.image_size, _named(ctx, "annotator")
    labels = annotator.create(settings, network, classes, device, image_size=size, artifact=named)
    if labels is not None and labels.places == (1, 1):
        ctx.progress.warn(
            f"token_labels.source {settings.source} sees one place: all patches of a view are labelled alike"
        )
    return labels


def _fitted(
    ctx: Context,
    trials: Trials,
    found: Found,
    policy: Policy,
    schedule: TokenSchedule | None,
    penalty: Pressing | None,
) -> Fitted:
    """The training, after the trials and as they went about it."""
    from .vision.training import fit

    config: TrainConfig = ctx.config
    if found.said:
        ctx.progress.warn(found.said)
    with ctx.progress.task("training", trials.recipe.total_steps(policy.size)) as task:
        return fit(
            found.network,
            trials.pool,
            trials.recipe,
            seed=ctx.seed,
            device=trials.device,
            normalise=trials.normalise,
            finish=config.finish,
            policy=policy,
            tokens=schedule,
            objective=trials.objective,
            annotate=trials.annotate,
            penalty=penalty,
            masks=found.held,
            judge=trials.judge,
            keep_epochs=config.keep_epochs,
            stop=config.stop_early,
            checkpoint=ctx.work / "training.safetensors",
            tick=lambda n, values: task.advance(n, **values),
            sharding=ctx.sharding,
        )


def _save(
    ctx: Context, fitted: Fitted, preprocessing: Preprocessing, policy: Policy, penalty: Pressing | None, members: int
) -> None:
    """The network, and what its training leaves for later stages. members: examples that the policy chose among."""
    from .vision import examples, trained_importance
    from .vision.weights import save_early, save_network

    config: TrainConfig = ctx.config
    save_network(fitted.network, ctx.out)
    preprocessing.save(ctx.out)
    if penalty is not None and config.weights is not None and (scores := penalty.importance(fitted.network)):
        trained_importance.write(ctx.out, config.weights.method, scores)
    save_early(fitted.early, ctx.out)
    if config.examples is not None:
        record = examples.record(config.examples, policy, members)
        (ctx.out / "pool.json").write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")


def _tell(
    ctx: Context,
    fitted: Fitted,
    found: Found,
    rates: list[dict[str, float]],
    schedule: TokenSchedule | None,
    annotator: Annotator | None,
) -> None:
    """How the training went and what it made. rates: accuracy by the fraction of the weights kept after training."""
    from .vision import mask_figures, mask_search, reports

    config: TrainConfig = ctx.config
    network = fitted.network
    reports.tell(fitted, ctx.metrics, ctx.progress)
    ctx.metrics |= {
        "curve": fitted.curve,
        "parameters": network.parameter_count(),
        "macs": network.architecture.macs(),
    }
    if schedule is not None:
        ctx.metrics["tokens"] = schedule.record()
    if config.masks is not None:
        ctx.metrics["masks"] = mask_search.told(config.masks, found, network, rates)
    if config.token_labels is not None and annotator is not None:
        ctx.metrics["token_labels"] = config.token_labels.model_dump() | {"map": annotator.places}
    ctx.ledger |= reports.cost(fitted) | {"seconds": round(fitted.seconds, 3)}
    for picture in mask_figures.pictures(config.masks, ctx.metrics.get("masks", {})):
        ctx.figure(picture.name, picture.svg, title=picture.title, caption=picture.caption)


def coherent(seen: Preflight) -> None:
    """Refuse a batch that the processes cannot share, cutmix on patch tickets that know one image, a sweep on a network
    that knows nothing, and masks that would change once in the steps that there are at most.
    """
    config: TrainConfig = seen.config
    check_processes(config, seen.processes, seen.sharding, f"stages.{seen.entry}")
    for name in ("masks", "weights") if seen.processes > 1 and seen.sharding == "fsdp2" else ():
        if getattr(config, name) is not None:
            raise looks_at_whole_tensors(seen.at(name))
    trained = seen.model.pretrained or seen.model.weights is not None or config.start is not None
    check_start(config.masks, trained, seen.at("masks"))
    if (most := seen.data.max_train) is not None and config.budget != "macs":
        check_room(config.masks, config.total_steps(most), f"data.max_train {most} allows no more", seen.at("masks"))
    ticket = seen.reads.get("tickets")
    if ticket is not None and not ticket.config.whole:
        check_cutmix(config.cutmix, ticket.config.patches, seen.at("cutmix"))


def idle(seen: Preflight) -> dict[str, str]:
    """A schedule of cuts where there is one cut, votes that are not asked, and a floor of a learning rate that does not
    fall.
    """
    config: TrainConfig = seen.config
    return config.idle() | {f"masks.{name}": why for name, why in idle_masks(config.masks).items()}


def preflight(seen: Preflight) -> None:
    """Refuse images and a device that are not there, a network that cannot be built, patch tickets that it cannot
    take, and what asks of it a head for patches, a class token, attention among all tokens or widths that are multiples
    of four.
    """
    from .methods import InvalidInput
    from .vision import demands
    from .vision.architecture import Architecture
    from .vision.device import check_device
    from .vision.external import check_name
    from .vision.forward import check_compiler
    from .vision.model_block import outlined
    from .vision.sources import check_sources
    from .vision.tickets import ticket_use
    from .vision.token_schedule import create

    config: TrainConfig = seen.config
    check_device(seen.device)
    if config.compile:
        check_compiler(seen.device, seen.at("compile"))
    network = outlined(seen.model, seen.data.image_size, _named(seen, "start"), seen.at("start"))
    try:
        ticket_use(network, config.patches, None if isinstance(network, Architecture) else _ticket_shape(seen))
    except InvalidInput as error:
        error.field = seen.at("patches")
        raise
    try:
        create(network, config.tokens, config.attention)
        demands.check_heads(network, config.token_labels)
        demands.check_attention(network, config.weights)
        demands.check_fours(network, config.masks)
        demands.check_class_token(network, config.examples)
    except InvalidInput as error:
        error.field = seen.at(error.field)
        raise
    if config.token_labels is not None and config.token_labels.source.startswith("timm:"):
        check_name(config.token_labels.source, seen.at("token_labels.source"))
    check_sources(seen.data.model_dump(), seen.base)


def _ticket_shape(seen: Preflight) -> tuple[tuple[int, int], int] | None:
    """Grid of the tickets that a Swin will get and patches kept of an image, as far as they can be known before the
    ticket stage has run.
    """
    from .vision import tickets
    from .vision.architecture import Architecture, load_architecture
    from .vision.network import outline
    from .vision.selector import ticket_size

    if "tickets" in seen.inputs:
        return tickets.load(seen.inputs["tickets"].root).shape
    ticket = seen.reads.get("tickets")
    if ticket is None or ticket.config.whole:
        return None
    if "selector" in ticket.inputs:
        ranker = load_architecture(ticket.inputs["selector"].root / "architecture.json")
    elif ticket.config.selector.source is None and (model := ticket.config.proxy.model) is not None:
        ranker = outline(model.name, image_size=seen.data.image_size, args=model.args)
    else:
        return None
    if not isinstance(ranker, Architecture):
        return None  # refused by the ticket stage
    chosen, selector = ticket.config.patches, ticket.config.selector
    return ranker.grid, ticket_size(ranker, ranker, chosen.keep, selector.keep_per_stage, selector.blocks)


def _references(config: TrainConfig) -> dict[str, str]:
    named = {"start": config.start, "annotator": None if config.token_labels is None else config.token_labels.source}
    return {role: text for role, text in named.items() if text is not None}


def _reached(work: Path) -> Reached | None:
    found = epochs(work / "training.safetensors")
    return None if found is None else Reached(*found)


STAGE = Stage(
    name="train",
    version=13,
    config=TrainConfig,
    run=run,
    reads=(Reads("tickets", "tickets", optional=True),),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy", "nncf"),
    uses=frozenset({"data", "model", "seed", "device"}),
    shares=True,
    # Where a training may end early, its time is in no proportion, and every setting bears on it.
    costless=lambda config: () if config.stop_early else (*COSTLESS, "weights.strength"),
    paced_by=lambda config: () if config.stop_early else ("epochs", "steps"),
    reached=_reached,
    references=_references,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
