"""architecture.json: everything needed to rebuild a (pruned) network without pickle and without the code that pruned
it.

It names the family, the timm model and its arguments, then states what a cut may have changed: the embedding width (of
a Swin: of every stage), which of timm's blocks are there, in each the heads, the query/key width, the value width, the
softmax scale and the MLP width, and where the network drops tokens. A record without a family is a ViT's, and blocks
without a place are all of timm's: there was nothing else when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..methods import InvalidInput
from ..methods.cost import (
    BlockWidths,
    SwinStageWidths,
    block_macs,
    conv_stem_macs,
    patches_processed,
    swin_macs,
    vit_macs,
)
from ..methods.windows import Level, pyramid

SCHEMA = 1
AGAIN = "give the file as Sievit wrote it, or make the artifact again"
Reduction = Literal["attention", "random", "tome"]


@dataclass(frozen=True, slots=True)
class Block:
    """heads, width of a head's queries/keys and of its values, softmax scale, hidden units of the MLP; place: its
    number among timm's blocks, in a Swin among those of its stage (there an odd one is shifted).
    """

    heads: int
    qk: int
    v: int
    scale: float
    mlp: int
    place: int


@dataclass(frozen=True, slots=True)
class TokenDrop:
    """From the MLP of `block` on, only `keep` patch tokens go on: those with most attention, drawn ones, or what is
    left after merging (tome); with `fuse` one more, that stands for all others.
    """

    block: int
    keep: int
    method: Reduction = "attention"
    fuse: bool = False

    @property
    def after(self) -> int:
        """Tokens besides the prefix tokens that go on."""
        return self.keep + self.fuse


@dataclass(frozen=True)
class Architecture:
    """A network's shape. `args` go to timm.create_model; `prefix`, `grid`, `patch` are recorded for readers and
    checks. heads_out, token_heads: classifier heads on prefix tokens, and on every patch token. stem: channels of a
    convolutional stem, 0 where patches are cut from the image itself.
    """

    model: str
    args: dict[str, Any]
    classes: int
    image_size: int
    patch: int
    grid: tuple[int, int]
    prefix: int
    heads_out: int
    embed: int
    blocks: tuple[Block, ...]
    tokens: tuple[TokenDrop, ...] = ()
    token_heads: int = 0
    stem: int = 0

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def streams(self) -> tuple[int, ...]:
        """Channels of each residual stream: a ViT has one."""
        return (self.embed,)

    @property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of every block: a ViT has one."""
        return (0,) * len(self.blocks)

    def cut(self, blocks: Sequence[Block | None], streams: Sequence[int]) -> Architecture:
        """With these blocks, None for one that is gone, and these channels. Blocks that drop tokens must stay."""
        left = [number for number, block in enumerate(blocks) if block is not None]
        return replace(
            self,
            embed=streams[0],
            blocks=tuple(block for block in blocks if block is not None),
            tokens=tuple(replace(drop, block=left.index(drop.block)) for drop in self.tokens),
        )

    def widths(self) -> list[BlockWidths]:
        return _widths(self.blocks)

    def macs(self, start_patches: int | None = None) -> int:
        """Multiply-accumulates for one image; start_patches: patches embedded and entering the blocks, all by
        default.
        """
        return vit_macs(
            self.embed,
            self.widths(),
            patches=self.patches,
            prefix=self.prefix,
            patch_values=self.stem * (self.patch // 2) ** 2 if self.stem else 3 * self.patch * self.patch,
            classes=self.classes,
            heads_out=self.heads_out,
            token_heads=self.token_heads,
            stem=conv_stem_macs(self.image_size, self.stem) if self.stem else 0,
            reduction=self._reduction(start_patches),
            merging=frozenset(
                drop.block
                for drop in self.tokens
                if drop.method == "tome" and drop.block in self._reduction(start_patches)
            ),
            start_patches=start_patches,
        )

    def processed(self, start_patches: int | None = None) -> float:
        """Patch tokens that a block works on, mean over the blocks; start_patches as for macs."""
        entering = self.patches if start_patches is None else start_patches
        return patches_processed(len(self.blocks), entering, self._reduction(start_patches))

    def _reduction(self, start_patches: int | None) -> dict[int, int]:
        """Block -> patch tokens after it, for the blocks that more reach than they leave."""
        return {d.block: d.after for d in self.tokens if start_patches is None or d.after < start_patches}

    def selector_macs(self) -> int:
        """Multiply-accumulates for the ticket of one image: everything up to the attention of the last block that drops
        tokens.
        """
        last = self.tokens[-1]
        reaching = self.tokens[-2].after if len(self.tokens) > 1 else self.patches
        begun = replace(self, blocks=self.blocks[: last.block], tokens=self.tokens[:-1], classes=0).macs()
        widths = self.widths()[last.block]
        return begun + block_macs(self.embed, widths, reaching + self.prefix, 0)

    def with_tokens(self, tokens: tuple[TokenDrop, ...]) -> Architecture:
        return replace(self, tokens=tokens)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "family": "vit", **asdict(self)}

    def save(self, path: Path) -> None:
        _write(self.as_json(), path)


def _widths(blocks: tuple[Block, ...]) -> list[BlockWidths]:
    return [BlockWidths(b.heads, b.qk, b.v, b.mlp) for b in blocks]


@dataclass(frozen=True, slots=True)
class SwinStage:
    """Channels, tokens a side of a window at the recorded image size, and blocks; those of odd place are shifted."""

    dim: int
    window: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class SwinArchitecture:
    """The shape of a Swin (generation 1) or Swin V2 (generation 2; a head's scale is a weight there, and `scale` is 1).

    grid: patches that are embedded, h and w; a stage after the first has half the side of the one before.
    """

    model: str
    args: dict[str, Any]
    generation: int
    classes: int
    image_size: int
    patch: int
    grid: tuple[int, int]
    stages: tuple[SwinStage, ...]

    # What the ViT's record states and a Swin has none of: tokens that are no patches, heads for patches, reduction.
    prefix = 0
    token_heads = 0
    tokens = ()

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stage in self.stages for block in stage.blocks)

    @property
    def streams(self) -> tuple[int, ...]:
        """Channels of each residual stream: one a stage."""
        return tuple(stage.dim for stage in self.stages)

    @property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of every block."""
        return tuple(number for number, stage in enumerate(self.stages) for _ in stage.blocks)

    def cut(self, blocks: Sequence[Block | None], streams: Sequence[int]) -> SwinArchitecture:
        """With these blocks, None for one that is gone, and these channels by stage."""
        left: list[list[Block]] = [[] for _ in self.stages]
        for number, block in zip(self.stage_of, blocks, strict=True):
            if block is not None:
                left[number].append(block)
        stages = zip(self.stages, left, streams, strict=True)
        return replace(self, stages=tuple(replace(old, dim=dim, blocks=tuple(own)) for old, own, dim in stages))

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(stage.window for stage in self.stages)

    def levels(self, side: int | None = None) -> tuple[Level, ...] | None:
        """The stages at an image of `side` patches a side (None: the recorded one); None where padding were needed."""
        return pyramid(side or self.grid[0], self.windows, reference=self.grid[0])

    def macs(self, side: int | None = None) -> int:
        """Multiply-accumulates for one image of `side` patches a side (None: the recorded one)."""
        levels = self.levels(side)
        if levels is None:
            raise InvalidInput(
                f"{self.model} does not take an image of {side} x {side} patches without padding",
                "give data.image_size that its windows tile",
            )
        stages = [
            SwinStageWidths(
                stage.dim,
                level.side**2,
                level.window**2,
                [BlockWidths(b.heads, b.qk, b.v, b.mlp) for b in stage.blocks],
            )
            for stage, level in zip(self.stages, levels, strict=True)
        ]
        return swin_macs(stages, patch_values=3 * self.patch * self.patch, classes=self.classes)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "family": "swin", **asdict(self)}

    def save(self, path: Path) -> None:
        _write(self.as_json(), path)


def _write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_architecture(path: Path) -> Architecture | SwinArchitecture:
    """Read and check architecture.json. Raises: InvalidInput naming the file and the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable architecture file ({error})", AGAIN) from error
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise InvalidInput(
            f"{path}: not an architecture file of schema {SCHEMA}", "it was written by another version of Sievit"
        )
    family = raw.pop("family", "vit")
    try:
        if family == "vit":
            return _vit(raw, path)
        if family == "swin":
            return _swin(raw, path)
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: {error}", AGAIN) from error
    raise InvalidInput(f"{path}: family {family!r} is not known here", "it was written by another version of Sievit")


def _vit(raw: dict[str, Any], path: Path) -> Architecture:
    raw["blocks"] = _blocks(raw["blocks"])
    raw["tokens"] = tuple(TokenDrop(**t) for t in raw["tokens"])
    raw["grid"] = tuple(raw["grid"])
    architecture = Architecture(**raw)
    _check_widths(architecture.blocks, path)
    if architecture.embed < 1 or architecture.classes < 1:
        raise InvalidInput(f"{path}: embed and classes must be at least 1", AGAIN)
    _check_tokens(architecture, path)
    return architecture


def _swin(raw: dict[str, Any], path: Path) -> SwinArchitecture:
    raw["stages"] = tuple(SwinStage(**(stage | {"blocks": _blocks(stage["blocks"])})) for stage in raw["stages"])
    raw["grid"] = tuple(raw["grid"])
    architecture = SwinArchitecture(**raw)
    for stage in architecture.stages:
        _check_widths(stage.blocks, path)
    if min(architecture.classes, architecture.patch, *(min(s.dim, s.window) for s in architecture.stages)) < 1:
        raise InvalidInput(f"{path}: classes, patch, dim and window must be at least 1", AGAIN)
    if architecture.levels() is None:
        raise InvalidInput(
            f"{path}: windows {list(architecture.windows)} do not tile {architecture.grid[0]} patches a side", AGAIN
        )
    return architecture


def _blocks(raw: Sequence[dict[str, Any]]) -> tuple[Block, ...]:
    return tuple(Block(**({"place": number} | block)) for number, block in enumerate(raw))


def _check_widths(blocks: tuple[Block, ...], path: Path) -> None:
    """Widths that no network can have are refused before timm sees them."""
    if not blocks:
        raise InvalidInput(f"{path}: there must be at least one block, in every stage of a Swin", AGAIN)
    places = [block.place for block in blocks]
    if places[0] < 0 or sorted(set(places)) != places:
        raise InvalidInput(f"{path}: places {places} of blocks do not rise from 0 or more", AGAIN)
    for index, block in enumerate(blocks):
        if min(block.heads, block.qk, block.v, block.mlp) < 1 or not block.scale > 0:
            raise InvalidInput(f"{path}: block {index} has an impossible width: {block}", AGAIN)


def _check_tokens(architecture: Architecture, path: Path) -> None:
    left = architecture.patches
    last = -1
    for drop in architecture.tokens:
        fits = last < drop.block < len(architecture.blocks) and drop.keep >= 1 and drop.after <= left
        if drop.method == "tome":
            fits = fits and not drop.fuse and 2 * drop.keep >= left  # matching pairs tokens, so half of them stay
        if not fits or drop.method not in get_args(Reduction):
            raise InvalidInput(
                f"{path}: token reduction {drop} does not fit {left} patches and {len(architecture.blocks)} blocks",
                AGAIN,
            )
        last, left = drop.block, drop.after
