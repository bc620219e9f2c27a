"""Attention inside windows, of Swin V1 and V2, whose heads, query/key width, value width and scale are stated.

As in attention.py the scale is an argument of both paths and names and layout of the parameters are timm's. The window
is not part of the module: which biases belong to which pair of tokens comes as an argument, so that the same weights
run on a smaller image with smaller windows. V1 adds a learned table of biases; V2 compares directions (cosine, times a
learned number a head) and computes its biases from offsets by a small network.
"""

from __future__ import annotations

import math
from typing import Any

import timm.models.swin_transformer as timm_v1
import timm.models.swin_transformer_v2 as timm_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods import InvalidInput
from . import layers

LARGEST_SCALE = math.log(100)  # V2, section 3.3: the learned scale never exceeds 100


class WindowAttention(layers.HeadWidths, nn.Module):
    """V1. (B, W, A, C) -> (B, W, A, C): B images of W windows of A tokens.

    heads: H. qk, v: width of one head's queries/keys and values. scale: softmax(scale * q k^T + bias + mask).
    fused: torch's scaled_dot_product_attention, or the plain products that ONNX tools recognise.
    fixed: biases as numbers (H, A, A) instead of their table, or None; see Swin.fixed_biases.
    """

    def __init__(self, theirs: Any) -> None:
        """theirs: timm's attention; its parameters are shared."""
        super().__init__()
        self.heads = int(theirs.num_heads)
        self.qk = self.v = theirs.qkv.out_features // (3 * self.heads)
        self.scale = float(theirs.scale)
        self.fused = True
        self.dropout = float(theirs.attn_drop.p)
        self.qkv, self.proj, self.proj_drop = theirs.qkv, theirs.proj, theirs.proj_drop
        self.relative_position_bias_table = theirs.relative_position_bias_table
        self.window_size = theirs.window_size  # the table's; timm's reader of checkpoints looks for it
        self.register_buffer("fixed", None, persistent=False)
        self.fixed: Tensor | None

    def resize(self, embed: int, heads: int, qk: int, v: int) -> None:
        """Other widths, untrained."""
        self.heads, self.qk, self.v = heads, qk, v
        self.qkv = layers.linear(self.qkv, embed, heads * (2 * qk + v))
        self.proj = layers.linear(self.proj, heads * v, embed)
        table = self.relative_position_bias_table
        self.relative_position_bias_table = nn.Parameter(torch.zeros(len(table), heads))

    def biases(self, index: Tensor) -> Tensor:
        """(H, A, A) for the pairs of tokens of a window. index: (A, A), see methods.windows.relative_index."""
        return _of_pairs(self.relative_position_bias_table, index)

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (W, A, A) added to the logits of every head, or None."""
        q, k, v = _heads(self.qkv(x), self.heads, self.qk, self.v)
        bias = self.biases(index) if self.fixed is None else self.fixed
        return _attend(self, q, k, v, self.scale, bias, mask)


class CosineWindowAttention(layers.HeadWidths, nn.Module):
    """V2, as WindowAttention otherwise. scale is 1: logit_scale, a weight, is what multiplies the cosines."""

    def __init__(self, theirs: Any) -> None:
        """theirs: timm's attention; its parameters are shared."""
        super().__init__()
        self.heads = int(theirs.num_heads)
        self.qk = self.v = theirs.qkv.out_features // (3 * self.heads)
        self.scale = 1.0
        self.fused = True
        self.dropout = float(theirs.attn_drop.p)
        self.logit_scale, self.cpb_mlp = theirs.logit_scale, theirs.cpb_mlp
        self.qkv, self.proj, self.proj_drop = theirs.qkv, theirs.proj, theirs.proj_drop
        self.q_bias, self.v_bias = theirs.q_bias, theirs.v_bias
        # Offsets on a logarithmic scale, relative to the window at the recorded image size: (1, 2R-1, 2R-1, 2).
        self.register_buffer("offsets", theirs.relative_coords_table, persistent=False)
        self.register_buffer("fixed", None, persistent=False)
        self.offsets: Tensor
        self.fixed: Tensor | None

    def resize(self, embed: int, heads: int, qk: int, v: int) -> None:
        """Other widths, untrained."""
        self.heads, self.qk, self.v = heads, qk, v
        self.qkv = layers.linear(self.qkv, embed, heads * (2 * qk + v))
        self.proj = layers.linear(self.proj, heads * v, embed)
        self.logit_scale = nn.Parameter(torch.zeros(heads, 1, 1))
        self.cpb_mlp[-1] = layers.linear(self.cpb_mlp[-1], self.cpb_mlp[-1].in_features, heads)
        if self.q_bias is not None:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(heads * qk)), nn.Parameter(torch.zeros(heads * v))

    def biases(self, index: Tensor) -> Tensor:
        """(H, A, A) for the pairs of tokens of a window. index: (A, A), see methods.windows.relative_index."""
        table = 16 * self.cpb_mlp(self.offsets).view(-1, self.heads).sigmoid()
        return _of_pairs(table, index)

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (W, A, A) added to the logits of every head, or None."""
        bias = None
        if self.q_bias is not None:  # keys have none: the softmax would cancel it
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = _heads(F.linear(x, self.qkv.weight, bias), self.heads, self.qk, self.v)
        q = _directions(q) * self.logit_scale.clamp(max=LARGEST_SCALE).exp()
        position = self.biases(index) if self.fixed is None else self.fixed
        return _attend(self, q, _directions(k), v, self.scale, position, mask)


def _of_pairs(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table (N, H) by positions (A, A) -> (H, A, A)."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


def _directions(x: Tensor) -> Tensor:
    """Unit vectors along the last axis. torch's own normalize is exported with a needless expansion."""
    units: Tensor = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return units


def _heads(qkv: Tensor, heads: int, qk: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, W, A, H * (2 * qk + v)) -> queries, keys (B, W, H, A, qk) and values (B, W, H, A, v)."""
    batch, windows, area, _ = qkv.shape
    parts = qkv.split([heads * qk, heads * qk, heads * v], dim=-1)
    q, k, values = (part.reshape(batch, windows, area, heads, -1).transpose(2, 3) for part in parts)
    return q, k, values


def _attend(
    module: WindowAttention | CosineWindowAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor,
    mask: Tensor | None,
) -> Tensor:
    batch, windows, heads, area, _ = q.shape
    dropout = module.dropout if module.training else 0.0
    if module.fused:
        # Four dimensions are what the fast kernels take: windows count as images without a mask, as heads with one.
        if mask is None:
            shape, added = (batch * windows, heads), bias.unsqueeze(0)
        else:
            shape, added = (batch, windows * heads), (bias + mask.unsqueeze(1)).reshape(1, windows * heads, area, area)
        q, k, v = (part.reshape(*shape, area, part.shape[-1]) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=scale)
        out = out.reshape(batch, windows, heads, area, -1)
    else:
        logits = q * scale @ k.transpose(-2, -1) + bias
        if mask is not None:
            logits = logits + mask.unsqueeze(1)
        out = F.dropout(logits.softmax(-1), dropout, module.training) @ v
    out = out.transpose(2, 3).reshape(batch, windows, area, -1)
    result: Tensor = module.proj_drop(module.proj(out))
    return result


def from_timm(attention: nn.Module) -> WindowAttention | CosineWindowAttention:
    """The same attention with stated widths; weights are shared. Raises: InvalidInput for another class."""
    if type(attention) is timm_v1.WindowAttention:
        return WindowAttention(attention)
    if type(attention) is timm_v2.WindowAttention:
        return CosineWindowAttention(attention)
    raise InvalidInput(
        f"window attention of class {type(attention).__name__} is not known here", "use swin_* or swinv2_*"
    )
