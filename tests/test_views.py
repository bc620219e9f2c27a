"""How results are drawn: whole at 80 columns, and nothing of a terminal's width lost."""

from __future__ import annotations

import io
from typing import Any

from report_run import measurement
from rich.console import Console, RenderableType

from sievit.pipeline import views


def drawn(what: RenderableType, width: int = 80) -> str:
    """As a terminal of so many columns shows it, spaces at the ends of lines left out."""
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, emoji=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_a_measurement_shows_every_percentile_with_its_interval_within_80_columns() -> None:
    shown = drawn(views.measurement(measurement()))
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split("batch 1, 1 thread\n")[1].splitlines()[:3] == [
        "file                       top-1       p50 ms      p90 ms     p99 ms    speed-up",
        "main/quantize int8         97.6%        0.894        1.07       1.70       2.31×",
        "472 KB, 21.9 M MACs   96.0–98.5%  0.876–0.921  0.983–1.16  1.52–1.97  2.22–2.43×",
    ]
    assert "below: 95% intervals; top-1 of 450 test images" in shown


def test_a_percentile_of_too_few_calls_is_a_dash_with_its_reason() -> None:
    rows: list[dict[str, Any]] = [row for row in measurement()["rows"] if row["p99_ms"] is None][:1]
    shown = drawn(views.measurement({"rows": rows})).splitlines()
    assert [line.split()[4] for line in shown[2:3]] == ["7.15"]
    assert "–" in shown[2].split()
    assert "131 calls," in shown[3]
    assert "662 needed" in shown[4]
