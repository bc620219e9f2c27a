"""Patch tickets: which patches of an image are worth training on, as a rank of every patch (0 = most important).

Data-Level Lottery Tickets (Shen et al., IJCAI 2023): a trained ViT that drops tokens at several blocks selects; the
indices that each dropping block keeps are relative to the tokens that reached it and are composed to positions in the
image (§2.3 of the authors' code: idx = idx[stage_topk]). Ranks instead of sets serve every keep rate from one pass of
the selector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def compose_ranks(stage_scores: Sequence[Tensor], stage_kept: Sequence[Tensor], patches: int) -> Tensor:
    """Rank of all patches from a selector that drops tokens in stages.

    A patch that survived more stages ranks before one that survived fewer; among equals in this, the score at the
    last stage that saw them decides, then the lower index.

    Args:
        stage_scores: per stage (B, n_s), the score of each token that reached the stage; n_0 = patches.
        stage_kept: per stage (B, K_s), ascending positions among these n_s.
    Returns: (B, N) int64, a permutation of 0..N-1 in each row.
    """
    batch, device = stage_scores[0].shape[0], stage_scores[0].device
    survived = torch.zeros(batch, patches, dtype=torch.float64, device=device)
    position = torch.arange(patches, device=device).expand(batch, -1)
    for scores, kept in zip(stage_scores, stage_kept, strict=True):
        # Scores are attentions in [0, 1]: a stage number plus half a score keeps the stages apart.
        survived = survived.scatter_add(1, position, scores.double() * 0.5 - _previous(survived, position))
        position = position.gather(1, kept)
        survived = survived.scatter_add(1, position, torch.ones_like(position, dtype=torch.float64))
    return ranks_from_scores(survived)


def _previous(survived: Tensor, position: Tensor) -> Tensor:
    """The fractional part (an earlier stage's score) of the entries at `position`, to be replaced by the new
    stage's.
    """
    held = survived.gather(1, position)
    return held - held.floor()


def ranks_from_scores(scores: Tensor) -> Tensor:
    """Rank 0 for the highest score; equal scores rank by index. scores (B, N) -> (B, N) int64."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def random_ranks(image_ids: Tensor, patches: int, seed: int, epoch: int = 0) -> Tensor:
    """A uniformly random order of the patches of each image, a function of (seed, epoch, image) alone: the same
    whatever batch an image comes in, another one in another epoch.

    Args: image_ids (B,) int64. Returns: (B, N) int64.

    Each (seed, epoch, image, patch) gets a number by Steele et al.'s SplitMix64 (OOPSLA 2014, fig. 17) and the patches
    are sorted by it: no generator an image, so that a batch costs one sort. The authors of the tickets leave the
    control unseeded; then no run can be repeated.
    """
    image = _mixed(_mixed(_mixed(np.uint64(seed % 2**64)) ^ np.uint64(epoch)) ^ image_ids.numpy().astype(np.uint64))
    numbers = _mixed(image[:, None] ^ np.arange(patches, dtype=np.uint64))
    # A tie among 64-bit numbers is not to be expected; a stable sort would give it to the lower index.
    return torch.from_numpy(numbers.argsort(axis=1, kind="stable").argsort(axis=1))


def _mixed(numbers: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's output for these states."""
    with np.errstate(over="ignore"):  # it wraps around, by design
        z = np.atleast_1d(numbers) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def inverse_ranks(ranks: Tensor) -> Tensor:
    """The least important first: the control that shows whether a score means anything. (B, N) -> (B, N) int64."""
    return ranks.shape[1] - 1 - ranks.long()


def center_ranks(grid: tuple[int, int]) -> Tensor:
    """Patches by the distance of their centre from the image's; equal distances go to the lower index. (N,) int64.

    The control for data sets whose objects stand in the middle: it knows no image.
    """
    rows, columns = (2 * torch.arange(side) + 1 - side for side in grid)
    distance = rows.square().unsqueeze(1) + columns.square()  # whole numbers, so that ties are ties
    return ranks_from_scores(-distance.flatten().unsqueeze(0))[0]


def saliency(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Model-free score of each patch: mean magnitude of the brightness gradient inside it.

    Flat patches (sky, paper) score low, edges and texture high. No paper of the four has it; it is the cheap rival
    that an attention ticket has to beat.

    Args: images (B, 3, H, W) float in [0, 1]; grid (h, w) patches.
    Returns: (B, h*w) float32, raster order.
    """
    grey = images.float().mean(1, keepdim=True)
    dy = torch.nn.functional.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 0, 0, 1))
    dx = torch.nn.functional.pad(grey[:, :, :, 1:] - grey[:, :, :, :-1], (0, 1))
    return torch.nn.functional.adaptive_avg_pool2d((dx.square() + dy.square()).sqrt(), grid).flatten(1)


def map_ranks(ranks: Tensor, theta: Tensor, grid: tuple[int, int]) -> Tensor:
    """Carry ranks of the stored image over to an augmented view of it, by nearest patch.

    Args:
        ranks: (B, N) rank of each patch of the stored image.
        theta: (B, 2, 3) affine map from view to image coordinates, both in [-1, 1], x first
            (torch.nn.functional.affine_grid).
        grid: (h, w) patches of both.
    Returns: (B, N) int64, the rank of the image patch under the centre of each view patch; N where that lies outside
    the image (padding is the least important).
    """
    h, w = grid
    ys = (torch.arange(h, device=ranks.device) * 2 + 1) / h - 1
    xs = (torch.arange(w, device=ranks.device) * 2 + 1) / w - 1
    centres = torch.stack([xs.repeat(h), ys.repeat_interleave(w), torch.ones(h * w, device=ranks.device)], dim=1)
    source = centres @ theta.transpose(1, 2)  # (B, N, 2)
    # The small shift breaks the tie of a centre that falls exactly on the border of two patches: the left or upper one
    # wins.
    column = ((source[..., 0] + 1) * w / 2 - 1e-4).floor().long()
    row = ((source[..., 1] + 1) * h / 2 - 1e-4).floor().long()
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    index = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
    return torch.where(inside, ranks.long().gather(1, index), torch.full_like(index, h * w))


def kept_patches(ranks: Tensor, count: int) -> Tensor:
    """The `count` best-ranked patches of each image, ascending; equal ranks go to the lower index. (B, N) -> (B,
    count).
    """
    order = ranks.sort(dim=1, stable=True).indices
    return order[:, :count].sort(dim=1).values
