"""The network that is going to be cut, and how important its parts are.

No pipeline file names this module: `prune` and the measurement of sensitivity start from it, so that what the one
measures is what the other removes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sievit.pipeline.stage import Context, Preflight

from .methods import InvalidInput
from .vision.recipe import Settings

if TYPE_CHECKING:
    import torch

    from .methods.allocation import Scores
    from .vision.calibration import Calibration
    from .vision.dataset import Splits
    from .vision.network import Network
    from .vision.preprocessing import Normaliser, Preprocessing

Importance = Literal["taylor", "hessian", "l1", "trained", "random"]
WITHOUT_IMAGES = ("l1", "trained", "random")


class Judging(Settings):
    """What decides which parts go first, and by which images."""

    importance: Importance = Field("taylor", description="as prune.importance")
    images: int = Field(512, ge=1, description="as prune.images")
    calibration: Literal["ticket", "split"] = Field("ticket", description="as prune.calibration")
    batch_size: int = Field(16, ge=1, description="as prune.batch_size")


def judge(
    ctx: Context, judging: Judging, network: Network, splits: Splits, normalise: Normaliser, device: torch.device
) -> tuple[Scores, Calibration]:
    """The importance of all parts of the network, which lies on the device, and the images. Its gradients are gone
    afterwards.

    Raises: InvalidInput for tickets of other data, and where `trained` finds nothing that was handed on.
    """
    from .vision.calibration import Calibration
    from .vision.surgery import score
    from .vision.trained_importance import judged

    folder = ctx.inputs["tickets"].root if "tickets" in ctx.inputs else None
    how = (judging.calibration, judging.images, judging.batch_size, normalise, device)
    calibration = Calibration(splits, folder, *how)
    if judging.importance == "trained":
        artifact = ctx.inputs["model"]
        scores = score(judged(network, artifact.root, f"model {artifact.ref}"), "taylor", ctx.seed)
    else:
        if judging.importance not in WITHOUT_IMAGES:
            with ctx.progress.task("gradients", calibration.images) as task:
                if judging.importance == "taylor":
                    calibration.gradients(network, task.advance)
                else:
                    calibration.squared_gradients(network, task.advance)
        scores = score(network, judging.importance, ctx.seed)
    network.zero_grad()
    return scores, calibration


def given(ctx: Context, splits: Splits) -> tuple[Network, Preprocessing]:
    """The model that the stage reads, else the pretrained one of the model block as it is."""
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


def check_given(seen: Preflight, importance: Importance, at: Callable[[str], str]) -> None:
    """Refuse a network that nothing has trained, and importance that nothing has handed on. at: a setting's place in
    pipeline.yaml.
    """
    from .vision.trained_importance import check_handed_on

    alone = "model" not in seen.reads and "model" not in seen.inputs
    if alone and importance == "trained":
        raise InvalidInput(
            f"{at('importance')}: trained is what a training hands on, and no stage before it trains",
            "put a train before it, or use taylor, hessian, l1 or random",
            field=at("importance"),
        )
    if alone and not (seen.model.pretrained or seen.model.weights is not None):
        raise InvalidInput(
            f"{at('target')}: no stage before it writes a model, and the one of the model block is untrained",
            "put train before it, or name weights: model.pretrained or model.weights",
            field=at("target"),
        )
    if "model" in seen.inputs and importance == "trained":
        made = seen.inputs["model"]
        try:
            check_handed_on(made.root, f"model {made.ref}")
        except InvalidInput as error:
            error.field = at("importance")
            raise
