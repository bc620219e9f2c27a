"""Whose patches tickets are about, and where a selector drops tokens so that exactly those of a ticket are left."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods import InvalidInput
from .architecture import Architecture, SwinArchitecture, TokenDrop
from .swin import check_grid


def ticketed(
    own: Architecture | SwinArchitecture, ranker: Architecture | SwinArchitecture
) -> Architecture | SwinArchitecture:
    """The architecture whose patches tickets of less than the whole image are about: the network itself; for a Swin,
    which ranks no patches, the ViT that does.

    Args:
        own: the network that the tickets are for; ranker: the selector, else the ticket's proxy.
    Raises: InvalidInput; its field is one of the ticket stage's settings.
    """
    if isinstance(own, Architecture):
        return own
    if isinstance(ranker, SwinArchitecture):
        raise InvalidInput(
            f"{own.model} is a Swin, which ranks no patches",
            "name a ViT whose patches the tickets are about: proxy: {model: {name: deit_tiny_patch16_224}}",
            field="proxy.model",
        )
    check_grid(own, ranker.grid)
    return ranker


def arrange(
    architecture: Architecture | SwinArchitecture,
    target: Architecture | SwinArchitecture,
    blocks: Sequence[int] | None,
    patches: int,
) -> tuple[TokenDrop, ...]:
    """Token reduction of a selector: an equal share at each block, `patches` left after the last.

    Args:
        target: the network that the tickets are for; both must see the same patches.
        blocks: where to drop; None: at a quarter, a half and three quarters of the depth.
    Returns: at least one drop, counts strictly falling; a block at which rounding would drop nothing is left out.
    Raises: InvalidInput when this network cannot rank these patches; its field is one of the ticket stage's settings.
    """
    if architecture.grid != target.grid or architecture.image_size != target.image_size:
        raise InvalidInput(
            f"the selector sees {architecture.grid[0]} x {architecture.grid[1]} patches of a "
            f"{architecture.image_size} px image, "
            f"the pipeline's model {target.grid[0]} x {target.grid[1]} of {target.image_size} px",
            "give both the same image_size and patch_size",
        )
    if architecture.prefix == 0:
        raise InvalidInput(
            f"{architecture.model} has no prefix token to rank patches by",
            "use patches.method: saliency, or a model with a class token",
            field="patches.method",
        )
    assert isinstance(architecture, Architecture), "a Swin has no prefix token"
    depth = len(architecture.blocks)
    chosen = sorted({depth // 4, depth // 2, (3 * depth) // 4} if blocks is None else blocks)
    if chosen[-1] >= depth or chosen[0] < 0 or len(set(chosen)) != len(chosen):
        raise InvalidInput(
            f"selector.blocks {chosen} do not fit a network of {depth} blocks",
            f"use different numbers from 0 to {depth - 1}",
            field="selector.blocks",
        )
    share = patches / architecture.patches
    drops, left = [], architecture.patches
    for number, block in enumerate(chosen, start=1):
        last = number == len(chosen)
        count = patches if last else max(patches, round(architecture.patches * share ** (number / len(chosen))))
        if count < left:
            drops.append(TokenDrop(block, count))
            left = count
    return tuple(drops)
