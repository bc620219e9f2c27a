"""What a sweep tries: `--grid prune.target.macs=0.3,0.5` and `--search finetune.lr=1e-4..1e-2:log` as values of fields.

A value is YAML under the strict rules of `--set`, so whatever a field can be set to can be swept: numbers, names, null,
{mappings}, [lists]. Values stand between commas, and each keeps its place in the option, where a mistake is shown.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .diagnostics import Source, printable
from .document import read
from .errors import SpecError, UsageError
from .stage import JSON

MOST = 10_000  # combinations of a grid: more are a mistake, not a plan
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_WHOLE = re.compile(r"[-+]?\d+")


@dataclass(frozen=True, slots=True)
class Choices:
    """Values one by one, in the order written. places: of `ends`, as --set would be given them."""

    values: tuple[JSON, ...]
    places: tuple[Source, ...] = field(default=(), compare=False, repr=False)

    @property
    def ends(self) -> tuple[JSON, ...]:
        """What is looked at before anything runs: all of them."""
        return self.values

    def as_json(self) -> JSON:
        return list(self.values)


@dataclass(frozen=True, slots=True)
class Range:
    """All numbers from low to high, both included: whole ones when both ends are. log: every octave is as likely.
    places: of `ends`.
    """

    low: float
    high: float
    log: bool = False
    places: tuple[Source, ...] = field(default=(), compare=False, repr=False)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[JSON, ...]:
        """What is looked at before anything runs: both ends."""
        return (self.low, self.high)

    def as_json(self) -> JSON:
        return {"low": self.low, "high": self.high, "log": self.log}


Tried = Choices | Range


def grid_of(options: Sequence[str]) -> dict[str, Tried]:
    """Field -> its values, of `--grid FIELD=A,B,C`. UsageError for a range, and for more than 10,000 combinations."""
    found = _fields(options, "--grid")
    for text, tried in zip(options, found.values(), strict=True):
        if isinstance(tried, Range):
            raise _usage("a grid has values, not a range", f"--grid {text}", "write the values, or --search for ranges")
    count = math.prod(len(tried.ends) for tried in found.values())
    if count > MOST:
        raise UsageError(f"the grid has {count:,} combinations; at most {MOST:,} are run", hint="--search tries a few")
    return found


def search_of(options: Sequence[str]) -> dict[str, Tried]:
    """Field -> its range or choices, of `--search FIELD=LOW..HIGH[:log]` and `--search FIELD=A,B,C`."""
    return _fields(options, "--search")


def combinations(grid: Mapping[str, Tried]) -> Iterator[dict[str, JSON]]:
    """Every combination of a grid's values, the last field changing first."""
    for values in itertools.product(*(tried.ends for tried in grid.values())):
        yield dict(zip(grid, values, strict=True))


def overrides(settings: Mapping[str, JSON]) -> list[str]:
    """The settings of a trial as `--set` takes them."""
    return [f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in settings.items()]


def _fields(options: Sequence[str], option: str) -> dict[str, Tried]:
    found: dict[str, Tried] = {}
    for text in options:
        name, equals, values = text.partition("=")
        if not (name.strip() and equals and values.strip()):
            example = "prune.target.macs=0.3,0.5" if option == "--grid" else "finetune.lr=1e-4..1e-2:log"
            raise _usage("a swept field is FIELD=VALUES", f"{option} {text}", f"for example {option} {example}")
        if name in found:
            raise _usage(f"{name} is swept twice", f"{option} {text}", "give all its values in one option")
        if "\n" in text or "\r" in text:
            raise _usage(
                "a swept field is one line", f"{option} {text}", "write lists and mappings as [a, b] and {a: 1}"
            )
        found[name] = _range(text, f"{option} {text}") or _choices(text, f"{option} {text}")
    return found


def _range(text: str, where: str) -> Range | None:
    match = _RANGE.fullmatch(text.rstrip(), _begin(text))
    if match is None:
        return None
    whole = all(_WHOLE.fullmatch(end) for end in match.group(1, 2))
    low, high = ((int if whole else float)(end) for end in match.group(1, 2))
    if not low < high or math.isinf(high) or math.isinf(low):
        raise _usage("a range goes from the lower number to the higher", where, "for example 1e-4..1e-2")
    if match[3] and low <= 0:
        raise _usage("a logarithmic range is above 0", where, "leave :log out, or begin above 0")
    places = tuple(_alone(text, where, *match.span(end)) for end in (1, 2))
    return Range(low, high, match[3] is not None, places)


def _choices(text: str, where: str) -> Choices:
    try:
        node = read(Source(where, f"[{text[_begin(text) :]}]", inline=True), 0)
    except SpecError as error:  # its caret would point into brackets that nobody wrote
        raise _usage(error.message, where, error.hint or "values stand between commas") from None
    items = node.items if node is not None else ()
    if not items or any(item.empty for item in items):
        raise _usage("a value is missing", where, "values stand between commas; write null for nothing")
    values = tuple(item.plain() for item in items)
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise _usage("a value stands twice", where, "remove one of the two")
    starts = [_begin(text) + item.span.column - 2 for item in items]  # columns count from 1, behind the bracket
    ends = [_end(text, start) for start in starts[1:]] + [len(text)]
    places = tuple(_alone(text, where, *span) for span in zip(starts, ends, strict=True))
    return Choices(values, places)


def _begin(text: str) -> int:
    """Where the values begin, blanks before them left out."""
    at = text.index("=") + 1
    return len(text) - len(text[at:].lstrip())


def _end(text: str, following: int) -> int:
    """Where a value ends, given where the next one begins."""
    return len(text[:following].rstrip().removesuffix(","))


def _alone(text: str, where: str, start: int, end: int) -> Source:
    """The option with one of its values alone in it, where it was written."""
    at = text.index("=") + 1
    return Source(where, (text[:at] + " " * (start - at) + text[start:end]).ljust(len(text)), inline=True)


def _usage(message: str, where: str, hint: str) -> UsageError:
    return UsageError(message, where=printable(where), hint=hint)
