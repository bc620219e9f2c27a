"""Importance of attention heads, of the widths inside them and of whole blocks.

Torch-Pruning scores what is cut as whole rows and columns (MLP units, embedding channels); the parts of a fused
attention are no such groups, so their scores are computed here by the same rules, on the same weights and gradients:

- Taylor: |w * dL/dw| (Molchanov et al., CVPR 2019, eq. 8, first order), summed over the coupled weights.
- Hessian: w^2 * E[(dL/dw)^2], summed: what removal costs to second order at a minimum, with the squared gradients of
  single images for the diagonal (LeCun et al., Optimal Brain Damage, NIPS 1989, eq. 5, without its factor of a half).
- L1: |w|, summed. Random: uniform.

What a training hands on is a score for every weight: its share of a group's norm, or its movement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .regularisers import head_norms, unit_norms

Weigh = Callable[[Tensor, Tensor | None], Tensor]


def taylor(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|w * dL/dw|, element by element."""
    if gradient is None:
        raise ValueError("Taylor importance needs gradients; run a backward pass on the calibration images first")
    return (weight * gradient).abs()


def hessian(weight: Tensor, squares: Tensor | None) -> Tensor:
    """w^2 times the mean squared gradient of single images, element by element."""
    if squares is None:
        raise ValueError("Hessian importance needs squared gradients of single calibration images")
    return weight.square() * squares


def magnitude(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """|w|, element by element."""
    return weight.abs()


def attention_scores(
    qkv: Tensor,
    qkv_gradient: Tensor | None,
    proj: Tensor,
    proj_gradient: Tensor | None,
    *,
    heads: int,
    qk: int,
    v: int,
    weigh: Weigh,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the heads, of the query/key dimensions and of the value dimensions.

    Args:
        qkv: (H * (2 * qk + v), C) rows ordered queries, keys, values; proj: (C, H * v); gradients alike or None.
    Returns: heads (H,), qk (H, qk) where a dimension's query and key rows count together, v (H, v) where a
    dimension's value row and projection column do. A head's score is the sum over all its dimensions.
    """
    rows = weigh(qkv, qkv_gradient).sum(1)
    q, k, value = rows.split([heads * qk, heads * qk, heads * v])
    columns = weigh(proj, proj_gradient).sum(0)
    pair = (q + k).view(heads, qk)
    out = (value + columns).view(heads, v)
    return pair.sum(1) + out.sum(1), pair, out


def head_shares(qkv: Tensor, proj: Tensor, heads: int, qk: int, v: int) -> tuple[Tensor, Tensor]:
    """Of every weight of the two matrices, w^2 over the norm of its head: those of a head add up to its norm.

    Shapes as in attention_scores.
    """
    norms = head_norms(qkv, proj, heads, qk, v)
    widths = torch.tensor([qk, qk, v], device=norms.device)
    of_rows = norms.repeat(3).repeat_interleave(widths.repeat_interleave(heads))
    return qkv.square() / of_rows[:, None], proj.square() / norms.repeat_interleave(v)


def unit_shares(fc1: Tensor, fc2: Tensor) -> tuple[Tensor, Tensor]:
    """As head_shares, of MLP units. fc1 (U, C), fc2 (C, U)."""
    norms = unit_norms(fc1, fc2)
    return fc1.square() / norms[:, None], fc2.square() / norms


def movement(weight: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """How far a plain gradient step moves each weight away from zero, to first order and times its size:
    -lr * w * dL/dw (Sanh et al., "Movement Pruning", NeurIPS 2020, eq. 4, its scores accumulated over a training).
    Below zero: the labels make the weight smaller.
    """
    return -lr * weight * gradient


def block_score(matrices: Iterable[tuple[Tensor, Tensor | None]], weigh: Weigh) -> Tensor:
    """Score of a whole block: with its matrices (and their gradients) go all of its heads and units, whose scores add
    up.
    """
    return torch.stack([weigh(weight, gradient).sum() for weight, gradient in matrices]).sum()


def random_like(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores of the same shape, the control."""
    return torch.rand(scores.shape, generator=generator)
