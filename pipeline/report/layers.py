"""Tables of layers and blocks with a bar in each cell: what is left of the weights, and what 8 bits cost.

They are sections as those of sections.py, but over the stages of all arms: an arm or stage is a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from .numbers import DASH, count, percent
from .reading import mapping, number
from .sections import Section
from .steps import Step

MOST_COLUMNS = 12


def of_layers(steps: Sequence[Step]) -> tuple[Section, ...]:
    """Those that have something to say."""
    return tuple(section for section in (density(steps), eight_bit_cost(steps)) if section is not None)


def density(steps: Sequence[Step]) -> Section | None:
    """Weights that are not zero, by layer, of every training that had masks."""
    columns = [
        (f"{step.name}, {step.arms}", found)
        for step in steps
        if (found := mapping(step.metrics, "masks", "density", "tensors"))
    ]
    return _section(
        "density",
        "Weights left by layer",
        "The share of each layer's weights that are not zero after training with masks; the bar is that share.",
        "Layer",
        columns,
        percent,
        whole=1.0,
    )


def eight_bit_cost(steps: Sequence[Step]) -> Section | None:
    """What each half block costs when it alone computes in 8 bits. It was measured where INT8 lost too much."""
    columns = [
        (f"{scheme}, {step.arms}", costs)
        for step in steps
        if step.stage == "quantize"
        for scheme in mapping(step.metrics, "sensitivity")
        if (costs := mapping(step.metrics, "sensitivity", scheme))
    ]
    return _section(
        "eight-bit",
        "What 8 bits cost by block",
        "Divergence of the answers from those of the float file, in nats, with the layers of one half block in 8 bits "
        "and all others float; the bar is the share of the costliest.",
        "Half block",
        columns,
        lambda value: DASH if value is None else f"{value:.2g}",
        whole=None,
    )


def _section(
    name: str,
    title: str,
    about: str,
    head: str,
    columns: Sequence[tuple[str, Mapping[str, object]]],
    form: Callable[[float | None], str],
    whole: float | None,
) -> Section | None:
    """whole: what fills a bar; None: the largest value of the column."""
    if not columns:
        return None
    told = columns[:MOST_COLUMNS]
    rows = sorted(dict.fromkeys(layer for _, found in told for layer in found), key=_in_order)
    most = [whole or max((number(found, row) or 0.0 for row in rows), default=0.0) for _, found in told]
    left = len(columns) - len(told)
    return Section(
        name,
        title,
        about,
        (head, *(label for label, _ in told)),
        tuple((row, *(form(number(found, row)) for _, found in told)) for row in rows),
        (f"{count(left)} further columns are left out.",) if left else (),
        tuple(
            tuple(_share(number(found, row), top) for (_, found), top in zip(told, most, strict=True)) for row in rows
        ),
    )


def _share(value: float | None, whole: float) -> float | None:
    return None if value is None or whole <= 0 else max(0.0, min(1.0, value / whole))


def _in_order(layer: str) -> list[tuple[int, str]]:
    """blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", layer)]
