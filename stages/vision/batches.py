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
from .processes import Share
from .recipe import Recipe

RANKS_APART = 1_000_003  # between the seeds of what the networks of two processes draw
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

    @property
    def entering(self) -> int | None:
        """Patches of a ticket that enter the network; None: all of the image."""
        return None if self.patches is None else self.patches.count

    @property
    def looking(self) -> int:
        """MACs of looking at one view to choose its patches."""
        return 0 if self.patches is None else self.patches.macs


@dataclass
class Batch:
    """One step's input on the device. clean: the un-mixed labels (B,). share: an image's own part of its view.
    token_labels: of the kept patches, where there is an annotator. draws: the seed of what the network itself draws,
    dropout and stochastic depth. Of several processes each has some rows of the step's batch (processes.Share).
    """

    images: Tensor  # (B, 3, S, S) normalised
    targets: Tensor  # (B, K) soft
    kept: Tensor | None  # (B, K) patch indices
    clean: Tensor
    ids: np.ndarray  # (B,) positions in the pool's images
    weights: Tensor | None  # (B,) what each loss is multiplied by
    share: float
    rows: Share
    counted: float  # rows of the step, all processes together, or the sum of their weights
    token_labels: Tensor | None = None  # (B, n, K) soft
    draws: int = 0

    def parts(self, count: int) -> Iterator[Batch]:
        """The same images in so many parts (or one an image), in order, of sizes that differ by one at most. Of several
        processes all get equally many.
        """
        if count == 1:
            yield self
            return
        for rows in np.array_split(np.arange(len(self.images)), min(count, self.rows.least)):
            one = slice(int(rows[0]), int(rows[-1]) + 1)
            yield replace(
                self,
                images=self.images[one],
                targets=self.targets[one],
                kept=None if self.kept is None else self.kept[one],
                clean=self.clean[one],
                ids=self.ids[one],
                weights=None if self.weights is None else self.weights[one],
                rows=replace(self.rows, own=min(self.rows.own, len(rows))),
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
        processes.check_batch(recipe.batch_size)
        tied = pool.patches is not None and pool.patches.follows_image
        self.augment = Augmenter(recipe.augment, pool.images.size, colour_only=tied)
        self.mix = Mixer(recipe.mixup, recipe.cutmix, recipe.smoothing, len(pool.images.classes))

    def rest(self, clock: Clock) -> Iterator[Batch]:
        """What is left of the present pass. The clock is to be moved on between one batch and the next."""
        chosen = self.policy.begin(clock.epoch)
        order = torch.randperm(len(chosen.ids), generator=_generator(self.seed, clock.epoch, -1)).numpy()
        clock.begin(len(order), self.size)
        steps = [self._rows(order[n * self.size : (n + 1) * self.size]) for n in range(clock.position, clock.steps)]
        if not steps:
            return
        own = np.concatenate([places[share.rows] for places, share in steps])
        longest = len(steps[0][1].rows)  # of all but the last, which may be shorter
        for (places, share), pixels in zip(steps, self.pool.images.batches(chosen.ids[own], longest), strict=True):
            weights = None if chosen.weights is None else chosen.weights[places]
            yield self._prepare(clock, pixels, chosen.ids[places[share.rows]], weights, share)

    def _rows(self, places: np.ndarray) -> tuple[np.ndarray, Share]:
        """The places of a step's batch, and which rows of it are this process's."""
        mixing = self.mix.mixer is not None
        if mixing and len(places) > 1:  # timm mixes in pairs; an odd last image of an epoch sits out
            places = places[: len(places) - len(places) % 2]
        return places, processes.share(len(places), pairs=mixing)

    def _prepare(
        self, clock: Clock, pixels: np.ndarray, indices: np.ndarray, of_all: np.ndarray | None, share: Share
    ) -> Batch:
        generator = _generator(self.seed, clock.epoch, clock.position)
        views, theta = self.augment(pixels, generator, self.device, share)
        labels = torch.from_numpy(self.pool.images.labels[indices]).to(self.device)
        kept = None
        of_patches = None if self.annotate is None else self.annotate(views)  # before the mixing writes over them
        mixed = self.mix(views, labels, generator)
        if self.pool.patches is not None and clock.now < self.whole_from:
            kept = self.pool.patches.kept(Views(indices, theta, mixed.share, clock.epoch, mixed.images))
        if of_patches is not None:
            of_patches = mixed_labels(of_patches, patch_shares(mixed.own, self.grid).to(self.device))
            of_patches = of_patches if kept is None else labels_of(of_patches, kept)
        draws = int(torch.randint(2**62, (1,), generator=generator))
        return Batch(
            images=self.normalise(mixed.images),
            targets=mixed.targets,
            kept=kept,
            clean=labels,
            ids=indices,
            weights=None if of_all is None else torch.from_numpy(of_all[share.rows]).to(self.device),
            share=mixed.share,
            rows=share,
            counted=share.count if of_all is None else float(torch.from_numpy(of_all).sum()),
            token_labels=of_patches,
            draws=draws + processes.rank() * RANKS_APART,
        )


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """A generator for one step (or for the order of an epoch, step -1), far from its neighbours."""
    mixed = np.random.SeedSequence([seed, epoch, step + 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
