"""Penalties that train towards what will be cut.

Group lasso (Yuan & Lin 2006; for transformers Wen et al. 2016's structured sparsity): the sum of Euclidean norms of
groups of weights that pruning would remove together, each weighted by the square root of its size so that large
groups are not favoured.
"""

from __future__ import annotations

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
