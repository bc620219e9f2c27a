"""The conditions of `sievit compare --fail-if`: a field, a comparator, a bound. A closed list; a wrong one is refused.

A is what there was, B what is to replace it. A bound is always of the field's own unit: accuracies are fractions, 0.01
is one point.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sievit.pipeline.diagnostics import suggest
from sievit.pipeline.errors import InputError, UsageError

Kind = Literal["fraction", "number", "accuracy word", "latency word"]

FIELDS: dict[str, tuple[Kind, str]] = {
    "accuracy": ("fraction", "top-1 of B"),
    "accuracy_drop": ("fraction", "top-1 of A less that of B"),
    "accuracy_drop_high": ("fraction", "the upper end of its 95% interval"),
    "accuracy_p": ("fraction", "p of McNemar's exact test"),
    "accuracy_verdict": ("accuracy word", "better, worse or no difference, at the 5% level"),
    "agreement": ("fraction", "images to which both give the same class"),
    "speedup": ("number", "p50 of A over that of B, round by round"),
    "speedup_low": ("number", "the lower end of its 95% interval"),
    "latency_verdict": ("latency word", "faster, slower or no difference, beyond the noise floor"),
    "p50_ms": ("number", "of B; p90_ms and p99_ms likewise"),
    "p90_ms": ("number", ""),
    "p99_ms": ("number", ""),
    "peak_memory_mb": ("number", "of B's process"),
    "bytes": ("number", "of B, with the weights beside it"),
    "bytes_ratio": ("number", "B over A; parameters_ratio and macs_ratio likewise"),
    "parameters": ("number", "of B"),
    "parameters_ratio": ("number", ""),
    "macs": ("number", "of B, for one image"),
    "macs_ratio": ("number", ""),
}
ACCURACY = frozenset(name for name in FIELDS if name.startswith("accuracy") or name == "agreement")
WORDS: dict[Kind, tuple[str, ...]] = {
    "accuracy word": ("better", "worse", "no difference"),
    "latency word": ("faster", "slower", "no difference"),
}
COMPARATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
OF_NUMBERS, OF_WORDS = ("<", "<=", ">", ">="), ("==", "!=")
_CONDITION = re.compile(r"\s*(?P<field>[A-Za-z0-9_.]*)\s*(?P<comparator>[<>=!~]+)?\s*(?P<bound>.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """Fails the comparison when it holds."""

    text: str
    field: str
    comparator: str
    bound: float | str

    def holds(self, measured: Mapping[str, Any]) -> bool:
        """Whether it holds. Raises InputError when the field was not measured: that is no pass."""
        value = measured.get(self.field)
        if value is None:
            why = measured.get("unsaid", {}).get(self.field, "it was not measured")
            raise InputError(
                f"{self.field} cannot be judged: {why}",
                where=f"--fail-if '{self.text}'",
                hint="give what it needs, or leave the condition out",
            )
        return bool(COMPARATORS[self.comparator](value, self.bound))


def parse(text: str) -> Condition:
    """A condition from its text, such as "accuracy_drop > 0.01". Raises UsageError that lists what there is."""
    match = _CONDITION.fullmatch(text)
    where = f"--fail-if '{text}'"
    if match is None or not match["field"] or match["comparator"] is None:
        raise UsageError(
            f"{text!r} is no condition: it wants a field, a comparator and a bound",
            hint=f"such as 'accuracy_drop > 0.01'; fields: {', '.join(FIELDS)}",
        )
    field, comparator, bound = match["field"], match["comparator"], match["bound"]
    if field not in FIELDS:
        raise UsageError(f"there is no field {field!r}", where=where, hint=suggest(field, FIELDS, kind="fields"))
    kind = FIELDS[field][0]
    allowed = OF_WORDS if kind in WORDS else OF_NUMBERS
    if comparator not in allowed:
        raise UsageError(f"{field} knows no {comparator!r}", where=where, hint=f"comparators: {', '.join(allowed)}")
    if kind in WORDS:
        word = bound.strip("'\"")
        if word not in WORDS[kind]:
            raise UsageError(f"{field} is never {bound!r}", where=where, hint=suggest(word, WORDS[kind], kind="words"))
        return Condition(text, field, comparator, word)
    return Condition(text, field, comparator, _number(field, kind, comparator, bound, where))


def _number(field: str, kind: Kind, comparator: str, bound: str, where: str) -> float:
    try:
        value = float(bound)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{bound!r} is no number", where=where, hint="write it plainly, as 0.01; 1% is 0.01")
    whole = value == 1 and comparator in ("<", ">=") and "drop" not in field  # all images, and not one point
    if kind == "fraction" and abs(value) >= 1 and not whole:
        raise UsageError(
            f"{field} is a fraction, and {comparator} {bound} says nothing of it",
            where=where,
            hint="one point is 0.01, all is 1",
        )
    return value
