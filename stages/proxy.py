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
from typing import TYPE_CHECKING

from pydantic import Field

from sievit.pipeline.settings import ModelConfig
from sievit.pipeline.stage import Config, Context, Stage

from .vision.recipe import Recipe

if TYPE_CHECKING:
    from .vision.network import Network


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


def start(ctx: Context, model: ModelConfig, classes: int, drop_path: float = 0.0) -> Network:
    """The network that a run starts from."""
    from .vision.network import create

    return create(
        model.name,
        classes=classes,
        image_size=ctx.data.image_size,
        args=dict(model.args),
        pretrained=model.pretrained,
        weights=None if model.weights is None else ctx.base / model.weights,
        drop_path=drop_path,
    )


def run(ctx: Context) -> None:
    """Train, looking at all images after each epoch; leave network and statistics."""
    import torch

    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.preprocessing import choose
    from .vision.proxy import macs, train_proxy
    from .vision.weights import save_network

    config: ProxyRun = ctx.config
    device = open_device(ctx.device)
    train = load_splits(ctx.data.model_dump(), ctx.base).train
    begun = time.monotonic()
    seed = ctx.seed * 1000 + config.number
    torch.manual_seed(seed)
    network = start(ctx, ctx.model, len(train.classes), config.recipe.drop_path)
    preprocessing = choose(network, ctx.data, train.classes, ctx.model.pretrained or ctx.model.weights is not None)
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
    version=3,  # raise ticket's with it: a ticket's key covers the proxy's settings and not this code
    config=ProxyRun,
    run=run,
    reads=(),
    writes="model",
    manual=__doc__,
    packages=("torch", "timm", "numpy"),
    uses=frozenset({"data", "model", "seed", "device"}),
    shares=True,
)
