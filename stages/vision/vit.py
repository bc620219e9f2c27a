"""The ViT family: a timm ViT or DeiT, or an LV-ViT, with stated attention, tickets and token reduction.

`ViT` runs timm's own modules one after the other. What it adds to timm's forward is three things that timm has not:
an argument `kept` (a patch ticket: only these patches enter the blocks), token reduction at chosen blocks (the patches
with most attention go on, or merged ones), and in training attention along chosen connections only. Without them it
computes what timm computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.layers import LayerScale, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.attention_connections import Connections, connect, narrow
from ..methods.token_merging import match, merge, pool_weights, proportional
from ..methods.token_reduction import fused_token, gather_tokens, keep_count, random_scores, top_tokens
from . import layers
from .architecture import Architecture, Block, Reduction, TokenDrop
from .attention import Attention, from_timm
from .embedding import embed
from .lvvit import ConvStem, LVViT

HEADS = ("head", "head_dist", "aux_head")
TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")  # parameters whose last dimension is the embedding


@dataclass
class Passage:
    """Tokens on their way through the blocks. x: (B, P + N, C). sizes: (B, N) patches in each patch token, once some
    were merged. allowed: (B, 1, T, T), which tokens attend to which; None for all. scores, positions: (B, n) and (B, K)
    of every block that dropped tokens. states: x as some blocks left it.
    """

    x: Tensor
    sizes: Tensor | None = None
    allowed: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


class ViT(nn.Module):
    """images (B, 3, S, S) normalised -> logits (B, K); in distilled training a pair (class head, distillation head), in
    token training a pair (class head (B, K), head of the patch tokens (B, N, K)).
    """

    def __init__(self, body: VisionTransformer, architecture: Architecture) -> None:
        super().__init__()
        self.body = body
        self.set_tokens(architecture)
        self.connections: Connections | None = None  # in training mode only

    def forward(self, images: Tensor, kept: Tensor | None = None, after: tuple[int, ...] = ()) -> Any:
        """kept: (B, K) patch indices of a ticket, or None for all patches. after: ascending numbers of blocks; then a
        pair is returned, the logits and a tuple of the tokens (B, P + N, C) as each of these blocks leaves them.
        """
        passage = self._through(images, kept, after=after)
        features = self.body.norm(passage.x)
        if passage.sizes is not None and self.body.global_pool == "avg":
            first = 0 if self.body.pool_include_prefix else self.architecture.prefix
            weights = pool_weights(passage.sizes, self.architecture.prefix - first)
            features = torch.cat([features[:, :first], features[:, first:] * weights], dim=1)
        answers = self.body.forward_head(features)
        return (answers, tuple(passage.states)) if after else answers

    def select(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Per token-dropping block the scores (B, n) of the patches that reached it and the positions (B, K) kept.
        What comes after the last of these blocks has no say and is not computed.
        """
        passage = self._through(images, None, last=max(self.drops))
        return passage.scores, passage.positions

    def _through(
        self, images: Tensor, kept: Tensor | None, last: int | None = None, after: tuple[int, ...] = ()
    ) -> Passage:
        """The tokens after all blocks, or as they stand once block `last` has dropped some."""
        body, prefix = self.body, self.architecture.prefix
        passage = Passage(body.norm_pre(embed(body, images, kept)))
        connections = self.connections if self.training else None
        mode = "corrected" if connections is None else connections.mode
        for index, block in enumerate(body.blocks):
            bias = None if passage.sizes is None else proportional(passage.sizes, prefix)
            attended, q, k = block.attn.attend(block.norm1(passage.x), bias=bias, allowed=passage.allowed, mode=mode)
            passage.x = passage.x + block.drop_path1(block.ls1(attended))
            drop, weights = self.drops.get(index), None
            if connections is not None and index in connections.blocks:
                weights = block.attn.weights(q, k, passage.allowed, mode)
            if drop is not None and drop.after < passage.x.shape[1] - prefix:  # a ticket may have left fewer already
                if drop.method == "tome":
                    self._merge(passage, drop, k)
                else:
                    self._drop(passage, drop, block.attn, q, k)
                    if weights is not None:
                        weights = narrow(weights, passage.positions[-1], prefix)
            if connections is not None and weights is not None:
                passage.allowed = connect(weights, prefix, connections.keep, mode, passage.allowed)
            if index == last:
                break
            passage.x = passage.x + block.drop_path2(block.ls2(block.mlp(block.norm2(passage.x))))
            if index in after:
                passage.states.append(passage.x)
        return passage

    def _drop(self, passage: Passage, drop: TokenDrop, attention: Attention, q: Tensor, k: Tensor) -> None:
        """Only some patch tokens go on, and where they are fused one for all others."""
        x, prefix = passage.x, self.architecture.prefix
        if drop.method == "random":
            patches = x.shape[1] - prefix
            scores = random_scores(len(x), patches, x.device, block=drop.block, training=self.training)
        elif drop.fuse:
            scores = attention.scores(q, k, prefix)  # they weigh what is summed
        else:
            scores = attention.scores(q.detach(), k.detach(), prefix)  # they order tokens; no gradient comes back
        positions = top_tokens(scores, drop.keep)
        passage.x = gather_tokens(x, positions, prefix)
        if drop.fuse:
            passage.x = torch.cat([passage.x, fused_token(x[:, prefix:], scores, positions)], dim=1)
        if passage.allowed is not None:
            passage.allowed = narrow(passage.allowed, positions, prefix)
        passage.scores.append(scores)
        passage.positions.append(positions)

    def _merge(self, passage: Passage, drop: TokenDrop, k: Tensor) -> None:
        """Patch tokens with like keys become one."""
        matching = match(k[:, :, self.architecture.prefix :].mean(1), drop.keep)
        x, prefix = passage.x, self.architecture.prefix
        sizes = x.new_ones(x.shape[0], x.shape[1] - prefix) if passage.sizes is None else passage.sizes
        merged, passage.sizes = merge(x[:, prefix:], sizes, matching)
        passage.x = torch.cat([x[:, :prefix], merged], dim=1)
        passage.scores.append(matching.strength)
        passage.positions.append(matching.alone)

    def place_logits(self, images: Tensor) -> Tensor:
        """What the class head answers for every patch token, in an LV-ViT the head for them: (B, K, h, w). A network
        that drops tokens has no answer for all.
        """
        features = self.body.norm(self._through(images, None).x)
        if isinstance(self.body, LVViT):
            logits: Tensor = self.body.token_logits(features)
        else:
            logits = head_on_patches(self.body, features, self.architecture.prefix)
        maps: Tensor = logits.transpose(1, 2).unflatten(2, self.architecture.grid)
        return maps

    @property
    def ticket_grid(self) -> tuple[int, int]:
        """Patches of the tickets that it takes, h and w: its own."""
        return self.architecture.grid

    def ticket_cost(self, kept: int | None) -> tuple[float, int]:
        """Patch tokens (mean over the blocks) and multiply-accumulates of one image, of which a ticket keeps `kept`
        patches; None: without one.
        """
        return self.architecture.processed(kept), self.architecture.macs(start_patches=kept)

    def set_distilled_training(self, on: bool) -> None:
        """Let the two heads of a distilled DeiT answer separately in training mode. Nothing to do for other models."""
        if isinstance(self.body, VisionTransformerDistilled):
            self.body.set_distilled_training(on)

    def set_token_training(self, on: bool) -> None:
        """Let the head of an LV-ViT's patch tokens answer separately in training mode.

        Raises: InvalidInput for a network without such a head.
        """
        if not isinstance(self.body, LVViT):
            raise InvalidInput(
                f"{self.architecture.model} has no head that answers for its patch tokens",
                "leave token_labels out, or use lvvit_t, lvvit_s or lvvit_m",
            )
        self.body.token_training = on

    @property
    def blocks(self) -> list[Any]:
        """timm's blocks in order of execution, with our attention."""
        return list(self.body.blocks)

    @property
    def attentions(self) -> list[Attention]:
        return [cast(Attention, block.attn) for block in self.body.blocks]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def with_tokens(self, drops: tuple[TokenDrop, ...]) -> ViT:
        """The same weights (shared) with another token reduction."""
        return ViT(self.body, self.architecture.with_tokens(drops))

    def set_tokens(self, architecture: Architecture) -> None:
        """Reduce tokens as this record says from now on, in place; all else in it must be as it was."""
        self.architecture = architecture
        self.drops = {drop.block: drop for drop in architecture.tokens}


def head_on_patches(body: VisionTransformer, features: Tensor, prefix: int) -> Tensor:
    """The class head of a timm ViT on every patch token: (B, P + N, C) -> (B, N, K).

    Each patch token is handed to it as all the tokens of an image, whichever of them it pools.
    """
    batch, tokens, width = features.shape
    alone = features[:, prefix:].reshape(-1, 1, width).expand(-1, prefix + 1, -1)
    logits: Tensor = body.forward_head(alone).view(batch, tokens - prefix, -1)
    return logits


def adopt(body: VisionTransformer) -> VisionTransformer:
    """Refuse what we could not cut, then give every block our attention (weights shared)."""
    if body.attn_pool is not None:
        raise InvalidInput(
            "a ViT with attention pooling cannot be pruned",
            "use one with a class token or average pooling",
            field="model.name",
        )
    if body.dynamic_img_size:
        raise InvalidInput(
            "dynamic_img_size has no fixed number of patches",
            "set model.args.dynamic_img_size: false",
            field="model.args.dynamic_img_size",
        )
    if not len(body.blocks):
        raise InvalidInput(
            "a network without blocks cannot be pruned", "give depth 1 or more", field="model.args.depth"
        )
    high, wide = body.patch_embed.patch_size
    if high != wide:
        raise InvalidInput(
            f"patches of {high} x {wide} pixels are not square",
            "give patch_size one number",
            field="model.args.patch_size",
        )
    if type(body.patch_embed) not in (PatchEmbed, ConvStem):
        raise InvalidInput(
            f"patches from a {type(body.patch_embed).__name__} cannot be cut, and their cost is not counted here",
            "use a model that embeds patches by one convolution, or an LV-ViT",
            field="model.name",
        )
    for block in body.blocks:
        if type(block) is not TimmBlock:
            raise InvalidInput(
                f"blocks of class {type(block).__name__} cannot be pruned",
                "use a plain ViT or DeiT",
                field="model.name",
            )
        if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            raise InvalidInput(
                f"an MLP of class {type(block.mlp).__name__} that gates or normalises inside cannot be pruned",
                "use a plain ViT or DeiT",
                field="model.name",
            )
        if not isinstance(block.attn, Attention):
            block.attn = from_timm(block.attn)
    return body


def describe(body: VisionTransformer, name: str, args: dict[str, Any], classes: int, image_size: int) -> Architecture:
    """The architecture record of a network as it stands."""
    blocks = tuple(
        Block(b.attn.heads, b.attn.qk, b.attn.v, b.attn.scale, b.mlp.fc1.out_features, place)
        for place, b in enumerate(body.blocks)
    )
    grid = body.patch_embed.grid_size
    return Architecture(
        model=name,
        args=dict(args),
        classes=classes,
        image_size=image_size,
        patch=body.patch_embed.patch_size[0],
        grid=(int(grid[0]), int(grid[1])),
        prefix=int(body.num_prefix_tokens),
        heads_out=2 if isinstance(body, VisionTransformerDistilled) else 1,
        embed=int(body.patch_embed.proj.out_channels),
        blocks=blocks,
        token_heads=1 if isinstance(body, LVViT) else 0,
        stem=body.patch_embed.conv1.out_channels if isinstance(body.patch_embed, ConvStem) else 0,
    )


def resize(body: VisionTransformer, architecture: Architecture) -> None:
    """Leave the blocks of the record, of its widths. The new layers are untrained: load a state dict next."""
    width = architecture.embed
    body.blocks = nn.Sequential(*(body.blocks[shape.place] for shape in architecture.blocks))
    body.feature_info = [{**body.feature_info[i], "num_chs": width} for i in range(len(body.blocks))]
    body.patch_embed.norm = layers.norm(body.patch_embed.norm, width)
    body.patch_embed.proj = layers.conv(body.patch_embed.proj, width)
    for name in TOKENS:
        old = getattr(body, name, None)
        if old is not None:
            setattr(body, name, nn.Parameter(torch.zeros(*old.shape[:-1], width)))
    for block, shape in zip(body.blocks, architecture.blocks, strict=True):
        old = cast(Attention, block.attn)
        new = Attention(
            width, shape.heads, shape.qk, shape.v, shape.scale,
            qkv_bias=old.qkv.bias is not None, proj_bias=old.proj.bias is not None, dropout=old.dropout,
        )  # fmt: skip
        new.q_norm, new.k_norm = layers.norm(old.q_norm, shape.qk), layers.norm(old.k_norm, shape.qk)
        new.proj_drop = old.proj_drop
        block.attn = new
        block.mlp.fc1 = layers.linear(block.mlp.fc1, width, shape.mlp)
        block.mlp.fc2 = layers.linear(block.mlp.fc2, shape.mlp, width)
        block.norm1, block.norm2 = layers.norm(block.norm1, width), layers.norm(block.norm2, width)
        block.ls1, block.ls2 = _scale(block.ls1, width), _scale(block.ls2, width)
    for name in ("norm_pre", "norm", "fc_norm"):
        setattr(body, name, layers.norm(getattr(body, name), width))
    for name in HEADS:
        if isinstance(getattr(body, name, None), nn.Linear):
            setattr(body, name, nn.Linear(width, architecture.classes))
    body.embed_dim = body.num_features = body.head_hidden_size = width


def _scale(scale: nn.Module, width: int) -> nn.Module:
    return LayerScale(width) if isinstance(scale, LayerScale) else scale


def drops_for(
    architecture: Architecture,
    blocks: tuple[int, ...],
    keep: float,
    method: Reduction = "attention",
    fuse: bool = False,
) -> tuple[TokenDrop, ...]:
    """Token reduction at these blocks, `keep` of the patch tokens that reach each, a fused one among them. K is a plain
    number, recorded, never recomputed. A block that would leave as many as reach it is left out.
    """
    reaching = architecture.patches
    drops = []
    for block in sorted(blocks):
        drop = TokenDrop(block, keep_count(reaching, keep), method, fuse)
        if drop.after < reaching:
            drops.append(drop)
            reaching = drop.after
    return tuple(drops)
