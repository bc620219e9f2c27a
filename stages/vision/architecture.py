"""architecture.json: everything needed to rebuild a (pruned) network without pickle and without the code that pruned
it.

It names the timm model and its arguments, then states what a cut may have changed: the embedding width, per block the
heads, the query/key width, the value width, the softmax scale and the MLP width, and where the network drops tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..methods import InvalidInput
from ..methods.cost import BlockWidths, conv_stem_macs, vit_macs

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Block:
    """heads, width of a head's queries/keys and of its values, softmax scale, hidden units of the MLP."""

    heads: int
    qk: int
    v: int
    scale: float
    mlp: int


@dataclass(frozen=True, slots=True)
class TokenDrop:
    """From the MLP of `block` on, only `keep` patch tokens go on."""

    block: int
    keep: int


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

    def widths(self) -> list[BlockWidths]:
        return [BlockWidths(b.heads, b.qk, b.v, b.mlp) for b in self.blocks]

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
            reduction={
                drop.block: drop.keep for drop in self.tokens if start_patches is None or drop.keep < start_patches
            },
            start_patches=start_patches,
        )

    def with_tokens(self, tokens: tuple[TokenDrop, ...]) -> Architecture:
        return replace(self, tokens=tokens)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_architecture(path: Path) -> Architecture:
    """Read and check architecture.json. Raises: InvalidInput naming the file and the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable architecture file ({error})") from error
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise InvalidInput(
            f"{path}: not an architecture file of schema {SCHEMA}", "it was written by another version of Sievit"
        )
    try:
        raw["blocks"] = tuple(Block(**b) for b in raw["blocks"])
        raw["tokens"] = tuple(TokenDrop(**t) for t in raw["tokens"])
        raw["grid"] = tuple(raw["grid"])
        architecture = Architecture(**raw)
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: {error}") from error
    _check(architecture, path)
    return architecture


def _check(architecture: Architecture, path: Path) -> None:
    """Widths that no network can have are refused before timm sees them."""
    if architecture.embed < 1 or architecture.classes < 1 or not architecture.blocks:
        raise InvalidInput(f"{path}: embed, classes and blocks must be at least 1")
    for index, block in enumerate(architecture.blocks):
        if min(block.heads, block.qk, block.v, block.mlp) < 1 or not block.scale > 0:
            raise InvalidInput(f"{path}: block {index} has an impossible width: {block}")
    left = architecture.patches
    last = -1
    for drop in architecture.tokens:
        if not (last < drop.block < len(architecture.blocks) and 1 <= drop.keep <= left):
            raise InvalidInput(
                f"{path}: token reduction {drop} does not fit {left} patches and {len(architecture.blocks)} blocks"
            )
        last, left = drop.block, drop.keep
