"""How the report writes numbers: short, with units, the same in HTML and Markdown. None is always a dash."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

DASH = "–"
NARROW = "\u202f"  # narrow no-break space: keeps a number and its unit on one line
Format = Callable[[float | None], str]


def significant(value: float | None, digits: int = 3) -> str:
    """3 significant digits, never an exponent: 0.0123, 1.23, 123, 12,346."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    shown = f"{value:,.{decimals}f}"
    if decimals and float(shown.replace(",", "")) >= 10 ** (math.floor(math.log10(abs(value))) + 1):
        shown = f"{value:,.{decimals - 1}f}"  # 9.996 rounds to 10.0, not to 10.00
    return shown


def count(value: float | None) -> str:
    """A whole number with thousands separated; fractions (3.5 epochs) keep three digits."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else significant(value)


def big(value: float | None) -> str:
    """MACs and parameters: 5.53 M, 1.26 G, 48.2 T."""
    if value is None:
        return DASH
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{significant(value / 10**power)}{NARROW}{unit}"
    return count(value)


def size(value: float | None) -> str:
    """Bytes as KB or MB (powers of 1000)."""
    if value is None:
        return DASH
    for power, unit in ((9, "GB"), (6, "MB"), (3, "KB")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{significant(value / 10**power)}{NARROW}{unit}"
    return f"{count(value)}{NARROW}bytes"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal: 0.976 is 97.6%; exactly all and nothing are 100% and 0%."""
    if value is None:
        return DASH
    return f"{100 * value:.0f}%" if value in (0, 1) else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of two fractions, in percentage points."""
    if value is None:
        return DASH
    shown = f"{100 * value:.1f}"
    return f"{'0.0' if shown == '-0.0' else shown.replace('-', '−')} points"


def points_between(low: float | None, high: float | None) -> str:
    """Both ends of an interval of differences: −0.4 to 2.8 points (a dash would be read as a minus); "" without."""
    return "" if low is None or high is None else f"{points(low).removesuffix(' points')} to {points(high)}"


def signed_points(value: float | None) -> str:
    """A change of a fraction, in percentage points, with its sign: +0.3 points, −1.2 points, no change."""
    if value is None:
        return DASH
    return "no change" if round(100 * value, 1) == 0 else f"{'+' if value > 0 else ''}{points(value)}"


def signed_milliseconds(value: float | None) -> str:
    """A change of a latency with its sign: +0.12 ms, −0.87 ms."""
    if value is None:
        return DASH
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{milliseconds(abs(value))}"


def p_value(value: float | None) -> str:
    """Two digits, and below 0.001 only that: 0.21, 0.034, < 0.001."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else significant(value, 2)


def p_equals(value: float | None) -> str:
    """In a sentence: "p = 0.21", "p < 0.001"."""
    shown = p_value(value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def ratio(value: float | None) -> str:
    """2.31×, 0.96×, 12.4×"""
    if value is None:
        return DASH
    return f"{value:.2f}×" if 0.1 <= abs(value) < 9.995 else f"{significant(value)}×"


def share(value: float | None) -> str:
    """A ratio to a baseline: 0.42×, with two decimals so that a column lines up."""
    return DASH if value is None else f"{value:.2f}×"


def duration(value: float | None) -> str:
    """Seconds as 12.3 s, 4 min 12 s, 1 h 03 min."""
    if value is None:
        return DASH
    if value < 59.95:
        return f"{significant(value, 3 if value >= 0.1 else 1)}{NARROW}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {seconds:02d}{NARROW}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NARROW}h {minutes:02d}{NARROW}min"


def joules(value: float | None) -> str:
    """950 J, 12.3 kJ, 4.56 MJ."""
    if value is None:
        return DASH
    for power, unit in ((6, "MJ"), (3, "kJ")):
        if value >= 0.9995 * 10**power:
            return f"{significant(value / 10**power)}{NARROW}{unit}"
    return f"{significant(value)}{NARROW}J"


def interval(low: float | None, high: float | None, form: Format) -> str:
    """Both ends with an en dash, the unit once at the end; "" when one end is unknown."""
    if low is None or high is None:
        return ""
    first, last = form(low), form(high)
    for unit in ("%", "×"):
        if first.endswith(unit) and last.endswith(unit):
            first = first.removesuffix(unit)
    return f"{first}–{last}"


def moment(stamp: str) -> str:
    """An ISO time in UTC to the minute; what cannot be read is shown as it is."""
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    if when.tzinfo is None:
        return f"{when:%Y-%m-%d %H:%M}"
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def milliseconds(value: float | None) -> str:
    """For text: 3.21 ms. In a table the unit stands in the head."""
    return DASH if value is None else f"{significant(value)}{NARROW}ms"


_FIELDS: dict[str, Format] = {
    "top1": percent,
    "p50_ms": milliseconds,
    "speedup": ratio,
    "bytes": size,
    "macs": big,
    "parameters": big,
    "train_macs": big,
    "teacher_macs": big,
    "scoring_macs": big,
    "images": count,
    "tokens_per_image": significant,
    "epochs": count,
    "steps": count,
    "train_seconds": duration,
    "scoring_seconds": duration,
    "other_seconds": duration,
    "seconds": duration,
    "energy_j": joules,
}


def shown(name: str, value: float | None) -> str:
    """A measured field in the form that its name calls for."""
    return _FIELDS.get(name, significant)(value)
