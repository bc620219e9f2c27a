"""A teacher from outside: any timm model with its pretrained weights, of any family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from .families import nearest


@dataclass(frozen=True)
class External:
    """A timm network, the normalisation it was trained with, and its multiply-accumulates for one image."""

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    macs: int


def check_name(text: str, field: str) -> None:
    """Refuse "timm:<name>" for a name that timm has no trained weights of; whether they can be fetched is not tried.

    field: the setting that says it. Raises: InvalidInput.
    """
    name = text.removeprefix("timm:")
    if ":" not in name and not timm.is_model_pretrained(name):
        close = nearest(name, timm.list_models(pretrained=True, include_tags=False))
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models(pretrained=True) names what there is"
        raise InvalidInput(f"timm has no trained weights of {name!r}", hint, field=field)


def load(text: str, classes: int, image_size: int) -> External:
    """The network of "timm:<name>", pretrained: an untrained teacher teaches nothing.

    The checkpoint's own classes must be as many as the data's: a fresh head would teach noise.
    Raises: InvalidInput for unknown names, unreachable weights or other classes.
    """
    name = text.removeprefix("timm:")
    try:
        network = timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"teacher: {error}",
            "timm:<name> takes a name of timm.list_models(pretrained=True), or timm:hf-hub:<repository>",
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"teacher {text}: weights could not be fetched ({error})", "check the network, or name a model artifact"
        ) from error
    answers = int(getattr(network, "num_classes", 0))
    if answers != classes:
        raise InvalidInput(
            f"teacher {text} answers {answers} classes, the data has {classes}",
            "name a teacher trained on these classes",
        )
    config = getattr(network, "pretrained_cfg", {}) or {}
    network.eval()
    try:
        macs = count_macs(network, torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        raise InvalidInput(
            f"teacher {text} does not take images of {image_size} px ({error})", "name a teacher of this image size"
        ) from error
    return External(network, tuple(config.get("mean", (0.5,) * 3)), tuple(config.get("std", (0.5,) * 3)), macs)


def count_macs(network: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Counted by torch's own counter: two operations a multiply-accumulate."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return int(counter.get_total_flops()) // 2
