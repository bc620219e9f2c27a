"""A strict YAML reader that remembers where every key and value stands.

PyYAML's loaders read YAML 1.1: `1e-3` is text, `no` is false, `12:30` is 750, the second of two equal keys wins, and
nine lines of aliases grow until memory ends. Here PyYAML only scans; its events are built into nodes under our own
rules: the core schema of YAML 1.2, text keys, each once, no aliases, no tags, one document, and limits that hold before
anything is built. What is not in the rules is an error that points, never a guess.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .diagnostics import Source, Span, located, printable
from .errors import SpecError

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_DIGITS = 18  # every such integer fits into 64 bits

EXAMPLE = "a pipeline starts like this: 'stages: {train: {epochs: 10}, export: {}}'; 'sievit init' writes a whole one"

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Line separators other than LF are among them: an editor would count other lines than we do.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_CONFLICT = re.compile(r"^(<<<<<<<|>>>>>>>|\|\|\|\|\|\|\|)( .*)?$", re.MULTILINE)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place. `keys` are the places of a mapping's keys; `empty`: nothing stands there."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    span: Span
    keys: dict[str, Span] = field(default_factory=dict)
    empty: bool = False

    @property
    def mapping(self) -> dict[str, Node]:
        """The entries of a mapping; of anything else none."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> tuple[Node, ...]:
        """The elements of a list; of anything else none."""
        return self.value if isinstance(self.value, tuple) else ()

    def plain(self) -> Any:
        """The value as json.dumps accepts it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


def contents(path: Path) -> bytes:
    """What stands in a file, one byte beyond the limit at most. SpecError when it is not a file that can be read."""
    hint = "'sievit init' writes one"
    try:
        if path.is_dir():
            raise SpecError("a folder, not a file", where=str(path), hint=f"try {path / 'pipeline.yaml'}")
        if path.exists() and not path.is_file():
            raise SpecError("not a regular file", where=str(path), hint=hint)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError("no such file", where=str(path), hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = printable(str(path))
        raise SpecError(f"the file cannot be read: {reason}", where=where, hint="give this user the right to") from None


def decode(data: bytes, name: str) -> Source:
    """The text of a file: UTF-8, a byte order mark and CRLF accepted, no larger than 1 MiB."""
    if len(data) > MAX_BYTES:
        raise SpecError(
            f"the file is larger than {MAX_BYTES // 2**20} MiB", where=name, hint="a pipeline needs a few KiB"
        )
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SpecError("the file is UTF-16", where=name, hint="save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before[before.rfind(b"\n") + 1 :].decode()) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise SpecError(message, where=f"{name}:{line}:{column}", hint="save the file as UTF-8") from None
    return Source(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def parse(text: str | bytes, filename: str) -> Node:
    """The mapping at the root of a YAML file. Raises SpecError, located, for everything that is not plain YAML."""
    source = decode(text.encode() if isinstance(text, str) else text, filename)
    root = read(source)
    if root is None or root.empty:
        raise SpecError("the file is empty", where=filename, hint=EXAMPLE)
    if not isinstance(root.value, dict):
        raise located(f"a pipeline is a mapping, this is {describe(root)}", root.span, EXAMPLE)
    return root


def read(source: Source, at: int = 0) -> Node | None:
    """Any YAML value of a source from character `at` of its only line on; None when there is nothing."""
    _check_characters(source)
    try:
        return _Builder(source, at).document()
    except yaml.MarkedYAMLError as error:
        raise _explained(error, source) from None


def describe(node: Node) -> str:
    """What stands there, in words: "the text '5'", "1.5", "a list"."""
    match node.value:
        case dict():
            return "a mapping"
        case tuple():
            return "a list"
        case str() as text:
            return f"the text {text[:40] + '…' if len(text) > 40 else text!r}"
        case None:
            return "nothing" if node.empty else "null"
        case bool() as flag:
            return str(flag).lower()
        case number:
            return repr(number)


class _Builder:
    """Builds nodes from events, one document, refusing what is outside the rules before it is built."""

    def __init__(self, source: Source, at: int) -> None:
        self.source = source
        # Blanks in place of what stands before the value (an override's field path) keep the columns right.
        self.events: Iterator[Any] = yaml.parse(" " * at + source.text[at:], Loader=_Loader)
        self.nodes = 0

    def document(self) -> Node | None:
        next(self.events)  # stream start
        if not isinstance(next(self.events), yaml.DocumentStartEvent):
            return None
        root = self.node(next(self.events), 1)
        next(self.events)  # document end
        after = next(self.events)
        if isinstance(after, yaml.DocumentStartEvent):
            self.refuse(after, "a second document starts here", "a pipeline is one document: remove the '---'", 3)
        return root

    def node(self, event: Any, depth: int) -> Node:
        self.refuse_foreign(event)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.refuse(event, f"the file holds more than {MAX_NODES} values", "a pipeline needs a few dozen")
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} levels deep", "a pipeline needs four or five")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(inner := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(inner, depth + 1))
            return Node(tuple(items), self.span(event, 1))
        return self.mapping(event, depth)

    def mapping(self, start: Any, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, Span] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            if key in keys:
                first, second = keys[key].line, event.start_mark.line + 1
                lines = f"twice in line {first}" if first == second else f"in line {first} and again in line {second}"
                self.refuse(event, f"key '{key}' stands {lines}", "keep one of the two")
            keys[key] = self.span(event)
            inner = next(self.events)
            if isinstance(inner, yaml.ScalarEvent) and event.implicit[0] and not self.has_colon(event, inner):
                hint = "put a space after the ':'" if ":" in key else f"write '{key}: value'"
                self.refuse(event, f"'{key}' is a key without a value", hint)
            values[key] = self.node(inner, depth + 1)
        return Node(values, self.span(start, 1), keys)

    def key(self, event: Any) -> str:
        self.refuse_foreign(event)
        if not isinstance(event, yaml.ScalarEvent):
            self.refuse(event, "a key must be text, this is a list or a mapping", "", 1)
        if event.value == "<<" and event.implicit[0]:
            self.refuse(event, "merge keys ('<<') are not read", "write the fields out; for variants use 'arms:'")
        key = self.scalar(event)
        if not isinstance(key.value, str):
            shown = event.value or "an empty key"
            self.refuse(event, f"a key must be text, this is {shown}", f'write "{event.value}" in quotes')
        return key.value

    def has_colon(self, key: Any, value: Any) -> bool:
        """Whether a ':' stands behind the key; in {epochs:20} none does, and YAML reads one long key."""
        if value.value or not value.implicit[0]:
            return True
        line = self.source.lines[key.end_mark.line] if key.end_mark.line < len(self.source.lines) else ""
        return line[key.end_mark.column :].lstrip().startswith(":") or key.end_mark.line != value.start_mark.line

    def scalar(self, event: Any) -> Node:
        span = self.span(event)
        text = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return Node(text, span)
        if text in _NULL:
            return Node(None, span, empty=not text)
        if text in _BOOL:
            return Node(_BOOL[text], span)
        if _NOT_FINITE.fullmatch(text):
            raise located(f"{text} is not a number that a pipeline can use", span, "give a finite number")
        if _INT.fullmatch(text) or _BASED.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise located(f"an integer of {len(text)} digits", span, f"at most {MAX_DIGITS} digits are read")
            return Node(int(text, 0), span)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if abs(number) == float("inf"):
                raise located(f"{text[:40]} is too large a number", span, "give a number below 1.8e308")
            return Node(number, span)
        return Node(text, span)

    def refuse_foreign(self, event: Any) -> None:
        """Aliases, anchors and tags: what makes YAML grow without bound, or build objects."""
        hint = "write the value out; for variants of a pipeline use 'arms:'"
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, f"aliases ('*{event.anchor}') are not read", hint)
        if event.anchor is not None:
            self.refuse(event, f"anchors ('&{event.anchor}') are not read", hint, len(event.anchor) + 1)
        if event.tag is not None:
            shown = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.refuse(event, f"tags ('{shown}') are not read", "write the plain value", len(shown))

    def span(self, event: Any, length: int | None = None) -> Span:
        start, end = event.start_mark, event.end_mark
        if length is None and start.line == end.line:
            length = end.column - start.column
        elif length is None:
            length = len(self.source.lines[start.line].rstrip()) - start.column
        return Span(self.source, start.line + 1, start.column + 1, max(0, length))

    def refuse(self, event: Any, message: str, hint: str, length: int | None = None) -> NoReturn:
        raise located(message, self.span(event, length), hint)


def _check_characters(source: Source) -> None:
    """Refuse what no editor shows (NUL, escape codes, odd line ends) and what a failed merge leaves behind."""
    if found := _UNPRINTABLE.search(source.text):
        name = "NUL" if found[0] == "\0" else f"U+{ord(found[0]):04X}"
        raise located(f"an invisible character ({name})", _span_at(source, found.start(), 1), "remove it")
    if found := _CONFLICT.search(source.text):
        raise located(
            "a merge conflict is not resolved",
            _span_at(source, found.start(), 7),
            "choose one side and remove the lines <<<<<<<, ======= and >>>>>>>",
        )


def _span_at(source: Source, index: int, length: int) -> Span:
    line = source.text.count("\n", 0, index)
    return Span(source, line + 1, index - (source.text.rfind("\n", 0, index) + 1) + 1, length)


# What the two loaders of PyYAML say -> what we say, and what to do. The last: point to the opening bracket.
_SYNTAX: tuple[tuple[str, str, str, bool], ...] = (
    (
        "mapping values are not allowed",
        "a ':' that cannot stand here",
        "check the indentation; text that holds ': ' needs quotes",
        False,
    ),
    ("found unexpected ':'", "a ':' that cannot stand here", "put a space after it", False),
    ("expected ',' or '}'", "a '{' that is not closed, or a missing comma", "close it with '}'", True),
    ("expected ',' or ']'", "a '[' that is not closed, or a missing comma", "close it with ']'", True),
    ("unexpected end of stream", "a quote that is not closed", "close it", True),
    ("could not find expected ':'", "neither a key with a value nor part of one", "write 'key: value'", True),
    ("cannot start any token", "a character that no value can start with", "put the text into quotes", False),
    ("unknown escape character", "an unknown escape in a quoted text", "use single quotes, or double the '\\'", False),
    ("did not find expected key", "this does not fit the lines above", "indent equal things equally", False),
    ("'-' indicator", "this does not fit the list above", "indent equal things equally", False),
    ("expected <block end>", "this does not fit the lines above", "indent equal things equally", False),
    ("entries are not allowed", "a list cannot start here", "start it on a line of its own, or write [a, b]", False),
    ("node content", "a value is missing, or a bracket stands alone", "", False),
    ("<document start>", "text after the end of the document, or an unknown directive", "remove it", False),
    (
        "comment or line break",
        "text behind a '|' or '>'",
        "start the block of text on the next line, or use quotes",
        False,
    ),
    ("alphabetic or numeric", "a character that no value can start with", "put the text into quotes", False),
    ("whitespace or line break", "a character that no value can start with", "put the text into quotes", False),
    ("unknown directive", "a directive ('%…') is not read", "remove the line", False),
)


def _explained(error: yaml.MarkedYAMLError, source: Source) -> SpecError:
    """A scanner's complaint in plain words, at the place to mend."""
    problem = error.problem or "not YAML"
    mark = error.problem_mark or error.context_mark
    message, hint, opened = f"not YAML: {problem}", "", False
    for sign, told, advice, at_open in _SYNTAX:
        if sign in problem:
            message, hint, opened = told, advice, at_open
            break
    if opened and error.context_mark is not None:
        mark = error.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    if line >= len(source.lines):
        line, column = len(source.lines) - 1, len(source.lines[-1])
    text = source.lines[line]
    if "\t" in text[: column + 1] and not text[: column + 1].strip():
        message, hint = "a tab; YAML is indented with spaces", "replace the tab by spaces"
    return located(message, Span(source, line + 1, column + 1, 1), hint)
