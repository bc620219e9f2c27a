"""From the examples of a pass to what each step is fed: views augmented and mixed, labels, and the patches that are
kept of them, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..methods.token_labels import labels_of, mixed_labels, patch_shares
from . import processes
from .augment import Augmenter, Mixer
from .clock import Clock
from .dataset import Images
from .examples import Policy
from .patches import PatchPolicy, Views
from .preprocessing import Normaliser
from .recipe import Recipe

Annotate = Callable[[Tensor], Tensor]  # views (B, 3, S, S) -> class probabilities of every patch (B, N, K)


@dataclass(frozen=True)
class Pool:
    """What is trained on: images, which of them, and which patches of each view (None: whole images)."""

    images: Images
    members: np.ndarray  # (m,) positions in images
    patches: PatchPolicy | None = None

    @property
    def whole(self) -> bool:
        return self.patches is None


@dataclass
class Batch:
    """One step's input on the device. clean: the un-mixed labels (B,). share: an image's own part of its view.
    token_labels: of the kept patches, where there is an annotator. draws: the seed of what the network itself draws,
    dropout and stochastic depth.
    """

    images: Tensor  # (B, 3, S, S) normalised
    targets: Tensor  # (B, K) soft
    kept: Tensor | None  # (B, K) patch indices
    clean: Tensor
    ids: np.ndarray  # (B,) positions in the pool's images
    weights: Tensor | None  # (B,) what each loss is multiplied by
    share: float
    token_labels: Tensor | None = None  # (B, n, K) soft
    draws: int = 0

    def parts(self, count: int) -> Iterator[Batch]:
        """The same images in so many parts (or one an image), in order, of sizes that differ by one at most."""
        if count == 1:
            yield self
            return
        for rows in np.array_split(np.arange(len(self.images)), min(count, len(self.images))):
            one = slice(int(rows[0]), int(rows[-1]) + 1)
            yield replace(
                self,
                images=self.images[one],
                targets=self.targets[one],
                kept=None if self.kept is None else self.kept[one],
                clean=self.clean[one],
                ids=self.ids[one],
                weights=None if self.weights is None else self.weights[one],
                token_labels=None if self.token_labels is None else self.token_labels[one],
            )


class Batches:
    """The steps of each pass, from wherever the clock stands."""

    def __init__(
        self,
        pool: Pool,
        recipe: Recipe,
        policy: Policy,
        *,
        seed: int,
        device: torch.device,
        normalise: Normaliser,
        grid: tuple[int, int],
        annotate: Annotate | None = None,
        whole_from: int = 0,
    ) -> None:
        """Args: grid: patches of the network, h and w; whole_from: the step from which whole images are seen."""
        self.pool, self.policy, self.size, self.seed, self.device = pool, policy, recipe.batch_size, seed, device
        self.normalise, self.grid, self.annotate, self.whole_from = normalise, grid, annotate, whole_from
        tied = pool.patches is not None and pool.patches.follows_image
        self.augment = Augmenter(recipe.augment, pool.images.size, colour_only=tied)
        self.mix = Mixer(recipe.mixup, recipe.cutmix, recipe.smoothing, len(pool.images.classes))

    def rest(self, clock: Clock) -> Iterator[Batch]:
        """What is left of the present pass. The clock is to be moved on between one batch and the next."""
        chosen = self.policy.begin(clock.epoch)
        order = torch.randperm(len(chosen.ids), generator=_generator(self.seed, clock.epoch, -1)).numpy()
        order, size = processes.part(order, self.size)
        clock.begin(len(order), size)
        order = order[clock.position * size : clock.steps * size]
        for number, pixels in enumerate(self.pool.images.batches(chosen.ids[order], size)):
            places = order[number * size : (number + 1) * size]
            weights = None if chosen.weights is None else torch.from_numpy(chosen.weights[places])
            yield self._prepare(clock, pixels, chosen.ids[places], weights)

    def _prepare(self, clock: Clock, pixels: np.ndarray, indices: np.ndarray, weights: Tensor | None) -> Batch:
        generator = _generator(self.seed, clock.epoch, clock.position)
        views, theta = self.augment(pixels, generator, self.device)
        labels = torch.from_numpy(self.pool.images.labels[indices]).to(self.device)
        even = len(labels) - len(labels) % 2  # timm mixes in pairs; an odd last image of an epoch sits out when mixing
        if self.mix.mixer is not None and even:
            views, theta, labels, indices = views[:even], theta[:even], labels[:even], indices[:even]
        kept = None
        of_patches = None if self.annotate is None else self.annotate(views)  # before the mixing writes over them
        mixed = self.mix(views, labels, generator)
        if self.pool.patches is not None and clock.now < self.whole_from:
            kept = self.pool.patches.kept(Views(indices, theta, mixed.share, clock.epoch, mixed.images))
        if of_patches is not None:
            of_patches = mixed_labels(of_patches, patch_shares(mixed.own, self.grid).to(self.device))
            of_patches = of_patches if kept is None else labels_of(of_patches, kept)
        draws = int(torch.randint(2**62, (1,), generator=generator))
        weights = None if weights is None else weights[: len(labels)].to(self.device)
        images = self.normalise(mixed.images)
        return Batch(images, mixed.targets, kept, labels, indices, weights, mixed.share, of_patches, draws)


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """A generator for one step (or for the order of an epoch, step -1), far from its neighbours."""
    mixed = np.random.SeedSequence([seed, epoch, step + 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
