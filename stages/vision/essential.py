"""Essential sparsity: how few weights of a pretrained network answer as well as all of them, by trying.

Jaiswal et al. (NeurIPS 2023), as LOTUS (2024) uses it: each level is cut from the pretrained weights at once, by
magnitude, trains for the same few steps on the same batches with its mask held, and is judged. It is judged on the
calibration split, so that the test split has no say in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.weight_masks import bend, knee
from .mask_settings import Essential
from .network import Network
from .trials import Trials


@dataclass(frozen=True)
class Tried:
    """keeps: fractions kept, the dense network's 1 first; top1: of each on the calibration split. bend: where the curve
    bends most, if it does. images, seconds: of all their training.
    """

    keeps: tuple[float, ...]
    top1: tuple[float, ...]
    chosen: float
    bend: float | None
    images: int
    seconds: float

    def rows(self) -> list[dict[str, float]]:
        """For JSON."""
        return [{"keep": keep, "top1": one} for keep, one in zip(self.keeps, self.top1, strict=True)]


def sweep(network: Network, settings: Essential, trials: Trials) -> Tried:
    """Try all levels on copies; the network stays as it is. A killed sweep begins again, with the same outcome."""
    keeps = (1.0, *settings.levels)
    top1: list[float] = []
    images, seconds = 0, 0.0
    with trials.progress.task("essential sparsity", len(keeps)) as task:
        for keep in keeps:
            fitted = trials.fit(network, settings.steps, seed=trials.seed, masks=settings.at(keep))
            top1.append(trials.judge(fitted.network))
            images, seconds = images + fitted.images, seconds + fitted.seconds
            task.advance(1, top1=top1[-1])
    chosen = knee(keeps, top1, settings.tolerance)
    return Tried(keeps, tuple(top1), chosen, bend(keeps, top1), images, seconds)
