"""The pictures of a benchmark, as SVG text: how the latencies spread, and what each block takes. Accuracy against
latency is drawn by the report.

The same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# One colour a file, told apart by people who do not see red and green too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "svg.hashsalt": "sievit",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


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


def block_times(files: Mapping[str, Mapping[str, float]], setting: str) -> str:
    """Milliseconds (y) of each block (x, in order of execution), a bar a file side by side.

    files: label -> block -> ms. A block that a file does not have has no bar.
    """
    blocks = list(dict.fromkeys(block for times in files.values() for block in times))
    blocks.sort(key=lambda block: (block != "embedding", block == "head"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        wide = 0.8 / len(files)
        for index, (label, times) in enumerate(files.items()):
            places = [place for place, block in enumerate(blocks) if block in times]
            axes.bar(
                [place + (index - (len(files) - 1) / 2) * wide for place in places],
                [times[blocks[place]] for place in places],
                wide,
                color=COLOURS[index % len(COLOURS)],
                label=label,
            )
        axes.set_xticks(range(len(blocks)), blocks, rotation=45, ha="right", fontsize=8)
        axes.set_ylabel(f"ms a call ({setting})")
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, axis="y")
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
