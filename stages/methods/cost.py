"""What a vision transformer costs: multiply-accumulates and parameters from its widths alone.

MACs of a block (methods' oracle: reproduces EViT's published DeiT-S table):
    T_in * C * H(2 qk + v)  +  H * T_in^2 * (qk + v)  +  T_in * H v * C  +  2 * T_out * C * MLP
with T_in tokens before and T_out after a token reduction in that block. Norms, biases, softmax and GELU are left out,
as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockWidths:
    """heads, width of a head's queries and keys, width of its values, hidden units of the MLP."""

    heads: int
    qk: int
    v: int
    mlp: int


def block_macs(embed: int, widths: BlockWidths, tokens_in: int, tokens_out: int) -> int:
    """Multiply-accumulates of one block for one image."""
    qkv = tokens_in * embed * widths.heads * (2 * widths.qk + widths.v)
    attention = widths.heads * tokens_in * tokens_in * (widths.qk + widths.v)
    proj = tokens_in * widths.heads * widths.v * embed
    return qkv + attention + proj + 2 * tokens_out * embed * widths.mlp


def vit_macs(
    embed: int,
    blocks: list[BlockWidths],
    *,
    patches: int,
    prefix: int,
    patch_values: int,
    classes: int,
    heads_out: int = 1,
    reduction: dict[int, int] | None = None,
    start_patches: int | None = None,
) -> int:
    """Multiply-accumulates of a whole ViT for one image.

    Args:
        patches: N of the image; patch_values: numbers in a patch (3 * p * p).
        prefix: P. classes, heads_out: output width and number of classifier heads (2 for a distilled DeiT).
        reduction: block index -> patch tokens kept from that block's MLP on.
        start_patches: patch tokens that are embedded and enter the blocks, when a ticket has left some out; N by
            default.
    """
    reduction = reduction or {}
    entering = patches if start_patches is None else start_patches
    total = entering * patch_values * embed
    tokens = entering + prefix
    for index, widths in enumerate(blocks):
        after = reduction[index] + prefix if index in reduction else tokens
        total += block_macs(embed, widths, tokens, after)
        tokens = after
    return total + heads_out * embed * classes
