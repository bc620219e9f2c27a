"""A proxy run: a small network, trained shortly on all training images, and its answers to each of them.

No pipeline file names this stage. Where a ticket needs scores or a selector it asks for run 0, 1, ... of its `proxy`
block, and the engine trains what is not in the store yet. So one run serves every score, every keep and every arm
whose block, data and seed are the same.

reads    the data block; ticket.proxy with its model, or the model block
writes   model.safetensors, architecture.json, preprocessing.json; correct.npy (E, M), el2n.npy, grand.npy, margin.npy,
         entropy.npy (E, M) after each of E epochs for M training images on their plain views; distance.npy (M,) to
         the class centre
ledger   the cost of training and of looking at all images after each epoch; every ticket that uses the run is charged
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sievit.pipeline.settings import ModelConfig
from sievit.pipeline.stage import Config, Context, Stage

from .vision.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path


class Proxy(Recipe):
    """The short runs whose statistics score the examples; the first of them is also the start of the selector."""

    epochs: float | None = Field(4, gt=0, le=10_000, description="passes of each run; this or steps")
    runs: int = Field(1, ge=1, le=20, description="independent runs, averaged")
    model: ModelConfig | None = Field(
        None, description="a smaller network for proxy and selector; null: the pipeline's own"
    )

    def run(self, number: int) -> ProxyRun:
        """What run `number` (from 0) depends on; how many there are is not part of it."""
        return ProxyRun(recipe=Recipe(**self.model_dump(exclude={"runs", "model"})), number=number)


class ProxyRun(Config):
    """One run of a ticket's proxy block; its network is the context's model."""

    recipe: Recipe = Field(description="how it is trained")
    number: int = Field(ge=0, description="which of the independent runs")


def run(ctx: Context) -> None:
    """Train, looking at all images after each epoch; leave network and statistics."""
    import torch

    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.model_block import begin
    from .vision.proxy import macs, train_proxy
    from .vision.weights import save_network

    config: ProxyRun = ctx.config
    device = open_device(ctx.device)
    train = load_splits(ctx.data.model_dump(), ctx.base).train
    begun = time.monotonic()
    seed = ctx.seed * 1000 + config.number
    torch.manual_seed(seed)
    network, preprocessing = begin(ctx.model, ctx.data, train.classes, ctx.base, drop_path=config.recipe.drop_path)
    with ctx.progress.task(f"proxy run {config.number + 1}", config.recipe.total_steps(len(train))) as task:
        fitted = train_proxy(
            network,
            train,
            config.recipe,
            seed=seed,
            device=device,
            normalise=preprocessing.normaliser(device),
            work=ctx.work,
            out=ctx.out,
            tick=lambda n, values: task.advance(n, **values),
            sharding=ctx.sharding,
        )
    save_network(fitted.network, ctx.out)
    preprocessing.save(ctx.out)
    ctx.metrics |= {"epochs": len(fitted.curve), "curve": fitted.curve}
    ctx.ledger |= {
        "images": fitted.images,
        "scoring_macs": macs(fitted.network, fitted, len(train)),
        "peak_gpu_memory_mb": fitted.peak_gpu_mb,
        "scoring_seconds": round(time.monotonic() - begun + fitted.earlier_seconds, 3),
    }


STAGE = Stage(
    name="proxy",
    version=4,  # raise ticket's with it: a ticket's key covers the proxy's settings and not this code
    config=ProxyRun,
    run=run,
    reads=(),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy"),
    uses=frozenset({"data", "model", "seed", "device"}),
    shares=True,
)


@dataclass
class Spent:
    """What choosing a ticket has cost. earlier_seconds: before a kill, or of whoever made a run that it shares."""

    images: int = 0
    macs: int = 0
    earlier_seconds: float = 0.0


class Runs:
    """The runs of a ticket's proxy block, trained when first asked for unless the store has them."""

    def __init__(self, ctx: Context, settings: Proxy, spent: Spent) -> None:
        """ctx, spent: of the ticket, to which every run that it asks for is charged."""
        self.ctx, self.settings, self.spent = ctx, settings, spent
        self.folders: dict[int, Path] = {}
        self.shared: list[dict[str, Any]] = []

    def run(self, number: int) -> Path:
        """The folder of run `number`, its cost charged to this ticket whoever paid it."""
        if number not in self.folders:
            begun = time.monotonic()
            config, model = self.settings.run(number), self.settings.model
            part = self.ctx.part(STAGE, config, role=f"proxy-{number}", model=model)
            if not part.made:
                self.ctx.progress.note(f"proxy run {number + 1}: {part.artifact.ref}, which was there")
            ledger = part.artifact.ledger
            self.spent.images += ledger["images"]
            self.spent.macs += ledger["scoring_macs"]
            self.spent.earlier_seconds += ledger["scoring_seconds"] - (time.monotonic() - begun)
            self.shared.append({"ref": part.artifact.ref, "made": part.made, **ledger})
            self.folders[number] = part.artifact.root
        return self.folders[number]
