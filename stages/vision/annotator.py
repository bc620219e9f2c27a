"""Who labels the patches for token labelling: a frozen network whose class head is applied at every place of its last
map, a ViT's to every patch token, a convolutional network's to every location.

It sees each view as the student will, before mixing, so its labels need no geometry of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.token_labels import on_grid, top_labels
from . import external
from .loss_settings import TokenLabels
from .network import Network
from .preprocessing import Normaliser, check, load
from .vit import ViT, head_on_patches
from .weights import load_network


class Annotator:
    """views (B, 3, S, S) in [0, 1] -> class probabilities of every patch (B, N, K), N patches of the student's grid.

    places: h and w of its own map. macs: for one image.
    """

    def __init__(
        self,
        answers: Callable[[Tensor], Tensor],
        normalise: Normaliser,
        *,
        image_size: int,
        grid: tuple[int, int],
        top: int | None,
    ) -> None:
        """answers: normalised images -> logits at every place, (B, K, h, w)."""
        self.answers, self.normalise, self.grid, self.top = answers, normalise, grid, top
        probe = torch.zeros(1, 3, image_size, image_size, device=normalise.mean.device)
        self.macs = external.count_macs(answers, probe)
        with torch.no_grad():
            high, wide = answers(probe).shape[2:]
        self.places = (high, wide)

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        return top_labels(on_grid(self.answers(self.normalise(views)).softmax(1), self.grid), self.top)


def create(
    settings: TokenLabels | None,
    network: Network,
    classes: tuple[str, ...],
    device: torch.device,
    *,
    image_size: int,
    artifact: tuple[Path, str] | None,
) -> Annotator | None:
    """Who labels the patches of a network, which answers for each of them from now on; None without token labels.

    artifact: folder and reference of a model; None: settings.source names one of timm's. Raises: InvalidInput as
    from_artifact and from_timm.
    """
    if settings is None:
        return None
    assert isinstance(network, ViT), "preflight refuses a Swin"
    network.set_token_training(True)
    how: dict[str, Any] = {"image_size": image_size, "grid": network.architecture.grid, "top": settings.top}
    if artifact is not None:
        return from_artifact(*artifact, classes, device, **how)
    return from_timm(settings.source, len(classes), device, **how)


def from_artifact(
    folder: Path, who: str, classes: tuple[str, ...], device: torch.device, *, image_size: int, **how: Any
) -> Annotator:
    """The network of a model artifact; `how`: grid and top. Raises: InvalidInput when it answers other classes or takes
    other images.
    """
    network, own = load_network(folder), load(folder)
    check(own, classes, image_size, f"token_labels.source {who}")
    if not isinstance(network, ViT):
        raise InvalidInput(f"token_labels.source {who} is a Swin, whose last tokens are no patches", "name a ViT")
    whole = network.with_tokens(()).to(device).requires_grad_(False)  # every patch has an answer

    return Annotator(whole.place_logits, own.normaliser(device), image_size=image_size, **how)


def from_timm(text: str, classes: int, device: torch.device, *, image_size: int, **how: Any) -> Annotator:
    """The network of "timm:<name>", pretrained; `how`: grid and top. Raises: InvalidInput for one that has no answer
    for every place.
    """
    outside = external.load(text, classes, image_size)
    network = outside.network.to(device).requires_grad_(False)
    normalise = Normaliser(outside.mean, outside.std, device)
    return Annotator(lambda images: place_logits(network, images), normalise, image_size=image_size, **how)


def place_logits(network: nn.Module, images: Tensor) -> Tensor:
    """The class head of a timm network at every place of its last map, or on every patch token: (B, K, h, w).

    Its own pooling is asked about one place at a time, so that norms and layers around the pooling are the network's.
    Raises: InvalidInput where the features are neither a map nor the tokens of a grid.
    """
    body: Any = network  # timm is not typed
    features: Tensor = body.forward_features(images)
    if features.dim() == 4 and getattr(body, "output_fmt", "NCHW") == "NHWC":
        batch, high, wide, width = features.shape
        logits = body.forward_head(features.reshape(-1, 1, 1, width))
    elif features.dim() == 4:
        batch, width, high, wide = features.shape
        logits = body.forward_head(features.permute(0, 2, 3, 1).reshape(-1, width, 1, 1))
    else:
        high, wide = getattr(getattr(body, "patch_embed", None), "grid_size", None) or (0, 0)
        prefix = int(getattr(body, "num_prefix_tokens", 0))
        batch = len(features)
        if features.dim() != 3 or features.shape[1] != prefix + high * wide:
            raise InvalidInput(
                f"{type(body).__name__} cannot label patches: its features, of shape {tuple(features.shape)}, are "
                "neither a map nor the tokens of a grid",
                "name a convolutional network or a plain ViT as token_labels.source",
            )
        logits = head_on_patches(body, features, prefix)
    maps: Tensor = logits.reshape(batch, high, wide, -1).permute(0, 3, 1, 2)
    return maps
