"""The exceptions of Sievit, and the exit code each stands for.

    SievitError               1   a stage failed
      UsageError              2   the command line is wrong
      SpecError               3   pipeline.yaml is wrong (file, line, column)
      InputError              3   data, a model or a file given to a stage is wrong
      IntegrityError          4   something stored is not what was stored
      LockedError             5   another process is making the same artifact
      GateError               6   a stated bound (accuracy, parity, speed-up) was missed
      Interrupted           130   Ctrl-C
      Terminated            143   SIGTERM

Every message says what is wrong; `where` names the file, field or artifact; `hint` says what to do next.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import ClassVar

STAGES_FAULT = "this is a fault of the stage rather than of your settings; --debug shows the traceback"


class SievitError(Exception):
    """Base of all errors that a user is meant to read. Printed without a traceback."""

    exit_code: ClassVar[int] = 1
    title: ClassVar[str] = "error"

    def __init__(self, message: str, *, where: str = "", hint: str = "", excerpt: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.excerpt = excerpt  # the lines under `where`: the source with a caret under the fault

    def text(self, width: int | None = None) -> str:
        """The whole printed text: what, where, what to do. width: of the terminal; None leaves long lines long.

        Places are never folded: they are there to be copied.
        """
        lines = _folded(f"{self.title}: {self.message}", width, "  ")
        if self.where:
            lines.append(f"  --> {self.where}")
        if shown := _window(self.excerpt, width):
            lines.append(shown)
        if self.hint:
            lines += _folded(f"  help: {self.hint}", width, "        ")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """The object printed under "error" with --json."""
        return {"code": self.exit_code, "message": self.message, "where": self.where, "hint": self.hint}


class UsageError(SievitError):
    """The command line is wrong."""

    exit_code = 2


class SpecError(SievitError):
    """pipeline.yaml or an override is wrong; nothing was started and nothing written.

    `also` are further, independent mistakes of the same file, told in the same breath.
    """

    exit_code = 3
    title = "invalid pipeline"

    def __init__(
        self, message: str, *, where: str = "", hint: str = "", excerpt: str = "", also: Sequence[SpecError] = ()
    ) -> None:
        super().__init__(message, where=where, hint=hint, excerpt=excerpt)
        self.also = tuple(also)

    def text(self, width: int | None = None) -> str:
        return "\n\n".join([super().text(width), *(error.text(width) for error in self.also)])

    def as_json(self) -> dict[str, object]:
        """The first mistake as in every error, and all of them under "diagnostics"."""
        every = [{"message": e.message, "where": e.where, "hint": e.hint} for e in (self, *self.also)]
        return {**super().as_json(), "diagnostics": every}


class InputError(SievitError):
    """Data, weights or a file that a stage was given is wrong. `field`: the setting that names it, such as data.source,
    for whoever has the file of settings at hand to show its line."""

    exit_code = 3
    title = "invalid input"

    def __init__(self, message: str, *, where: str = "", hint: str = "", excerpt: str = "", field: str = "") -> None:
        super().__init__(message, where=where, hint=hint, excerpt=excerpt)
        self.field = field


class IntegrityError(SievitError):
    """A stored file is missing or not the one that was stored."""

    exit_code = 4
    title = "damaged artifact"


class LockedError(SievitError):
    """Another process holds the key."""

    exit_code = 5
    title = "locked"


class GateError(SievitError):
    """A stated bound was missed."""

    exit_code = 6
    title = "gate missed"


class Interrupted(SievitError):
    """Ctrl-C; what was done up to the last checkpoint is kept."""

    exit_code = 130
    title = "interrupted"


class Terminated(SievitError):
    """SIGTERM; what was done up to the last checkpoint is kept."""

    exit_code = 143
    title = "terminated"


def _folded(text: str, width: int | None, indent: str) -> list[str]:
    """Lines of at most `width` columns, broken between words alone: a path or a key in it stays whole."""
    if width is None:
        return [text]
    return [
        folded
        for line in text.split("\n")
        for folded in textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        or [line]
    ]


def _window(excerpt: str, width: int | None) -> str:
    """The part of a source line around its carets that fits; nothing when even those do not."""
    lines = excerpt.split("\n")
    if width is None or max(map(len, lines)) <= width:
        return excerpt
    *above, carets = lines
    if len(above) < 2:  # under an option: without its line, carets point at nothing
        return ""
    gutter = carets.index("|") + 2
    room, start = width - gutter - 2, carets.index("^")  # two columns for the dots at the ends
    source = above[-1]
    first = max(gutter, min(start - room // 2, len(source) - room))
    head = "…" if first > gutter else ""
    tail = "…" if first + room < len(source) else ""
    length = min(len(carets) - start, first + room - start)
    above[-1] = source[:gutter] + head + source[first : first + room] + tail
    return "\n".join([*above, carets[:gutter] + " " * (len(head) + start - first) + "^" * max(1, length)])
