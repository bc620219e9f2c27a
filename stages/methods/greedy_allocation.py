"""How much to cut where, by what is lost for each unit of cost that is saved.

From the whole network on, the cut that loses least for what it saves is made again and again: a step of an MLP's units,
of the queries' and keys' or the values' width, a head, a step of the embedding, a block as a whole. The networks on the
way are the candidates for every target, each smaller than the one before.

Cost is in milliseconds or in multiply-accumulates. What is lost is either importance, added up over what goes, so that
all axes are weighed in one currency (the scores must be sums over the weights, not shares of a layer: what a set of
weights is worth to the first order is at most the sum over it), or a loss that was measured (methods/sensitivity.py). A
block costs what is left in it at that moment. How hard an axis is pressed divides what its cuts are said to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from .allocation import MOST, Axis, Kept, KeptBlock, Pressure, Scores, best
from .cost import BlockWidths

MLP_STEPS = 32  # an MLP or a stream is cut in at most so many steps, each at least round_to wide


@dataclass(frozen=True)
class Cost:
    """What a network takes, in any unit. block: number of the block, its widths and the channels that it sees -> cost.
    outside: channels by stream -> cost.
    """

    block: Callable[[int, BlockWidths, int], float]
    outside: Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Stop:
    """A network on the way: widths of every block, None for one that is gone, and channels of every stream."""

    blocks: tuple[BlockWidths | None, ...]
    streams: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One step: what is lost (by pressure), and the cost that is saved."""

    stop: Stop
    lost: float
    saved: float

    @property
    def price(self) -> float:
        return self.lost / self.saved


class Worth(Protocol):
    """What cuts lose, in one unit for all of them; infinite: nobody knows, and it is not made."""

    def lost_in_block(self, block: int, before: BlockWidths, after: BlockWidths | None) -> float:
        """By narrowing a block, or by removing what is left of it (None)."""

    def lost_in_stream(self, stream: int, before: int, after: int) -> float:
        """By taking channels off a residual stream."""


class ImportanceWorth:
    """The importance that goes, from scores."""

    def __init__(self, scores: Scores) -> None:
        self._mlp = [_running(s) for s in scores.mlp]
        self._streams = [_running(s) for s in scores.embed]
        order = [s.sort(descending=True, stable=True).indices for s in scores.heads]
        # Of the best h heads, the best positions of each: (H + 1, D + 1).
        self._qk = [_of_heads(s[o]) for s, o in zip(scores.qk, order, strict=True)]
        self._v = [_of_heads(s[o]) for s, o in zip(scores.v, order, strict=True)]

    def lost_in_block(self, block: int, before: BlockWidths, after: BlockWidths | None) -> float:
        return self._left(block, before) - (0.0 if after is None else self._left(block, after))

    def lost_in_stream(self, stream: int, before: int, after: int) -> float:
        return float(self._streams[stream][before] - self._streams[stream][after])

    def _left(self, block: int, w: BlockWidths) -> float:
        attention = self._qk[block][w.heads, w.qk] + self._v[block][w.heads, w.v]
        return float(attention + self._mlp[block][w.mlp])


def way(
    scores: Scores,
    worth: Worth,
    cost: Cost,
    pressure: Pressure,
    *,
    round_to: int,
    head_round_to: int,
    start: Stop | None = None,
) -> list[Stop]:
    """The networks from `start`, None: the whole one, down to the smallest that the axes allow, and that the worth
    knows of. Of cuts at the same price the smallest is made: its steps come closest to a target.
    """
    walk = _Walk(scores, worth, cost, pressure, round_to, head_round_to)
    stops = [start or walk.start()]
    while True:
        cuts = [cut for cut in walk.cuts(stops[-1]) if cut.saved > 0 and cut.lost < inf]
        if not cuts:
            return stops
        stops.append(min(cuts, key=lambda cut: (cut.price, cut.saved)).stop)


def kept_of(stop: Stop, scores: Scores) -> Kept:
    """The best of everything, as many as the stop has of it."""
    blocks: list[KeptBlock | None] = []
    for number, widths in enumerate(stop.blocks):
        if widths is None:
            blocks.append(None)
            continue
        heads = best(scores.heads[number], widths.heads)
        qk, v = best(scores.qk[number][heads], widths.qk), best(scores.v[number][heads], widths.v)
        blocks.append(KeptBlock(heads, qk, v, best(scores.mlp[number], widths.mlp)))
    embed = tuple(best(s, count) for s, count in zip(scores.embed, stop.streams, strict=True))
    return Kept(tuple(blocks), embed)


class _Walk:
    """The cuts that are open at a stop. Those of a block are kept until its widths or its channels change."""

    def __init__(
        self, scores: Scores, worth: Worth, cost: Cost, pressure: Pressure, round_to: int, head_round_to: int
    ) -> None:
        self.scores, self.worth, self.cost, self.pressure = scores, worth, cost, pressure
        self.round_to, self.head_round_to = round_to, head_round_to
        self._known: dict[tuple[int, BlockWidths, int], list[tuple[BlockWidths, float, float]]] = {}

    def start(self) -> Stop:
        s = self.scores
        blocks = tuple(
            BlockWidths(len(heads), qk.shape[1], v.shape[1], len(mlp))
            for heads, qk, v, mlp in zip(s.heads, s.qk, s.v, s.mlp, strict=True)
        )
        return Stop(blocks, tuple(len(stream) for stream in s.embed))

    def cuts(self, stop: Stop) -> Iterator[_Cut]:
        left = [self.scores.stage[i] for i, widths in enumerate(stop.blocks) if widths is not None]
        for i, widths in enumerate(stop.blocks):
            if widths is None:
                continue
            channels = stop.streams[self.scores.stage[i]]
            key = i, widths, channels
            if key not in self._known:
                self._known[key] = list(self._narrower(i, widths, channels))
            for after, lost, saved in self._known[key]:
                yield _Cut(_with(stop, i, after), lost, saved)
            last = left.count(self.scores.stage[i]) == 1
            if self.pressure.depth.touches(i) and i not in self.scores.fixed and not last:
                lost = self.worth.lost_in_block(i, widths, None) / self.pressure.depth.press
                yield _Cut(_with(stop, i, None), lost, self.cost.block(i, widths, channels))
        yield from self._thinner(stop)

    def _narrower(self, i: int, w: BlockWidths, channels: int) -> Iterator[tuple[BlockWidths, float, float]]:
        whole = self.cost.block(i, w, channels)
        p, s = self.pressure, self.scores
        options: list[tuple[Axis, BlockWidths | None]] = [
            (p.heads, replace(w, heads=w.heads - 1) if w.heads > _least(len(s.heads[i]), 1) else None),
            (p.qk, _less(w, "qk", s.qk[i].shape[1], self.head_round_to, self.head_round_to)),
            (p.v, _less(w, "v", s.v[i].shape[1], self.head_round_to, self.head_round_to)),
            (p.mlp, _less(w, "mlp", len(s.mlp[i]), self.round_to, _step(len(s.mlp[i]), self.round_to))),
        ]
        for axis, after in options:
            if after is not None and axis.touches(i):
                lost = self.worth.lost_in_block(i, w, after)
                yield after, lost / axis.press, whole - self.cost.block(i, after, channels)

    def _thinner(self, stop: Stop) -> Iterator[_Cut]:
        axis = self.pressure.embed
        if not axis.press:
            return
        for number, channels in enumerate(stop.streams):
            full = len(self.scores.embed[number])
            after = _narrow(channels, full, self.round_to, _step(full, self.round_to))
            if after is None:
                continue
            streams = (*stop.streams[:number], after, *stop.streams[number + 1 :])
            saved = self.cost.outside(stop.streams) - self.cost.outside(streams)
            for i, widths in enumerate(stop.blocks):
                if widths is not None and self.scores.stage[i] == number:
                    saved += self.cost.block(i, widths, channels) - self.cost.block(i, widths, after)
            lost = self.worth.lost_in_stream(number, channels, after)
            yield _Cut(Stop(stop.blocks, streams), lost / axis.press, saved)


def _with(stop: Stop, block: int, widths: BlockWidths | None) -> Stop:
    return Stop((*stop.blocks[:block], widths, *stop.blocks[block + 1 :]), stop.streams)


def _less(widths: BlockWidths, axis: str, full: int, multiple: int, step: int) -> BlockWidths | None:
    after = _narrow(getattr(widths, axis), full, multiple, step)
    return None if after is None else replace(widths, **{axis: after})


def _narrow(width: int, full: int, multiple: int, step: int) -> int | None:
    """The next multiple at least a step below; None below what must stay."""
    after = (width - step) // multiple * multiple if width % multiple == 0 else width // multiple * multiple
    return after if after >= _least(full, multiple) else None


def _least(full: int, multiple: int) -> int:
    """What must stay of an axis: MOST of it may go, and one multiple is the end."""
    return max(multiple, -(-round((1 - MOST) * full) // multiple) * multiple)


def _step(full: int, multiple: int) -> int:
    return max(multiple, full // MLP_STEPS // multiple * multiple)


def _running(scores: Tensor) -> Tensor:
    """Of the n best, for n from 0 on."""
    ordered = scores.double().sort(descending=True, stable=True).values
    return torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])


def _of_heads(scores: Tensor) -> Tensor:
    """(H, D) -> (H + 1, D + 1): the best d positions in each of the first h heads, added up."""
    ordered = scores.double().sort(dim=1, descending=True, stable=True).values
    padded = torch.zeros(scores.shape[0] + 1, scores.shape[1] + 1, dtype=torch.float64)
    padded[1:, 1:] = ordered.cumsum(1).cumsum(0)
    return padded
