"""A network's blocks as shapes to be timed, and networks that hold many shapes at once.

Blocks of one network may have different widths, so that a few exported files time dozens of shapes, each among the
operators that the exporter writes for it and the runtime makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from ..methods.block_latency import BlockShape, Surroundings, sweep_widths
from ..methods.cost import BlockWidths, block_macs, window_block_macs
from ..methods.greedy_allocation import Cost
from .architecture import Architecture, Block, SwinArchitecture

EMBED = (1.0, 0.75, 0.5)
HEADS = (1.0, 0.5, 0.75, 0.25)
WIDTH = (1.0, 0.75, 0.5)
MLP = (1.0, 0.5, 0.25, 0.75)


def shapes(architecture: Architecture | SwinArchitecture) -> list[BlockShape]:
    """Every block, in order of execution."""
    found = []
    for (tokens, left, window), embed, block in zip(
        _tokens(architecture), _embed(architecture), architecture.blocks, strict=True
    ):
        found.append(BlockShape(tokens, left, window, embed, block.heads, block.qk, block.v, block.mlp))
    return found


def surroundings(architecture: Architecture | SwinArchitecture) -> Surroundings:
    """Embedding, norms and head, and in a Swin what merges tokens."""
    blocks = sum(map(macs_of, shapes(architecture)))
    tokens = dict(zip(architecture.stage_of, (s.tokens for s in shapes(architecture)), strict=True))
    activations = sum(tokens[stage] * width for stage, width in enumerate(architecture.streams))
    return Surroundings(activations, architecture.macs() - blocks)


def macs_of(s: BlockShape) -> int:
    """Multiply-accumulates of a block."""
    widths = BlockWidths(s.heads, s.qk, s.v, s.mlp)
    if s.window == s.tokens:
        return block_macs(s.embed, widths, s.tokens, s.left)
    return window_block_macs(s.embed, widths, s.tokens, s.window)


def macs(before: Architecture | SwinArchitecture) -> Cost:
    """Multiply-accumulates for an allocation that narrows this network."""
    dense = shapes(before)

    @cache
    def outside(streams: tuple[int, ...]) -> float:
        return float(surroundings(before.cut(before.blocks, streams)).macs)

    def block(number: int, w: BlockWidths, channels: int) -> float:
        return float(macs_of(replace(dense[number], embed=channels, heads=w.heads, qk=w.qk, v=w.v, mlp=w.mlp)))

    return Cost(block, lambda streams: outside(tuple(streams)))


def probes(architecture: Architecture | SwinArchitecture) -> list[Architecture | SwinArchitecture]:
    """Networks to time: the dense one's stem and head around blocks of other widths."""
    kinds = [shape.kind for shape in shapes(architecture)]
    common, count = Counter(kinds).most_common(1)[0]
    model = architecture.blocks[kinds.index(common)]
    mlp, heads = sweep_widths(model.mlp), sweep_widths(min(model.qk, model.v))
    made = []
    for start in range(0, max(len(mlp), len(heads)), count):
        numbers = iter(range(start, start + count))
        blocks = [
            _swept(block, mlp, heads, next(numbers)) if kind == common else _sample(block, number)
            for number, (kind, block) in enumerate(zip(kinds, architecture.blocks, strict=True))
        ]
        made.append(architecture.cut(blocks, architecture.streams))
    for level, share in enumerate(EMBED):
        streams = [_part(width, share) for width in architecture.streams]
        for more in range(1 if count > 3 else 2):
            blocks = [_sample(block, level + n + 5 * more) for n, block in enumerate(architecture.blocks)]
            made.append(architecture.cut(blocks, streams))
    return made


def half_of(module: str, blocks: Mapping[str, int]) -> tuple[int, bool] | None:
    """The block and whether it is its MLP that a module of the body is in; None outside of the blocks, or for a block
    itself. blocks: name of a block in the body -> its number.
    """
    for name, number in blocks.items():
        if module.startswith(f"{name}."):
            part = module.removeprefix(f"{name}.").partition(".")[0]
            return number, part in ("mlp", "norm2", "ls2")
    return None


def _tokens(architecture: Architecture | SwinArchitecture) -> Iterator[tuple[int, int, int]]:
    """Of every block: tokens that attend, those that are left for the MLP, and those that one attends to."""
    if isinstance(architecture, SwinArchitecture):
        levels = architecture.levels()
        assert levels is not None, "a record whose windows need padding is refused when it is read"
        for stage in architecture.stage_of:
            level = levels[stage]
            yield level.side**2, level.side**2, level.window**2
        return
    drops = {drop.block: drop.after for drop in architecture.tokens}
    tokens = architecture.patches + architecture.prefix
    for number in range(len(architecture.blocks)):
        left = drops[number] + architecture.prefix if number in drops else tokens
        yield tokens, left, tokens
        tokens = left


def _embed(architecture: Architecture | SwinArchitecture) -> list[int]:
    return [architecture.streams[stage] for stage in architecture.stage_of]


def _swept(block: Block, mlp: Sequence[int], heads: Sequence[int], number: int) -> Block:
    """The width of that number of each sweep, all else as it is; beyond the end of a sweep a sample."""
    other = _sample(block, number)
    attention = {"heads": other.heads, "qk": other.qk, "v": other.v}
    if number < len(heads):
        attention = {"qk": heads[number], "v": heads[number]}
    return replace(block, **attention, mlp=mlp[number] if number < len(mlp) else other.mlp)


def _sample(block: Block, number: int) -> Block:
    """One of the combinations of widths, each fraction as often as the others; number 0 is the block itself."""
    width = WIDTH[number // 2 % len(WIDTH)]
    return replace(
        block,
        heads=max(1, round(block.heads * HEADS[number % len(HEADS)])),
        qk=_part(block.qk, width),
        v=_part(block.v, width),
        mlp=_part(block.mlp, MLP[(number + number // 4) % len(MLP)]),
    )


def _part(width: int, share: float) -> int:
    """A share of a width, as a multiple that no runtime dislikes."""
    if share == 1:
        return width
    unit = next(unit for unit in (32, 16, 8, 4, 2, 1) if unit <= width * share)
    return max(unit, round(width * share / unit) * unit)
