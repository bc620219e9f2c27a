"""Dropping patch tokens inside a network by the attention they get from the prefix tokens.

EViT (Liang et al., ICLR 2022, eq. 5), without fusion as Data-Level Lottery Tickets and Tri-Level E-ViT use it, or with
one fused token for all that were dropped. Where we differ: any number of prefix tokens (the seeds take column 0 as CLS
and would rank a distillation token as a patch), ties go to the lower index (theirs are unspecified), and the kept
tokens stay in raster order, so that an image can be drawn from them. A fused token stands last and is ranked like any
patch by the blocks that follow, as in EViT's code: kept, or folded into the next fused token.

The ramp from all tokens to the share that is kept is EViT's cosine (section 3.3), but in levels: their count changes
every few steps, ours takes `levels + 1` values in a run, so that compiled graphs are few and can be named.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_count(tokens: int, keep: float) -> int:
    """ceil(keep * tokens), at least 1. The small subtraction undoes binary fractions: 0.55 * 100 keeps 55, not 56."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    return max(1, math.ceil(keep * tokens - 1e-9))


def ramp(start: float, keep: float, warmup: float, length: float, levels: int) -> list[tuple[float, float]]:
    """The cosine from `start` down to `keep`, each moment rounded to the nearest of `levels` equal steps.

    Args: warmup, length: shares of the training before the ramp and on it, warmup + length <= 1.
    Returns: per level, the share of the training at which it ends (ascending, the last 1) and the fraction kept until
        then. Of the published ratio, start down to keep by (1 + cos(pi t)) / 2, it is never further off than half a
        step.
    """
    ends = [warmup + length * math.acos(1 - (2 * level + 1) / levels) / math.pi for level in range(levels)]
    kept = [start - (start - keep) * level / levels for level in range(levels)]
    return [*zip(ends, kept, strict=True), (1.0, keep)]


def prefix_attention(q: Tensor, k: Tensor, prefix: int, scale: float) -> Tensor:
    """Attention that each patch token gets from the prefix tokens, without forming the T x T matrix.

    Args:
        q, k: (B, H, T, D), prefix tokens first.
        prefix: P >= 1; with none there is no row to read the score from, see column_attention.
        scale: the softmax scale of the block.
    Returns: (B, N) float32, mean over heads and prefix rows of softmax(q k^T)[:, :, :P, P:]. fp32 whatever the input: a
    rounding in half precision changes which tokens are kept.
    """
    if prefix < 1:
        raise ValueError("prefix_attention needs at least one prefix token")
    with torch.autocast(q.device.type, enabled=False):
        rows = q[:, :, :prefix].float() @ k.float().transpose(-2, -1) * scale
        return rows.softmax(-1)[..., prefix:].mean((1, 2))


def column_attention(q: Tensor, k: Tensor, prefix: int, scale: float, rows: int = 64) -> Tensor:
    """Attention that each patch token gets from all patch tokens: the score of a network without prefix tokens.

    Args: as prefix_attention; prefix may be 0. rows: query rows held at once, so that T x T is never formed.
    Returns: (B, N) float32, mean over heads and patch rows of softmax(q k^T)[:, :, P:, P:].
    """
    keys, tokens = k.float().transpose(-2, -1), q.shape[2]
    total = q.new_zeros(q.shape[0], tokens - prefix, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(prefix, tokens, rows):
            weights = (q[:, :, start : start + rows].float() @ keys * scale).softmax(-1)
            total = total + weights[..., prefix:].sum((1, 2))
    return total / (q.shape[1] * (tokens - prefix))


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores of each row, ascending; equal scores go to the lower index.

    Args: scores (B, N). Returns: (B, count) int64.
    A stable descending sort: torch.topk leaves the order of equals open. ONNX has no stable sort, but its TopK
    promises the lower index, so the exporter is given topk; the kept tokens then stand in order of score, which
    attention does not see.
    """
    if torch.compiler.is_exporting():
        return scores.topk(count, dim=1).indices
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def gather_tokens(tokens: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """Prefix tokens and the kept patch tokens. tokens (B, P+N, C), kept (B, K) patch indices -> (B, P+K, C)."""
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)


def fused_token(tokens: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """One token for all that were dropped: their sum, weighted by the attention they get, which is not renormalised.

    Args: tokens (B, N, C) patch tokens, scores (B, N) their attention, kept (B, K). Returns: (B, 1, C).
    The sum over all less the sum over the kept, which needs no index of what was dropped; in fp32, where the
    difference of two sums is safe.
    """
    weighted = scores.float().unsqueeze(-1) * tokens.float()
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    dropped = weighted.sum(1, keepdim=True) - weighted.gather(1, index).sum(1, keepdim=True)
    return dropped.to(tokens.dtype)


def random_scores(batch: int, tokens: int, device: torch.device, *, block: int, training: bool) -> Tensor:
    """(B, N) lots in place of scores, the control of every ranking. In training from torch's global generator, which
    the loop seeds from (seed, epoch, step), as for dropout: each image of each step gets its own. Otherwise from a
    fixed one, so that an evaluation can be repeated: an image's lot is then that of its place in the batch.
    """
    if training:
        return torch.rand(batch, tokens, device=device)
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(block)).to(device)
