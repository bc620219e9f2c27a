"""Curves that a reader may look into: training by epoch, latency by percentile.

The script draws them from JSON in the page (uPlot, in templates/vendor); without it the same numbers stand in a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .facts import Facts
from .numbers import DASH, percent, significant
from .payload import json_file
from .reading import listing, number, objects, text
from .steps import Step

MOST_LINES = 24
MOST_POINTS = 1000  # epochs; further ones are thinned out evenly
HUES = 8  # colours of the style sheet


@dataclass(frozen=True, slots=True)
class Line:
    """A value for each x, None where there is none. hue: which colour; dash: of lines that share a colour, which."""

    label: str
    values: tuple[float | None, ...]
    hue: int
    dash: int = 0


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over one x. unit: "percent" for fractions, else shown after each number."""

    name: str
    title: str
    about: str
    x_label: str
    y_label: str
    unit: str
    x: tuple[float, ...]
    lines: tuple[Line, ...]

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The same numbers as words."""
        form = percent if self.unit == "percent" else significant
        return tuple(
            (f"{x:g}", *(form(line.values[place]) if line.values[place] is not None else DASH for line in self.lines))
            for place, x in enumerate(self.x)
        )


def curves(facts: Facts) -> tuple[Plot, ...]:
    """Every plot that the run has numbers for."""
    return (*_training(facts), *_latency(facts.measurement, facts.arms))


def as_script_data(plots: Sequence[Plot]) -> str:
    """JSON that may stand in a <script> of the page: no character of it can end that element."""
    found = [
        {
            "name": plot.name,
            "x": plot.x,
            "xLabel": plot.x_label,
            "yLabel": plot.y_label,
            "unit": plot.unit,
            "lines": [
                {"label": line.label, "values": line.values, "hue": line.hue, "dash": line.dash} for line in plot.lines
            ],
        }
        for plot in plots
    ]
    written = json.dumps(found, allow_nan=False, separators=(",", ":"))  # ASCII: other letters are escaped
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _training(facts: Facts) -> list[Plot]:
    """For each kind of training two plots, loss and top-1 of the calibration split, with a line for every arm."""
    plots = []
    entries = dict.fromkeys(step.places[0][1] for step in facts.steps if _told(step))
    for number_, entry in enumerate(entries):
        steps = [step for step in facts.steps if _told(step) and step.places[0][1] == entry]
        for field, title, y_label, unit in (
            ("loss", f"{entry}: loss", "training loss", ""),
            ("top1_calibration", f"{entry}: top-1 while training", "top-1, calibration split", "percent"),
        ):
            lines = _by_epoch(steps, field, facts.arms)
            if lines is not None:
                x, found = lines
                about = (
                    "Mean loss of each epoch on the training split; arms may minimise other sums of losses."
                    if field == "loss"
                    else "On the calibration split, never on the test split, after each epoch."
                )
                plots.append(Plot(f"train-{number_}-{field}", title, about, "epoch", y_label, unit, x, found))
    return plots


def _told(step: Step) -> bool:
    return len([row for row in listing(step.metrics, "curve") if number(row, "epoch") is not None]) > 1


def _by_epoch(
    steps: Sequence[Step], field: str, arms: Sequence[str]
) -> tuple[tuple[float, ...], tuple[Line, ...]] | None:
    """x: every epoch that any of the stages tells of."""
    told: list[tuple[str, dict[float, float | None]]] = []
    for step in steps[:MOST_LINES]:
        points = {
            epoch: number(row, field)
            for row in listing(step.metrics, "curve")
            if (epoch := number(row, "epoch")) is not None
        }
        if any(value is not None for value in points.values()):
            told.append((step.arms, points))
    if not told:
        return None
    x = sorted({epoch for _, points in told for epoch in points})
    x = x[:: -(-len(x) // MOST_POINTS)]
    return tuple(x), tuple(
        Line(label, tuple(points.get(epoch) for epoch in x), *_look(label.split(",")[0], arms))
        for label, points in told
    )


def _latency(measurement: Step | None, arms: Sequence[str]) -> list[Plot]:
    """How long the calls of each file took, by percentile, in the first setting."""
    if measurement is None:
        return []
    kept = json_file(measurement.root, "spread.json")
    told = [
        (text(file, "file"), tuple(number({"": ms}, "") for ms in listing(file, "ms")[:100]))
        for file in objects(kept, "files")
    ]
    told = [(name, values) for name, values in told if len(values) == 100][:MOST_LINES]
    if not told:
        return []
    seen: dict[str, int] = {}
    lines = []
    for name, values in told:
        arm = _arm_of(name)
        hue, _ = _look(arm, arms)
        dash = seen[arm] = seen.get(arm, -1) + 1
        lines.append(Line(" ".join(name.rsplit("/", 2)), values, hue, dash))
    return [
        Plot(
            "latency",
            "Latency by percentile",
            f"The time that so many of the calls of a file take at most ({text(kept, 'setting')}); the slowest 1% lie "
            "beyond. The baseline ran twice: what lies between its two lines is noise.",
            "share of calls, %",
            "ms",
            "ms",
            tuple(float(rank) for rank in range(100)),
            tuple(lines),
        )
    ]


def _arm_of(file: str) -> str:
    """Of arm/entry/variant."""
    return file.rsplit("/", 2)[0]


def _look(arm: str, arms: Sequence[str]) -> tuple[int, int]:
    """Colour by arm, dashes by seed: main@seed1 has the colour of main."""
    families = list(dict.fromkeys(one.partition("@")[0] for one in arms))
    family = arm.partition("@")[0]
    same = [one for one in arms if one.partition("@")[0] == family]
    hue = families.index(family) if family in families else len(families)
    return hue % HUES, same.index(arm) if arm in same else 0
