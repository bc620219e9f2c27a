"""Penalties that train towards what will be cut, and those that are said to.

- Group lasso (Yuan & Lin 2006; for transformers Wen et al. 2016's structured sparsity): the sum of Euclidean norms of
  groups of weights that pruning would remove together, each weighted by the square root of its size so that large
  groups are not favoured.
- Hoyer-square (Yang, Wen & Li, "DeepHoyer", ICLR 2020) of the same norms: it does not shrink all of them alike,
  since it does not change when all are scaled.
- L1 and L2 of matrices.
- attention_log: Prasetyo et al., "Sparse then Prune" (2023). On a row of a softmax log(1 + a^2) is convex, so the
  penalty flattens attention, the opposite of what its name promises, and as a mean over T x T entries it is tiny:
  times the authors' 0.01 at most 1.1e-4 for 65 tokens. It is here to reproduce the paper; attention_entropy is what
  makes attention peaked.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def head_norms(qkv: Tensor, proj: Tensor, heads: int, qk: int, v: int) -> Tensor:
    """Norm of everything that goes with each head.

    Args:
        qkv: (H * (2 * qk + v), C) rows ordered queries, keys, values, heads within each.
        proj: (C, H * v).
    Returns: (H,) root of the summed squares over the head's query, key and value rows and projection columns.
    """
    q, k, value = qkv.split([heads * qk, heads * qk, heads * v])
    parts = [part.reshape(heads, -1).square().sum(1) for part in (q, k, value)]
    parts.append(proj.t().reshape(heads, -1).square().sum(1))
    # The root has no derivative at 0; a floor far below any trained weight keeps the gradient finite.
    return torch.stack(parts).sum(0).clamp_min(1e-12).sqrt()


def unit_norms(fc1: Tensor, fc2: Tensor) -> Tensor:
    """Norm of each hidden MLP unit's incoming row and outgoing column. fc1 (U, C), fc2 (C, U) -> (U,)."""
    return (fc1.square().sum(1) + fc2.square().sum(0)).clamp_min(1e-12).sqrt()


def group_lasso(norms: Tensor, group_size: int) -> Tensor:
    """sqrt(size) * sum of group norms, a scalar."""
    total: Tensor = norms.sum() * group_size**0.5
    return total


def hoyer_square(norms: Tensor) -> Tensor:
    """(sum of norms)^2 / sum of their squares, a scalar from 1 (one group left) to G (all alike). norms (G,), not all
    zero.
    """
    ratio: Tensor = norms.sum().square() / norms.square().sum()
    return ratio


def kept_back(scores: Tensor) -> Tensor:
    """How hard each group is pressed when scores say which matter: 2 * sigmoid(-score / mean |score|), from 2 for what
    is pushed towards zero anyway to 0 for what grows; 1 for all while the scores are zero. scores (G,).
    """
    return 2 * torch.sigmoid(-scores / scores.abs().mean().clamp_min(1e-30))


def l1(weights: Iterable[Tensor]) -> Tensor:
    """Sum of absolute values over all tensors, a scalar."""
    return torch.stack([weight.abs().sum() for weight in weights]).sum()


def l2(weights: Iterable[Tensor]) -> Tensor:
    """Sum of squares over all tensors, a scalar: weight decay that an adaptive optimiser rescales."""
    return torch.stack([weight.square().sum() for weight in weights]).sum()


def attention_log(logits: Tensor) -> Tensor:
    """Mean over images, heads, queries and keys of log(1 + a^2), a the softmax of the logits (B, H, T, T); a scalar."""
    return logits.softmax(-1).square().log1p().mean()


def attention_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the rows of attention, 0 (one key) to log T (all alike). logits (B, H, T, T) before the
    softmax: an attention that has rounded to 0 has no finite derivative any more.
    """
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()
