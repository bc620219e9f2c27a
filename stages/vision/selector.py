"""Whose patches tickets are about, and where a selector drops tokens so that exactly those of a ticket are left."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods import InvalidInput
from ..methods.token_reduction import keep_count
from .architecture import Architecture, SwinArchitecture, TokenDrop
from .patch_settings import Patches, Selector
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


def ticket_size(
    architecture: Architecture | SwinArchitecture,
    target: Architecture | SwinArchitecture,
    keep: float | None,
    keep_per_stage: float | None,
    blocks: Sequence[int] | None,
) -> int:
    """Patches kept of each image: ceil(keep * N), or with keep_per_stage ceil(keep_per_stage * n) at every block of the
    selector that drops tokens (the papers' way of saying it); with neither, all.

    Args: architecture: of the selector; target: the network that the tickets are for; blocks: as for arrange.
    Raises: InvalidInput for a keep that is less than one patch.
    """
    total = target.patches
    if keep_per_stage is None:
        keep = 1.0 if keep is None else keep
        if keep * total < 1:
            raise InvalidInput(
                f"patches.keep {keep:g} of {total} patches is {keep * total:.2g} of one",
                f"keep at least one: 1/{total} is {1 / total:.2g}",
                field="patches.keep",
            )
        return keep_count(total, keep)
    left = total
    for _ in places(architecture, blocks):
        if keep_per_stage * left < 1:
            raise InvalidInput(
                f"selector.keep_per_stage {keep_per_stage:g} of {left} patches is {keep_per_stage * left:.2g} of one",
                f"keep at least one: 1/{left} is {1 / left:.2g}",
                field="selector.keep_per_stage",
            )
        left = keep_count(left, keep_per_stage)
    return left


def ranked_size(
    patches: Patches,
    settings: Selector,
    ranker: Architecture | SwinArchitecture,
    target: Architecture | SwinArchitecture,
    *,
    selected: bool,
) -> int:
    """Patches kept of each image of a ticket that keeps less than all.

    Args:
        ranker: the architecture of the selector, or of the proxy that would be one; target: as in ticket_size.
        selected: whether patches are ranked by a selector.
    Raises: InvalidInput as ticket_size, and for a selector that cannot rank them, before anything is trained for it.
    """
    size = ticket_size(ranker, target, patches.keep, settings.keep_per_stage, settings.blocks)
    if size < target.patches and selected:
        arrange(ranker, target, settings.blocks, size, settings.keep_per_stage)
        if settings.mode == "paper" and ranker.prefix != 1:
            raise InvalidInput(
                f"mode: paper takes the first token for the class token and all others for patches; {ranker.model} has "
                f"{ranker.prefix} tokens that are no patches",
                "use mode: corrected",
                field="selector.mode",
            )
    return size


def places(architecture: Architecture | SwinArchitecture, blocks: Sequence[int] | None) -> list[int]:
    """The blocks that drop tokens, ascending; None: at a quarter, a half and three quarters of the depth.

    Raises: InvalidInput for blocks that the network does not have.
    """
    depth = len(architecture.blocks)
    chosen = sorted({depth // 4, depth // 2, (3 * depth) // 4}) if blocks is None else sorted(blocks)
    if chosen[-1] >= depth or chosen[0] < 0 or len(set(chosen)) != len(chosen):
        raise InvalidInput(
            f"selector.blocks {chosen} do not fit a network of {depth} blocks",
            f"use different numbers from 0 to {depth - 1}",
            field="selector.blocks",
        )
    return chosen


def arrange(
    architecture: Architecture | SwinArchitecture,
    target: Architecture | SwinArchitecture,
    blocks: Sequence[int] | None,
    patches: int,
    keep_per_stage: float | None = None,
) -> tuple[TokenDrop, ...]:
    """Token reduction of a selector: an equal share at each block, `patches` left after the last.

    Args:
        target: the network that the tickets are for; both must see the same patches.
        blocks: where to drop; see places.
        keep_per_stage: the share at each block, where it is stated; `patches` is then its ticket_size.
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
    if isinstance(architecture, SwinArchitecture):
        raise InvalidInput(
            f"{architecture.model} is a Swin, which ranks no patches",
            "use patches.method: saliency, or name a ViT in proxy.model",
            field="patches.method",
        )
    chosen = places(architecture, blocks)
    share = patches / architecture.patches
    drops, left = [], architecture.patches
    for number, block in enumerate(chosen, start=1):
        if keep_per_stage is not None:
            count = keep_count(left, keep_per_stage)
        elif number == len(chosen):
            count = patches
        else:
            count = max(patches, round(architecture.patches * share ** (number / len(chosen))))
        if count < left:
            drops.append(TokenDrop(block, count))
            left = count
    return tuple(drops)
