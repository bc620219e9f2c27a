"""What several training processes tell each other about examples. In a single process nothing is sent.

A pool of examples is one global pool: every process trains on its part of each batch, all of them see the statistics of
all of them, and what the first one decides is what all of them do. (Tri-Level E-ViT's code draws and swaps on every
GPU alone, so that each trains on another subset.) Gradients are not averaged here.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ..methods import InvalidInput


def count() -> int:
    """Processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def part(order: np.ndarray, batch: int) -> tuple[np.ndarray, int]:
    """This process's share of an epoch.

    Args: order (n,), the whole epoch, the same in every process; batch: examples a step, all processes together.
    Returns: the own examples in order, and how many of them a step takes. Every process gets as many steps: a last
    batch with fewer examples than processes sits out.
    Raises: InvalidInput for a batch that cannot be divided evenly.
    """
    processes = count()
    if processes == 1:
        return order, batch
    if batch % processes:
        raise InvalidInput(f"batch_size {batch} cannot be divided by {processes} processes", "take a multiple of it")
    rank = dist.get_rank()
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    own = [one[rank::processes] for one in batches if len(one) >= processes]
    return np.concatenate(own) if own else order[:0], batch // processes


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of their ranks. rows (n, F) float64, n may differ -> (sum of n, F)."""
    processes = count()
    if processes == 1:
        return rows
    device = _device()
    length = torch.tensor([len(rows)], device=device)
    lengths = [torch.zeros_like(length) for _ in range(processes)]
    dist.all_gather(lengths, length)
    sizes = [int(one) for one in lengths]
    padded = torch.zeros(max(sizes), rows.shape[1], dtype=torch.float64, device=device)
    padded[: len(rows)] = torch.from_numpy(rows)
    parts = [torch.zeros_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return np.concatenate([one[:size].cpu().numpy() for one, size in zip(parts, sizes, strict=True)])


def decided(values: np.ndarray) -> np.ndarray:
    """The first process's values, in every process. values: a numeric array of the same shape everywhere."""
    if count() == 1:
        return values
    sent = torch.from_numpy(values.copy()).to(_device())
    dist.broadcast(sent, src=0)
    result: np.ndarray = sent.cpu().numpy()
    return result


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
