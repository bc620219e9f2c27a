"""Merging patch tokens that resemble each other: ToMe (Bolya et al., ICLR 2023, section 3), in a form that exports.

In a block, between attention and MLP, the patch tokens are split in turns into two sets. Every token of the first
draws an edge to the token of the second whose key resembles its own most; the r strongest edges are merged into the
mean of the patches behind both ends. A token then counts in attention as often as it has patches (proportional
attention, their eq. 1).

Where we differ: theirs adds by scatter_reduce, for which ONNX has no mean and runtimes disagree; here the sum is a
product with a one-hot matrix, with counts that are constants. Prefix tokens take no part (theirs protects one class
token, which holds a place in the first set, so that the turns are the other way round). Ties go to the lowest index.
The keys are those that attention sees: normalised, in a network that does so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Matching(NamedTuple):
    """Which tokens are merged into which. The first set is every even token, A of them."""

    strength: Tensor  # (B, A), the cosine of each token of the first set to its nearest of the second
    alone: Tensor  # (B, A - removed), places in the first set that stay
    assigned: Tensor  # (B, N - A, A) float32, 1 where a token of the second set takes in one of the first


def merge(tokens: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge the patch tokens as they were matched.

    Args: tokens (B, N, C) without prefix tokens; sizes (B, N) patches in each.
    Returns: tokens (B, N - removed, C) and sizes (B, N - removed): the first set's rest, then the second set.
        Attention does not see the order.
    """
    _, alone, assigned = matching
    size = sizes.float().unsqueeze(-1)
    weighted = torch.cat([tokens.float() * size, size], dim=-1)  # the sizes are summed by the same product
    first, second = weighted[:, ::2], weighted[:, 1::2]
    with torch.autocast(tokens.device.type, enabled=False):  # half precision cannot count beyond 256 patches
        second = second + assigned @ first
    first = first.gather(1, alone.unsqueeze(-1).expand(-1, -1, weighted.shape[-1]))
    merged = torch.cat([first, second], dim=1)
    return (merged[..., :-1] / merged[..., -1:]).to(tokens.dtype), merged[..., -1]


def match(keys: Tensor, count: int) -> Matching:
    """Which tokens are merged so that `count` are left. keys (B, N, D) of all patch tokens, mean over heads; count: at
    least N - floor(N / 2). No gradient.
    """
    removed, most = keys.shape[1] - count, keys.shape[1] // 2
    if not 0 <= removed <= most:
        raise ValueError(f"of {keys.shape[1]} tokens at most {most} can be merged away, not {removed}")
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        direction = F.normalize(keys.float(), dim=-1)
        first, second = direction[:, ::2], direction[:, 1::2]
        strength, into = (first @ second.transpose(1, 2)).max(dim=-1)  # of equals the first
        order = _descending(strength)
        merged, alone = order[:, :removed], order[:, removed:]
        places = torch.arange(first.shape[1], device=keys.device)
        goes = (merged.unsqueeze(-1) == places).float().sum(1)
        targets = torch.arange(second.shape[1], device=keys.device)
        assigned = (into.unsqueeze(1) == targets.view(1, -1, 1)).float() * goes.unsqueeze(1)
    return Matching(strength, alone, assigned)


def _descending(values: Tensor) -> Tensor:
    """Places by value, equals by place. ONNX has no stable sort, but its TopK promises the lower index."""
    if torch.compiler.is_exporting():
        return values.topk(values.shape[1], dim=1).indices
    return values.sort(dim=1, descending=True, stable=True).indices


def proportional(sizes: Tensor, prefix: int) -> Tensor:
    """What is added to the logits so that a token counts as often as it has patches. sizes (B, N) -> (B, 1, 1, P + N),
    the prefix tokens counting once.
    """
    return F.pad(sizes.log(), (prefix, 0))[:, None, None]


def pool_weights(sizes: Tensor, prefix: int) -> Tensor:
    """What tokens are multiplied by so that their plain mean is the mean over the patches behind them, and over the
    `prefix` tokens that are pooled with them. sizes (B, N) -> (B, P + N, 1).
    """
    counts = F.pad(sizes, (prefix, 0), value=1.0)
    return (counts * counts.shape[1] / counts.sum(1, keepdim=True)).unsqueeze(-1)
