"""A proxy run: a short training of a small network on all training images, and what it answers about each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .dataset import Images
from .evaluate import logits
from .network import Network
from .recipe import Recipe
from .training import Normaliser, Pool, Tick, fit


@dataclass(frozen=True)
class ProxyRun:
    """The network of one run and its answers on the clean training images, M of them, K classes, after E epochs.

    probabilities: (M, K) float32 at the end. correct: (E, M) bool. images: passes forward and backward.
    macs: of training and of looking at all images after each epoch. earlier_seconds: spent before a kill.
    """

    network: Network
    probabilities: np.ndarray
    correct: np.ndarray
    images: int
    macs: int
    earlier_seconds: float


def train_proxy(
    network: Network,
    train: Images,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    normalise: Normaliser,
    work: Path,
    stem: str,
    tick: Tick,
) -> ProxyRun:
    """Train, and look at every image after each epoch. `work` survives a kill; files that begin with `stem` are this
    run's.
    """

    def remember(epoch: int, current: Network) -> None:
        answers = logits(current, train, normalise, device).softmax(1).numpy().astype(np.float32)
        _save_array(work / f"{stem}-epoch-{epoch:04d}.npy", answers)

    fitted = fit(
        network,
        Pool(train, np.arange(len(train))),
        recipe,
        seed=seed,
        device=device,
        normalise=normalise,
        after_epoch=remember,
        checkpoint=work / f"{stem}.safetensors",
        tick=tick,
    )
    answers = [np.load(path) for path in sorted(work.glob(f"{stem}-epoch-*.npy"))]
    # Forward and backward are three forwards; each epoch's look at all images is one more.
    macs = network.architecture.macs() * (3 * fitted.images + len(fitted.curve) * len(train))
    correct = np.stack([a.argmax(1) == train.labels for a in answers])
    return ProxyRun(fitted.network, answers[-1], correct, fitted.images, macs, fitted.earlier_seconds)


def _save_array(path: Path, array: np.ndarray) -> None:
    """A file that a kill leaves whole or not at all."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
