"""Widths per block before and after pruning, from the metrics of a prune stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reading import listing, number, text
from .steps import Step


@dataclass(frozen=True, slots=True)
class Change:
    """A width before and after; `after` is None when the whole block is gone or unknown."""

    before: float | None
    after: float | None

    @property
    def kept(self) -> float | None:
        return None if self.before is None or not self.before or self.after is None else self.after / self.before


@dataclass(frozen=True, slots=True)
class Widths:
    """Per block: number and changes in the order of `columns`; on their own the embedding widths, a Swin's by stage."""

    step: Step
    columns: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[Change, ...]], ...]
    embed: tuple[Change, ...]


_WIDTHS = {"heads": "Heads", "qk": "Query and key width a head", "v": "Value width a head", "mlp": "MLP width"}


def widths(step: Step) -> Widths | None:
    """Widths per block before and after pruning, or None where the stage recorded none."""
    before = [row for row in listing(step.metrics, "widths", "before") if isinstance(row, Mapping)]
    after = {text(row, "block"): row for row in listing(step.metrics, "widths", "after")}
    if not before:
        return None
    names = [name for name in _WIDTHS if any(number(row, name) is not None for row in before)]
    blocks = []
    for row in before:
        block = text(row, "block")
        cut = after.get(block, {})
        blocks.append((block, tuple(Change(number(row, name), number(cut, name)) for name in names)))
    return Widths(
        step, tuple(_WIDTHS[name] for name in names), tuple(blocks), _embed(listing(step.metrics, "widths", "embed"))
    )


def _embed(pair: Sequence[Any]) -> tuple[Change, ...]:
    """A pair of lists, a number for each stage, or of numbers."""
    if len(pair) != 2:
        return ()
    before, after = (one if isinstance(one, list) else [one] for one in pair)
    return tuple(
        Change(number({"w": old}, "w"), number({"w": new}, "w")) for old, new in zip(before, after, strict=False)
    )
