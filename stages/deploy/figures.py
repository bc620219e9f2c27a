"""Pictures of a benchmark, as SVG text: accuracy against latency, and how the latencies spread.

The same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# One colour an arm, told apart by people who do not see red and green too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "svg.hashsalt": "sievit",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy_against_latency(rows: Sequence[Mapping[str, Any]]) -> str:
    """Top-1 (percent) over p50 (ms) of the rows of one setting, with their intervals.

    Each arm has a colour, each file a marker. Filled: the file that the arm ships. Round: FP32, square: INT8.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
        colours = {arm: COLOURS[index % len(COLOURS)] for index, arm in enumerate(arms)}
        for row in rows:
            colour = colours[str(row["arm"])]
            x, y = row["p50_ms"], 100 * row["top1"]
            across = [[max(0.0, x - row["p50_low"])], [max(0.0, row["p50_high"] - x)]]
            up = [[max(0.0, y - 100 * row["top1_low"])], [max(0.0, 100 * row["top1_high"] - y)]]
            axes.errorbar(x, y, xerr=across, yerr=up, color=colour, elinewidth=0.8, capsize=2, fmt="none", alpha=0.7)
            face = colour if row["final"] else "white"
            axes.plot(x, y, "s" if row["variant"] == "int8" else "o", color=colour, markerfacecolor=face, markersize=7)
        axes.margins(x=0.2, y=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"p50 latency, ms ({_setting(rows[0])})")
        axes.set_ylabel("top-1 on the test split, %")
        axes.grid(alpha=0.25)
        _label(figure, axes, rows, colours)
        return _svg(figure)


def latency_distributions(samples: Mapping[str, Any], setting: str) -> str:
    """How the calls of each file spread: share of calls (y) that took at most x ms, for one setting.

    samples: label -> milliseconds of all calls. The axis ends at the largest 99th percentile, outliers lie beyond it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for index, (label, values) in enumerate(samples.items()):
            ordered = np.quantile(np.asarray(values), np.linspace(0, 1, 201))
            style = "-" if index < len(COLOURS) else "--"
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(ordered, np.linspace(0, 100, 201), style, color=colour, label=label, linewidth=1.4)
        axes.set_xlim(0, 1.05 * max(float(np.quantile(np.asarray(values), 0.99)) for values in samples.values()))
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"latency, ms ({setting})")
        axes.set_ylabel("calls that took at most this, %")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def _label(figure: Figure, axes: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Names to the right of the markers, moved apart so that none covers another, with a thin line to the marker."""
    figure.draw_without_rendering()  # fixes the layout, which the places below are reckoned from
    point = figure.dpi / 72
    placed: list[tuple[float, float, float]] = []  # left, right, baseline of the labels so far, in pixels
    for row in sorted(rows, key=lambda row: (-row["top1"], row["p50_ms"])):
        name = " ".join(word for word in (str(row["arm"]), str(row["variant"]).upper()) if word)
        at = row["p50_ms"], 100 * row["top1"]
        x, y = axes.transData.transform(at)
        left, right, height = x + 22 * point, x + (22 + 5.2 * len(name)) * point, y + 8 * point
        while any(start < right and left < end and abs(line - height) < 11 * point for start, end, line in placed):
            height -= 1 * point
        placed.append((left, right, height))
        colour = colours[str(row["arm"])]
        axes.annotate(
            name,
            at,
            ((left - x) / point, (height - y) / point),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def _setting(row: Mapping[str, Any]) -> str:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] != 1 else "")
    return f"{row['provider']}, batch {row['batch']}, {threads}"


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
