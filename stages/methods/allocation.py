"""How much to cut where: from importance scores to the sets of kept heads, widths and channels that meet a target.

Isomorphic pruning (Fang et al., ECCV 2024): scores are ranked only among groups of the same computational topology
(all MLP units of the network together, all heads together, ...), each layer's scores first divided by their mean.
What we add: one dial for all axes, bisected until a stated cost is met, widths rounded to a multiple, and the slack
of rounding given back to the MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 0.95  # the largest share that the dial may remove from an axis


@dataclass(frozen=True)
class Scores:
    """Importance of everything that can go, per block l: heads (H_l,), qk (H_l, D), v (H_l, D), mlp (U_l,); embed
    (C,).
    """

    heads: Sequence[Tensor]
    qk: Sequence[Tensor]
    v: Sequence[Tensor]
    mlp: Sequence[Tensor]
    embed: Tensor


@dataclass(frozen=True)
class Pressure:
    """How hard each axis is pressed relative to the dial: 0 leaves it alone, 1 removes the dial's share of it."""

    heads: float
    head_width: float
    mlp: float
    embed: float


@dataclass(frozen=True)
class KeptBlock:
    """Indices kept in one block, each ascending. qk and v: (kept heads, width) positions within the head."""

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor


@dataclass(frozen=True)
class Kept:
    """What stays of the whole network; everything else goes."""

    blocks: tuple[KeptBlock, ...]
    embed: Tensor


def allocate(
    scores: Scores,
    cost: Callable[[Kept], float],
    target: float,
    pressure: Pressure,
    *,
    round_to: int = 8,
    head_round_to: int = 4,
) -> Kept | None:
    """The largest network of the family drawn by the dial whose cost is at most `target`; None when even the smallest
    is above.

    Args:
        cost: of a candidate, in the unit of `target`; must fall when less is kept.
        target: absolute cost allowed.
        round_to: MLP and embedding widths are multiples of it; head_round_to: widths of heads are.
    """

    def at(dial: float) -> Kept:
        return at_dial(scores, dial, pressure, round_to=round_to, head_round_to=head_round_to)

    if cost(at(0.0)) <= target:
        return at(0.0)
    low, high = 0.0, 1.0
    if cost(at(high)) > target:
        return None
    for _ in range(24):  # the widths are integers: 2^-24 is finer than any of them
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= target else (middle, high)
    return _give_back(scores, at(high), cost, target, round_to) if pressure.mlp > 0 else at(high)


def at_dial(scores: Scores, dial: float, pressure: Pressure, *, round_to: int, head_round_to: int) -> Kept:
    """What stays at a dial position in [0, 1]."""
    heads = _keep_heads(scores.heads, _share(dial, pressure.heads))
    width_share = _share(dial, pressure.head_width)
    qk_widths = _widths(scores.qk, heads, width_share, head_round_to)
    v_widths = _widths(scores.v, heads, width_share, head_round_to)
    mlp_sizes = [
        _rounded(int(n), len(s), round_to)
        for n, s in zip(_survivors(scores.mlp, _share(dial, pressure.mlp)), scores.mlp, strict=True)
    ]
    channels = len(scores.embed)
    embed = _rounded(round((1 - _share(dial, pressure.embed)) * channels), channels, round_to)
    blocks = tuple(
        KeptBlock(h, _best(qk[h], qw), _best(v[h], vw), _best(mlp, size))
        for h, qk, qw, v, vw, mlp, size in zip(
            heads, scores.qk, qk_widths, scores.v, v_widths, scores.mlp, mlp_sizes, strict=True
        )
    )
    return Kept(blocks, _best(scores.embed, embed))


def _share(dial: float, pressure: float) -> float:
    return min(MOST, dial * pressure)


def _best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of the last axis, ascending; equal scores keep the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def _relative(scores: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's scores over their mean, so that layers of different scale can be ranked together."""
    return [s / s.mean().clamp_min(1e-30) for s in scores]


def _survivors(scores: Sequence[Tensor], share: float) -> list[int]:
    """How many of each layer stay when `share` of all go, lowest first over all layers."""
    flat = torch.cat([s.flatten() for s in _relative(scores)])
    owner = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(scores)])
    stay = flat.sort(descending=True, stable=True).indices[: round((1 - share) * len(flat))]
    return torch.bincount(owner[stay], minlength=len(scores)).tolist()


def _keep_heads(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Heads that stay in each block, at least one."""
    return [_best(s, max(1, n)) for s, n in zip(scores, _survivors(scores, share), strict=True)]


def _widths(scores: Sequence[Tensor], heads: Sequence[Tensor], share: float, multiple: int) -> list[int]:
    """Width of the remaining heads of each block: equal within a block, since the heads are computed as one tensor."""
    remaining = [s[h] for s, h in zip(scores, heads, strict=True)]
    counts = _survivors(remaining, share)
    return [_rounded(round(n / len(s)), s.shape[1], multiple) for n, s in zip(counts, remaining, strict=True)]


def _rounded(count: int, full: int, multiple: int) -> int:
    """To the nearest multiple, at least one multiple, at most what there is; what is whole stays whole."""
    if count >= full:
        return full
    return min(full, max(multiple, round(count / multiple) * multiple))


def _give_back(scores: Scores, kept: Kept, cost: Callable[[Kept], float], target: float, round_to: int) -> Kept:
    """Spend what rounding left of the target: widen MLPs by one multiple at a time, the most important cut units
    first.
    """
    relative = _relative(scores.mlp)
    closed: set[int] = set()
    while True:
        offers = []
        for i, (block, score) in enumerate(zip(kept.blocks, relative, strict=True)):
            size = len(block.mlp)
            if i not in closed and size < len(score):
                ranked = score.sort(descending=True, stable=True).values
                offers.append((-float(ranked[size : size + round_to].mean()), i))
        if not offers:
            return kept
        _, chosen = min(offers)
        wider = list(kept.blocks)
        block = wider[chosen]
        size = min(len(scores.mlp[chosen]), len(block.mlp) + round_to)
        wider[chosen] = KeptBlock(block.heads, block.qk, block.v, _best(scores.mlp[chosen], size))
        candidate = Kept(tuple(wider), kept.embed)
        if cost(candidate) <= target:
            kept = candidate
        else:
            closed.add(chosen)
