"""Several runs side by side on one page: what each shipped, which gates held, what differs in their recipes and costs.

Files of one run were measured in turns, those of two runs were not: the host may have been another, or busier. So each
speed-up is against the baseline of its own run, and the page says on which host that was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .facts import Facts, Row
from .ledger import Cost
from .numbers import DASH
from .reading import dig, mapping, objects, text
from .verdict import Verdict, verdict

MOST = 8  # runs; more columns are read by nobody
MOST_FIELDS = 200
COMMON = ("device", "gates", "data", "model")
APART = ("arm", "entry", "stage", "key", "inputs", "packages", *COMMON)  # of a node: no fields of its own recipe


@dataclass(frozen=True, slots=True)
class Column:
    """One run. name: as short as tells it from the others."""

    name: str
    facts: Facts
    verdict: Verdict
    host: str  # the processor of the measurement, or ""
    busy: bool

    @property
    def rows(self) -> tuple[Row, ...]:
        """The final files and the baseline, the first setting first."""
        return tuple(row for row in self.facts.rows if row.final or row.baseline)


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of the recipe that is not the same in all runs: which arms it stands in, and its value in each run."""

    field: str
    arms: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Beside:
    """What a page on several runs shows."""

    columns: tuple[Column, ...]
    differences: tuple[Difference, ...]
    further: int  # fields that differ and are not shown

    @property
    def title(self) -> str:
        return " and ".join(dict.fromkeys(column.facts.pipeline for column in self.columns))

    @property
    def points(self) -> tuple[tuple[str, Row], ...]:
        """The shipped file and the baseline of each run, with its name."""
        return tuple(
            (column.name, row)
            for column in self.columns
            for row in column.facts.first_setting
            if row is column.facts.shipped or row is column.facts.baseline
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.host for column in self.columns if column.host))

    @property
    def costs(self) -> tuple[tuple[str, Cost], ...]:
        return tuple((column.name, cost) for column in self.columns for cost in column.facts.costs)


def beside(found: Sequence[tuple[Mapping[str, Any], Facts]]) -> Beside:
    """Lay runs beside each other: each its record and facts. Raises InputError for fewer than two, one that stands
    there twice, and more than MOST.
    """
    ids = [facts.run for _, facts in found]
    if len(set(ids)) < len(ids):
        twice = next(run for run in ids if ids.count(run) > 1)
        raise InputError(f"run {twice} is named twice", hint="name each run once")
    if not 2 <= len(found) <= MOST:
        raise InputError(f"{len(found)} runs cannot be laid side by side", hint=f"name 2 to {MOST} of them")
    names = _short(ids)
    differences = _differences([record for record, _ in found])
    return Beside(
        tuple(_column(name, facts) for name, (_, facts) in zip(names, found, strict=True)),
        differences[:MOST_FIELDS],
        len(differences[MOST_FIELDS:]),
    )


def _short(ids: Sequence[str]) -> list[str]:
    """The first letters of each id, as many as tell all apart; four at least."""
    length = next(n for n in range(4, 65) if len({run[:n] for run in ids}) == len(ids))
    return [run[:length] for run in ids]


def _column(name: str, facts: Facts) -> Column:
    measured = facts.measurement.metrics if facts.measurement else {}
    host = mapping(measured, "host")
    processor = text(host, "processor") or text(host, "cpu") or ("unknown processor" if measured else "")
    return Column(name, facts, verdict(facts), processor, dig(measured, "disturbed") is True)


def _differences(records: Sequence[Mapping[str, Any]]) -> tuple[Difference, ...]:
    """Fields whose values differ, in the order in which the runs have them; arms with the same values in one line. A
    stage that a run does not have is one line, not one for each of its fields.
    """
    recipes = [_recipe(record) for record in records]
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for arm, entry in dict.fromkeys(place for recipe in recipes for place in recipe):
        fields = [recipe.get((arm, entry)) for recipe in recipes]
        if None in fields:
            values = tuple(DASH if own is None else "in the run" for own in fields)
            lines.setdefault((entry or "pipeline", values), []).append(arm)
            continue
        for field in dict.fromkeys(field for own in fields for field in own or {}):
            values = tuple((own or {}).get(field, DASH) for own in fields)
            if len(set(values)) > 1:
                lines.setdefault((field, values), []).append(arm)
    found = [Difference(field, ", ".join(filter(None, arms)), values) for (field, values), arms in lines.items()]
    return tuple(sorted(found, key=lambda one: DASH in one.values))  # what a run does not know at all comes last


def _recipe(record: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """(arm, entry) -> dotted field -> value as text; ("", "") has what all stages have in common."""
    spec = mapping(record, "spec")
    nodes = objects(spec, "nodes")
    common: dict[str, str] = {}
    recipe = {("", ""): common}
    for name in COMMON:
        values = [value for value in (spec.get(name), *(node.get(name) for node in nodes)) if value is not None]
        for value in values[:1]:
            common.update(_flat(value, name))
    for node in nodes:
        own = recipe.setdefault((text(node, "arm"), text(node, "entry")), {})
        for name, value in node.items():
            if name not in APART:
                own.update(_flat(value, text(node, "entry") if name == "config" else f"{text(node, 'entry')} {name}"))
    return recipe


def _flat(value: Any, above: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, one in value.items():
            yield from _flat(one, f"{above}.{name}")
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        for place, one in enumerate(value):
            yield from _flat(one, above if isinstance(one, Mapping) else f"{above}[{place}]")
    elif value is None:
        yield above, "none"
    else:
        yield above, value if isinstance(value, str) else json.dumps(value, default=str)
