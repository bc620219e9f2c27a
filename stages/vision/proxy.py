"""A proxy run: a short training of a small network on all training images, and what it answers about each of them.

M images, K classes, E epochs, C features. After each epoch every image is looked at once, on its plain view, and what
all scores need is reduced in that one pass to a row of M numbers on the disk; in memory are one batch and one row.

    correct.npy                                  (E, M) bool      was the label the highest answer
    el2n.npy grand.npy margin.npy entropy.npy    (E, M) float32   methods/example_scores.py
    distance.npy                                 (M,) float32     to the class centre, after the last epoch
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.example_scores import class_distances, el2n, entropy, forgetting, grand, margin
from .batches import Pool
from .dataset import Images
from .network import Network
from .preprocessing import Normaliser
from .recipe import Recipe
from .training import Fitted, Tick, fit

BY_EPOCH = ("el2n", "grand", "margin", "entropy")
KINDS = {"correct": np.bool_, **dict.fromkeys(BY_EPOCH, np.float32)}


def train_proxy(
    network: Network,
    train: Images,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    normalise: Normaliser,
    work: Path,
    out: Path,
    tick: Tick,
) -> Fitted:
    """Train, look at every image after each epoch, leave the statistics in `out`. `work` survives a kill: a run that
    goes on from there ends with the same files.
    """
    epochs = math.ceil(recipe.total_steps(len(train)) / math.ceil(len(train) / recipe.batch_size))
    rows = {name: _rows(work / f"{name}.npy", (epochs, len(train)), kind) for name, kind in KINDS.items()}

    def remember(epoch: int, current: Network) -> None:
        spool = work / "features.npy" if epoch == epochs else None
        _look(current, train, normalise, device, {name: array[epoch - 1] for name, array in rows.items()}, spool)
        for array in rows.values():
            array.flush()  # the checkpoint that says this epoch is done must not be ahead of them
        if spool is not None:
            features = np.load(spool, mmap_mode="r")
            _save_array(work / "distance.npy", class_distances(features, train.labels, len(train.classes)))
            spool.unlink()

    fitted = fit(
        network,
        Pool(train, np.arange(len(train))),
        recipe,
        seed=seed,
        device=device,
        normalise=normalise,
        after_epoch=remember,
        checkpoint=work / "proxy.safetensors",
        tick=tick,
    )
    for name in (*KINDS, "distance"):
        shutil.copyfile(work / f"{name}.npy", out / f"{name}.npy")
    return fitted


def macs(network: Network, fitted: Fitted, images: int) -> int:
    """Multiply-accumulates of a run: forward and backward are three forwards, each look at all images is one."""
    return network.architecture.macs() * (3 * fitted.images + len(fitted.curve) * images)


def statistic(folder: Path, name: str, epoch: int | None) -> np.ndarray:
    """(M,) float32 of one run: a score after an epoch (from 1; None: the last), "forgetting" or "distance".

    Raises: InvalidInput when the run had fewer epochs.
    """
    if name == "distance":
        distances: np.ndarray = np.load(folder / "distance.npy", allow_pickle=False)
        return distances
    array = np.load(folder / f"{'correct' if name == 'forgetting' else name}.npy", mmap_mode="r", allow_pickle=False)
    if name == "forgetting":
        return forgetting(array)
    if epoch is not None and epoch > len(array):
        raise InvalidInput(
            f"examples.epoch is {epoch}, and the proxy ran for {len(array)} epochs", "lower it, or raise proxy.epochs"
        )
    return np.array(array[-1 if epoch is None else epoch - 1])


@torch.inference_mode()
def _look(
    network: Network,
    images: Images,
    normalise: Normaliser,
    device: torch.device,
    rows: dict[str, np.ndarray],
    spool: Path | None,
    batch: int = 256,
) -> None:
    """One pass over all images: fills the rows (M,), and with `spool` a file of features (M, C)."""
    training = network.training
    network.eval()
    features: np.ndarray | None = None
    for start, (logits, inputs) in zip(
        range(0, len(images), batch), _answers(network, images, normalise, device, batch), strict=True
    ):
        here = slice(start, start + len(logits))
        labels = torch.from_numpy(images.labels[here]).to(device)
        probabilities = logits.float().softmax(1)
        rows["correct"][here] = (logits.argmax(1) == labels).cpu().numpy()
        rows["el2n"][here] = el2n(probabilities, labels).cpu().numpy()
        rows["grand"][here] = grand(probabilities, labels, inputs.float()).cpu().numpy()
        rows["margin"][here] = margin(probabilities).cpu().numpy()
        rows["entropy"][here] = entropy(probabilities).cpu().numpy()
        if spool is not None:
            if features is None:
                shape = (len(images), inputs.shape[2])
                features = np.lib.format.open_memmap(spool, mode="w+", dtype=np.float32, shape=shape)
            features[here] = inputs.float().mean(1).cpu().numpy()
    network.train(training)


def _answers(
    network: Network, images: Images, normalise: Normaliser, device: torch.device, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch the logits (B, K) and what the last linear layers read, (B, H, C): two of them in a distilled
    DeiT, whose logits are the mean of both. A head that answers for every patch (LV-ViT's) is left out.
    """
    given = network.body.get_classifier()
    heads: tuple[nn.Module, ...] = given if isinstance(given, tuple) else (given,)
    read: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for head in heads]
    try:
        for pixels in images.batches(np.arange(len(images)), batch):
            views = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float().div_(255.0)
            read.clear()
            logits = network(normalise(views))
            yield logits, torch.stack([pooled for pooled in read if pooled.ndim == 2], 1)
    finally:
        for hook in hooks:
            hook.remove()


def _rows(path: Path, shape: tuple[int, int], kind: type[np.generic]) -> np.memmap:
    """A file of one row an epoch, made whole or not at all, or as a killed run left it."""
    if not path.exists():
        temporary = path.with_suffix(".part")
        np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape).flush()
        temporary.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")


def _save_array(path: Path, array: np.ndarray) -> None:
    """A file that a kill leaves whole or not at all."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
