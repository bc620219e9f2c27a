"""Which patches of a training view are kept: by ranks of the stored image that follow it (Cached), drawn anew for each
image and epoch (Drawn), or by looking at the view itself (Online).

A policy is asked once a step, after augmentation and mixing, with everything that happened to the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..methods.patch_tickets import kept_patches, map_ranks, random_ranks


@dataclass(frozen=True)
class Views:
    """A batch as the student will see it, and how it came about.

    indices (B,): positions in the split. theta (B, 2, 3): view to image coordinates, as affine_grid takes them.
    share: of each image's own content; the rest is image B-1-i's (1.0: nothing mixed). images (B, 3, S, S): in [0, 1],
    augmented and mixed, on the device of training.
    """

    indices: np.ndarray
    theta: Tensor
    share: float
    epoch: int
    images: Tensor


class PatchPolicy(Protocol):
    """Patches of every view that the student embeds and attends to."""

    @property
    def count(self) -> int:
        """Patches kept of each image."""

    @property
    def follows_image(self) -> bool:
        """Whether patches are known on the stored image only. Then augmentation has to say where pixels went, and may
        paste nothing from elsewhere.
        """

    @property
    def macs(self) -> int:
        """What looking at one view costs, in multiply-accumulates of a network; 0 without one."""

    def kept(self, views: Views) -> Tensor:
        """(B, count) int64 patch indices, ascending, on the device of the images."""


@dataclass(frozen=True)
class Cached:
    """Ranks made once on the plain images (M, N), carried to each view by its geometry; of a mixture, the mixture of
    both ranks.
    """

    ranks: np.ndarray
    count: int
    grid: tuple[int, int]

    @property
    def follows_image(self) -> bool:
        return True

    @property
    def macs(self) -> int:
        return 0

    def kept(self, views: Views) -> Tensor:
        ranks = torch.from_numpy(self.ranks[views.indices].astype(np.int64))
        mapped = map_ranks(ranks, views.theta, self.grid).float()
        if views.share < 1:
            mapped = mapped * views.share + mapped.flip(0) * (1 - views.share)
        return kept_patches(mapped, self.count).to(views.images.device)


@dataclass(frozen=True)
class Drawn:
    """Random patches of the view, anew in each epoch, from (seed, epoch, image) alone."""

    patches: int  # N of an image
    count: int
    seed: int

    @property
    def follows_image(self) -> bool:
        return False

    @property
    def macs(self) -> int:
        return 0

    def kept(self, views: Views) -> Tensor:
        ranks = random_ranks(torch.from_numpy(views.indices), self.patches, self.seed, views.epoch)
        return kept_patches(ranks, self.count).to(views.images.device)


@dataclass(frozen=True)
class Online:
    """Ranks of the very view that the student sees, as in the paper; `rank` is frozen and learns nothing from it.

    rank: (B, 3, S, S) in [0, 1] -> (B, N), 0 = most important.
    """

    rank: Callable[[Tensor], Tensor]
    count: int
    macs: int

    @property
    def follows_image(self) -> bool:
        return False

    def kept(self, views: Views) -> Tensor:
        with torch.inference_mode():
            kept = kept_patches(self.rank(views.images), self.count)
        return kept.clone()  # autograd may not save a tensor of inference mode
