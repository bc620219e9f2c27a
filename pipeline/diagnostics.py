"""Errors that point: which file, which line, which column, what stands there, what was probably meant.

A `Span` is a piece of a `Source` (pipeline.yaml, or one `--set` of the command line). `located` turns a message and a
span into a `SpecError` that prints as a compiler's error does; `Problems` gathers independent ones, so that five
mistakes take one attempt and not five.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from .errors import SpecError

MAX_SHOWN = 10  # errors told at once; a file with more is better mended and tried again
MAX_WIDTH = 100  # columns of a source line shown around the fault


@dataclass(frozen=True)
class Source:
    """A text that a mistake can stand in. `inline` texts (one --set) have no lines: the caret goes under the text."""

    name: str
    text: str
    inline: bool = False

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")


@dataclass(frozen=True, slots=True)
class Span:
    """`length` characters from line and column, both counted from 1. Length 0 points between two characters."""

    source: Source
    line: int
    column: int
    length: int = 1

    @property
    def where(self) -> str:
        """What is printed after the arrow: file:line:column, or the option itself."""
        return self.source.name if self.source.inline else f"{self.source.name}:{self.line}:{self.column}"

    @property
    def short(self) -> str:
        """The same for the middle of a message about another place in the file."""
        return self.source.name if self.source.inline else f"line {self.line}"


def located(message: str, span: Span, hint: str = "") -> SpecError:
    """A SpecError that shows the line with a caret under the fault."""
    return SpecError(printable(message), where=printable(span.where), hint=printable(hint), excerpt=excerpt(span))


def excerpt(span: Span) -> str:
    """The source line under a gutter, and carets under the span; a long line is cut around the span."""
    if span.source.inline:
        before = span.source.name[: len(span.source.name) - len(span.source.text) + span.column - 1]
        return " " * (len("  --> ") + columns(before)) + "^" * max(1, span.length)
    line = span.source.lines[span.line - 1] if span.line <= len(span.source.lines) else ""
    start = min(span.column - 1, len(line))
    end = min(start + span.length, len(line))
    first = 0 if len(line) <= MAX_WIDTH else max(0, min(start - MAX_WIDTH // 2, len(line) - MAX_WIDTH))
    head, cut = ("…" if first else ""), line[first : first + MAX_WIDTH]
    tail = "…" if first + MAX_WIDTH < len(line) else ""
    gutter = f"{span.line:>2}"
    margin = " " * len(gutter)
    indent = columns(head + line[first:start])
    carets = max(1, columns(line[start : min(end, first + MAX_WIDTH)]))
    return f"{margin} |\n{gutter} | {printable(head + cut + tail)}\n{margin} | {' ' * indent}{'^' * carets}"


def columns(text: str) -> int:
    """How many terminal columns a text takes: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in printable(text)
    )


def printable(text: str) -> str:
    """The text without what a terminal would obey: an escape code in a name must not colour the screen."""
    return "".join(c if c.isprintable() or c == " " else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", " "))


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word that was probably meant, or None when none is near."""
    folded = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.7)
    return folded[close[0]] if close else None


def suggest(word: str, valid: Iterable[str], *, kind: str) -> str:
    """The hint for an unknown word: "did you mean 'macs'? valid keys: macs, params"."""
    names = list(valid)
    if not names:
        return f"there are no {kind} here"
    close = nearest(word, names)
    return (f"did you mean '{close}'? " if close else "") + f"valid {kind}: {', '.join(names)}"


@dataclass
class Problems:
    """Independent mistakes of one file, in the order found; told together, the first one first."""

    errors: list[SpecError] = field(default_factory=list)

    def add(self, message: str, span: Span, hint: str = "") -> None:
        self.keep(located(message, span, hint))

    def keep(self, error: SpecError) -> None:
        """Keep an error once: arms share lines of the file, and the same line is not told twice."""
        if not any((e.message, e.where, e.excerpt) == (error.message, error.where, error.excerpt) for e in self.errors):
            self.errors.append(error)

    def raise_if_any(self) -> None:
        """Raise all of them as one SpecError."""
        if not self.errors:
            return
        first, *rest = self.errors
        shown = rest[: MAX_SHOWN - 1]
        if len(rest) > len(shown):
            shown.append(SpecError(f"{len(rest) - len(shown)} more mistakes are not shown", hint="mend these first"))
        raise SpecError(first.message, where=first.where, hint=first.hint, excerpt=first.excerpt, also=shown)
