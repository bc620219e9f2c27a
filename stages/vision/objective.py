"""What a training minimises, without penalties: one loss an image, or their mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..methods.token_labels import token_label_losses
from .batches import Batch
from .forward import Forward
from .loss_settings import TokenLabels

Objective = Callable[[Forward, Batch], Tensor]  # one loss an image (B,), or their mean ()


def cross_entropy(logits: Tensor, targets: Tensor, *, each: bool = False) -> Tensor:
    """Cross-entropy with soft targets (B, K): the mean (), or one for each image (B,)."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none" if each else "mean")


def supervised(network: Forward, batch: Batch) -> Tensor:
    """The plain objective: cross-entropy with the (mixed, smoothed) labels."""
    return cross_entropy(network(batch.images, batch.kept), batch.targets)


def each_supervised(network: Forward, batch: Batch) -> Tensor:
    """As supervised, one loss an image (B,): what a policy that watches or weighs examples needs."""
    return cross_entropy(network(batch.images, batch.kept), batch.targets, each=True)


def labelled(weight: float, *, each: bool) -> Objective:
    """The labels' loss and that of the patches beside it (Jiang et al. 2021, eq. 3). weight: of the patches' loss."""

    def objective(network: Forward, batch: Batch) -> Tensor:
        assert batch.token_labels is not None
        of_class, of_patches = network(batch.images, batch.kept)
        patches = token_label_losses(of_patches, batch.token_labels)
        return cross_entropy(of_class, batch.targets, each=each) + weight * (patches if each else patches.mean())

    return objective


def create(labels: TokenLabels | None, *, each: bool) -> Objective:
    """The labels' loss, and with token labels the patches' beside it. each: one loss an image, for a policy that
    watches or weighs examples.
    """
    if labels is not None:
        return labelled(labels.weight, each=each)
    return each_supervised if each else supervised
