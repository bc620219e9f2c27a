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
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.example_scores import class_distances, el2n, entropy, forgetting, grand, margin
from . import processes
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
    sharding: Literal["ddp", "fsdp2"] = "ddp",
) -> Fitted:
    """Train, look at every image after each epoch, leave the statistics in `out`. `work` survives a kill: a run that
    goes on from there ends with the same files. Of several processes the first leaves them.
    """
    epochs = math.ceil(recipe.total_steps(len(train)) / math.ceil(len(train) / recipe.batch_size))
    writes = processes.rank() == 0
    rows = {name: _rows(work / f"{name}.npy", (epochs, len(train)), kind) for name, kind in KINDS.items() if writes}

    def remember(epoch: int, current: Network) -> None:
        spool = work / "features.npy" if epoch == epochs else None
        seen = {name: array[epoch - 1] for name, array in rows.items()}
        _look(current, train, normalise, device, seen, spool)
        if not writes:
            return
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
        sharding=sharding,
    )
    if not writes:
        return fitted
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
    """One pass over all images, which several processes share: fills the rows (M,), and with `spool` a file of features
    (M, C), where there are rows.
    """
    training = network.training
    network.eval()
    order, turns = processes.dealt(len(images), batch)

    def statistics() -> Iterator[np.ndarray]:
        done = 0
        for logits, inputs in _answers(network, images, normalise, device, order, batch):
            labels = torch.from_numpy(images.labels[order[done : done + len(logits)]]).to(device)
            yield _statistics(logits, inputs, labels, features=spool is not None).cpu().numpy()
            done += len(logits)

    features, start = None, 0
    for found in processes.in_order(statistics(), turns):
        here = slice(start, start + len(found))
        start += len(found)
        for name, column in zip(rows, found.T, strict=False):
            rows[name][here] = column
        if spool is not None and rows:
            read = found[:, len(KINDS) :]
            if features is None:
                shape = (len(images), read.shape[1])
                features = np.lib.format.open_memmap(spool, mode="w+", dtype=np.float32, shape=shape)
            features[here] = read
    network.train(training)


def _statistics(logits: Tensor, inputs: Tensor, labels: Tensor, *, features: bool) -> Tensor:
    """(B, as many as KINDS, in its order, and with `features` C more)."""
    probabilities = logits.float().softmax(1)
    columns = [
        (logits.argmax(1) == labels).float(),
        el2n(probabilities, labels),
        grand(probabilities, labels, inputs.float()),
        margin(probabilities),
        entropy(probabilities),
    ]
    found = torch.stack([column.float() for column in columns], 1)
    return torch.cat([found, inputs.float().mean(1)], 1) if features else found


def _answers(
    network: Network, images: Images, normalise: Normaliser, device: torch.device, order: np.ndarray, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch the logits (B, K) and what the last linear layers read, (B, H, C): two of them in a distilled
    DeiT, whose logits are the mean of both. A head that answers for every patch (LV-ViT's) is left out.
    """
    given = network.body.get_classifier()
    heads: tuple[nn.Module, ...] = given if isinstance(given, tuple) else (given,)
    read: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for head in heads]
    try:
        for pixels in images.batches(order, batch):
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
