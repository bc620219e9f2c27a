"""Several processes that work on one thing: which part of it is whose, and what they tell each other about it. In a
single process nothing is sent.

A step of so many processes is the step of one: they draw alike for the whole batch, each computes its rows of it, and
gradients are averaged so that every row counts the same. A pool of examples is one global pool: all processes see the
statistics of all of them, and what the first one decides is what all of them do. (Tri-Level E-ViT's code draws and
swaps on every GPU alone, so that each trains on another subset.) To look at a whole split, batches are dealt out, and
what comes back is what one process would have seen, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..methods import InvalidInput


def count() -> int:
    """Processes that work together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


@dataclass(frozen=True)
class Share:
    """The rows of a batch that this process computes. rows (n,): positions in the batch, ascending, at least one.
    count: rows of the whole batch. own: those of `rows` that count; a process that gets none computes one for nothing,
    since the others wait for its gradients. least: the fewest that any of the processes computes.
    """

    rows: np.ndarray
    count: int
    own: int
    least: int

    @property
    def scale(self) -> float:
        """What a mean over the own rows is multiplied by, so that the mean over processes is that over the batch."""
        return self.own * count() / self.count


def share(batch: int, *, pairs: bool = False) -> Share:
    """This process's rows of a batch. pairs: rows i and batch-1-i, which are mixed with each other, go together, so
    that they are each other's mirror among the own rows too.
    """
    of = count()
    every = [_dealt(batch, here, of, pairs) for here in range(of)]
    least = max(1, min(len(rows) for rows in every))
    rows = every[rank()]
    return Share(rows if len(rows) else np.zeros(1, np.int64), batch, len(rows), least)


def _dealt(batch: int, here: int, of: int, pairs: bool) -> np.ndarray:
    if not pairs:
        return np.arange(here, batch, of)
    half = batch // 2
    left = np.arange(here, half, of)
    middle = [half] if batch % 2 and half % of == here else []
    return np.concatenate([left, middle, batch - 1 - left[::-1]]).astype(np.int64)


def check_batch(size: int) -> None:
    """Raises: InvalidInput for a batch that cannot be divided evenly."""
    if size % count():
        raise InvalidInput(f"batch_size {size} cannot be divided by {count()} processes", "take a multiple of it")


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of their ranks. rows (n, F) float64, n may differ -> (sum of n, F)."""
    processes = count()
    if processes == 1:
        return rows
    device = _device()
    length = torch.tensor(rows.shape, device=device)
    lengths = [torch.zeros_like(length) for _ in range(processes)]
    dist.all_gather(lengths, length)
    sizes = [int(one[0]) for one in lengths]
    # A process without rows may not know how wide they are.
    padded = torch.zeros(max(sizes), max(int(one[1]) for one in lengths), dtype=torch.float64, device=device)
    padded[: len(rows), : rows.shape[1]] = torch.from_numpy(rows)
    parts = [torch.zeros_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return np.concatenate([one[:size].cpu().numpy() for one, size in zip(parts, sizes, strict=True)])


def dealt(images: int, batch: int) -> tuple[np.ndarray, int]:
    """Whose turn it is when a split is looked at: batch k is for process k modulo their number.

    Returns: positions (n,) of the own images in order, of which every `batch` are one turn; how many turns there are.
    """
    mine = [np.arange(start, min(start + batch, images)) for start in range(rank() * batch, images, batch * count())]
    return np.concatenate([np.zeros(0, np.int64), *mine]), -(-images // (batch * count()))


def in_order(answers: Iterator[np.ndarray], turns: int) -> Iterator[np.ndarray]:
    """The answers (n, F) of all processes to what they were dealt, in the order of the split, a turn of all at once."""
    for _ in range(turns):
        own = next(answers, None)
        yield gather(np.zeros((0, 0)) if own is None else own.astype(np.float64))


def total(values: Tensor) -> Tensor:
    """The sum over the processes of their values, of the same shape everywhere, on their device."""
    if count() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def decided(values: np.ndarray) -> np.ndarray:
    """The first process's values, in every process. values: a numeric array of the same shape everywhere."""
    if count() == 1:
        return values
    sent = torch.from_numpy(values.copy()).to(_device())
    dist.broadcast(sent, src=0)
    result: np.ndarray = sent.cpu().numpy()
    return result


def check_alike(value: int, what: str) -> None:
    """Raises: InvalidInput, in every process, when they do not all have the same value."""
    if len(seen := np.unique(gather(np.array([[float(value)]])))) > 1:
        raise InvalidInput(
            f"the processes see {what} {', '.join(f'{one:g}' for one in seen)}",
            "all nodes must share the folder of artifacts",
        )


def _device() -> torch.device:
    return torch.device("cpu" if "gloo" in dist.get_backend_config() else "cuda")
