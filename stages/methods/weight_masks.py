"""Which weights stay: masks by magnitude, at random, of N in M, and masks that drop and grow.

Masks are bool, True where a weight is kept. Every function keeps exactly the number of weights that it says, and among
equals the lower index stays; torch.topk leaves their order open, and a threshold alone keeps too many or too few.

- Magnitude, over all tensors together or in each of them (Han et al. 2015); Sparse then Prune and essential sparsity
  take the first, at once.
- Zhu & Gupta, "To prune, or not to prune" (2017), eq. 1: the cubic schedule.
- Evci et al., "Rigging the Lottery" (RigL, ICML 2020), §3, for ViTs Chen et al., SViTE (NeurIPS 2021): densities by
  Erdos-Renyi, then drop the smallest weights and grow where the gradient is largest. SViTE's code drops by a strict
  threshold, so that ties change the number of weights; here it never changes.
- Jaiswal et al., "The Emergence of Essential Sparsity" (NeurIPS 2023): the last level before accuracy falls.
- Jaiswal et al., "Instant Soup" (ICML 2023), as LOTUS (2024) takes it: weak masks joined into one.
- N of M consecutive inputs of an output: Zhou et al., SR-STE (ICLR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def weights_kept(keep: float, total: int) -> int:
    """How many of `total` weights a fraction keeps: the nearest number, halves up; at least 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    return max(1, math.floor(keep * total + 0.5))


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask (n,) of the `count` highest of the scores (n,); of equal ones the lower index first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.numel() - count + 1).values
    above, equal = scores > threshold, scores == threshold
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def highest(scores: Sequence[Tensor], keep: float, *, scope: str) -> list[Tensor]:
    """Masks of the shapes of the scores (magnitudes, for pruning by magnitude), the highest kept.

    Args:
        scope: global ranks the scores of all tensors together, layer keeps the same fraction of each tensor.
    """
    if scope == "layer":
        return [largest(one.flatten(), weights_kept(keep, one.numel())).view_as(one) for one in scores]
    together = torch.cat([one.flatten() for one in scores])
    parts = largest(together, weights_kept(keep, together.numel())).split([one.numel() for one in scores])
    return [part.view_as(one) for part, one in zip(parts, scores, strict=True)]


def first_of(order: Tensor, count: int, shape: torch.Size) -> Tensor:
    """Mask of the first `count` positions of an order (n,), a permutation. Masks of one order are nested."""
    mask = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    mask[order[:count]] = True
    return mask.view(shape)


def cubic_keep(progress: float, keep: float) -> float:
    """Fraction kept when a share `progress`, 0 to 1, of the schedule is over: Zhu & Gupta's eq. 1 from 1 to keep."""
    return keep + (1 - keep) * (1 - min(1.0, max(0.0, progress))) ** 3


def cosine_fraction(progress: float, first: float) -> float:
    """RigL's share of the kept weights that is exchanged: `first`, falling to 0 as half a cosine. progress: 0 to 1."""
    return first / 2 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def erk_counts(shapes: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """How many weights each tensor keeps so that there are `count` in all, in densities as Erdos and Renyi's graphs:
    proportional to the sum of a tensor's sides over their product (RigL, §3(1)). What would get a density above 1
    stays whole. Rounded down; what remains goes to the largest remainders, equal ones by position.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if not 0 < count <= sum(sizes):
        raise ValueError(f"{count} of {sum(sizes)} weights cannot be kept")
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    whole: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in whole]
        left = count - sum(sizes[i] for i in whole)
        scale = left / sum(raw[i] * sizes[i] for i in rest) if rest else 0.0
        over = {i for i in rest if scale * raw[i] > 1}
        if not over:
            break
        whole |= over
    exact = [float(sizes[i]) if i in whole else scale * raw[i] * sizes[i] for i in range(len(sizes))]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts


def drop_and_grow(weight: Tensor, gradient: Tensor, mask: Tensor, exchanged: int) -> Tensor:
    """RigL's next mask, of as many weights as before.

    Of the kept weights the `exchanged` smallest go, then as many of all that are not kept come, those with the largest
    gradient; one that has just gone may come back (its code, and I_active without I_drop in its algorithm 1).
    exchanged: at most the weights that are kept, and at most those that are not.
    """
    kept = int(mask.sum())
    if not 0 <= exchanged <= min(kept, mask.numel() - kept):
        raise ValueError(f"{exchanged} weights cannot be exchanged: {kept} of {mask.numel()} are kept")
    flat = mask.flatten()
    # Below every magnitude and every gradient stands what may not be chosen at all.
    staying = largest(torch.where(flat, weight.abs().flatten(), -1.0), kept - exchanged)
    coming = largest(torch.where(staying, -1.0, gradient.abs().flatten()), exchanged)
    return (staying | coming).view_as(mask)


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the n largest of every m consecutive weights of a row; equal ones by position.

    Args: weight (out, in), in a multiple of m: the groups that sparse tensor cores take lie along the inputs.
    """
    groups = weight.abs().reshape(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view_as(weight)


def joined(masks: Sequence[Tensor], votes: float, magnitudes: Tensor, least: int) -> Tensor:
    """The weights that at least this share of the masks keep, one of them in any case; with votes 0 their union. Where
    these are fewer than `least`, those with the next most votes come too, the larger ones first.

    A union is denser than the masks it is made of, the more so the more they disagree, and of nested masks it is the
    densest: masks of one training at several densities make no soup.

    Args: masks, of (n,) each; magnitudes (n,). Returns: (n,).
    """
    counts = torch.stack([mask.to(torch.float64) for mask in masks]).sum(0)
    enough = int((counts >= max(1, math.ceil(votes * len(masks) - 1e-9))).sum())
    below_one = magnitudes.double() / (2 * magnitudes.max().clamp_min(1e-30))
    return largest(counts + below_one, max(enough, least))


def knee(keeps: Sequence[float], top1: Sequence[float], tolerance: float) -> float:
    """The last of falling fractions before accuracy falls by more than `tolerance` below that of the first, which is
    the dense network's. What comes back up further on is taken for noise.
    """
    enough = 0
    while enough + 1 < len(keeps) and top1[0] - top1[enough + 1] <= tolerance + 1e-9:
        enough += 1
    return keeps[enough]


def bend(keeps: Sequence[float], top1: Sequence[float]) -> float | None:
    """The fraction at which accuracy bends most: farthest above the straight line from the first point to the last,
    with both axes scaled to 1. keeps fall. None where no point is above it, or the last one has lost nothing.

    Satopaa et al. 2011 (Kneedle) without smoothing. It depends on where the levels end, and `knee` does not: it is told
    beside the choice and is not the choice.
    """
    lost, span = top1[0] - top1[-1], keeps[0] - keeps[-1]
    if lost <= 0 or span <= 0:
        return None
    above = [(one - top1[-1]) / lost - (keep - keeps[-1]) / span for keep, one in zip(keeps, top1, strict=True)]
    best = max(range(len(above)), key=above.__getitem__)
    return keeps[best] if above[best] > 1e-9 else None
