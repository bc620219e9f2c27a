"""What each stage of the main arm contributed, from the dense file to the shipped one: a waterfall.

Only what was measured stands in it. Top-1 is of the test split, of the network in PyTorch or of the file as said; a
latency is that of a file in the first setting of the benchmark, so stages before `export` have none of their own: what
they gained shows where their first file was measured. Where a value is missing, `unsaid` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .facts import Facts, Row
from .reading import number
from .steps import Step

WIDE = 100.0  # of a bar, in its own units


@dataclass(frozen=True, slots=True)
class Bar:
    """A floating bar from the value before to this one, as fractions of WIDE. kind: whole, better, worse or same."""

    start: float
    width: float
    kind: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A measured value (a fraction for top-1, ms for p50), its distance from the last one measured, and a bar."""

    value: float | None
    low: float | None = None
    high: float | None = None
    change: float | None = None
    of: str = ""  # what it was measured on
    unsaid: str = ""
    bar: Bar | None = None


@dataclass(frozen=True, slots=True)
class Contribution:
    """One stage, or the dense file that all is compared with (first) or the shipped one (last)."""

    name: str
    note: str
    top1: Reading
    p50: Reading
    macs: float | None
    bytes: float | None
    end: bool = False


def contributions(facts: Facts) -> tuple[Contribution, ...]:
    """From dense to shipped; () without both files, since there is then no way between them."""
    dense, shipped = facts.baseline, facts.shipped
    if dense is None or shipped is None:
        return ()
    steps = [s for s in facts.steps if not s.across_arms and any(arm == shipped.arm for arm, _ in s.places)]
    found = [_of_file(dense, dense.label, "where the way begins")]
    found += [_of_stage(step, facts, shipped) for step in steps]
    found.append(_of_file(shipped, shipped.label, "what is shipped"))
    return _drawn(found)


def _of_file(row: Row, name: str, note: str) -> Contribution:
    file = "file, test split"
    return Contribution(
        name,
        note,
        Reading(row.get("top1"), row.get("top1_low"), row.get("top1_high"), of=file, unsaid="not measured"),
        Reading(row.get("p50_ms"), row.get("p50_low"), row.get("p50_high"), of=row.setting, unsaid="not measured"),
        row.get("macs"),
        row.get("bytes"),
        end=True,
    )


def _of_stage(step: Step, facts: Facts, shipped: Row) -> Contribution:
    entry = next(entry for arm, entry in step.places if arm == shipped.arm)
    row = _row(entry, step, facts, shipped)
    if row is not None:
        kept = "" if row.entry == entry else f"the very file that {row.entry} ships"
        made = _of_file(row, step.name, kept)
        return Contribution(step.name, kept, made.top1, made.p50, made.macs, made.bytes)
    if not step.manifest:
        gone = step.absent or "no manifest"
        return Contribution(step.name, "", Reading(None, unsaid=gone), Reading(None, unsaid=gone), None, None)
    top1, note = _of_network(step)
    macs = number(step.metrics, "macs")
    return Contribution(
        step.name,
        note,
        top1,
        Reading(None, unsaid="no file of it was measured"),
        macs if macs is not None else number(step.metrics, "after", "macs"),
        None,
    )


def _row(entry: str, step: Step, facts: Facts, shipped: Row) -> Row | None:
    """The row of the file that the stage made: its final one, else its float one. A later stage may have kept that file
    as it is, which then stands under the name of that stage.
    """
    own = [row for row in facts.first_setting if (row.arm, row.entry) == (shipped.arm, entry)]
    if own:
        return next((row for row in own if row.final), own[-1])
    made = step.stage == "export" and shipped.variant == "fp32"
    return shipped if made else None


def _of_network(step: Step) -> tuple[Reading, str]:
    """Top-1 of the network in PyTorch; every stage takes it on the test split."""
    of = "network, test split"
    if (top1 := number(step.metrics, "top1", "all")) is not None:
        return Reading(top1, of=of), ""
    if (cut := number(step.metrics, "top1_before_recovery")) is not None:
        return Reading(cut, of=of), "just cut, before recovery"
    return Reading(None, unsaid="makes no network" if step.stage == "ticket" else "not measured"), ""


def _drawn(found: Sequence[Contribution]) -> tuple[Contribution, ...]:
    """The same with changes and bars."""
    top1 = _waterfall([one.top1 for one in found], [one.end for one in found], more_is_better=True)
    p50 = _waterfall([one.p50 for one in found], [one.end for one in found], more_is_better=False)
    return tuple(
        Contribution(one.name, one.note, accuracy, latency, one.macs, one.bytes, one.end)
        for one, accuracy, latency in zip(found, top1, p50, strict=True)
    )


def _kind(change: float, *, more_is_better: bool) -> str:
    if change == 0:
        return "same"
    return "better" if (change > 0) == more_is_better else "worse"


def _waterfall(readings: Sequence[Reading], ends: Sequence[bool], *, more_is_better: bool) -> list[Reading]:
    """Bars on one scale from 0 to the largest value, floating between one measured value and the next."""
    most = max((one.value for one in readings if one.value is not None), default=0.0)
    drawn: list[Reading] = []
    before: float | None = None
    for one, end in zip(readings, ends, strict=True):
        if one.value is None:
            drawn.append(one)
            continue
        change = None if before is None else one.value - before
        bar = None
        if most > 0:
            low, high = (0.0, one.value) if end or before is None else sorted((before, one.value))
            kind = "whole" if end or change is None else _kind(change, more_is_better=more_is_better)
            bar = Bar(WIDE * low / most, WIDE * (high - low) / most, kind)
        drawn.append(Reading(one.value, one.low, one.high, None if end else change, one.of, one.unsaid, bar))
        before = one.value
    return drawn
