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
ledger   images (forward and backward), tokens per image, epochs, steps, MACs, seconds, peak memory on a GPU; the
         forward passes of the annotator and of the selector of online tickets are in scoring_macs

    sievit train pipeline.yaml --set train.epochs=40
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from sievit.pipeline.settings import ModelConfig
from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .vision.example_settings import ExamplePolicy, InfoBatch, Swap, check_examples
from .vision.loss_settings import Penalty, TokenLabels
from .vision.mask_settings import Essential, Hold, Magnitude, MaskSettings, Pattern, Soup, check_masks
from .vision.recipe import Recipe, StopEarly, check_compile, check_processes, check_stop, looks_at_whole_tensors
from .vision.token_settings import Connected, Tokens, check_connected

if TYPE_CHECKING:
    import torch

    from .vision.annotator import Annotator
    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.network import Network
    from .vision.objective import Objective
    from .vision.preprocessing import Preprocessing


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
        check_examples(self.examples, self.epochs, self.budget)
        if self.steps is not None and self.budget == "epochs":
            check_masks(self.masks, self.steps)
        if isinstance(self.masks, Essential | Soup) and self.budget == "macs":
            raise ValueError(
                f"budget: macs leaves out what finding the masks costs; use steps or epochs with {self.masks.method}"
            )
        if self.start is not None and self.start.startswith("timm:"):
            raise ValueError("start: names a stage or an artifact; a timm model is named in the model block")
        check_connected(self.attention, self.tokens)
        self._check_stop()
        watched = self.examples is not None and self.examples.policy != "random"
        of_attention = self.weights is not None and self.weights.method.startswith("attention_")
        check_compile(
            self,
            f"examples.policy: {self.examples.policy}"
            if watched and self.examples is not None
            else f"weights.method: {self.weights.method}"
            if of_attention and self.weights is not None
            else None,
        )
        if self.token_labels is not None and self.tokens is not None:
            raise ValueError(
                "tokens: token_labels asks the network about every patch, and tokens drops some; leave one of them out"
            )
        merged = self.tokens is not None and self.tokens.method == "tome"
        if self.weights is not None and self.weights.method.startswith("attention_") and (self.attention or merged):
            raise ValueError(
                f"weights.method: {self.weights.method} looks at attention as it is without "
                f"{'attention.keep' if self.attention else 'tokens.method: tome'}; leave one of them out"
            )
        return self

    def _check_stop(self) -> None:
        """What early stopping would leave undone."""
        check_stop(self.stop_early, self.epochs)
        if self.stop_early is None:
            return
        if self.budget != "epochs":
            raise ValueError(
                f"stop_early: a training that may end early spends no equal {self.budget}; use budget: epochs"
            )
        if self.keep_epochs:
            raise ValueError("keep_epochs: training may stop before these epochs; leave out keep_epochs or stop_early")
        if isinstance(self.examples, InfoBatch):
            raise ValueError(
                "stop_early: infobatch owes its last passes to the examples that it dropped; leave one of them out"
            )


def run(ctx: Context) -> None:
    """Data and tickets, network, training, then accuracy under every token policy."""
    import torch

    from .vision import (
        budget,
        examples,
        figures,
        mask_search,
        masks,
        penalty,
        reports,
        tickets,
        token_schedule,
        trained_importance,
    )
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1
    from .vision.tensors import write_tensors
    from .vision.training import fit
    from .vision.weights import save_network

    config: TrainConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None

    torch.manual_seed(ctx.seed)
    network, preprocessing = _beginning(ctx, splits.train.classes)
    network = tickets.adapt(network, loaded, config.patches)
    tickets.check(loaded, splits, network.ticket_grid, config.cutmix)
    normalise = preprocessing.normaliser(device)
    patches = tickets.policy(loaded, seed=ctx.seed, device=device)
    pool = tickets.pool(splits.train, loaded, patches)
    annotator = _annotator(ctx, network, splits.train.classes, device)
    policy = examples.create(config.examples, pool.members, config.epochs, ctx.seed)
    dense = network.architecture.macs()
    schedule = token_schedule.create(network.architecture, config.tokens, config.attention, finish=config.finish)
    labelling = 0 if annotator is None else annotator.macs
    looking = 0 if patches is None else patches.macs
    entering = None if patches is None else patches.count
    trial = 3 * network.ticket_cost(entering)[1] + labelling + looking  # a step of the search drops no tokens
    arm = budget.Arm(
        kept=policy.size,
        examples=len(splits.train),
        # Forward and backward are three forwards.
        phases=tuple(
            (end, 3 * macs + labelling + (looking if ticketed else 0))
            for end, ticketed, macs in token_schedule.phases(network, schedule, entering, config.finish)
        ),
        dense=3 * dense + labelling,
        scoring=0 if loaded is None else loaded.scoring_macs,
    )
    recipe = config
    if config.budget != "epochs":
        recipe = config.model_copy(update={"epochs": None, "steps": budget.steps_for(config, config.budget, arm)})
    _check_epochs(recipe, policy.size)

    def judge(current: Network) -> float:
        return top1(current, splits.calibration, normalise, device)

    found = mask_search.find(
        config.masks,
        network,
        pool,
        recipe,
        seed=ctx.seed,
        device=device,
        normalise=normalise,
        objective=_objective(config),
        annotate=annotator,
        judge=judge,
        progress=ctx.progress,
    )
    if found.said:
        ctx.progress.warn(found.said)

    pressing = None if config.weights is None else penalty.create(config.weights.method, config.weights.strength)
    with ctx.progress.task("training", recipe.total_steps(arm.kept)) as task:
        fitted = fit(
            found.network,
            pool,
            recipe,
            seed=ctx.seed,
            device=device,
            normalise=normalise,
            finish=config.finish,
            policy=policy,
            tokens=schedule,
            objective=_objective(config),
            annotate=annotator,
            penalty=pressing,
            masks=found.held,
            judge=judge,
            keep_epochs=config.keep_epochs,
            stop=config.stop_early,
            checkpoint=ctx.work / "training.safetensors",
            tick=lambda n, values: task.advance(n, **values),
            sharding=ctx.sharding,
        )
    network = fitted.network
    rates = mask_search.cut_after(
        config.masks, network, ctx.seed, lambda current: top1(current, splits.test, normalise, device)
    )
    reports.tell(fitted, ctx.metrics, ctx.progress)
    save_network(network, ctx.out)
    if pressing is not None and config.weights is not None and (scores := pressing.importance(network)):
        trained_importance.write(ctx.out, config.weights.method, scores)
    preprocessing.save(ctx.out)
    for epoch, state in fitted.early.items():
        (ctx.out / "early").mkdir(exist_ok=True)
        write_tensors(ctx.out / "early" / f"epoch-{epoch}.safetensors", state)
    if config.examples is not None:
        record = examples.record(config.examples, policy, len(pool.members))
        (ctx.out / "pool.json").write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")
        ctx.metrics["examples"] = examples.use(config.examples, len(pool.members), fitted.passes, fitted.images)

    searching = found.images * trial
    scoring = fitted.images * labelling + fitted.ticketed * looking
    spent = budget.Spent(
        budget=config.budget,
        steps=fitted.steps,
        examples=arm.kept,
        of=arm.examples,
        images=fitted.images,
        macs=3 * fitted.macs + scoring,
        scoring_macs=None if arm.scoring is None else arm.scoring + searching,
        allowed=budget.allowance(config, arm) if config.budget == "macs" else None,
    )
    spent.save(ctx.out)
    ctx.metrics |= {
        "top1": tickets.accuracy(network, splits.test, loaded, normalise, device, seed=ctx.seed),
        "budget": asdict(spent),
        "policy": _policy(config, pool.whole, network),
        "curve": fitted.curve,
        "parameters": network.parameter_count(),
        "macs": network.architecture.macs(),
    }
    if schedule is not None:
        ctx.metrics["tokens"] = schedule.record()
    if config.masks is not None:
        # What soup's mode is about is how masks are joined; its pool is always the same.
        mode = "corrected" if isinstance(config.masks, Soup) else getattr(config.masks, "mode", "corrected")
        ctx.metrics["masks"] = config.masks.model_dump() | found.record | {"density": masks.densities(network, mode)}
    if rates:
        ctx.metrics["masks"] |= {"rates": rates}
    if config.token_labels is not None and annotator is not None:
        ctx.metrics["token_labels"] = config.token_labels.model_dump() | {"map": annotator.places}
    ctx.ledger |= {
        "budget": config.budget,
        "images": fitted.images,
        "tokens_per_image": round(fitted.tokens / fitted.images, 2),
        "epochs": round(fitted.passes, 3),
        "steps": fitted.steps,
        "train_macs": 3 * fitted.macs,
        "scoring_macs": scoring + searching,
        "peak_gpu_memory_mb": fitted.peak_gpu_mb,
        "seconds": round(fitted.seconds + found.seconds, 3),
    }
    _draw_masks(ctx)
    ctx.figure(
        "curve",
        figures.curve(fitted.curve),
        title="Training",
        caption="Accuracy on the calibration split, all patches.",
    )


def _beginning(ctx: Context, classes: tuple[str, ...]) -> tuple[Network, Preprocessing]:
    """The network before the first step: that of the model block, or of `start` with its weights and widths."""
    from .vision.network import create
    from .vision.preprocessing import check, choose, load
    from .vision.weights import load_network

    drop_path = ctx.config.drop_path
    if "start" in ctx.inputs:
        artifact = ctx.inputs["start"]
        preprocessing = load(artifact.root)
        check(preprocessing, classes, ctx.data.image_size, f"start {artifact.ref}")
        begun = load_network(artifact.root, drop_path=drop_path).with_tokens(())
        _check_start(begun.architecture, ctx.model, f"start {artifact.ref}")
        return begun, preprocessing
    network = create(
        ctx.model.name,
        classes=len(classes),
        image_size=ctx.data.image_size,
        args=dict(ctx.model.args),
        pretrained=ctx.model.pretrained,
        weights=None if ctx.model.weights is None else ctx.base / ctx.model.weights,
        drop_path=drop_path,
    )
    return network, choose(network, ctx.data, classes, ctx.model.pretrained or ctx.model.weights is not None)


def _draw_masks(ctx: Context) -> None:
    """What the search for masks tried, and what further fractions would have given."""
    from .vision import figures

    masks, record = ctx.config.masks, ctx.metrics.get("masks", {})
    if isinstance(masks, Essential):
        ctx.figure(
            "essential",
            figures.sweep(*_columns(record["tried"]), record["chosen"], masks.tolerance),
            title="Weights kept against accuracy",
            caption=f"Each level cut at once and trained for {masks.steps} steps. Dashed: what may be lost; "
            "upright: the level taken.",
        )
    if isinstance(masks, Soup) and record["rounds"]:
        ctx.figure(
            "soup",
            figures.soup(record["rounds"], masks.keep),
            title="Weights kept, round by round",
            caption="Dots: of each weak mask; line: of the joined one; dashed: what is kept in the end.",
        )
    if "rates" in record:
        ctx.figure(
            "rates",
            figures.rates(*_columns(record["rates"]), masks.keep),
            title="Weights kept after training against accuracy",
            caption="Each fraction cut at once from the trained network, nothing trained after it. Upright: what is "
            "saved.",
        )


def _check_start(architecture: Architecture | SwinArchitecture, model: ModelConfig, who: str) -> None:
    """Raises: InvalidInput for another network than that of the model block; its widths may have been cut."""
    from .methods import InvalidInput

    if (architecture.model, architecture.args) != (model.name, dict(model.args)):
        raise InvalidInput(
            f"{who} is {architecture.model} with {architecture.args}, and the model block says {model.name} with "
            f"{dict(model.args)}",
            "name in start a network of the model block, or write that network into the model block",
        )


def _policy(config: TrainConfig, whole: bool, network: Network) -> str:
    kind = {None: "tickets", "zero": "tickets with the other patches blanked (no compute saved)", "mosaic": "mosaics"}
    seen = "all" if whole else f"{kind[config.patches]}, then all for {config.finish:.0%} of the steps"
    left = network.architecture.tokens
    return f"reduced to {left[-1].after} patches" + ("" if whole else f"; {seen}") if left else seen


def _columns(rows: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [row["keep"] for row in rows], [row["top1"] for row in rows]


def _check_epochs(config: TrainConfig, examples: int) -> None:
    """Raises: InvalidInput for kept epochs and swaps that these steps do not reach, and masks that do not change."""
    from .methods import InvalidInput

    try:
        check_masks(config.masks, config.total_steps(examples))
    except ValueError as error:
        raise InvalidInput(f"train.{error}") from error

    last = config.total_steps(examples) // -(-examples // config.batch_size)
    if config.keep_epochs and max(config.keep_epochs) > last:
        raise InvalidInput(
            f"train.keep_epochs names epoch {max(config.keep_epochs)}, training completes {last}",
            "name epochs from 1 to the last, or train longer",
        )
    if isinstance(config.examples, Swap) and config.examples.until >= last:
        raise InvalidInput(
            f"train.examples.until: swaps until epoch {config.examples.until}, and training completes {last}",
            "lower until, or train longer",
        )


def _annotator(ctx: Context, network: Network, classes: tuple[str, ...], device: torch.device) -> Annotator | None:
    """Who labels the patches; the network then answers for each of them."""
    from .vision import annotator
    from .vision.vit import ViT

    settings = ctx.config.token_labels
    if settings is None:
        return None
    assert isinstance(network, ViT), "preflight refuses a Swin"
    network.set_token_training(True)
    how: dict[str, Any] = {
        "image_size": ctx.data.image_size,
        "grid": network.architecture.grid,
        "top": settings.top,
    }
    if "annotator" in ctx.inputs:
        artifact = ctx.inputs["annotator"]
        labels = annotator.from_artifact(artifact.root, artifact.ref, classes, device, **how)
    else:
        labels = annotator.from_timm(ctx.references["annotator"], len(classes), device, **how)
    high, wide = labels.places
    if high * wide == 1:
        ctx.progress.warn(
            f"token_labels.source {settings.source} sees one place: all patches of a view are labelled alike"
        )
    return labels


def _objective(config: TrainConfig) -> Objective:
    """The labels' loss, and with token labels the patches' beside it. A policy on examples needs it for each image."""
    from .vision.objective import each_supervised, labelled, supervised

    each = config.examples is not None
    if config.token_labels is not None:
        return labelled(config.token_labels.weight, each=each)
    return each_supervised if each else supervised


def coherent(seen: Preflight) -> None:
    """Refuse a batch that the processes cannot share, cutmix on patch tickets that know one image, and a sweep on a
    network that knows nothing.
    """
    from .methods import InvalidInput

    config: TrainConfig = seen.config
    check_processes(config, seen.processes, seen.sharding, f"stages.{seen.entry}")
    for name in ("masks", "weights") if seen.processes > 1 and seen.sharding == "fsdp2" else ():
        if getattr(config, name) is not None:
            raise looks_at_whole_tensors(seen.at(name))
    trained = seen.model.pretrained or seen.model.weights is not None or config.start is not None
    if isinstance(config.masks, Essential | Soup | Hold) and not trained:
        what = {"essential": "tries what", "soup": "joins masks of what", "hold": "keeps what"}[config.masks.method]
        raise InvalidInput(
            f"{seen.at('masks')}: {config.masks.method} {what} a trained network can do without, and this one begins "
            "at random",
            "name a network: start, model.pretrained or model.weights; or use the method magnitude",
            field=seen.at("masks.method"),
        )
    ticket = seen.reads.get("tickets")
    if not config.cutmix or ticket is None or ticket.config.whole:
        return
    patches = ticket.config.patches
    if patches.view == "cached" and patches.method != "random":
        raise InvalidInput(
            f"{seen.at('cutmix')}: cached patch tickets know one image, cutmix shows two",
            "set cutmix: 0, patches.view: online, or patches.keep: 1.0; mixup goes with all",
            field=seen.at("cutmix"),
        )


def idle(seen: Preflight) -> dict[str, str]:
    """A schedule of cuts where there is one cut, votes that are not asked, and a floor of a learning rate that does not
    fall.
    """
    config: TrainConfig = seen.config
    masks, found = config.masks, config.idle()
    if isinstance(masks, Soup) and masks.mode == "paper":
        found["masks.votes"] = "masks.mode paper keeps what any mask keeps"
    if isinstance(masks, Magnitude) and masks.schedule == "one_shot":
        found |= {f"masks.{name}": "masks.schedule is one_shot" for name in ("end", "every")}
    return found


def preflight(seen: Preflight) -> None:
    """Refuse images that are not there, a network that cannot be built, patch tickets that it cannot take, and what
    asks of it a head for patches, a class token, attention among all tokens or widths that are multiples of four.
    """
    from .methods import InvalidInput
    from .vision import masks
    from .vision.architecture import Architecture, load_architecture
    from .vision.external import check_name
    from .vision.forward import check_compiler
    from .vision.network import outline
    from .vision.penalty import ATTENTION, no_rows
    from .vision.sources import check_sources
    from .vision.tickets import ticket_use
    from .vision.token_schedule import create

    if seen.config.compile:
        check_compiler(seen.device, seen.at("compile"))
    if "start" in seen.inputs:
        network = load_architecture(seen.inputs["start"].root / "architecture.json")
        if isinstance(network, Architecture):
            network = replace(network, tokens=())
        try:
            _check_start(network, seen.model, f"start {seen.inputs['start'].ref}")
        except InvalidInput as error:
            error.field = seen.at("start")
            raise
    else:
        network = outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
    try:
        ticket_use(network, seen.config.patches, None if isinstance(network, Architecture) else _ticket_shape(seen))
    except InvalidInput as error:
        error.field = seen.at("patches")
        raise
    try:
        create(network, seen.config.tokens, seen.config.attention)
    except InvalidInput as error:
        error.field = seen.at(error.field)
        raise
    if seen.config.token_labels is not None and not network.token_heads:
        raise InvalidInput(
            f"token_labels: {seen.model.name} has no head that answers for its patch tokens",
            "leave token_labels out, or use lvvit_t, lvvit_s or lvvit_m",
            field=seen.at("token_labels"),
        )
    penalty = seen.config.weights
    if penalty is not None and penalty.method in ATTENTION and not isinstance(network, Architecture):
        refusal = no_rows(seen.model.name, penalty.method)
        refusal.field = seen.at("weights.method")
        raise refusal
    if isinstance(seen.config.masks, Pattern):
        try:
            masks.check_outline(seen.model.name, image_size=seen.data.image_size, args=seen.model.args)
        except InvalidInput as error:
            error.field = seen.at("masks.pattern")
            raise
    if isinstance(seen.config.examples, Swap) and seen.config.examples.mode == "paper" and not network.prefix:
        raise InvalidInput(
            f"examples.mode: paper sorts by the attention of the class token, and {seen.model.name} has none",
            "use mode: corrected",
            field=seen.at("examples.mode"),
        )
    if seen.config.token_labels is not None and seen.config.token_labels.source.startswith("timm:"):
        check_name(seen.config.token_labels.source, seen.at("token_labels.source"))
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


STAGE = Stage(
    name="train",
    version=10,
    config=TrainConfig,
    run=run,
    reads=(Reads("tickets", "tickets", optional=True),),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy", "nncf"),
    uses=frozenset({"data", "model", "seed", "device"}),
    shares=True,
    references=_references,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
