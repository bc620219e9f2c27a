"""Multi-head attention whose heads, query/key width, value width and softmax scale are stated one by one.

timm's own Attention derives the scale from the width of a head. After pruning that is wrong, and its fused and plain
paths disagree by up to 23%: the plain one keeps the old number, the fused one computes a new one. Here the scale is
an argument of both paths. Parameter names and layout are timm's (qkv, proj, q_norm, k_norm), so that its checkpoints
load.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.attention_connections import Mode, weigh
from ..methods.token_reduction import column_attention, prefix_attention
from .layers import HeadWidths
from .window_attention import CosineWindowAttention, WindowAttention


class Attention(HeadWidths, nn.Module):
    """(B, T, C) -> (B, T, C).

    heads: H. qk, v: width of one head's queries/keys and values. scale: softmax(scale * q k^T).
    fused: torch's scaled_dot_product_attention, or the plain products that ONNX tools recognise.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        qk: int,
        v: int,
        scale: float,
        *,
        qkv_bias: bool,
        proj_bias: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.qk, self.v, self.scale = heads, qk, v, scale
        self.fused = True
        self.dropout = dropout
        self.qkv = nn.Linear(embed, heads * (2 * qk + v), bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(heads * v, embed, bias=proj_bias)
        self.proj_drop = nn.Dropout(0.0)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output of qkv (B, T, H(2 qk + v)) -> normalised queries and keys (B, H, T, qk), values (B, H, T, v)."""
        batch, tokens, _ = projected.shape
        q, k, v = projected.split([self.heads * self.qk, self.heads * self.qk, self.heads * self.v], dim=-1)
        q = self.q_norm(q.view(batch, tokens, self.heads, self.qk).transpose(1, 2))
        k = self.k_norm(k.view(batch, tokens, self.heads, self.qk).transpose(1, 2))
        return q, k, v.view(batch, tokens, self.heads, self.v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)[0]

    def attend(
        self, x: Tensor, *, bias: Tensor | None = None, allowed: Tensor | None = None, mode: Mode = "corrected"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, T, C), and the queries and keys (B, H, T, qk) that it came from.

        bias: added to the logits (B, H, T, T), broadcast. allowed: (B, 1, T, T) bool, which tokens attend to which, and
        mode: how the others are kept out (methods/attention_connections.py). Not both.
        """
        batch, tokens, _ = x.shape
        q, k, v = self.split(self.qkv(x))
        dropout = self.dropout if self.training else 0.0
        if self.fused and (allowed is None or mode == "corrected"):
            mask = allowed if bias is None else bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            logits = logits if bias is None else logits + bias.to(logits.dtype)
            out = F.dropout(weigh(logits, allowed, mode), dropout, self.training) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, self.heads * self.v)
        return self.proj_drop(self.proj(out)), q, k

    def weights(self, q: Tensor, k: Tensor, allowed: Tensor | None, mode: Mode) -> Tensor:
        """The attention map averaged over heads, (B, T, T) float32, without gradient: it decides which connections are
        kept, and half precision has many equals.
        """
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return weigh(q.float() * self.scale @ k.float().transpose(-2, -1), allowed, mode).mean(1)

    def scores(self, q: Tensor, k: Tensor, prefix: int) -> Tensor:
        """The score of each patch token, (B, N): the attention that the prefix tokens pay it, or, with a prefix of 0,
        that all patch tokens pay it.
        """
        if prefix:
            return prefix_attention(q, k, prefix, self.scale)
        # All rows at once when exporting: a loop would be unrolled into the graph.
        return column_attention(q, k, 0, self.scale, rows=q.shape[2] if torch.compiler.is_exporting() else 64)


def from_timm(attention: nn.Module) -> Attention:
    """The same attention with stated widths; weights are shared, outputs equal.

    Raises: InvalidInput for a variant (gated, normalised output, relative bias, rotary) whose parts we could not cut
    truly.
    """
    if type(attention) is not timm.layers.Attention:
        raise InvalidInput(
            f"attention of class {type(attention).__name__} cannot be pruned or reduced",
            "use a plain ViT or DeiT of timm (vit_*, deit_*, deit3_*)",
            field="model.name",
        )
    plain: Any = attention  # timm is not typed here
    if plain.gate is not None or not isinstance(plain.norm, nn.Identity):
        raise InvalidInput(
            "gated attention and attention with a normalised output cannot be pruned",
            "use a plain ViT or DeiT of timm",
            field="model.name",
        )
    ours = Attention(
        plain.qkv.in_features,
        plain.num_heads,
        plain.head_dim,
        plain.head_dim,
        float(plain.scale),
        qkv_bias=plain.qkv.bias is not None,
        proj_bias=plain.proj.bias is not None,
        dropout=float(plain.attn_drop.p),
    )
    ours.qkv, ours.proj = plain.qkv, plain.proj
    ours.q_norm, ours.k_norm = plain.q_norm, plain.k_norm
    ours.proj_drop = plain.proj_drop
    return ours.train(plain.training)


def set_fused(network: nn.Module, fused: bool) -> None:
    """Choose the attention path of every block."""
    for module in network.modules():
        if isinstance(module, Attention | WindowAttention | CosineWindowAttention):
            module.fused = fused
