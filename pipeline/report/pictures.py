"""The accuracy-against-latency picture, drawn as inline SVG from the rows of the benchmark.

It is plain SVG with classes, so that the page's style sheet colours it for light, dark and print; every point is
an element of its own that tells its numbers: to a screen reader, to the page's script (templates/tips.js), and as a
<title> where no script runs. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from .facts import Row
from .numbers import big, interval, percent, ratio, significant, size

WIDTH, HEIGHT = 640, 430
MOST_NAMES = 8  # points that all have their names beside them
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 52


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis, about five."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(step for m in (1, 2, 2.5, 5, 10) if (step := m * power) >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Point:
    """A row that has both numbers. run: where points of several runs stand together, the name of its run."""

    row: Row
    p50: float
    top1: float
    run: str

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.run, self.row.label)))


def draw_tradeoff(rows: Sequence[Row], runs: Sequence[str] = ()) -> str:
    """SVG of top-1 (with interval) against p50 (with interval), one point a row; "" when no row has both.

    runs: of rows of several runs, the name of the run of each.
    """
    points = [
        Point(row, p50, top1, run)
        for row, run in zip(rows, runs or [""] * len(rows), strict=True)
        if (p50 := row.get("p50_ms")) and (top1 := row.get("top1")) is not None
    ]
    if not points:
        return ""
    across = Axis(0, 1.08 * max(max(one.p50, one.row.get("p50_high") or 0) for one in points), LEFT, WIDTH - RIGHT)
    lows = [min(one.top1, one.row.get("top1_low") or one.top1) for one in points]
    highs = [max(one.top1, one.row.get("top1_high") or one.top1) for one in points]
    pad = max(0.005, 0.12 * (max(highs) - min(lows)))
    up = Axis(max(0, min(lows) - pad), max(highs) + pad, HEIGHT - BOTTOM, TOP)
    named = Scale(across, "p50 latency, ms", lambda ms: f"{ms:g}"), Scale(up, "top-1", percent)
    parts = [*frame(*named), *_points(points, across, up)]
    label = "Top-1 against p50 latency, one point a file. The same numbers stand in the deployment table."
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis with what is written at it: a name, and a form for the numbers at its ticks."""

    axis: Axis
    name: str
    form: Callable[[float], str]


def frame(across: Scale, up: Scale) -> list[str]:
    """Grid, ticks and names of a picture."""
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in up.axis.ticks():
        y = up.axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{up.form(tick)}</text>')
    for tick in across.axis.ticks():
        x = across.axis(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 20}" text-anchor="middle">{across.form(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{across.name}</text>')
    parts.append(f'<text class="name" x="{LEFT - 8}" y="{TOP - 20}" text-anchor="end">{up.name}</text>')
    return parts


def _points(points: Sequence[Point], across: Axis, up: Axis) -> list[str]:
    parts = []
    taken = []
    named = _named([one.row for one in points])
    for one in points:
        x, y = across(one.p50), up(one.top1)
        taken.append(Box(x - 7, y - 7, x + 7, y + 7))
        taken += [Box(x1 - 2, y1 - 2, x2 + 2, y2 + 2) for x1, y1, x2, y2 in _whiskers(one.row, x, y, across, up)]
    for one in sorted(points, key=lambda point: _style(point.row) != "shipped"):
        row, x, y = one.row, across(one.p50), up(one.top1)
        marks = [_line("whisker", *ends) for ends in _whiskers(row, x, y, across, up)]
        marks.append(f'<rect class="reach" x="{x - 12:.1f}" y="{y - 12:.1f}" width="24" height="24"/>')  # for fingers
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        if named is None or row in named:
            label = _placed(one.label, x, y, taken)
            taken.append(label.box)
            if label.away:  # too far to be told by nearness
                marks.insert(0, _line("leader", x, y, label.x, label.y - 5))
            marks.append(
                f'<text class="label" x="{label.x:.1f}" y="{label.y:.1f}" text-anchor="{label.anchor}">'
                f"{escape(one.label)}</text>"
            )
        told = escape(_told(one))
        parts.append(
            f'<g class="point {_style(row)}" role="img" tabindex="0" aria-label="{told}"><title>{told}</title>'
            f"{''.join(marks)}</g>"
        )
    return parts[::-1]  # the shipped file has the first choice of a place, and lies on top


def _named(rows: Sequence[Row]) -> Sequence[Row] | None:
    """The points whose names there is room for: of many, the final files of the first seed; None: all."""
    if len(rows) <= MOST_NAMES:
        return None
    return [row for row in rows if (row.final or row.baseline) and "@seed" not in row.arm][:MOST_NAMES]


def _style(row: Row) -> str:
    return "shipped" if row.final and row.arm == "main" else "baseline" if row.baseline else "other"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _whiskers(row: Row, x: float, y: float, across: Axis, up: Axis) -> list[tuple[float, float, float, float]]:
    """Lines from (left, top) to (right, bottom): the intervals of top-1 and p50, as far as they are known."""
    lines = []
    low, high = row.get("top1_low"), row.get("top1_high")
    if low is not None and high is not None:
        lines.append((x, up(high), x, up(low)))
    low, high = row.get("p50_low"), row.get("p50_high")
    if low is not None and high is not None:
        lines.append((across(low), y, across(high), y))
    return lines


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


class Label(NamedTuple):
    """Where a name stands, and how far from the nearest place to its point."""

    x: float
    y: float
    anchor: str
    away: int
    box: Box


def _placed(name: str, x: float, y: float, taken: Sequence[Box]) -> Label:
    """The first free place around the point: beside it, then further up or down; where nothing is free, the freest."""
    wide = 12 * len(name)  # of the larger letters that a phone shows
    free = []
    for away in (0, 18, 36, 54, 72, 90, 126):
        for level in (y - 8 - away, y + 20 + away):
            for anchor, edge, left in (("start", x + 12, x + 12), ("end", x - 12, x - 12 - wide)):
                box = Box(left, level - 15, left + wide, level + 5)
                if box.left >= LEFT and box.right <= WIDTH and box.top >= TOP - 20 and box.bottom <= HEIGHT - BOTTOM:
                    free.append(Label(edge, level, anchor, away, box))
    beside = Label(x + 12, y - 8, "start", 0, Box(x + 12, y - 23, x + 12 + wide, y - 3))  # of a name that fits nowhere
    return min(free, key=lambda label: sum(label.box.overlap(other) for other in taken), default=beside)


def _told(one: Point) -> str:
    row, p50, top1 = one.row, one.p50, one.top1
    within = interval(row.get("top1_low"), row.get("top1_high"), percent)
    p50_within = interval(row.get("p50_low"), row.get("p50_high"), significant)
    speed = f"p50 {significant(p50)} ms{f' ({p50_within})' if p50_within else ''}"
    accuracy = f"top-1 {percent(top1)}{f' ({within})' if within else ''}"
    faster = "baseline" if row.baseline else f"speed-up {ratio(row.get('speedup'))}"
    size_ = f"{size(row.get('bytes'))}, {big(row.get('macs'))} MACs"
    return "; ".join((f"{one.label}, by {row.entry}", speed, accuracy, faster, size_, row.setting))
