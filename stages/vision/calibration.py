"""The images that importance and repair are judged by, and what a network's gradients on them say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import tickets
from .dataset import SPLIT_SEED, Splits, at_most
from .network import Network
from .preprocessing import Normaliser

Tick = Callable[[int], None]
Source = Literal["ticket", "split"]


class Calibration:
    """Images of the ticket's examples or of the training split, the same share of every class, in eval mode and without
    augmentation.
    """

    def __init__(
        self,
        splits: Splits,
        tickets_folder: Path | None,
        source: Source,
        images: int,
        batch_size: int,
        normalise: Normaliser,
        device: torch.device,
    ) -> None:
        """tickets_folder: None without tickets, which is as source "split". images: at most so many. Raises:
        InvalidInput for tickets of other data.
        """
        self.normalise, self.device, self.batch_size = normalise, device, batch_size
        loaded = None if tickets_folder is None else tickets.load(tickets_folder)
        tickets.check(loaded, splits, None, 0.0)
        chosen = None if source == "split" else loaded
        members = np.arange(len(splits.train)) if chosen is None else chosen.kept
        members = at_most(splits.train.labels, members, images, np.random.default_rng(SPLIT_SEED))
        self.pixels, self.labels = splits.train.pixels(members), splits.train.labels[members]
        self.images = len(members)

    def batches(self, tick: Tick, size: int | None = None) -> Iterator[Tensor]:
        """Normalised images (B, 3, S, S); tick: called with B once a batch is used."""
        size = size or self.batch_size
        for start in range(0, self.images, size):
            part = np.ascontiguousarray(self.pixels[start : start + size])
            yield self.normalise(torch.from_numpy(part).to(self.device).permute(0, 3, 1, 2).float().div_(255.0))
            tick(len(part))

    def gradients(
        self, network: Network, tick: Tick, size: int | None = None, each: Callable[[], None] = lambda: None
    ) -> None:
        """dL/dw of the plain cross-entropy, summed over the images. each: called after every batch of `size`."""
        network.eval()
        seen = 0
        for views in self.batches(tick, size):
            target = torch.from_numpy(self.labels[seen : seen + len(views)]).to(self.device)
            torch.nn.functional.cross_entropy(network(views), target, reduction="sum").backward()
            seen += len(views)
            each()

    def squared_gradients(self, network: Network, tick: Tick) -> None:
        """In the place of the gradients the mean over the images of each one's squared gradient."""
        squares = {parameter: parameter.detach().new_zeros(parameter.shape) for parameter in network.parameters()}

        def square() -> None:
            for parameter, total in squares.items():
                if parameter.grad is not None:
                    total.addcmul_(parameter.grad, parameter.grad)
                    parameter.grad = None

        self.gradients(network, tick, 1, square)
        for parameter, total in squares.items():
            parameter.grad = total / self.images
