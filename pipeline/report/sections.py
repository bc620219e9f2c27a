"""Sections of the report beyond the fixed ones: each a heading, sentences and a table of words.

A section is made from the metrics of one kind of stage, and drawn alike in HTML, Markdown and on the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .numbers import DASH, interval, percent, ratio
from .reading import listing, number, text


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a sentence before it and some after it. The first column names the rows, the others hold numbers."""

    name: str  # the anchor on the page
    title: str
    about: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = ()


def sections(metrics: Mapping[str, Any]) -> tuple[Section, ...]:
    """What the metrics of a stage across arms say beyond its rows."""
    return tuple(section for make in (over_seeds,) if (section := make(metrics)) is not None)


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
                f"{text(line, 'provider')}, batch {text(line, 'batch')}, threads {text(line, 'threads')}",
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


def _each(line: Any, name: str, form: Any) -> str:
    values: Sequence[Any] = listing(line, name)
    return ", ".join(form(number({"": value}, "")) for value in values) or DASH
