"""What an image goes through before the network: one record, written beside the weights, read by every evaluation and
by the exported file's sidecar.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import InvalidInput
from .architecture import AGAIN
from .decode import PICTURE
from .network import Network


class Normaliser:
    """(x - mean) / std per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to image_size (bilinear), centre cut out, / 255, minus mean, over std; class names in the order of
    the logits.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def normaliser(self, device: torch.device) -> Normaliser:
        return Normaliser(self.mean, self.std, device)

    def save(self, folder: Path) -> None:
        how = {"resize": PICTURE["resize"], "crop": PICTURE["crop"]}
        text = json.dumps({"schema": 1, **how, **asdict(self)}, indent=1, sort_keys=True)
        (folder / "preprocessing.json").write_text(text + "\n", encoding="utf-8")

    def deployed(self) -> dict[str, Any]:
        """The record of an exported file's sidecar: how the picture is made included."""
        values = {"size": self.image_size, "scale": 1 / 255, "mean": list(self.mean), "std": list(self.std)}
        return PICTURE | values


def choose(network: Network, data: Any, classes: tuple[str, ...], pretrained: bool) -> Preprocessing:
    """The stated mean and std, else those the pretrained weights were trained with, else 0.5."""
    known = getattr(network.body, "pretrained_cfg", {}) if pretrained else {}
    mean = data.mean or tuple(known.get("mean", (0.5, 0.5, 0.5)))
    std = data.std or tuple(known.get("std", (0.5, 0.5, 0.5)))
    return Preprocessing(data.image_size, tuple(mean), tuple(std), classes)


def check(preprocessing: Preprocessing, classes: tuple[str, ...] | None, image_size: int, who: str) -> None:
    """Refuse a network made for other images than the data block's. classes None: they do not matter here."""
    if preprocessing.image_size != image_size:
        raise InvalidInput(
            f"{who} takes images of {preprocessing.image_size} px, data.image_size is {image_size}",
            "set data.image_size as it was trained, or train again",
        )
    if classes is not None and preprocessing.classes != classes:
        raise InvalidInput(f"{who} answers other classes than this data has", "train it on this data")


def load(folder: Path) -> Preprocessing:
    """Read preprocessing.json of a model artifact. Raises: InvalidInput, also for pictures that are made otherwise than
    the data set makes them.
    """
    path = folder / "preprocessing.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        made = {name: raw.get(name, how) for name, how in PICTURE.items()}
        found = Preprocessing(int(raw["image_size"]), tuple(raw["mean"]), tuple(raw["std"]), tuple(raw["classes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path}: not a readable preprocessing record ({error})", AGAIN) from error
    if made != PICTURE:
        raise InvalidInput(
            f"{path}: this network learned from pictures made by {made}, here they are made by {PICTURE}",
            "train it again on this data",
        )
    return found
