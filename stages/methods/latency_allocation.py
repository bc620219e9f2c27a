"""How much to cut where, by importance lost per millisecond won.

From the whole network on, the cut that loses least importance for each millisecond that it saves is made again and
again: a step of an MLP's units, of the queries' and keys' or the values' width, a head, a step of the embedding, a
block as a whole. The networks on the way are the candidates for every target, each smaller than the one before.

Importance is added up over what goes, so that all axes are weighed in one currency: the scores must be sums over the
weights, not shares of a layer (what a set of weights is worth to the first order is at most the sum over it). A block
costs what is left in it at that moment. How hard an axis is pressed divides what its cuts are said to lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .allocation import MOST, Axis, Kept, KeptBlock, Pressure, Scores, best
from .cost import BlockWidths

MLP_STEPS = 32  # an MLP or a stream is cut in at most so many steps, each at least round_to wide


@dataclass(frozen=True)
class Milliseconds:
    """block: number of the block, its widths and the channels that it sees -> ms. outside: channels by stream -> ms."""

    block: Callable[[int, BlockWidths, int], float]
    outside: Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Stop:
    """A network on the way: widths of every block, None for one that is gone, and channels of every stream."""

    blocks: tuple[BlockWidths | None, ...]
    streams: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One step, and what it is worth: importance lost (by pressure), milliseconds saved."""

    stop: Stop
    lost: float
    saved: float

    @property
    def price(self) -> float:
        return self.lost / self.saved


class Worth:
    """Importance of what is left, from scores: of a block's attention and MLP, and of a stream."""

    def __init__(self, scores: Scores) -> None:
        self._mlp = [_running(s) for s in scores.mlp]
        self._streams = [_running(s) for s in scores.embed]
        order = [s.sort(descending=True, stable=True).indices for s in scores.heads]
        # Of the best h heads, the best positions of each: (H + 1, D + 1).
        self._qk = [_of_heads(s[o]) for s, o in zip(scores.qk, order, strict=True)]
        self._v = [_of_heads(s[o]) for s, o in zip(scores.v, order, strict=True)]

    def attention(self, block: int, widths: BlockWidths) -> float:
        return float(self._qk[block][widths.heads, widths.qk] + self._v[block][widths.heads, widths.v])

    def mlp(self, block: int, units: int) -> float:
        return float(self._mlp[block][units])

    def stream(self, number: int, channels: int) -> float:
        return float(self._streams[number][channels])

    def block(self, number: int, widths: BlockWidths) -> float:
        return self.attention(number, widths) + self.mlp(number, widths.mlp)


def way(
    scores: Scores, worth: Worth, ms: Milliseconds, pressure: Pressure, *, round_to: int, head_round_to: int
) -> list[Stop]:
    """The networks from the whole one down to the smallest that the axes allow."""
    walk = _Walk(scores, worth, ms, pressure, round_to, head_round_to)
    stops = [walk.start()]
    while True:
        cuts = [cut for cut in walk.cuts(stops[-1]) if cut.saved > 0]
        if not cuts:
            return stops
        stops.append(min(cuts, key=lambda cut: cut.price).stop)


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
        self, scores: Scores, worth: Worth, ms: Milliseconds, pressure: Pressure, round_to: int, head_round_to: int
    ) -> None:
        self.scores, self.worth, self.ms, self.pressure = scores, worth, ms, pressure
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
                lost = self.worth.block(i, widths) / self.pressure.depth.press
                yield _Cut(_with(stop, i, None), lost, self.ms.block(i, widths, channels))
        yield from self._thinner(stop)

    def _narrower(self, i: int, w: BlockWidths, channels: int) -> Iterator[tuple[BlockWidths, float, float]]:
        whole = self.ms.block(i, w, channels)
        p, s = self.pressure, self.scores
        options: list[tuple[Axis, BlockWidths | None]] = [
            (p.heads, replace(w, heads=w.heads - 1) if w.heads > _least(len(s.heads[i]), 1) else None),
            (p.qk, _less(w, "qk", s.qk[i].shape[1], self.head_round_to, self.head_round_to)),
            (p.v, _less(w, "v", s.v[i].shape[1], self.head_round_to, self.head_round_to)),
            (p.mlp, _less(w, "mlp", len(s.mlp[i]), self.round_to, _step(len(s.mlp[i]), self.round_to))),
        ]
        for axis, after in options:
            if after is not None and axis.touches(i):
                lost = self.worth.block(i, w) - self.worth.block(i, after)
                yield after, lost / axis.press, whole - self.ms.block(i, after, channels)

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
            saved = self.ms.outside(stop.streams) - self.ms.outside(streams)
            for i, widths in enumerate(stop.blocks):
                if widths is not None and self.scores.stage[i] == number:
                    saved += self.ms.block(i, widths, channels) - self.ms.block(i, widths, after)
            lost = self.worth.stream(number, channels) - self.worth.stream(number, after)
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
