"""How patches are ranked: by a selector network, by saliency, by the distance from the centre. A ranker looks at views,
(B, 3, S, S) in [0, 1] -> (B, N) with rank 0 first; the tables of a whole split are the ranker's answers on its plain
images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..methods.patch_tickets import (
    center_ranks,
    compose_ranks,
    inverse_ranks,
    random_ranks,
    ranks_from_scores,
    saliency,
)
from . import processes
from .dataset import Images, Splits
from .preprocessing import Normaliser
from .vit import ViT

Ranker = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ByAttention:
    """Composed ranks of a token-dropping network in eval mode; inverse: the least attended first."""

    selector: ViT
    normalise: Normaliser
    inverse: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        scores, kept = self.selector.select(self.normalise(images))
        ranks = compose_ranks(scores, kept, self.selector.architecture.patches)
        return inverse_ranks(ranks) if self.inverse else ranks


@dataclass(frozen=True)
class BySaliency:
    """Ranks by brightness gradient; no model."""

    grid: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        return ranks_from_scores(saliency(images, self.grid))


@dataclass(frozen=True)
class ByCenter:
    """The same ranks for every image: the middle first."""

    grid: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        return center_ranks(self.grid).to(images.device).expand(len(images), -1)


def ranker(method: str, grid: tuple[int, int], selector: ByAttention | None) -> Ranker:
    """The ranker of a method of `ticket.patches`; selector: for the methods that need one, the network that ranks."""
    if method in ("attention", "inverse") and selector is not None:
        return replace(selector, inverse=method == "inverse")
    return BySaliency(grid) if method == "saliency" else ByCenter(grid)


@torch.inference_mode()
def table(rank: Ranker, images: Images, device: torch.device, order: np.ndarray, batch: int = 256) -> np.ndarray:
    """(m, N) ranks of these m images of a split, plain. Several processes share the work, and each gets all ranks."""
    own, turns = processes.dealt(len(order), batch)
    answers = (rank(_views(pixels).to(device)).cpu().numpy() for pixels in images.batches(order[own], batch))
    # Ranks are below 2**16: kept small while they come in.
    return np.concatenate([ranks.astype(np.int32) for ranks in processes.in_order(answers, turns)]).astype(np.int64)


@dataclass(frozen=True)
class Tables:
    """What write_tables left, besides its files: how many images it ranked, and the ranks of a sample (n,) of training
    images, (n, N).
    """

    ranked: int
    sample: np.ndarray
    sample_ranks: np.ndarray


def write_tables(
    folder: Path,
    splits: Splits,
    method: str,
    grid: tuple[int, int],
    selector: ByAttention | None,
    device: torch.device,
    *,
    seed: int,
    training: bool,
) -> Tables:
    """ranks_calibration.npy, ranks_test.npy and, with `training`, ranks.npy: (M, N) in as few bytes as N allows."""
    patches = grid[0] * grid[1]
    kind = np.uint8 if patches <= 256 else np.uint16  # 255 is the highest rank of 256 patches
    rank = None if method in ("random", "random_fixed") else ranker(method, grid, selector)
    ranked = 0

    def ranks_of(images: Images, salt: int, order: np.ndarray) -> np.ndarray:
        nonlocal ranked
        ranked += len(order)
        if rank is None:
            return random_ranks(torch.from_numpy(order), patches, seed * 3 + salt).numpy()
        return table(rank, images, device, order)

    for name, images, salt in (("ranks_calibration", splits.calibration, 1), ("ranks_test", splits.test, 2)):
        np.save(folder / f"{name}.npy", ranks_of(images, salt, np.arange(len(images))).astype(kind))
    sample = _sample(splits.train)
    if training:
        ranks = ranks_of(splits.train, 0, np.arange(len(splits.train)))
        np.save(folder / "ranks.npy", ranks.astype(kind))
        shown = ranks[sample]
    else:
        shown = ranks_of(splits.train, 0, sample)
    return Tables(ranked, sample, shown)


def _sample(images: Images) -> np.ndarray:
    """The first image of each class, of two dozen classes at most, spread over all."""
    classes = np.linspace(0, len(images.classes) - 1, min(24, len(images.classes))).round().astype(int)
    return np.array([np.flatnonzero(images.labels == c)[0] for c in classes], dtype=np.int64)


def by_chance(count: int, patches: int, seed: int) -> np.ndarray:
    """(count, N) random ranks, fixed per image."""
    return random_ranks(torch.arange(count), patches, seed).numpy()


def _views(pixels: np.ndarray) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255.0)
