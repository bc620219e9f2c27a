"""The Swin family: timm's Swin V1 and V2 with stated attention, at two image sizes with the same weights.

`Swin` runs timm's own modules one after the other. Windows, shifts and masks stand in `Geometry`, one for the recorded
image size and, with tickets packed into a mosaic, one for the mosaic's. Without tickets it computes what timm computes.
Tokens of a Swin cannot be left out one by one, since windows must stay whole: a ticket blanks the other patches or
packs its own into a smaller image (methods.mosaic), and its grid is that of the ViT that selected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.mosaic import blank, pack
from ..methods.windows import Level, join, legal_squares, partition, pyramid, relative_index, shift_mask
from . import layers
from .architecture import Block, SwinArchitecture, SwinStage, TokenDrop
from .window_attention import CosineWindowAttention, WindowAttention, from_timm

HEAD = "head.fc"
Body: TypeAlias = SwinTransformer | SwinTransformerV2


@dataclass(frozen=True, slots=True)
class TicketUse:
    """How patch tickets enter: zero blanks the other patches, mosaic packs the kept ones.

    grid: the tickets' own patches, h and w; kept: how many of them a ticket names.
    """

    mode: Literal["zero", "mosaic"]
    grid: tuple[int, int]
    kept: int

    def side(self, own: int) -> int:
        """Patches of the network a side of the mosaic. own: of the whole image."""
        return math.isqrt(self.kept) * own // self.grid[0]


class Geometry(nn.Module):
    """The windows of a stage at one image size: positions (A, A) in the bias table, mask (W, A, A) of shifted ones."""

    def __init__(self, level: Level, table: int) -> None:
        super().__init__()
        self.level = level
        self.register_buffer("index", relative_index(level.window, table), persistent=False)
        self.register_buffer("mask", shift_mask(level), persistent=False)
        self.index: Tensor
        self.mask: Tensor | None


class Swin(nn.Module):
    """images (B, 3, S, S) normalised -> logits (B, K)."""

    def __init__(self, body: Body, architecture: SwinArchitecture, tickets: TicketUse | None = None) -> None:
        super().__init__()
        self.body = body
        self.architecture = architecture
        self.tickets = tickets
        self.whole = self._geometry(architecture.grid[0])
        self.packed: nn.ModuleList | None = None
        if tickets is not None and tickets.mode == "mosaic":
            self.packed = self._geometry(tickets.side(architecture.grid[0]))

    def forward(self, images: Tensor, kept: Tensor | None = None, after: tuple[int, ...] = ()) -> Any:
        """kept: (B, K) patch indices of a ticket, ascending, or None for the whole image. after: ascending numbers of
        blocks, counted through all stages; then a pair is returned, the logits and a tuple of the tokens (B, N, C) as
        each of these blocks leaves them, N and C being its stage's.
        """
        features, states = self._features(images, kept, after)
        answers = self.body.head(features)
        return (answers, states) if after else answers

    def place_logits(self, images: Tensor) -> Tensor:
        """What the class head answers for every place of the last stage: (B, K, h, w)."""
        features, _ = self._features(images, None)
        batch, high, wide, width = features.shape
        logits: Tensor = self.body.head(features.reshape(-1, 1, 1, width))
        return logits.view(batch, high, wide, -1).permute(0, 3, 1, 2)

    def _features(
        self, images: Tensor, kept: Tensor | None, after: tuple[int, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalised, (B, h, w, C), and what the blocks `after` left."""
        geometry = self.whole
        if kept is not None:
            if self.tickets is None:
                raise InvalidInput("a Swin cannot leave out single patches", "set train.patches: zero or mosaic")
            if self.packed is None:
                images = blank(images, kept, self.tickets.grid)
            else:
                images, geometry = pack(images, kept, self.tickets.grid), self.packed
        body = self.body
        x = body.patch_embed.norm(body.patch_embed.proj(images).permute(0, 2, 3, 1))
        number, states = 0, []
        for stage, record, windows in zip(body.layers, self.architecture.stages, geometry, strict=True):
            x = self._merge(stage.downsample, x)
            for block, shape in zip(stage.blocks, record.blocks, strict=True):
                x = self._block(block, x, windows, shifted=shape.place % 2 == 1)
                if number in after:
                    states.append(x.flatten(1, 2))
                number += 1
        return body.norm(x), tuple(states)

    def _merge(self, merging: Any, x: Tensor) -> Tensor:
        """2 x 2 tokens to one; none in the first stage. timm's own also pads. (B, S, S, C) -> (B, S/2, S/2, C')."""
        if isinstance(merging, nn.Identity):
            return x
        batch, side, _, channels = x.shape
        x = x.reshape(batch, side // 2, 2, side // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        if self.architecture.generation == 1:
            x = merging.reduction(merging.norm(x))
        else:
            x = merging.norm(merging.reduction(x))
        return x

    def _block(self, block: Any, x: Tensor, windows: Any, shifted: bool) -> Tensor:
        """V1 normalises before attention and MLP, V2 after them. x: (B, S, S, C)."""
        if self.architecture.generation == 1:
            x = x + block.drop_path1(_attend(block.attn, block.norm1(x), windows, shifted))
            x = x + block.drop_path2(block.mlp(block.norm2(x)))
        else:
            x = x + block.drop_path1(block.norm1(_attend(block.attn, x, windows, shifted)))
            x = x + block.drop_path2(block.norm2(block.mlp(x)))
        return x

    def _geometry(self, side: int) -> nn.ModuleList:
        levels = self.architecture.levels(side)
        assert levels is not None, "adopt and with_tickets refuse what needs padding"
        return nn.ModuleList(Geometry(at, table) for at, table in zip(levels, self.architecture.windows, strict=True))

    def with_tickets(self, tickets: TicketUse) -> Swin:
        """The same weights (shared), to be called with tickets of this kind. Raises: InvalidInput as check_use."""
        check_use(self.architecture, tickets)
        return Swin(self.body, self.architecture, tickets)

    @property
    def ticket_grid(self) -> tuple[int, int]:
        """Patches of the tickets, h and w; without tickets the network's own."""
        return self.architecture.grid if self.tickets is None else self.tickets.grid

    def ticket_cost(self, kept: int | None) -> tuple[int, int]:
        """Patch tokens and MACs of one image of which a ticket keeps `kept` patches (None: there is none); blanking the
        others saves none.
        """
        if self.tickets is None or self.packed is None or kept is None:
            return self.architecture.patches, self.architecture.macs()
        side = replace(self.tickets, kept=kept).side(self.architecture.grid[0])
        return side * side, self.architecture.macs(side)

    @contextmanager
    def fixed_biases(self) -> Iterator[None]:
        """Position biases as numbers, computed once, for an export: a quantizer would take V2's network of biases for
        layers that see images. For the recorded image size only.
        """
        stages = [(stage, windows) for stage, windows in zip(self.body.layers, self.whole, strict=True)]
        try:
            with torch.no_grad():
                for stage, windows in stages:
                    for block in stage.blocks:
                        block.attn.fixed = block.attn.biases(windows.index).contiguous()
            yield
        finally:
            for attention in self.attentions:
                attention.fixed = None

    @property
    def masks(self) -> list[Tensor]:
        """What is added to the logits of shifted windows at the recorded size, (W, A, A), of every stage with any."""
        stages = zip(self.architecture.stages, self.whole, strict=True)
        shifting = [at.mask for stage, at in stages if any(block.place % 2 for block in stage.blocks)]
        return [mask for mask in shifting if isinstance(mask, Tensor)]

    def set_distilled_training(self, on: bool) -> None:
        """A Swin has one head: nothing to do."""

    @property
    def blocks(self) -> list[Any]:
        """timm's blocks in order of execution, with our attention."""
        return [block for stage in self.body.layers for block in stage.blocks]

    @property
    def attentions(self) -> list[WindowAttention | CosineWindowAttention]:
        return [block.attn for block in self.blocks]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def with_tokens(self, drops: tuple[TokenDrop, ...]) -> Swin:
        """Raises: InvalidInput for any token reduction."""
        if drops:
            raise InvalidInput("a Swin cannot drop tokens: its windows must stay whole", "leave finetune.tokens out")
        return self


def check_grid(architecture: SwinArchitecture, grid: tuple[int, int]) -> None:
    """Raises: InvalidInput unless each patch of a ticket of this grid covers whole patches of the network."""
    own, (h, w) = architecture.grid[0], grid
    if h != w or own % h:
        raise InvalidInput(
            f"tickets of {h} x {w} patches do not cover whole patches of {architecture.model}, which has {own} x {own}",
            f"let ticket.proxy.model have a patch_size that is a multiple of {architecture.patch} px",
            field="proxy.model",
        )


def check_use(architecture: SwinArchitecture, tickets: TicketUse) -> None:
    """Raises: InvalidInput when patches of the tickets do not cover whole patches of the network, or fill no mosaic
    that it takes without padding; then with the keep rates that do.
    """
    check_grid(architecture, tickets.grid)
    if tickets.mode == "zero":
        return
    own, (h, w) = architecture.grid[0], tickets.grid
    legal = legal_squares(h, own // h, architecture.windows)
    if tickets.kept not in [k * k for k in legal]:
        # Rounded down: the number of patches is rounded up from the rate.
        rates = ", ".join(f"{int(k * k / (h * w) * 1e4) / 1e4:g} ({k * k})" for k in reversed(legal))
        raise InvalidInput(
            f"train.patches: mosaic: {tickets.kept} of {h * w} patches fill no square that {architecture.model} takes "
            "without padding",
            f"ticket.patches.keep that do (patches): {rates}; or train.patches: zero",
            field="patches",
        )


def _attend(attention: Any, x: Tensor, windows: Geometry, shifted: bool) -> Tensor:
    """Attention within windows; shifted: of the image rolled by the stage's shift. x: (B, S, S, C), as the result."""
    level = windows.level
    shift = level.shift if shifted else 0
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    x = attention(partition(x, level.window), windows.index, windows.mask if shift else None)
    x = join(x, level.window, level.side)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def adopt(body: Body) -> Body:
    """Refuse what needs padding or is no plain Swin, then give every block our attention (weights shared)."""
    if body.dynamic_img_size or type(body.patch_embed) is not PatchEmbed:
        raise InvalidInput(
            "a Swin of open image size has no fixed windows",
            "leave dynamic_img_size and strict_img_size out of model.args",
            field="model.args",
        )
    grid = body.patch_embed.grid_size
    high, wide = body.patch_embed.patch_size
    if high != wide:
        raise InvalidInput(
            f"patches of {high} x {wide} pixels are not square",
            "give patch_size one number",
            field="model.args.patch_size",
        )
    for block in (block for stage in body.layers for block in stage.blocks):
        plain = type(block) in (SwinTransformerBlock, SwinTransformerV2Block) and type(block.mlp) is Mlp
        if not plain or block.always_partition or block.window_size[0] != block.window_size[1]:
            raise InvalidInput(
                f"block of class {type(block).__name__} with windows of {block.window_size} is not known here",
                "use swin_* or swinv2_* with square windows that are fitted to small stages",
                field="model.args",
            )
        width, heads = block.norm1.normalized_shape[0], block.attn.num_heads
        if width % heads:
            raise InvalidInput(
                f"a stage of {width} channels cannot be shared by {heads} heads equally",
                "let each of num_heads divide its stage's width: embed_dim, doubled at every stage",
                field="model.args.num_heads",
            )
        block.attn = from_timm(block.attn)
    windows = _windows(body)
    if pyramid(grid[0], windows, reference=grid[0]) is None:
        raise InvalidInput(
            f"windows of {windows} tokens do not tile {grid[0]} x {grid[0]} patches, halved at every stage",
            _fitting(grid[0], len(windows)),
            field="model.args.window_size",
        )
    return body


def _windows(body: Body) -> list[int]:
    return [int(stage.blocks[0].window_size[0]) for stage in body.layers]


def _fitting(side: int, stages: int) -> str:
    """Windows that tile every stage."""
    fit = [w for w in range(2, side + 1) if pyramid(side, [w] * stages, reference=side) is not None]
    if not fit:
        return f"patches a side must be a multiple of {2 ** (stages - 1)}: change data.image_size or patch_size"
    return f"set model.args.window_size to one of {', '.join(map(str, fit))}"


def describe(body: Body, name: str, args: dict[str, Any], classes: int, image_size: int) -> SwinArchitecture:
    """The architecture record of a network as it stands."""
    stages = tuple(
        SwinStage(
            int(stage.blocks[0].norm1.normalized_shape[0]),
            window,
            tuple(
                Block(b.attn.heads, b.attn.qk, b.attn.v, b.attn.scale, b.mlp.fc1.out_features, place)
                for place, b in enumerate(stage.blocks)
            ),
        )
        for stage, window in zip(body.layers, _windows(body), strict=True)
    )
    grid = body.patch_embed.grid_size
    return SwinArchitecture(
        model=name,
        args=dict(args),
        generation=1 if isinstance(body, SwinTransformer) else 2,
        classes=classes,
        image_size=image_size,
        patch=int(body.patch_embed.patch_size[0]),
        grid=(int(grid[0]), int(grid[1])),
        stages=stages,
    )


def resize(body: Body, architecture: SwinArchitecture) -> None:
    """Leave the blocks of the record, of its widths. The new layers are untrained: load a state dict next."""
    first, last = architecture.streams[0], architecture.streams[-1]
    body.patch_embed.proj = layers.conv(body.patch_embed.proj, first)
    body.patch_embed.norm = layers.norm(body.patch_embed.norm, first)
    entering = first
    for number, (stage, record) in enumerate(zip(body.layers, architecture.stages, strict=True)):
        width, merging = record.dim, stage.downsample
        if not isinstance(merging, nn.Identity):
            merging.reduction = layers.linear(merging.reduction, 4 * entering, width)
            merging.norm = layers.norm(merging.norm, 4 * entering if architecture.generation == 1 else width)
            merging.dim, merging.out_dim = entering, width
        stage.blocks = nn.ModuleList([stage.blocks[shape.place] for shape in record.blocks])
        stage.dim, stage.depth, entering = entering, len(record.blocks), width
        body.feature_info[number]["num_chs"] = width
        for block, shape in zip(stage.blocks, record.blocks, strict=True):
            block.dim = width
            block.attn.resize(width, shape.heads, shape.qk, shape.v)
            block.mlp.fc1 = layers.linear(block.mlp.fc1, width, shape.mlp)
            block.mlp.fc2 = layers.linear(block.mlp.fc2, shape.mlp, width)
            block.norm1, block.norm2 = layers.norm(block.norm1, width), layers.norm(block.norm2, width)
    body.norm = layers.norm(body.norm, last)
    body.head.fc = nn.Linear(last, architecture.classes)
    body.embed_dim, body.num_features, body.head_hidden_size = first, last, last
