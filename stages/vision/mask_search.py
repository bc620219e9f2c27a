"""What masks need besides the training that they hold in: trials before its first step, a cut after its last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import essential, masks, soup
from .mask_settings import Applied, Essential, Hold, Magnitude, MaskSettings, Soup
from .network import Network
from .trials import Trials


@dataclass(frozen=True)
class Found:
    """network: what is trained; held: its masks. images, seconds: of the trainings that found them. record: what they
    showed, for JSON; said: what a reader must be told.
    """

    network: Network
    held: Applied | None
    images: int = 0
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def find(settings: MaskSettings | None, network: Network, trials: Trials) -> Found:
    """The masks that a training begins with."""
    match settings:
        case Essential():
            tried = essential.sweep(network, settings, trials)
            record: dict[str, Any] = {"chosen": tried.chosen, "bend": tried.bend, "tried": tried.rows()}
            return Found(network, settings.at(tried.chosen), tried.images, tried.seconds, record)
        case Soup():
            cooked = soup.cook(network, settings, trials)
            record = {"chosen": cooked.chosen, "rounds": list(cooked.rounds), "tried": cooked.top1}
            said = ""
            if cooked.chosen == "magnitude":
                said = (
                    f"masks: the soup answers {cooked.top1['soup']:.1%} of the calibration images, magnitudes alone "
                    f"{cooked.top1['magnitude']:.1%}: these are taken"
                )
            return Found(cooked.network, Hold(method="hold"), cooked.images, cooked.seconds, record, said)
        case Magnitude(after_training=True):
            return Found(network, None)
        case _:
            return Found(network, settings)


def told(settings: MaskSettings, found: Found, network: Network, rates: list[dict[str, float]]) -> dict[str, Any]:
    """The masks of a trained network, for JSON. rates: as cut_after returned them."""
    # What soup's mode is about is how masks are joined; its pool is always the same.
    mode = "corrected" if isinstance(settings, Soup) else getattr(settings, "mode", "corrected")
    record = settings.model_dump() | found.record | {"density": masks.densities(network, mode)}
    return record | {"rates": rates} if rates else record


def cut_after(
    settings: MaskSettings | None, network: Network, seed: int, judge: Callable[[Network], float]
) -> list[dict[str, float]]:
    """Cut what is cut when training is over, in place. Returns: accuracy of the whole network, of copies cut to each
    fraction of `also`, and of the network as it is handed on; nothing where masks are held in training or not at all.
    """
    if not isinstance(settings, Magnitude) or not settings.after_training:
        return []
    rates = [{"keep": 1.0, "top1": judge(network)}]
    for keep in sorted({*settings.also, settings.keep}, reverse=True):
        sparse = copy.deepcopy(network)
        masks.cut(sparse, settings, keep, seed)
        rates.append({"keep": keep, "top1": judge(sparse)})
    masks.cut(network, settings, settings.keep, seed)
    return rates
