"""Token labelling: a soft label for every patch, through mixing and tickets (Jiang et al., "All Tokens Matter", NeurIPS
2021, eq. 3).

An annotator's map of class probabilities says what is in each patch. Where the authors un-mix tokens by reshaping them
to a grid (Data-Level Lottery Tickets reshapes the kept ones to 11 x 11, which are no grid), labels here carry their
provenance: each patch of a mixed view has a share of its own image, measured on its pixels, and gets that share of its
own label and the rest of its partner's; a ticket then takes the labels of the patches that it keeps. Theirs keeps the
five highest logits and renormalises them over the crop; here the map is made of the very view, and `top` may be
all classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def top_labels(probabilities: Tensor, top: int | None) -> Tensor:
    """The `top` highest of the last axis, which then sum to 1 again, 0 elsewhere; None: all. Any shape (..., K)."""
    if top is None or top >= probabilities.shape[-1]:
        return probabilities
    values, classes = probabilities.topk(top, dim=-1)
    kept = probabilities.new_zeros(probabilities.shape).scatter(-1, classes, values)
    return kept / kept.sum(-1, keepdim=True)


def on_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Probabilities of a map (B, K, h, w), at the places of a patch grid: (B, N, K) in raster order, sums kept at 1."""
    if maps.shape[2:] != grid:
        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False, antialias=True)
    labels: Tensor = maps.flatten(2).transpose(1, 2)
    return labels


def patch_shares(own: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that is its own image's. own (S, S): of each pixel -> (N,) in raster order."""
    shares: Tensor = F.adaptive_avg_pool2d(own[None, None], grid).flatten()
    return shares


def mixed_labels(labels: Tensor, shares: Tensor) -> Tensor:
    """Labels of mixed views, image i mixed with image B-1-i: (B, N, K), shares (N,) -> (B, N, K)."""
    own = shares[:, None]
    return labels * own + labels.flip(0) * (1 - own)


def labels_of(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels of the patches that a ticket keeps, in its order: (B, N, K), kept (B, n) -> (B, n, K)."""
    return labels.gather(1, kept.unsqueeze(-1).expand(-1, -1, labels.shape[-1]))


def token_label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image's patch tokens with their soft labels, meaned over the tokens: (B, n, K) both ->
    (B,).
    """
    losses: Tensor = -(labels * F.log_softmax(logits, dim=-1)).sum(-1).mean(1)
    return losses
