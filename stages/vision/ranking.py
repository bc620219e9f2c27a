"""Patch ranks of a whole split, batch by batch, by a selector network, by saliency or by chance. All return (M, N)
int64, rank 0 first.
"""

from __future__ import annotations

import numpy as np
import torch

from ..methods.patch_tickets import compose_ranks, random_ranks, ranks_from_scores, saliency
from .dataset import Images
from .training import Normaliser
from .vit import ViT


@torch.inference_mode()
def by_attention(
    selector: ViT, images: Images, normalise: Normaliser, device: torch.device, batch: int = 256
) -> np.ndarray:
    """Composed ranks of a token-dropping network in eval mode."""
    parts = []
    for pixels in images.batches(np.arange(len(images)), batch):
        _, scores, kept = selector.select(normalise(_views(pixels).to(device)))
        parts.append(compose_ranks(scores, kept, selector.architecture.patches))
    return torch.cat(parts).numpy()


def by_saliency(images: Images, grid: tuple[int, int], batch: int = 256) -> np.ndarray:
    """Ranks by brightness gradient; no model."""
    order = np.arange(len(images))
    return torch.cat([ranks_from_scores(saliency(_views(p), grid)) for p in images.batches(order, batch)]).numpy()


def by_chance(count: int, patches: int, seed: int) -> np.ndarray:
    """Random ranks, fixed per image."""
    return random_ranks(torch.arange(count), patches, seed).numpy()


def _views(pixels: np.ndarray) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255.0)
