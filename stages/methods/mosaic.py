"""Patch tickets for networks that need a whole grid: what is not in the ticket is blanked, or cut out of the image.

Data-Level Lottery Tickets (Shen et al., IJCAI 2023) trains Swin in these two ways. `blank` keeps image, grid and
windows as they are and saves nothing. `pack` lays the kept patches, in raster order, into a smaller square image: it
saves what that image is smaller, and patches that touch in it need not have touched before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blank(images: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """Multiply all other patches by 0. On normalised images 0 is the mean colour.

    Args:
        images: (B, C, S, S) normalised; kept: (B, K) patch indices; grid: (h, w) patches that tile the image.
    Returns: (B, C, S, S).
    """
    h, w = grid
    stays = torch.zeros(len(images), h * w, dtype=images.dtype, device=images.device)
    stays = stays.scatter(1, kept, 1.0).view(-1, 1, h, w)
    high, wide = images.shape[2] // h, images.shape[3] // w
    return images * stays.repeat_interleave(high, 2).repeat_interleave(wide, 3)


def pack(images: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """The kept patches as an image of k x k patches, raster order in both; all of them give the image back.

    Args:
        images: (B, C, S, S); kept: (B, k * k) patch indices, ascending; grid: (h, w) patches that tile the image.
    Returns: (B, C, k * S / h, k * S / w).
    """
    h, w = grid
    side = math.isqrt(kept.shape[1])
    if side * side != kept.shape[1]:
        raise ValueError(f"{kept.shape[1]} patches fill no square")
    batch, channels, height, width = images.shape
    high, wide = height // h, width // w
    patches = images.reshape(batch, channels, h, high, w, wide).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, h * w, channels * high * wide)
    chosen = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    chosen = chosen.reshape(batch, side, side, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    return chosen.reshape(batch, channels, side * high, side * wide)
