"""What a block takes in milliseconds, from its widths: a line through measured blocks, and which widths are rewarded.

A block is timed in two halves. Each is a sum of non-negative rates times work that can be counted:

    attention   fixed + tokens * embed + tokens * (queries, keys, values) + their products with embed
                + heads * tokens * window * (qk + v) + heads * tokens * window (softmax) + the projection back
    MLP         fixed + tokens * embed + tokens * units + tokens * embed * units

The rates are found by non-negative least squares on relative errors, over all measured blocks together, and corrected
by one factor for each kind of block (tokens and window), since small products run at another pace than large ones.
Counting multiply-accumulates is the special case in which all rates but those of products are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Kind = tuple[int, int, int]

ALIGNMENTS = (1, 2, 4, 8, 16, 32)
REWARD = 0.03  # a width that is this much slower than its neighbours' line is worth avoiding


@dataclass(frozen=True, slots=True)
class BlockShape:
    """tokens: that attend. left: that the MLP sees, fewer where tokens are dropped. window: that one attends to."""

    tokens: int
    left: int
    window: int
    embed: int
    heads: int
    qk: int
    v: int
    mlp: int

    @property
    def kind(self) -> Kind:
        return self.tokens, self.left, self.window


@dataclass(frozen=True, slots=True)
class Surroundings:
    """All that is outside of the blocks: activations written, and multiply-accumulates."""

    activations: int
    macs: int


@dataclass(frozen=True, slots=True)
class TimedBlock:
    """A measured block: milliseconds of both halves."""

    shape: BlockShape
    attention_ms: float
    mlp_ms: float


@dataclass(frozen=True, slots=True)
class TimedSurroundings:
    """The rest of a measured network."""

    work: Surroundings
    ms: float


@dataclass(frozen=True)
class BlockLatency:
    """The fitted rates. error: median relative error of the halves that it was fitted on."""

    attention: Floats
    mlp: Floats
    outside: Floats
    pace: Mapping[Kind, tuple[float, float]]
    error: float

    def attention_ms(self, shape: BlockShape) -> float:
        return float(self.attention @ _attention_work(shape)) * self.pace.get(shape.kind, (1.0, 1.0))[0]

    def mlp_ms(self, shape: BlockShape) -> float:
        return float(self.mlp @ _mlp_work(shape)) * self.pace.get(shape.kind, (1.0, 1.0))[1]

    def block_ms(self, shape: BlockShape) -> float:
        return self.attention_ms(shape) + self.mlp_ms(shape)

    def outside_ms(self, work: Surroundings) -> float:
        return float(self.outside @ _outside_work(work))

    def total_ms(self, shapes: Sequence[BlockShape], work: Surroundings) -> float:
        """Of a whole network."""
        return self.outside_ms(work) + sum(self.block_ms(shape) for shape in shapes)


def fit(blocks: Sequence[TimedBlock], outside: Sequence[TimedSurroundings]) -> BlockLatency:
    """The rates that explain what was measured best."""
    attention = _rates([_attention_work(b.shape) for b in blocks], [b.attention_ms for b in blocks])
    mlp = _rates([_mlp_work(b.shape) for b in blocks], [b.mlp_ms for b in blocks])
    rest = _rates([_outside_work(o.work) for o in outside], [o.ms for o in outside])
    flat = BlockLatency(attention, mlp, rest, {}, 0.0)
    pace = {}
    for kind in dict.fromkeys(b.shape.kind for b in blocks):
        own = [b for b in blocks if b.shape.kind == kind]
        pace[kind] = (
            float(np.median([b.attention_ms / flat.attention_ms(b.shape) for b in own])),
            float(np.median([b.mlp_ms / flat.mlp_ms(b.shape) for b in own])),
        )
    fitted = BlockLatency(attention, mlp, rest, pace, 0.0)
    errors = [abs(fitted.attention_ms(b.shape) / b.attention_ms - 1) for b in blocks]
    errors += [abs(fitted.mlp_ms(b.shape) / b.mlp_ms - 1) for b in blocks]
    return BlockLatency(attention, mlp, rest, pace, float(np.median(errors)))


def sweep_widths(full: int) -> list[int]:
    """Widths up to `full` that tell a runtime's multiples apart: two far apart that suit any of them, and between the
    two, widths of every alignment. [] where the axis is too narrow to tell.
    """
    unit = 32 if full >= 64 else 16 if full >= 32 else 8
    top = full // unit * unit
    low = top // 2 // unit * unit
    if low < 1:
        return []
    middle = (low + top) // 2 // unit * unit
    base = middle if middle > low else top
    between = [base - less for less in (1, 3, 2, 6, 4, 12, 8, 24, 16, 48) if base - less > low]
    return [*dict.fromkeys((top, low, base, *between))]


def rewarded_multiple(ms: Mapping[int, float], least: int) -> int:
    """The smallest multiple, at least `least`, from which on no coarser one is faster: measured width -> milliseconds.

    A line goes through the narrowest and the widest of the coarsest alignment of which there are two (the alignment of
    a width is the largest power of two that divides it, 32 at most); what a width takes beyond the line is the price of
    its own.
    """
    of_alignment: dict[int, list[int]] = {}
    for width in ms:
        for alignment in ALIGNMENTS:
            if width % alignment == 0:
                of_alignment.setdefault(alignment, []).append(width)
    coarsest = max((a for a, widths in of_alignment.items() if len(widths) > 1), default=None)
    if coarsest is None:
        return least
    low, high = min(of_alignment[coarsest]), max(of_alignment[coarsest])
    slope = (ms[high] - ms[low]) / (high - low)
    price: dict[int, list[float]] = {}
    for width, taken in ms.items():
        price.setdefault(min(coarsest, width & -width), []).append(taken / (ms[low] + slope * (width - low)) - 1)
    chosen = coarsest
    for alignment in sorted(price, reverse=True):
        if median(price[alignment]) > REWARD:
            break
        chosen = alignment
    return max(least, chosen)


def _attention_work(s: BlockShape) -> Floats:
    inner = s.heads * (2 * s.qk + s.v)
    pairs = s.heads * s.tokens * s.window
    return np.array(
        [
            1e3,
            s.tokens * s.embed,
            s.tokens * inner,
            s.tokens * inner * s.embed,
            pairs * (s.qk + s.v),
            pairs,
            s.tokens * s.heads * s.v * s.embed,
        ],
        dtype=np.float64,
    )


def _mlp_work(s: BlockShape) -> Floats:
    return np.array([1e3, s.left * s.embed, s.left * s.mlp, s.left * s.embed * s.mlp], dtype=np.float64)


def _outside_work(work: Surroundings) -> Floats:
    return np.array([1e3, work.activations, work.macs], dtype=np.float64)


def _rates(work: Sequence[Floats], ms: Sequence[float]) -> Floats:
    """Non-negative, least squares of the relative error; columns are scaled, so that none is lost to rounding."""
    rows, taken = np.stack(work), np.asarray(ms, dtype=np.float64)
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale / taken[:, None], np.ones(len(taken)))
    return np.asarray(found / scale, dtype=np.float64)
