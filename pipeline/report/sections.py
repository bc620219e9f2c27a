"""Sections of the report beyond the fixed ones: each a heading, sentences and a table of words.

A section is made from the metrics of one kind of stage, and drawn alike in HTML, Markdown and on the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numbers import (
    DASH,
    big,
    count,
    interval,
    milliseconds,
    p_value,
    percent,
    points_between,
    ratio,
    signed_points,
    significant,
)
from .reading import dig, listing, mapping, number, text


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a sentence before it and some after it. The first column names the rows, the others hold numbers."""

    name: str  # the anchor on the page
    title: str
    about: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()
    shares: tuple[tuple[float | None, ...], ...] = ()  # of a bar in each cell but the first; (): no bars


def sections(metrics: Mapping[str, Any]) -> tuple[Section, ...]:
    """What the metrics of a stage say beyond its rows."""
    makers = (over_seeds, between_arms, scenarios, torch_reference, by_kind, by_block, matrix, sensitivity)
    return tuple(section for make in makers if (section := make(metrics)) is not None)


def over_seeds(metrics: Mapping[str, Any]) -> Section | None:
    """The shipped files under all seeds; None when there is one seed."""
    lines = listing(metrics, "over_seeds")
    if not lines:
        return None
    seeds = ", ".join(map(text, listing(lines[0], "seeds")))
    return Section(
        "seeds",
        "Over seeds",
        f"The final files of each arm under the seeds {seeds}. Top-1: mean, 95% interval of the mean by Student's t, "
        "and each seed; speed-up: geometric mean and each seed.",
        ("Arm", "Setting", "Top-1", "95% interval", "Each seed", "Speed-up", "Each seed", "File"),
        tuple(
            (
                text(line, "arm"),
                _setting(line),
                percent(number(line, "top1_mean")),
                interval(number(line, "top1_low"), number(line, "top1_high"), percent) or DASH,
                _each(line, "top1", percent),
                ratio(number(line, "speedup_mean")),
                _each(line, "speedup", ratio),
                ", ".join(dict.fromkeys(text(variant).upper() for variant in listing(line, "variant"))),
            )
            for line in lines
        ),
    )


def between_arms(metrics: Mapping[str, Any]) -> Section | None:
    """Every two arms on the same test images; None where there are no two."""
    lines = listing(metrics, "between_arms")
    if not lines:
        return None
    images = count(number(lines[0], "images"))
    several = max(len(listing(line, "seeds")) for line in lines) > 1
    test = (
        "a paired t test over the seeds"
        if several
        else "McNemar's exact test; with one seed it speaks of these networks, and not of the ways they were made"
    )
    return Section(
        "arms",
        "Arms against each other",
        f"Top-1 of the final file of an arm less that of another, on the same {images} test images; p by {test}. "
        "Better or worse is said below p = 0.05, of each pair by itself: of twenty pairs that are alike one is told "
        "apart by chance.",
        ("Arm", "Against", "Top-1", "Difference", "95% interval", "p", "Verdict"),
        tuple(
            (
                text(line, "arm"),
                text(line, "against"),
                f"{percent(number(line, 'top1'))}, {percent(number(line, 'top1_against'))}",
                signed_points(number(line, "difference")),
                points_between(number(line, "low"), number(line, "high")) or DASH,
                p_value(number(line, "p")),
                text(line, "verdict"),
            )
            for line in lines
        ),
    )


def scenarios(metrics: Mapping[str, Any]) -> Section | None:
    """Images a second offline, and queries a second under a bound; None where only single calls were measured."""
    rows = listing(metrics, "scenarios")
    if not rows:
        return None
    bounds = {bound for row in rows if (bound := number(row, "bound_ms")) is not None}
    said = ["Offline: the best of doubling batch sizes, with its 95% interval."] if _has(rows, "offline") else []
    said += [
        f"Server: images that come one by one at random (Poisson), the highest rate whose p99 stays within "
        f"{milliseconds(bound)}, waiting included."
        for bound in sorted(bounds)
    ]
    return Section(
        "scenarios",
        "Offline and server",
        " ".join(said),
        ("File", "Scenario", "Setting", "Images/s", "p99 ms"),
        tuple(
            (
                _file(row),
                text(row, "scenario"),
                _setting(row) + ("" if text(row, "io") in ("", "host") else f", data on {text(row, 'io')}"),
                _throughput(row),
                significant(number(row, "p99_ms")),
            )
            for row in rows
        ),
        tuple(dict.fromkeys(_limits(rows))),
    )


def _has(rows: Sequence[Any], scenario: str) -> bool:
    return any(text(row, "scenario") == scenario for row in rows)


def _throughput(row: Any) -> str:
    within = interval(number(row, "throughput_low"), number(row, "throughput_high"), significant)
    return significant(number(row, "throughput")) + (f" ({within})" if within else "")


def _limits(rows: Sequence[Any]) -> Iterator[str]:
    """What ended a search before its end."""
    for row in rows:
        if reason := text(row, "unsaid"):
            yield f"{_file(row)}, {text(row, 'scenario')}: {reason}."
        if dig(row, "limited") is True:
            yield f"{_file(row)}, {text(row, 'scenario')}: throughput still grew at batch {text(row, 'batch')}."


def torch_reference(metrics: Mapping[str, Any]) -> Section | None:
    """Networks in PyTorch; None where none was timed."""
    rows = listing(metrics, "torch")
    if not rows:
        return None
    return Section(
        "torch",
        "PyTorch, as a reference",
        f"Networks of the pipeline in PyTorch {text(rows[0], 'torch')} on the same cores, 95% intervals; the first "
        "call of a compiled one compiles. They took no turns with the files, and so there is no verdict.",
        ("Network", "Mode", "Setting", "p50 ms", "First call ms", "Peak MB"),
        tuple(
            (
                text(row, "network"),
                text(row, "mode"),
                _setting(row),
                significant(number(row, "p50_ms"))
                + f" ({interval(number(row, 'p50_low'), number(row, 'p50_high'), significant) or DASH})",
                significant(number(row, "first_ms")),
                significant(number(row, "peak_memory_mb")),
            )
            for row in rows
        ),
    )


def by_kind(metrics: Mapping[str, Any]) -> Section | None:
    """Milliseconds of each file by kind of operator; None where the operators were not timed."""
    found = mapping(metrics, "attribution")
    files = listing(found, "files")
    if not files:
        return None
    kinds = dict.fromkeys(kind for file in files for kind in mapping(file, "kinds"))
    return Section(
        "kinds",
        "Time by kind of operator",
        f"Milliseconds of one call and their share, {_setting(found)}, from ONNX Runtime's own profile; the first file "
        "is the baseline, and bars have one scale. Attention is softmax and products of two activations, its "
        "projections are matrix products; moving is to reorder, join and copy; quantizing is to and from 8 bits.",
        ("Operators", *map(_file, files)),
        tuple(
            (kind, *(_of_total(number(file, "kinds", kind), number(file, "operators_ms")) for file in files))
            for kind in kinds
        ),
        (
            *map(_sum_beside_p50, files),
            "Time between operators is in p50 alone; what it takes to write each operator down is in their sum alone.",
        ),
        _shares([[number(file, "kinds", kind) for file in files] for kind in kinds]),
    )


def by_block(metrics: Mapping[str, Any]) -> Section | None:
    """Milliseconds of each file by block; None where no file has weights that are named after blocks."""
    found = mapping(metrics, "attribution")
    files = [file for file in listing(found, "files") if mapping(file, "blocks")]
    if not files:
        return None
    blocks = list(dict.fromkeys(block for file in files for block in mapping(file, "blocks")))
    blocks.sort(key=lambda block: (block != "embedding", block == "head"))
    return Section(
        "blocks",
        "Time by block",
        f"Milliseconds of one call, {_setting(found)}; a block that a file does not have has a dash. "
        "Bars have one scale.",
        ("Block", *map(_file, files)),
        tuple((block, *(significant(number(file, "blocks", block)) for file in files)) for block in blocks),
        shares=_shares([[number(file, "blocks", block) for file in files] for block in blocks]),
    )


def _shares(values: Sequence[Sequence[float | None]]) -> tuple[tuple[float | None, ...], ...]:
    """Of the largest value of the table, so that all bars have one scale."""
    most = max((value for row in values for value in row if value is not None), default=0.0)
    return tuple(tuple(None if value is None or most <= 0 else value / most for value in row) for row in values)


def _file(row: Any) -> str:
    return " ".join(word for word in (text(row, "arm") or text(row, "entry"), text(row, "variant").upper()) if word)


def _setting(row: Any) -> str:
    threads = text(row, "threads")
    return f"{text(row, 'provider')}, batch {text(row, 'batch')}, {threads} thread{'' if threads == '1' else 's'}"


def _sum_beside_p50(file: Any) -> str:
    operators, p50 = number(file, "operators_ms"), number(file, "p50_ms")
    rough = (
        " Writing them down took much of it: shares are rough." if operators and p50 and operators > 1.5 * p50 else ""
    )
    return f"{_file(file)}: operators {milliseconds(operators)}, p50 without a profile {milliseconds(p50)}.{rough}"


def _of_total(value: float | None, total: float | None) -> str:
    if value is None:
        return DASH
    return significant(value) + (f" ({percent(value / total)})" if total else "")


def matrix(metrics: Mapping[str, Any]) -> Section | None:
    """Each arm on each kind of test patches, what it spent, and the verdicts; None without a matrix."""
    found = mapping(metrics, "matrix")
    if not found:
        return None
    tested = [text(name) for name in listing(found, "test")]
    cells = {(text(cell, "arm"), text(cell, "test")): cell for cell in listing(found, "cells")}
    seeds = [text(seed) for seed in listing(found, "seeds")]
    spread = "t over seeds" if len(seeds) > 1 else "Wilson's, one seed: they speak of these networks, not of the method"
    equal = text(found, "budget")
    return Section(
        "matrix",
        "Tickets, random and full patches",
        f"Rows: what an arm was trained on; columns: the patches of {count(number(found, 'test_images'))} test images "
        f"that it was tested on. Top-1 with 95% intervals ({spread}); seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}.",
        ("Trained", *(f"On {name}" for name in tested), "Steps", "MACs spent"),
        tuple(
            (
                text(arm, "arm"),
                *(_estimate(cells.get((text(arm, "arm"), name))) for name in tested),
                *_spent(listing(arm, "spent")),
            )
            for arm in listing(found, "arms")
        ),
        (
            *(f"{text(claim, 'words')}." for claim in listing(found, "claims")),
            f"Budget: equal {'MACs' if equal == 'macs' else equal}." if equal else "The arms have no budget in common.",
            "MACs spent are those of training, and of choosing the ticket before it; means over seeds.",
        ),
    )


def sensitivity(metrics: Mapping[str, Any]) -> Section | None:
    """What each axis of each block loses when it alone is cut; None where that was not measured."""
    found = mapping(metrics, "sensitivity")
    if not found:
        return None
    fractions = [float(fraction) for fraction in listing(found, "fractions")]
    form = _lost if len(fractions) <= 4 else _points_lost  # more columns of both do not fit on a terminal
    whole, cuts = mapping(metrics, "whole"), mapping(metrics, "cuts")
    missed = text(metrics, "not_reached")
    both = " and rise of the loss" if form is _lost else ""
    return Section(
        "sensitivity",
        "Sensitivity: what is kept of one axis, all else whole",
        "Every axis of every block cut alone, by importance, without recovery.",
        ("Axis", *(f"{fraction:.0%}" for fraction in fractions)),
        tuple(
            (f"{text(row, 'axis')} {text(row, 'place')}", *map(form, listing(row, "cuts")))
            for row in listing(found, "rows")
        ),
        (
            f"Top-1 lost in points{both}, on {count(number(metrics, 'images'))} calibration images by importance "
            f"{text(metrics, 'importance')}; uncut top-1 {percent(number(whole, 'top1'))}, loss "
            f"{significant(number(whole, 'loss'))}.",
            *(f"Most sensitive: {text(cut)}." for cut in listing(metrics, "most")),
            *(f"Least sensitive: {text(cut)}." for cut in listing(metrics, "least")),
            *(
                [f"{count(number(cuts, 'measured'))} of {count(number(cuts, 'of'))} cuts were measured; not {missed}."]
                if missed
                else []
            ),
        ),
    )


def _lost(cut: Any) -> str:
    return DASH if cut is None else f"{100 * cut[0]:.1f} {cut[1]:+.3f}"


def _points_lost(cut: Any) -> str:
    return DASH if cut is None else f"{100 * cut[0]:.1f}"


def _estimate(cell: Any) -> str:
    within = interval(number(cell, "low"), number(cell, "high"), percent)
    return percent(number(cell, "mean")) + (f" ({within})" if within else "")


def _spent(records: Sequence[Any]) -> tuple[str, str]:
    """Steps and MACs, means over seeds; a dash where one is not known."""
    steps = [number(record, "steps") for record in records]
    macs = [_sum(number(record, "macs"), number(record, "scoring_macs")) for record in records]
    return count(_mean(steps)), big(_mean(macs))


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    total = _sum(*values)
    return None if total is None or not values else total / len(values)


def _each(line: Any, name: str, form: Any) -> str:
    values: Sequence[Any] = listing(line, name)
    return ", ".join(form(number({"": value}, "")) for value in values) or DASH
