"""What a vision transformer costs: multiply-accumulates and parameters from its widths alone.

MACs of a block (methods' oracle: reproduces EViT's published DeiT-S table):
    T_in * C * H(2 qk + v)  +  H * T_in^2 * (qk + v)  +  T_in * H v * C  +  2 * T_out * C * MLP
with T_in tokens before and T_out after a token reduction in that block. Norms, biases, softmax and GELU are left out,
as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockWidths:
    """heads, width of a head's queries and keys, width of its values, hidden units of the MLP."""

    heads: int
    qk: int
    v: int
    mlp: int


@dataclass(frozen=True, slots=True)
class SwinStageWidths:
    """A stage of a Swin at one image size: channels, tokens in all and in a window, its blocks."""

    dim: int
    tokens: int
    window_area: int
    blocks: list[BlockWidths]


def block_macs(embed: int, widths: BlockWidths, tokens_in: int, tokens_out: int) -> int:
    """Multiply-accumulates of one block for one image."""
    qkv = tokens_in * embed * widths.heads * (2 * widths.qk + widths.v)
    attention = widths.heads * tokens_in * tokens_in * (widths.qk + widths.v)
    proj = tokens_in * widths.heads * widths.v * embed
    return qkv + attention + proj + 2 * tokens_out * embed * widths.mlp


def conv_stem_macs(image_size: int, width: int) -> int:
    """LV-ViT's stem before it cuts patches, for one image: a 7x7 convolution of stride 2, then two of 3x3, `width`
    channels each.
    """
    positions = (image_size // 2) ** 2
    return positions * width * (3 * 7 * 7 + 2 * width * 3 * 3)


def vit_macs(
    embed: int,
    blocks: list[BlockWidths],
    *,
    patches: int,
    prefix: int,
    patch_values: int,
    classes: int,
    heads_out: int = 1,
    token_heads: int = 0,
    stem: int = 0,
    reduction: dict[int, int] | None = None,
    merging: frozenset[int] = frozenset(),
    start_patches: int | None = None,
) -> int:
    """Multiply-accumulates of a whole ViT for one image.

    Args:
        patches: N of the image; patch_values: numbers in a patch (3 * p * p), or in what a stem made of it.
        prefix: P. classes, heads_out: output width and number of classifier heads (2 for a distilled DeiT).
        token_heads: classifier heads that answer for every patch token that is left (1 for LV-ViT).
        stem: multiply-accumulates before patches are cut; with a stem all patches are embedded, whatever a ticket
            keeps.
        reduction: block index -> patch tokens kept from that block's MLP on.
        merging: which of these blocks merge tokens by their keys (ToMe), which costs products of its own.
        start_patches: patch tokens that are embedded and enter the blocks, when a ticket has left some out; N by
            default.
    """
    reduction = reduction or {}
    entering = patches if start_patches is None else start_patches
    total = stem + (patches if stem else entering) * patch_values * embed
    tokens = entering + prefix
    for index, widths in enumerate(blocks):
        after = reduction[index] + prefix if index in reduction else tokens
        if index in merging:
            total += merge_macs(tokens - prefix, embed, widths.qk)
        total += block_macs(embed, widths, tokens, after)
        tokens = after
    answers = heads_out + token_heads * (tokens - prefix)
    return total + answers * embed * classes


def merge_macs(patches: int, embed: int, qk: int) -> int:
    """Multiply-accumulates to merge some of `patches` tokens: one half's keys with the other's, then the one-hot matrix
    with tokens and their sizes.
    """
    first, second = -(-patches // 2), patches // 2
    return first * second * (qk + embed + 1)


def patches_processed(depth: int, patches: int, reduction: dict[int, int]) -> float:
    """Patch tokens that a block works on, mean over all blocks and in each over attention (before a reduction in it)
    and MLP (after it).
    """
    total, tokens = 0, patches
    for index in range(depth):
        after = reduction.get(index, tokens)
        total, tokens = total + tokens + after, after
    return total / (2 * depth)


def window_block_macs(embed: int, widths: BlockWidths, tokens: int, window_area: int) -> int:
    """Multiply-accumulates of one block whose tokens see only the `window_area` tokens of their own window."""
    linear = block_macs(embed, widths, tokens, tokens) - widths.heads * tokens * tokens * (widths.qk + widths.v)
    return linear + widths.heads * tokens * window_area * (widths.qk + widths.v)


def swin_macs(stages: Sequence[SwinStageWidths], *, patch_values: int, classes: int) -> int:
    """Multiply-accumulates of a whole Swin for one image: embedding, blocks, the 2 x 2 mergings between stages, head.

    The MLP of V2's continuous position bias is left out: it sees no image, and an exported file holds its result.
    """
    total = stages[0].tokens * patch_values * stages[0].dim
    for before, stage in zip([None, *stages], stages, strict=False):
        if before is not None:
            total += stage.tokens * 4 * before.dim * stage.dim
        total += sum(window_block_macs(stage.dim, block, stage.tokens, stage.window_area) for block in stage.blocks)
    return total + stages[-1].dim * classes


@dataclass(frozen=True, slots=True)
class TicketCost:
    """Multiply-accumulates to train on one image once. Forward and backward are three forwards.

    dense: on all patches. cached: on its ticket, whose rank is there already. online: on its ticket, after a forward
    of the selector. selector: that forward. break_even: presentations of an image after which ranking it once has paid
    for itself; None where a ticket saves nothing.
    """

    dense: int
    cached: int
    online: int
    selector: int
    break_even: float | None


def ticket_cost(dense: int, student: int, selector: int) -> TicketCost:
    """What a patch ticket costs and saves, from the MACs of one forward of the student on all patches, of the student
    on its ticket, and of the selector (0 for tickets without a network).
    """
    saved = 3 * (dense - student)
    return TicketCost(3 * dense, 3 * student, 3 * student + selector, selector, selector / saved if saved > 0 else None)
