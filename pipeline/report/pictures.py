"""The accuracy-against-latency picture, drawn as inline SVG when the benchmark left none of its own.

It is plain SVG with classes, so that the page's style sheet colours it for light, dark and print; every point is
labelled, and carries its numbers as a <title>. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .facts import Facts, Row
from .numbers import interval, percent, significant
from .steps import Picture

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52


def tradeoff_picture(facts: Facts) -> Picture | None:
    """The benchmark's own picture of accuracy against latency, known by its file name or title."""
    if facts.measurement is None:
        return None
    for picture in facts.measurement.pictures:
        name = f"{picture.file} {picture.title}".lower()
        if (
            picture.uri
            and any(w in name for w in ("accuracy", "top-1", "top1"))
            and any(w in name for w in ("latency", "p50"))
        ):
            return picture
    return None


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


def draw_tradeoff(rows: Sequence[Row]) -> str:
    """SVG of top-1 (with interval) against p50 (with interval), one point a row; "" when no row has both."""
    points = [(row, p50, top1) for row in rows if (p50 := row.get("p50_ms")) and (top1 := row.get("top1")) is not None]
    if not points:
        return ""
    across = Axis(0, 1.08 * max(max(p50, row.get("p50_high") or 0) for row, p50, _ in points), LEFT, WIDTH - RIGHT)
    lows = [min(top1, row.get("top1_low") or top1) for row, _, top1 in points]
    highs = [max(top1, row.get("top1_high") or top1) for row, _, top1 in points]
    pad = max(0.005, 0.12 * (max(highs) - min(lows)))
    up = Axis(max(0, min(lows) - pad), max(highs) + pad, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(across, up), *_points(points, across, up)]
    label = "Top-1 against p50 latency, one point a file. The same numbers stand in the deployment table."
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(across: Axis, up: Axis) -> list[str]:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent(tick)}</text>')
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">p50 latency, ms</text>')
    parts.append(
        f'<text class="name" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        'text-anchor="middle">top-1</text>'
    )
    return parts


def _points(points: Sequence[tuple[Row, float, float]], across: Axis, up: Axis) -> list[str]:
    parts = []
    taken: list[tuple[float, float, float, float]] = [
        (across(p50) - 7, up(top1) - 7, across(p50) + 7, up(top1) + 7) for _, p50, top1 in points
    ]
    for row, p50, top1 in points:
        x, y = across(p50), up(top1)
        style = "shipped" if row.final and row.arm == "main" else "baseline" if row.baseline else "other"
        marks = _whiskers(row, x, y, across, up)
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        label_x, label_y, anchor, box = _label_place(row.label, x, y, taken)
        taken.append(box)
        marks.append(
            f'<text class="label" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(row.label)}</text>'
        )
        parts.append(f'<g class="point {style}"><title>{escape(_told(row, p50, top1))}</title>{"".join(marks)}</g>')
    return parts


def _whiskers(row: Row, x: float, y: float, across: Axis, up: Axis) -> list[str]:
    marks = []
    low, high = row.get("top1_low"), row.get("top1_high")
    if low is not None and high is not None:
        marks.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{up(low):.1f}" y2="{up(high):.1f}"/>')
    low, high = row.get("p50_low"), row.get("p50_high")
    if low is not None and high is not None:
        marks.append(
            f'<line class="whisker" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    return marks


def _label_place(
    label: str, x: float, y: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float, str, tuple[float, float, float, float]]:
    """The first free place around the point: right, left, above, below, then further away."""
    wide = 13 * len(label) + 6  # of the larger letters that a phone shows
    tries = []
    for away in (0, 16, 32, 48):
        tries += [
            (x + 12, y - 8 - away, "start", x + 12),
            (x - 12, y - 8 - away, "end", x - 12 - wide),
            (x + 12, y + 18 + away, "start", x + 12),
            (x - 12, y + 18 + away, "end", x - 12 - wide),
        ]
    for label_x, label_y, anchor, left in tries:
        box = (left, label_y - 12, left + wide, label_y + 4)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return label_x, label_y, anchor, box
    label_x, label_y, anchor, left = tries[0]
    return label_x, label_y, anchor, (left, label_y - 12, left + wide, label_y + 4)


def _told(row: Row, p50: float, top1: float) -> str:
    within = interval(row.get("top1_low"), row.get("top1_high"), percent)
    p50_within = interval(row.get("p50_low"), row.get("p50_high"), significant)
    speed = f"p50 {significant(p50)} ms{f' ({p50_within})' if p50_within else ''}"
    accuracy = f"top-1 {percent(top1)}{f' ({within})' if within else ''}"
    return f"{row.label} ({row.entry}), {row.setting}: {speed}, {accuracy}"
