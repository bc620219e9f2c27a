"""Where a command speaks: its result on stdout, everything else on stderr.

A command hands over its result once, as a plain document and a function that draws it. With --json the document is
printed and nothing else ever reaches stdout, on a failure too; without it the drawing is. So the table that a person
reads and the JSON that a script reads cannot tell different things.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .diagnostics import printable
from .errors import SievitError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

STDOUT, STDERR = 1, 2  # what a process below Python writes to
Document = dict[str, Any]  # what --json prints: always an object, so that an error can stand beside the result


class Console:
    """The two streams of one command line.

    json: one JSON document on stdout. debug: tracebacks on stderr. by_line: with json a document a line, as `piece`
    gives them, an error that ends the command being the last. events: lines as `events` describes them, the document
    as the last of them.
    """

    def __init__(self, *, json: bool = False, events: bool = False, debug: bool = False) -> None:
        self.json = json or events
        self.events = events
        self.debug = debug
        self.by_line = events
        self._document: Document | None = None
        self._events = _kept(sys.stdout) if events else None
        self._unwritten: OSError | None = None

    @cached_property
    def stdout(self) -> RichConsole:
        return _rich(sys.stdout)

    @cached_property
    def stderr(self) -> RichConsole:
        return _rich(sys.stderr)

    @property
    def interactive(self) -> bool:
        """Somebody can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not self.json

    def result(self, document: Document, draw: Callable[[Document], RenderableType]) -> None:
        """What the command was asked for, said once. With --json it is printed by `close`."""
        self._document = document
        if not self.json:
            self.stdout.print(draw(document), crop=False)  # a path that is left whole may run over the edge

    def document(self, document: Document) -> None:
        """A result that is JSON with or without --json."""
        self.json = True
        self._document = document

    def piece(self, document: Document) -> None:
        """A part of a result that comes bit by bit: said at once with --json, and not at all without."""
        if self.json:
            sys.stdout.write(_line(document))
            sys.stdout.flush()

    def event(self, fields: Document) -> None:
        """One event on stdout, also while `results_only` has stdout elsewhere. A reader that has gone stops nothing:
        `close` says so.
        """
        from . import events, records

        if self._events is None or self._unwritten is not None:
            return
        try:
            self._events.write(_line({"v": events.VERSION, **fields, "time": records.now()}))
            self._events.flush()
        except OSError as error:
            self._unwritten = error

    def say(self, text: str) -> None:
        """A line beside the result."""
        if not self.json:
            self._tell(text)

    def close(self, error: SievitError | None = None) -> int:
        """Print the JSON document or the error and return the exit code."""
        if error is not None and self.debug:
            traceback.print_exception(error, file=sys.stderr)
        if self.json:
            failure = {"error": error.as_json()} if error is not None else {}
            document = {**(self._document or {}), **failure}
            if self.events:
                self.event({"event": "result", "result": document})
                if self._unwritten is not None:
                    raise self._unwritten
            elif document:
                sys.stdout.write(json.dumps(document, indent=None if self.by_line else 2, allow_nan=False) + "\n")
        elif error is not None:
            self._tell(error.text(self.stderr.width if self.stderr.is_terminal else None))
        return error.exit_code if error is not None else 0

    def _tell(self, text: str) -> None:
        self.stderr.print("\n".join(map(printable, text.split("\n"))), soft_wrap=True)


def _kept(stream: TextIO | None) -> TextIO:
    """A stream as it is now, wherever its descriptor leads later."""
    try:
        return os.fdopen(os.dup(stream.fileno()), "w", encoding="utf-8") if stream else Path(os.devnull).open("w")
    except OSError:  # no file: somebody in this process reads it
        assert stream is not None
        return stream


def _line(document: Document) -> str:
    return json.dumps(document, allow_nan=False) + "\n"


@contextmanager
def results_only() -> Iterator[None]:
    """Stdout is for results: what libraries print while a stage works, in Python or below it, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)


@contextmanager
def unheard() -> Iterator[None]:
    """What libraries print in a process that does not speak for itself reaches nobody, in Python or below it."""
    kept = {number: os.dup(number) for number in (STDOUT, STDERR)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def _rich(stream: TextIO) -> RichConsole:
    from rich.console import Console as RichConsole

    # Names and paths are printed as they are: no markup, no emoji codes, no guessing at what might be a number.
    return RichConsole(file=stream, markup=False, emoji=False, highlight=False)
