"""How much a network suffers when one axis of one block is cut and nothing else: which cuts are tried, in which order,
and what is believed between them.

The idea is as old as pruning by layers (Li et al., ICLR 2017, section 3.2; Han et al., NIPS 2015, figure 6): each layer
is cut alone to several fractions, and accuracy is looked at without any recovery. We cut by axes, measure the loss
beside the accuracy, since it moves before accuracy does, and hold the curve to be monotone: what more cutting seems to
win is noise of few images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from .allocation import Axis, Kept, Pressure, Scores, at_dial
from .cost import BlockWidths

AxisName = Literal["heads", "qk", "v", "mlp", "embed", "depth"]
AXES: tuple[AxisName, ...] = ("depth", "mlp", "heads", "v", "qk", "embed")  # the order of a round
IN_BLOCKS: tuple[AxisName, ...] = ("heads", "qk", "v", "mlp")
Place = tuple[AxisName, int]  # an axis and a block, of embed a stream


@dataclass(frozen=True, slots=True)
class Trial:
    """A cut that is tried alone. fraction: kept of the axis; 0 for a block that goes as a whole."""

    axis: AxisName
    place: int
    fraction: float


def trials(scores: Scores, fractions: Sequence[float], without: frozenset[Place] = frozenset()) -> list[Trial]:
    """All cuts, so that a list that is broken off somewhere is as useful as it can be: the deepest fraction of every
    axis and place, and every block as a whole, before any of the fractions between.

    Args:
        fractions: kept of an axis, each in (0, 1).
        without: what cannot be cut. Blocks that must stay, or are the last of their stage, are left out by themselves.
    """
    rounds: list[list[Trial]] = []
    for number, fraction in enumerate(coarse_first(fractions)):
        axes = AXES if number == 0 else AXES[1:]
        rounds.append(
            [
                Trial(axis, place, 0.0 if axis == "depth" else fraction)
                for axis in axes
                for place in _places(scores, axis)
                if (axis, place) not in without
            ]
        )
    return [trial for one in rounds for trial in one]


def coarse_first(fractions: Sequence[float]) -> list[float]:
    """In such an order that each lies as far as possible from 1 and from those before it; of equal ones the lower."""
    known, left, ordered = [1.0], sorted(fractions), []
    while left:
        farthest = max(left, key=lambda fraction: (round(min(abs(fraction - k) for k in known), 9), -fraction))
        left.remove(farthest)
        known.append(farthest)
        ordered.append(farthest)
    return ordered


def _places(scores: Scores, axis: AxisName) -> Iterator[int]:
    if axis == "embed":
        yield from range(len(scores.embed))
        return
    for block in range(len(scores.mlp)):
        last = list(scores.stage).count(scores.stage[block]) == 1
        if axis != "depth" or not (block in scores.fixed or last):
            yield block


def everything(scores: Scores) -> Kept:
    """Nothing is cut."""
    return at_dial(scores, 0.0, Pressure(), round_to=1, head_round_to=1)


def alone(scores: Scores, trial: Trial) -> Kept:
    """What stays when this is cut and nothing else: the best of the axis, as many as its fraction, at least one."""
    whole = everything(scores)
    if trial.axis == "depth":
        blocks = (*whole.blocks[: trial.place], None, *whole.blocks[trial.place + 1 :])
        return replace(whole, blocks=blocks)
    pressure = Pressure(**{trial.axis: Axis(1.0, None if trial.axis == "embed" else frozenset({trial.place}))})
    cut = at_dial(scores, 1 - trial.fraction, pressure, round_to=1, head_round_to=1)
    if trial.axis == "embed":
        streams = (*whole.embed[: trial.place], cut.embed[trial.place], *whole.embed[trial.place + 1 :])
        return replace(whole, embed=streams)
    return cut


def count_of(kept: Kept, axis: AxisName, place: int) -> int:
    """Heads, width inside a head, units or channels that are kept; of depth 1 for a block that is there."""
    if axis == "embed":
        return len(kept.embed[place])
    block = kept.blocks[place]
    if axis == "depth" or block is None:
        return int(block is not None)
    match axis:
        case "heads":
            return len(block.heads)
        case "mlp":
            return len(block.mlp)
        case "qk":
            return block.qk.shape[1]
        case _:
            return block.v.shape[1]


class Curve:
    """The rise of the loss by what is kept of an axis, between measured points; never falling when more goes.

    The measured losses are replaced by the closest ones, in squares, that do not fall with the cut (isotonic
    regression by pooling adjacent violators; Barlow et al., 1972), and joined by straight lines.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        """measured: count that is kept -> mean loss; the largest count is the whole axis."""
        counts = sorted(measured)
        losses: NDArray[np.float64] = np.asarray([measured[count] for count in counts], dtype=np.float64)
        fitted = isotonic_regression(losses, increasing=False).x
        self._counts = np.asarray(counts, dtype=np.float64)
        self._rise = fitted - fitted[-1]

    def rise(self, count: int) -> float:
        """At so many that are kept; infinite below the fewest that were measured."""
        if count < self._counts[0]:
            return inf
        return float(np.interp(count, self._counts, self._rise))


class LossWorth:
    """What cuts lose of the calibration loss, from curves of single axes.

    Losses of different axes are added up, as if none knew of the others. A block that goes as a whole loses what its
    removal was measured to lose, less what its narrowing has lost already, and never less than nothing.
    """

    def __init__(self, curves: Mapping[Place, Curve], whole: Mapping[int, float]) -> None:
        """whole: block -> rise of the loss when it goes as a whole. What is in neither is not cut."""
        self._curves, self._whole = curves, whole

    def lost_in_block(self, block: int, before: BlockWidths, after: BlockWidths | None) -> float:
        if after is None:
            curves = {axis: self._curves[axis, block] for axis in IN_BLOCKS if (axis, block) in self._curves}
            narrowed = sum(curve.rise(getattr(before, axis)) for axis, curve in curves.items())
            return max(0.0, self._whole.get(block, inf) - narrowed)
        return sum(self._lost((axis, block), getattr(before, axis), getattr(after, axis)) for axis in IN_BLOCKS)

    def lost_in_stream(self, stream: int, before: int, after: int) -> float:
        return self._lost(("embed", stream), before, after)

    def _lost(self, place: Place, before: int, after: int) -> float:
        if before == after:
            return 0.0
        curve = self._curves.get(place)
        return inf if curve is None else curve.rise(after) - curve.rise(before)
