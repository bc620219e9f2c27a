"""Accuracy and loss of a network on a split, under a stated token policy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..methods.patch_tickets import kept_patches
from . import processes
from .dataset import Images
from .network import Network
from .preprocessing import Normaliser


@torch.inference_mode()
def logits(
    network: Network,
    images: Images,
    normalise: Normaliser,
    device: torch.device,
    *,
    ranks: np.ndarray | None = None,
    patches: int | None = None,
    batch: int = 256,
) -> Tensor:
    """(M, K) float32 on the CPU, in the order of the split; with ranks (M, N), the best `patches` of each image
    only. Several processes share the work, and each gets all answers.
    """
    training = network.training
    network.eval()
    order, turns = processes.dealt(len(images), batch)

    def answers() -> Iterator[np.ndarray]:
        done = 0
        for pixels in images.batches(order, batch):
            views = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float().div_(255.0)
            kept = None
            if ranks is not None and patches is not None:
                rows = torch.from_numpy(ranks[order[done : done + len(pixels)]].astype(np.int64))
                kept = kept_patches(rows, patches).to(device)
            yield network(normalise(views), kept).float().cpu().numpy()
            done += len(pixels)

    found = np.concatenate(list(processes.in_order(answers(), turns)))
    network.train(training)
    return torch.from_numpy(found.astype(np.float32))


def top1(
    network: Network,
    images: Images,
    normalise: Normaliser,
    device: torch.device,
    *,
    ranks: np.ndarray | None = None,
    patches: int | None = None,
) -> float:
    """Fraction of the split whose highest logit is the label's."""
    answers = logits(network, images, normalise, device, ranks=ranks, patches=patches).argmax(1).numpy()
    return float((answers == images.labels).mean())


def top1_and_loss(network: Network, images: Images, normalise: Normaliser, device: torch.device) -> tuple[float, float]:
    """Fraction of the split whose highest logit is the label's, and the mean cross-entropy."""
    answers, labels = logits(network, images, normalise, device), torch.from_numpy(images.labels)
    loss = torch.nn.functional.cross_entropy(answers.double(), labels)
    return float((answers.argmax(1) == labels).double().mean()), float(loss)
