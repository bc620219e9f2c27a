"""Choose what is worth training on: which images (examples), and which patches of each (patch tickets).

Examples   random      uniform, the control
           el2n        ||softmax - onehot|| early in training (Paul et al., NeurIPS 2021)
           grand       norm of the last layer's gradient early in training (the same)
           forgetting  how often a proxy run lost an example it had right (Toneva et al., ICLR 2019)
           margin      1 - (best - second best probability); entropy of the probabilities (Coleman et al., ICLR 2020)
           moderate    a median distance to the class centre, neither easy nor hard (Xia et al., ICLR 2023)
           ccs         skip_hardest passed over, then an even share of every stratum of a score (Zheng et al., ICLR
                       2023)
           Scores are means over proxy runs, the highest stay, equal ones go by index. A proxy run is an artifact of
           its own (`sievit ls proxy`): arms that differ in method, keep or score share it.
Patches    attention     composed top-k by the attention of the prefix tokens (without them, of all patches) in a
                         trained ViT that drops tokens at several blocks (Data-Level Lottery Tickets, IJCAI 2023):
                         proxy network, then adapt_epochs with dropping on, then frozen
           saliency      mean brightness gradient in the patch, no model
           controls with as many patches:
           random        drawn anew for each image and epoch from (seed, epoch, image)
           random_fixed  drawn once for each image
           inverse       least attended first
           center        closest to the middle of the image

`keep` is the fraction kept overall: with 0.7 of 64 patches, 45 go on. The selector drops in stages, keep^(1/stages)
at each; `selector.keep_per_stage` states that share instead, as the papers do. A Swin ranks no patches: its tickets are
about the patches of the ViT named in proxy.model.

Tickets are `cached`: ranks are made once per image on its plain view, and train carries them through crop and flip. Or
they are `online`: the selector is stored and looks at every view that train makes, after all augmentation and mixing,
as in the paper; cutmix is possible then, and every step pays for the selector. The test split is ranked too, so that a
network can be tested on tickets; nothing is chosen by it. `launch: {processes: N}` shares the proxy runs' training
and all scoring and ranking among N processes.

reads    the data block, the model block (for the proxy); with selector.source a model artifact
writes   kept.npy (ascending indices into the training split), scores.npy, ranks.npy (cached only),
         ranks_calibration.npy, ranks_test.npy (rank 0 = most important patch), selector/ (attention and inverse: the
         network that ranked), tickets.json
ledger   scoring_macs, scoring_seconds: proxy runs (whoever trained them: `shared` says which), adapting the selector,
         ranking; images: of all these trainings; what an image costs in training, cached and online, is in the metrics

    sievit ticket pipeline.yaml --set ticket.examples.keep=0.5
"""

from __future__ import annotations

import time
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Stage

from . import proxy
from .proxy import Proxy
from .vision.patch_settings import Patches, Selector
from .vision.recipe import check_processes
from .vision.scoring import Examples

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from sievit.pipeline.settings import ModelConfig
    from sievit.pipeline.store import Artifact

    from .vision.architecture import Architecture, SwinArchitecture
    from .vision.dataset import Splits
    from .vision.preprocessing import Preprocessing
    from .vision.vit import ViT


class TicketConfig(Config):
    """Settings of the ticket stage."""

    examples: Examples = Field(default_factory=Examples, description="which images")
    patches: Patches = Field(default_factory=Patches, description="which patches")
    proxy: Proxy = Field(default_factory=Proxy, description="short runs that score examples and start the selector")
    selector: Selector = Field(default_factory=Selector, description="the network that ranks patches")

    @property
    def scored(self) -> bool:
        """Whether examples are chosen by what proxy runs say."""
        return self.examples.statistic is not None

    @property
    def whole(self) -> bool:
        """Whether all patches of every image are asked for."""
        return self.patches.keep == 1 or self.patches.keep is self.selector.keep_per_stage is None

    @property
    def selected(self) -> bool:
        """Whether patches are ranked by a selector."""
        return not self.whole and self.patches.method in ("attention", "inverse")

    @model_validator(mode="after")
    def _one_keep(self) -> TicketConfig:
        if self.patches.keep is not None and not self.whole and self.selector.keep_per_stage is not None:
            raise ValueError(
                f"patches.keep: {self.patches.keep:g} is overall, selector.keep_per_stage "
                f"{self.selector.keep_per_stage:g} of each stage; give one of them and set the other to null"
            )
        return self

    @model_validator(mode="after")
    def _method_is_used(self) -> TicketConfig:
        if "method" in self.patches.model_fields_set and self.whole and self.patches.keep is None:
            raise ValueError(
                f"patches.method: {self.patches.method} is named, and nothing says how many patches are kept; give "
                "patches.keep (1.0: all) or selector.keep_per_stage"
            )
        return self

    @model_validator(mode="after")
    def _falling(self) -> TicketConfig:
        if self.selected and self.selector.adaptation and self.selector.lr < self.proxy.min_lr:
            raise ValueError(
                f"selector.lr: {self.selector.lr:g} is below proxy.min_lr {self.proxy.min_lr:g}, where it ends; "
                "lower that"
            )
        return self

    @model_validator(mode="after")
    def _epoch_is_reached(self) -> TicketConfig:
        epoch, epochs = self.examples.epoch, self.proxy.epochs
        if self.examples.statistic is not None and epoch is not None and epochs is not None and epoch > ceil(epochs):
            raise ValueError(f"examples.epoch: is {epoch}, and proxy.epochs {epochs:g}; name an epoch that comes")
        return self


def run(ctx: Context) -> None:
    """Scores, then kept examples; ranks, then a look at them."""
    import numpy as np

    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.reports import tell_splits
    from .vision.score_figures import pictures
    from .vision.scoring import choose, score
    from .vision.tickets import write_record

    config: TicketConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    tell_splits(splits, ctx.progress)
    begun = time.monotonic()
    selection = _Selection(ctx, splits, device)
    architecture = selection.target
    patches = architecture.patches if config.whole else _ranked_size(config, selection.ranker, architecture)
    whole = patches == architecture.patches
    # Which class gets how many hangs on the labels alone unless some are passed over: told before a proxy is paid for.
    if config.examples.balanced and config.examples.skip_hardest == 0:
        choose(config.examples, np.zeros(len(splits.train), np.float32), splits.train, ctx.seed)
    runs = (selection.proxies.run(number) for number in range(config.proxy.runs))
    scores = score(config.examples, splits.train, runs, ctx.seed)
    kept = choose(config.examples, scores, splits.train, ctx.seed)
    np.save(ctx.out / "kept.npy", kept)
    np.save(ctx.out / "scores.npy", scores.astype(np.float32))

    cost, spent = None if whole else _write_ranks(ctx, splits, selection, patches), selection.spent

    examples_metrics = {
        "method": config.examples.method if config.examples.keep < 1 else "all",
        "keep": config.examples.keep,
        "kept": len(kept),
        "of": len(splits.train),
    }
    patches_metrics = {
        "method": "all" if whole else config.patches.method,
        "view": config.patches.view,
        "keep": patches / architecture.patches if config.patches.keep is None else config.patches.keep,
        "kept_per_image": patches,
        "of": architecture.patches,
    }
    ctx.metrics |= {"examples": examples_metrics, "patches": {**patches_metrics, "cost": cost}}
    write_record(
        ctx.out,
        splits,
        examples=examples_metrics,
        patches={**patches_metrics, "grid": architecture.grid},
        # What `train` must know to compare arms at equal cost.
        cost={"scoring_macs": spent.macs, "selector_macs": selection.source_macs},
    )
    ctx.ledger |= {
        "images": spent.images,
        "scoring_macs": spent.macs,
        "scoring_seconds": round(time.monotonic() - begun + spent.earlier_seconds, 3),
        "shared": selection.proxies.shared,
    }
    for picture in pictures(config.examples, splits.train, scores, kept):
        ctx.figure(picture.name, picture.svg, title=picture.title, caption=picture.caption)


def _ranked_size(
    config: TicketConfig, ranker: Architecture | SwinArchitecture, target: Architecture | SwinArchitecture
) -> int:
    from .vision.selector import ranked_size

    return ranked_size(config.patches, config.selector, ranker, target, selected=config.selected)


class _Selection:
    """The proxy runs, the selector, and what they cost."""

    def __init__(self, ctx: Context, splits: Splits, device: torch.device) -> None:
        self.ctx, self.splits, self.device = ctx, splits, device
        self.config: TicketConfig = ctx.config
        self.spent = proxy.Spent()
        self.proxies = proxy.Runs(ctx, self.config.proxy, self.spent)
        self.source_macs: int | None = 0  # what selector.source cost to make; None when it does not say

    def bare(self, model: ModelConfig) -> Architecture | SwinArchitecture:
        """The architecture of a model, weights left out."""
        from .vision.model_block import begin

        without = model.model_copy(update={"pretrained": False, "weights": None})
        network, _ = begin(without, self.ctx.data, self.splits.train.classes, self.ctx.base)
        return network.architecture

    @cached_property
    def target(self) -> Architecture | SwinArchitecture:
        """The architecture whose patches the tickets are about: the pipeline's model; for a Swin, which cannot rank
        patches, the ViT that does.
        """
        from .vision.selector import ticketed

        own = self.bare(self.ctx.model)
        return own if self.config.whole else ticketed(own, self.ranker)

    @cached_property
    def ranker(self) -> Architecture | SwinArchitecture:
        """The architecture of the selector, or of the proxy that would be one."""
        from .vision.architecture import load_architecture

        if self.config.selector.source is None:
            return self.bare(self.config.proxy.model or self.ctx.model)
        return load_architecture(self.ctx.inputs["selector"].root / "architecture.json")

    def selector(self, patches: int) -> tuple[ViT, Preprocessing]:
        """The adapted, token-dropping network."""
        import numpy as np

        from .vision import budget
        from .vision.batches import Pool
        from .vision.preprocessing import check, load
        from .vision.selector import arrange
        from .vision.training import fit
        from .vision.vit import ViT
        from .vision.weights import load_network

        settings = self.config.selector
        if settings.source is not None:
            artifact = self.ctx.inputs["selector"]
            network, preprocessing = load_network(artifact.root), load(artifact.root)
            spent = budget.load(artifact.root)
            self.source_macs = None if spent is None else spent.total
            check(preprocessing, None, self.ctx.data.image_size, f"selector.source {artifact.ref}")
        else:
            folder = self.proxies.run(0)
            network = load_network(folder, drop_path=self.config.proxy.drop_path)
            preprocessing = load(folder)
        drops = arrange(network.architecture, self.target, settings.blocks, patches, settings.keep_per_stage)
        dropping = network.with_tokens(drops)
        if settings.adaptation > 0:
            recipe = self.config.proxy.model_copy(
                update={"epochs": settings.adaptation, "steps": None, "lr": settings.lr}
            )
            train = self.splits.train
            with self.ctx.progress.task("adapting the selector", recipe.total_steps(len(train))) as task:
                fitted = fit(
                    dropping,
                    Pool(train, np.arange(len(train))),
                    recipe,
                    seed=self.ctx.seed * 1000 + 999,
                    device=self.device,
                    normalise=preprocessing.normaliser(self.device),
                    checkpoint=self.ctx.work / "selector.safetensors",
                    tick=lambda n, values: task.advance(n, **values),
                    sharding=self.ctx.sharding,
                )
            dropping = fitted.network
            self.spent.images += fitted.images
            self.spent.earlier_seconds += fitted.earlier_seconds
            self.spent.macs += 3 * fitted.images * dropping.architecture.macs()
        assert isinstance(dropping, ViT), "arrange refuses other families"
        return dropping.to(self.device).eval(), preprocessing


def _write_ranks(ctx: Context, splits: Splits, selection: _Selection, patches: int) -> dict[str, float | None] | None:
    """Ranks of the splits, the selector, a picture of some tickets. Returns what training on tickets costs."""
    from dataclasses import asdict

    from .methods.cost import ticket_cost
    from .vision import figures
    from .vision.architecture import Architecture
    from .vision.ranking import ByAttention, write_tables
    from .vision.reports import ticket_savings
    from .vision.tickets import save_selector

    settings, target, device = ctx.config.patches, selection.target, selection.device
    network, macs = None, 0
    if ctx.config.selected:
        selector, preprocessing = selection.selector(patches)
        save_selector(selector, preprocessing, ctx.out)
        network, macs = ByAttention(selector, preprocessing.normaliser(device)), selector.architecture.selector_macs()
    cached = settings.view == "cached" and settings.method != "random"
    tables = write_tables(
        ctx.out, splits, settings.method, target.grid, network, device, seed=ctx.seed, training=cached
    )
    selection.spent.macs += macs * tables.ranked

    images = splits.train
    names = [images.classes[label] for label in images.labels[tables.sample]]
    anew = " The draw is another one in each epoch." if settings.method == "random" else ""
    ctx.figure(
        "tickets",
        figures.tickets(images.pixels(tables.sample), tables.sample_ranks, patches, target.grid, names),
        title="Patch tickets",
        caption=f"One image of each of {len(names)} classes; the ranks of its patches by {settings.method}, the darker "
        f"the sooner kept; its ticket, {patches} of {target.patches} patches, the others tinted.{anew}",
    )
    if not isinstance(student := selection.bare(ctx.model), Architecture):
        return None  # what a Swin saves depends on train.patches
    cost = ticket_cost(student.macs(), student.macs(start_patches=patches), macs)
    ctx.progress.note(ticket_savings(cost, selection.spent.macs / len(images)))
    return asdict(cost)


def coherent(seen: Preflight) -> None:
    """Refuse batches of proxies and selectors that the processes cannot share."""
    config: TicketConfig = seen.config
    if config.scored or (config.selected and (config.selector.source is None or config.selector.adaptation)):
        check_processes(config.proxy, seen.processes, seen.sharding, seen.at("proxy"))


def idle(seen: Preflight) -> dict[str, str]:
    """What proxy, selector and noise settings have no part in, as chosen here."""
    config: TicketConfig = seen.config
    examples, patches, selector = config.examples, config.patches, config.selector
    found = {f"examples.{field}": why for field, why in examples.idle().items()}
    found |= {f"proxy.{field}": why for field, why in config.proxy.idle().items()}
    unscored = examples.unscored
    unselected = "all patches are kept" if config.whole else f"patches.method is {patches.method}"
    if patches.method in ("random", "random_fixed"):
        found["patches.view"] = f"patches.method is {patches.method}"
    if not config.selected:
        # How many patches are kept may still be said there, and the blocks that count as stages.
        adapting = ("selector.mode", "selector.adapt_epochs", "selector.lr")
        found |= dict.fromkeys(("selector",) if selector.keep_per_stage is None else adapting, unselected)
        if not config.scored and selector.keep_per_stage is None:
            # A Swin's tickets are about the patches of proxy.model; without torch timm's name alone tells a Swin.
            swin = seen.model.name.startswith("swin") and not config.whole
            names = ("runs", "epochs", "steps", "batch_size", "lr") if swin else ("",)
            found |= {f"proxy.{name}".rstrip("."): f"{unscored}, and {unselected}" for name in names}
        return found
    if not selector.adaptation:
        found["selector.lr"] = "the selector is not adapted"
    if not config.scored and selector.source is not None:
        # Only how the selector is adapted is still read from there.
        names = ("runs", "epochs", "steps", "lr", "model") if selector.adaptation else ("",)
        found |= {f"proxy.{name}".rstrip("."): f"{unscored}, and the selector is {selector.source}" for name in names}
    elif not config.scored:
        found["proxy.runs"] = f"{unscored}, and the selector starts from the first run"
    return found


def preflight(seen: Preflight) -> None:
    """Refuse images and a device that are not there, a network, a proxy or a selector that cannot be built, and blocks
    that they do not have.
    """
    from .methods import InvalidInput
    from .vision.architecture import load_architecture
    from .vision.device import check_device
    from .vision.forward import check_compiler
    from .vision.model_block import outlined
    from .vision.network import outline
    from .vision.selector import ticketed
    from .vision.sources import check_sources

    check_device(seen.device)
    check_sources(seen.data.model_dump(), seen.base)
    config: TicketConfig = seen.config
    if config.proxy.compile and (config.scored or config.selected):
        check_compiler(seen.device, seen.at("proxy.compile"))
    size = seen.data.image_size
    own = outlined(seen.model, size, None, "model")
    proxy = own
    if (other := config.proxy.model) is not None:
        try:
            proxy = outline(other.name, image_size=size, args=other.args)
        except InvalidInput as error:
            if error.field.startswith("model."):
                error.field = seen.at(f"proxy.{error.field}")
            raise
    if config.selector.source is not None:
        if "selector" not in seen.inputs:
            return  # a stage of this plan, whose network is not there yet
        proxy = load_architecture(seen.inputs["selector"].root / "architecture.json")
    try:
        if not config.whole:
            _ranked_size(config, proxy, ticketed(own, proxy))
    except InvalidInput as error:
        error.field = seen.at(error.field)
        raise


def _compare(left: Artifact, right: Artifact) -> Mapping[str, float | int | str]:
    """For `sievit diff`: which images, and which patches of each, two tickets both keep."""
    from .vision.overlap import overlap

    return overlap(left.root, right.root)


def _references(config: TicketConfig) -> dict[str, str]:
    return {} if config.selector.source is None else {"selector": config.selector.source}


STAGE = Stage(
    name="ticket",
    version=9,
    config=TicketConfig,
    run=run,
    reads=(),
    writes="tickets",
    manual=__doc__,
    packages=("torch", "timm", "numpy"),
    uses=frozenset({"data", "model", "seed", "device"}),
    shares=True,
    references=_references,
    compare=_compare,
    coherent=coherent,
    idle=idle,
    preflight=preflight,
)
