"""What drawings for a terminal are made of: lines, tables, values in few characters. No text in them steers a terminal.

`views` draws what was made, `views_store` what is in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .console import Document
from .diagnostics import printable
from .report.numbers import DASH, NARROW

WIDEST = 60  # characters of a value that is shown in a table


def line(text: str, style: str = "") -> Text:
    """A line of text as it is: no markup, no control characters."""
    # Line by line: a line break is layout, anything else unprintable is not to be obeyed.
    lines = text.replace(NARROW, " ").split("\n")
    return Text("\n".join(map(printable, lines)), style=style)


def table(*columns: str, rows: Iterable[Sequence[Any]], right: Iterable[str] = (), whole: Iterable[str] = ()) -> Table:
    """A table without lines. right: columns of numbers; whole: columns that are never folded."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        drawn.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in whole or name in right,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else line(shown(cell)) for cell in row))
    return drawn


def shown(value: Any) -> str:
    """A value of a manifest in a cell: yes and no, six digits, a long list as the number of its values."""
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(shown, value))
        return f"[{text}]" if len(text) <= WIDEST else f"[{len(value)} values]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def two_lines(above: str, below: str) -> Text:
    """A cell of two lines, the lower one pale; of one, when there is nothing below."""
    return Text("\n").join([line(above), line(below, "dim")]) if below else line(above)


def whole_path(text: str) -> Text:
    """A path that is never folded: it is there to be copied."""
    drawn = line(text, "dim")
    drawn.no_wrap, drawn.overflow = True, "ignore"
    return drawn


def fields(values: Document) -> Table:
    """A nested mapping, a dotted name a line."""
    return aligned(flatten(values).items())


def aligned(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Names and their values, the values below each other."""
    drawn = Table.grid(padding=(0, 2, 0, 0))
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        drawn.add_row(line(f"  {name}"), line(shown(value)))
    return drawn


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names: {"target": {"macs": 0.5}} -> {"target.macs": 0.5}. Lists stay whole."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
    return flat
