"""How much to cut where: from importance scores to the sets of kept blocks, heads, widths and channels that meet a
target.

Isomorphic pruning (Fang et al., ECCV 2024): scores are ranked only among groups of the same computational topology
(all MLP units of the network together, all heads together, ...), each layer's scores first divided by their mean.
What we add: one dial for all axes, bisected until a stated cost is met, widths rounded to a multiple, and the slack
of rounding given back to the MLPs. Whole blocks are an axis too: they are ranked by their scores as they are, and what
they would have kept does not compete with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MOST = 0.95  # the largest share that the dial may remove from an axis


@dataclass(frozen=True)
class Scores:
    """Importance of everything that can go, per block l: heads (H_l,), qk (H_l, D), v (H_l, D), mlp (U_l,); embed, per
    residual stream s (a ViT has one, a Swin one a stage): (C_s,); depth (L,), of whole blocks.

    stage: of each block; one block of every stage must stay. fixed: blocks that must stay as a whole.
    """

    heads: Sequence[Tensor]
    qk: Sequence[Tensor]
    v: Sequence[Tensor]
    mlp: Sequence[Tensor]
    embed: Sequence[Tensor]
    depth: Tensor
    stage: Sequence[int]
    fixed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Axis:
    """How hard an axis is pressed relative to the dial, 0 leaves it alone and 1 removes the dial's share of it, and in
    which blocks; None: in all.
    """

    press: float = 0.0
    blocks: frozenset[int] | None = None

    def touches(self, block: int) -> bool:
        return self.press > 0 and (self.blocks is None or block in self.blocks)

    def share(self, dial: float) -> float:
        return min(MOST, dial * self.press)


@dataclass(frozen=True)
class Pressure:
    """Every axis. embed runs through all blocks, and its `blocks` are None."""

    heads: Axis = Axis()
    qk: Axis = Axis()
    v: Axis = Axis()
    mlp: Axis = Axis()
    embed: Axis = Axis()
    depth: Axis = Axis()


@dataclass(frozen=True)
class KeptBlock:
    """Indices kept in one block, each ascending. qk and v: (kept heads, width) positions within the head."""

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor


@dataclass(frozen=True)
class Kept:
    """What stays of the whole network; everything else goes. blocks: None for one that goes as a whole. embed: the
    channels of every residual stream, ascending.
    """

    blocks: tuple[KeptBlock | None, ...]
    embed: tuple[Tensor, ...]

    @property
    def left(self) -> list[int]:
        """The numbers of the blocks that stay."""
        return [number for number, block in enumerate(self.blocks) if block is not None]

    def as_json(self) -> dict[str, Any]:
        """Lists of indices; null: a block is gone."""
        blocks = [
            None if b is None else {name: getattr(b, name).tolist() for name in ("heads", "qk", "v", "mlp")}
            for b in self.blocks
        ]
        return {"embed": [channels.tolist() for channels in self.embed], "blocks": blocks}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Kept:
        """What as_json wrote."""
        blocks = (
            None if b is None else KeptBlock(**{k: torch.tensor(v) for k, v in b.items()}) for b in record["blocks"]
        )
        return Kept(tuple(blocks), tuple(map(torch.tensor, record["embed"])))


def compose(first: Kept, second: Kept) -> Kept:
    """One cut for two: `second` counts in what `first` left, the result in what there was at the beginning."""
    blocks: list[KeptBlock | None] = [None] * len(first.blocks)
    for number, then in zip(first.left, second.blocks, strict=True):
        before = first.blocks[number]
        if before is not None and then is not None:
            rows = then.heads[:, None]
            own = before.heads[then.heads], before.qk[rows, then.qk], before.v[rows, then.v], before.mlp[then.mlp]
            blocks[number] = KeptBlock(*own)
    return Kept(tuple(blocks), tuple(a[b] for a, b in zip(first.embed, second.embed, strict=True)))


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
    return give_back(scores, at(high), cost, target, pressure.mlp, round_to)


def at_dial(scores: Scores, dial: float, pressure: Pressure, *, round_to: int, head_round_to: int) -> Kept:
    """What stays at a dial position in [0, 1]."""
    left = _keep_blocks(scores, pressure.depth, dial)
    heads = {i: best(scores.heads[i], max(1, n)) for i, n in _counts(scores.heads, left, pressure.heads, dial).items()}
    qk = _head_widths(scores.qk, heads, pressure.qk, dial, head_round_to)
    v = _head_widths(scores.v, heads, pressure.v, dial, head_round_to)
    mlp = {
        i: best(scores.mlp[i], _rounded(n, len(scores.mlp[i]), round_to))
        for i, n in _counts(scores.mlp, left, pressure.mlp, dial).items()
    }
    blocks = [KeptBlock(heads[i], qk[i], v[i], mlp[i]) if i in left else None for i in range(len(scores.mlp))]
    share = pressure.embed.share(dial)
    embed = (best(s, _rounded(round((1 - share) * len(s)), len(s), round_to)) for s in scores.embed)
    return Kept(tuple(blocks), tuple(embed))


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of the last axis, ascending; equal scores keep the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def _relative(scores: Tensor) -> Tensor:
    """A layer's scores over their mean, so that layers of different scale can be ranked together."""
    return scores / scores.mean().clamp_min(1e-30)


def _keep_blocks(scores: Scores, axis: Axis, dial: float) -> list[int]:
    """The blocks that stay: the lowest scores go first, never the last of a stage; of equal ones the later goes."""
    order = scores.depth.sort(descending=True, stable=True).indices.tolist()[::-1]
    open_to = [i for i in order if axis.touches(i) and i not in scores.fixed]
    left = list(range(len(order)))
    wanted = round(axis.share(dial) * len(open_to))
    for block in open_to:
        if wanted and sum(scores.stage[i] == scores.stage[block] for i in left) > 1:
            left.remove(block)
            wanted -= 1
    return left


def _counts(scores: Sequence[Tensor], left: Sequence[int], axis: Axis, dial: float) -> dict[int, int]:
    """How many of each remaining layer stay when the axis' share of all that it touches goes, lowest first."""
    touched = [i for i in left if axis.touches(i)]
    counts = {i: scores[i].numel() for i in left}
    if touched:
        flat = torch.cat([_relative(scores[i]).flatten() for i in touched])
        owner = torch.cat([torch.full((scores[i].numel(),), n) for n, i in enumerate(touched)])
        stay = flat.sort(descending=True, stable=True).indices[: round((1 - axis.share(dial)) * len(flat))]
        counts |= zip(touched, torch.bincount(owner[stay], minlength=len(touched)).tolist(), strict=True)
    return counts


def _head_widths(
    scores: Sequence[Tensor], heads: dict[int, Tensor], axis: Axis, dial: float, multiple: int
) -> dict[int, Tensor]:
    """Positions kept in the remaining heads of each block: as many in every head of a block, since they are computed as
    one tensor.
    """
    remaining = {i: scores[i][kept] for i, kept in heads.items()}
    rows = [remaining.get(i, s) for i, s in enumerate(scores)]
    counts = _counts(rows, list(heads), axis, dial)
    return {i: best(s, _rounded(round(counts[i] / len(s)), s.shape[1], multiple)) for i, s in remaining.items()}


def _rounded(count: int, full: int, multiple: int) -> int:
    """To the nearest multiple, at least one multiple, at most what there is; what is whole stays whole."""
    if count >= full:
        return full
    return min(full, max(multiple, round(count / multiple) * multiple))


def give_back(
    scores: Scores,
    kept: Kept,
    cost: Callable[[Kept], float],
    target: float,
    axis: Axis,
    round_to: int,
    gain: Callable[[int, int, int], float] | None = None,
) -> Kept:
    """Spend what rounding left of the target: widen MLPs by one multiple at a time, where most is won.

    gain: block, units now, units then -> what is won; None: the importance of these units, relative to their layer's.
    """

    def relative(i: int, now: int, then: int) -> float:
        ranked = _relative(scores.mlp[i]).sort(descending=True, stable=True).values
        return float(ranked[now:then].mean())

    won = gain or relative
    closed = {i for i, block in enumerate(kept.blocks) if block is None or not axis.touches(i)}
    while True:
        offers = []
        for i, block in enumerate(kept.blocks):
            if block is not None and i not in closed and len(block.mlp) < len(scores.mlp[i]):
                offers.append((-won(i, len(block.mlp), min(len(scores.mlp[i]), len(block.mlp) + round_to)), i))
        if not offers:
            return kept
        _, chosen = min(offers)
        candidate = _widened(kept, chosen, scores.mlp[chosen], round_to)
        if cost(candidate) <= target:
            kept = candidate
        else:
            closed.add(chosen)


def _widened(kept: Kept, chosen: int, scores: Tensor, units: int) -> Kept:
    blocks = list(kept.blocks)
    block = blocks[chosen]
    assert block is not None
    blocks[chosen] = replace(block, mlp=best(scores, min(len(scores), len(block.mlp) + units)))
    return Kept(tuple(blocks), kept.embed)
