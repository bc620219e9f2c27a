"""The windows of a Swin transformer (Liu et al., ICCV 2021; V2: CVPR 2022) as plain geometry: how many tokens a stage
has, how windows tile them, and which pairs of tokens may see each other.

A Swin without padding is a pyramid: every stage's side is a multiple of its window (or the window is the whole side),
and a side that is merged 2 x 2 is even. At another image size the windows are scaled with the image, so that a stage
keeps its number of windows (timm's rule in `set_input_size`; 224 px with windows of 7 become 192 px with windows of 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What timm adds to the logits of pairs that may not see each other: finite, so that no row can become NaN.
BLOCKED = -100.0


@dataclass(frozen=True, slots=True)
class Level:
    """A stage at one image size: tokens a side, tokens a side of a window, how far every second block shifts them."""

    side: int
    window: int
    shift: int


def pyramid(side: int, windows: Sequence[int], *, reference: int) -> tuple[Level, ...] | None:
    """The stages of a network at `side` tokens a side, or None where timm would have to pad.

    Args:
        windows: per stage, tokens a side of a window at `reference` tokens a side of the first stage.
    """
    levels = []
    first = side
    for number, window in enumerate(windows):
        if number:
            if side % 2:
                return None
            side //= 2
        scaled = min(side, max(1, window * first // reference))
        if side % scaled:
            return None
        levels.append(Level(side, scaled, scaled // 2 if scaled < side else 0))
    return tuple(levels)


def legal_squares(grid: int, cell: int, windows: Sequence[int]) -> list[int]:
    """Sides k, in patches of a ticket, of the square images that a network takes without padding.

    Args:
        grid: patches of the ticket a side; cell: tokens of the first stage a side of such a patch.
        windows: per stage, at grid * cell tokens.
    """
    return [k for k in range(1, grid + 1) if pyramid(k * cell, windows, reference=grid * cell) is not None]


def partition(x: Tensor, window: int) -> Tensor:
    """(B, S, S, C) -> (B, W, A, C): W windows in raster order, A = window * window tokens in each, raster order too."""
    batch, side, _, channels = x.shape
    across = side // window
    x = x.reshape(batch, across, window, across, window, channels)
    return x.transpose(2, 3).reshape(batch, across * across, window * window, channels)


def join(x: Tensor, window: int, side: int) -> Tensor:
    """Undo `partition`: (B, W, A, C) -> (B, S, S, C)."""
    across = side // window
    x = x.reshape(x.shape[0], across, across, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(x.shape[0], side, side, x.shape[-1])


def relative_index(window: int, table: int) -> Tensor:
    """Where a table of position biases made for windows of `table` >= window holds the bias of each pair of tokens.

    The offset (dy, dx) of a pair finds the same row at every window size: a smaller window reads the middle of the
    table. timm instead stretches the table to the smaller window, which gives an offset of one token another bias.

    Returns: (A, A) int64, rows of a table ((2 * table - 1)^2, H) in raster order of (dy, dx).
    """
    axis = torch.arange(window)
    y, x = axis.repeat_interleave(window), axis.repeat(window)
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + table - 1) * (2 * table - 1) + dx + table - 1


def shift_mask(level: Level) -> Tensor | None:
    """Which tokens of a shifted window come from different edges of the image and so may not see each other.

    Returns: (W, A, A) float32, 0 or BLOCKED, to be added to the logits; None without shift.
    """
    if level.shift == 0:
        return None
    axis = torch.arange(level.side)
    # Rolled by the shift, the last window of an axis holds a strip of the far edge and one of the near edge.
    strip = (axis >= level.side - level.window).long() + (axis >= level.side - level.shift).long()
    regions = (strip[:, None] * 3 + strip).view(1, level.side, level.side, 1)
    of_token = partition(regions, level.window).view(-1, level.window**2)
    return torch.where(of_token[:, None, :] == of_token[:, :, None], 0.0, BLOCKED)
