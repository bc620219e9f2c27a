"""How help is laid out: a stage's docstring as it is written, options and commands in columns under plain headings.

Plain text without rich, whose Markdown and panels would take a quarter of the time that `sievit --help` takes.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns: longer lines are hard to read
SENTENCE = 120  # characters of a command's summary in the overview
TERM = 30  # columns of an option's name at most; a longer one has its explanation below


class Command(TyperCommand):
    """A command whose --help is laid out here."""

    def get_help(self, ctx: Any) -> str:
        return "\n\n".join(_page(self, ctx))


class Group(TyperGroup):
    """`sievit` itself: its commands stand under their tasks."""

    def get_help(self, ctx: Any) -> str:
        tasks: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            tasks.setdefault(command.rich_help_panel, []).append((name, _sentence(command.help or "")))
        return "\n\n".join([*_page(self, ctx), *_sections(tasks)])


def _sentence(text: str) -> str:
    """The first sentence of a manual, up to the detail that a colon brings."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", paragraph)[0]
    return sentence if len(sentence) <= SENTENCE else sentence.partition(":")[0] + "."


def _page(command: TyperCommand | TyperGroup, ctx: Any) -> Iterator[str]:
    """What it is for, then its arguments and options."""
    yield command.get_usage(ctx)
    yield textwrap.indent(laid_out(command.help or "", _width() - 2), "  ")
    options: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
        record = parameter.get_help_record(ctx)
        if record is not None:
            options.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
    yield from _sections(options)


def _sections(found: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for heading, rows in found.items():
        yield "\n".join([f"{heading}:", *_columns(rows)])


def _columns(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Terms and their explanations, side by side."""
    rows = list(rows)
    column = 2 + min(TERM, max(len(term) for term, _ in rows)) + 2
    for term, text in rows:
        head = f"  {term}".ljust(column)
        if len(head) > column:
            yield head
            head = " " * column
        yield from _wrapped(head + text, column, _width())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def laid_out(text: str, width: int) -> str:
    """A docstring in `width` columns: prose runs on; tables and examples keep their rows, hanging."""
    return "\n\n".join("\n".join(_paragraph(part.splitlines(), width)) for part in text.strip("\n").split("\n\n"))


def _paragraph(lines: Iterable[str], width: int) -> Iterator[str]:
    rows: list[tuple[str, int]] = []  # the text, and the column under which it goes on: 0 for prose
    for line in lines:
        column = max((gap.end() for gap in re.finditer(r"(?<=\S) {2,}", line)), default=0)
        text, under = rows[-1] if rows else ("", -1)
        indented = line.startswith(" ")
        if not column and (under > 0 if indented else under == 0):
            rows[-1] = f"{text} {line.strip()}", under
        elif indented and not column:
            rows.append((line, -1))  # an example
        else:
            rows.append((line, column))
    for text, under in rows:
        yield from _wrapped(text, under if under >= 0 else len(text) - len(text.lstrip()) + 4, width)


def _wrapped(text: str, under: int, width: int) -> list[str]:
    hanging = " " * min(under, width // 2)
    return textwrap.wrap(text, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False) or [
        text
    ]
