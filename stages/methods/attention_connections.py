"""Keeping only the strongest attention connections between patch tokens: Tri-Level E-ViT's second level (Kong et al.,
AAAI 2023), a regulariser of training.

At chosen blocks, right after tokens were dropped, each kept patch token keeps the connections to the patch tokens that
it attends to most, on the map averaged over heads; the blocks that follow, up to and including the next of these,
attend along these only. On dense hardware this saves nothing: the whole map is computed, then covered, which takes
longer than not to cover it. It is off outside of training.

Two modes. `paper` is the released formula: the row maximum is taken over all keys, the covered ones included, and every
key gets a share of eps / T. Where a covered key has the largest logit, the others underflow towards eps and most of the
weight lands on covered keys. `corrected` covers before the softmax, so that covered keys get nothing, leaves every
token its connection to itself, and a connection that is gone stays gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .token_reduction import keep_count

Mode = Literal["paper", "corrected"]
EPS = 1e-6  # of the released formula


@dataclass(frozen=True)
class Connections:
    """keep: fraction of the patch tokens that a patch token goes on attending to. blocks: where that is decided."""

    keep: float
    mode: Mode
    blocks: tuple[int, ...]


def connect(weights: Tensor, prefix: int, keep: float, mode: Mode, before: Tensor | None) -> Tensor:
    """Which tokens may attend to which.

    Args:
        weights: (B, T, T) attention averaged over heads, of the tokens that were kept, prefix tokens first.
        before: (B, 1, T, T) what was allowed until now, of the same tokens; None for all.
    Returns: (B, 1, T, T) bool, True where attention is allowed. Rows and columns of prefix tokens are on. Of K patch
        tokens each keeps ceil(keep * K); those equal to the last of these are kept as well, so a row may exceed that.
    """
    between = weights[:, prefix:, prefix:].float()
    count = keep_count(between.shape[-1], keep)
    least = between.topk(count, dim=-1).values[..., -1:]
    strongest = between >= least
    if mode == "corrected":
        if before is not None:
            strongest = strongest & before[:, 0, prefix:, prefix:]
        strongest = strongest | torch.eye(between.shape[-1], dtype=torch.bool, device=weights.device)
    allowed = torch.ones(weights.shape, dtype=torch.bool, device=weights.device)
    allowed[:, prefix:, prefix:] = strongest
    return allowed.unsqueeze(1)


def narrow(square: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """Rows and columns of the prefix tokens and of the kept patch tokens. square (..., T, T) with the batch first, kept
    (B, K) patch indices -> (..., P + K, P + K).
    """
    own = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
    index = torch.cat([own, kept + prefix], dim=1)
    index = index.view(kept.shape[0], *[1] * (square.dim() - 3), index.shape[1])
    tokens = square.shape[-1]
    rows = square.gather(-2, index.unsqueeze(-1).expand(*square.shape[:-2], -1, tokens))
    return rows.gather(-1, index.unsqueeze(-2).expand(*square.shape[:-2], index.shape[-1], -1))


def weigh(logits: Tensor, allowed: Tensor | None, mode: Mode) -> Tensor:
    """Attention weights from logits (B, H, T, T); allowed (B, 1, T, T) bool, None for all."""
    if allowed is None:
        return logits.softmax(-1)
    if mode == "paper":
        return published(logits, allowed)
    # The smallest finite number and not -inf, from which half precision makes NaN where a row is empty.
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)


def published(logits: Tensor, allowed: Tensor) -> Tensor:
    """The released formula: (e + eps / T) / (sum e + eps), e = allowed * exp(logits - their row maximum), in fp32. The
    maximum is over all keys, and covered keys get eps / T.
    """
    wide = logits.float()
    powers = (wide - wide.amax(-1, keepdim=True)).exp() * allowed
    weights = (powers + EPS / logits.shape[-1]) / (powers.sum(-1, keepdim=True) + EPS)
    return weights.to(logits.dtype)
