"""From images to the tokens that enter the blocks; of a ticket, only the kept patches are embedded.

timm embeds all patches and adds the positions; a ticket that is gathered after that has paid for patches that nobody
reads. Where patches do not overlap, an embedded patch depends on its own pixels alone, so gathering first gives the
same tokens for less. Where they do overlap (convolutional stems), it does not, and all patches are embedded before the
ticket is gathered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..methods.token_reduction import gather_tokens


def embed(body: VisionTransformer, images: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens with their positions. images (B, 3, S, S), kept (B, K) patch indices or None -> (B, P + K, C)."""
    if kept is not None and separable(body.patch_embed):
        return _with_positions(body, _embed_kept(body.patch_embed, images, kept), kept)
    every: Tensor = body._pos_embed(body.patch_embed(images))
    return every if kept is None else gather_tokens(every, kept, body.num_prefix_tokens)


def separable(embedding: nn.Module) -> bool:
    """Whether every patch is embedded from its own pixels alone: timm's plain PatchEmbed and no other class."""
    return type(embedding) is PatchEmbed


def kept_pixels(images: Tensor, kept: Tensor, patch: tuple[int, int]) -> Tensor:
    """The pixels of the kept patches, in the order of a convolution's weight. Nothing of the others is copied.

    images (B, 3, S, S), kept (B, K) raster indices -> (B, K, 3 * h * w) for patches of h x w pixels.
    """
    batch, channels, height, width = images.shape
    high, wide = patch
    rows, columns = height // high, width // wide
    cells = images.reshape(batch, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
    which = torch.arange(batch, device=kept.device).unsqueeze(1)
    return cells[which, kept // columns, kept % columns].flatten(2)


def _embed_kept(embedding: PatchEmbed, images: Tensor, kept: Tensor) -> Tensor:
    """The convolution whose stride is its kernel, as the matrix product that it is. Returns (B, K, C)."""
    weight: Tensor = embedding.proj.weight
    pixels = kept_pixels(images, kept, (weight.shape[-2], weight.shape[-1]))
    embedded: Tensor = embedding.norm(F.linear(pixels, weight.flatten(1), embedding.proj.bias))
    return embedded


def _with_positions(body: VisionTransformer, patches: Tensor, kept: Tensor) -> Tensor:
    """As timm's `_pos_embed`, for some of the patches: their rows of the position table, then the prefix tokens."""
    batch = len(patches)
    first = [getattr(body, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = [token.expand(batch, -1, -1) for token in first if token is not None]
    table: Tensor | None = body.pos_embed
    if table is None:
        return torch.cat([*prefix, patches], dim=1)
    # timm's no_embed_class: the table has rows for the patches only.
    of_prefix = 0 if body.no_embed_class else body.num_prefix_tokens
    # Not by an index: the gradient of F.embedding is added up in order and several times faster on a CPU.
    patches = patches + F.embedding(kept, table[0, of_prefix:])
    if prefix and of_prefix:
        prefix = [torch.cat(prefix, dim=1) + table[:, :of_prefix]]
    tokens: Tensor = body.pos_drop(torch.cat([*prefix, patches], dim=1))
    return tokens
