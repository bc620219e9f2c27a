"""Pictures of the training side, as SVG text: training curves, patch tickets over real images, widths before and
after, what a cut of one axis alone costs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

INK, FAINT, ACCENT = "#30363d", "#b6bec8", "#0b6e63"
PALE = "#dfe3e8"
TINT = np.array([150.0, 205.0, 197.0], dtype=np.float32)  # no grey: a faded patch must not pass for part of the image


class Picture(NamedTuple):
    """A figure of an artifact: file stem, SVG, title and caption."""

    name: str
    svg: str
    title: str
    caption: str


def svg_of(figure: Any) -> str:
    """The same bytes for the same picture: fixed ids, no date."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "sievit", "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return buffer.getvalue()


def axes_of(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def tickets(pixels: np.ndarray, ranks: np.ndarray, kept: int, grid: tuple[int, int], names: Sequence[str]) -> str:
    """Each image, its ranks as a heat map (dark: ranked first), and its ticket: the patches outside it faded into a
    tint. pixels (n, S, S, 3) uint8, ranks (n, N).
    """
    from matplotlib.figure import Figure

    bands = -(-len(pixels) // 10)
    columns = -(-len(pixels) // bands)
    figure = Figure(figsize=(columns, 3.2 * bands))
    cells = [
        band.subplots(3, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
        for band in figure.subfigures(bands, 1, squeeze=False)[:, 0]
    ]
    for axes in (one for band in cells for one in band.flat):
        axes.set_axis_off()
    side = pixels.shape[1]
    for index, (image, rank, name) in enumerate(zip(pixels, ranks, names, strict=True)):
        band, column = divmod(index, columns)
        top, middle, bottom = cells[band][:, column]
        cut = name if len(name) <= 14 else f"{name[:13]}…"
        top.set_title(cut, fontsize=7, color=INK, parse_math=False)
        top.imshow(image, interpolation="nearest")
        heat = 1 - rank.reshape(grid).repeat(side // grid[0], 0).repeat(side // grid[1], 1) / len(rank)
        middle.imshow(heat, cmap="BuGn", vmin=0, vmax=1, interpolation="nearest")
        mask = (rank < kept).reshape(grid).repeat(side // grid[0], 0).repeat(side // grid[1], 1)[..., None]
        faded = image.astype(np.float32) * 0.15 + TINT * 0.85
        bottom.imshow(np.where(mask, image, faded).astype(np.uint8), interpolation="nearest")
    return svg_of(figure)


def widths(before: Sequence[Mapping[str, int]], after: Sequence[Mapping[str, int]]) -> str:
    """Attention width (heads x value width) and MLP width by block, before and after the cut; a block that is gone has
    no bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6))
    places = np.arange(len(before))
    left = {b["block"]: b for b in after}
    gone = {"heads": 0, "v": 0, "mlp": 0}
    both = (before, [left.get(b["block"], gone) for b in before])
    attention = [[b["heads"] * b["v"] for b in blocks] for blocks in both]
    mlp = [[b["mlp"] for b in blocks] for blocks in both]
    panels = (("attention width (heads × value width)", attention), ("MLP width", mlp))
    for number, (title, (old, new)) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.bar(places, old, color=FAINT, width=0.8, label="before")
        axes.bar(places, new, color=ACCENT, width=0.5, label="after")
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel("block")
        axes.set_xticks(places)
        if number == 0:
            axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.tight_layout()
    return svg_of(figure)


def budget(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> str:
    """Milliseconds of attention and MLP by block, before (pale, wide) and after the cut; a block that is gone has no
    bar.
    """
    figure, axes = axes_of(7, 2.6)
    for rows, width, colours in ((before, 0.8, (FAINT, PALE)), (after, 0.45, (ACCENT, "#5fb3a6"))):
        places = [row["block"] for row in rows]
        attention = np.array([row["attention_ms"] for row in rows])
        name = "before" if rows is before else "after"
        axes.bar(places, attention, width, color=colours[0], label=f"attention, {name}")
        mlp = [row["mlp_ms"] for row in rows]
        axes.bar(places, mlp, width, bottom=attention, color=colours[1], label=f"MLP, {name}")
    axes.set_xlabel("block")
    axes.set_xticks([row["block"] for row in before])
    axes.set_ylabel("ms")
    axes.legend(fontsize=7, ncols=2, framealpha=0.9, edgecolor="none")
    return svg_of(figure)


def sensitivity(fractions: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Heat maps of the top-1 lost, one an axis: places down, fractions kept across; grey where nothing was measured.

    rows: axis, place and cuts, which are (top-1 lost, rise of the loss) or None for each of the fractions.
    """
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    shown = {name: [0.0] if name == "depth" else [f for f in fractions if f] for name in axes_names}
    deepest = max((cut[0] for row in rows for cut in row["cuts"] if cut is not None), default=0.0)
    most = max(len([row for row in rows if row["axis"] == name]) for name in axes_names)
    figure = Figure(figsize=(9, 1.4 + 0.28 * most))
    panels = figure.subplots(
        1, len(axes_names), squeeze=False, gridspec_kw={"width_ratios": [1 + len(shown[name]) for name in axes_names]}
    )[0]
    for name, axes in zip(axes_names, panels, strict=True):
        own = [row for row in rows if row["axis"] == name]
        columns = [list(fractions).index(fraction) for fraction in shown[name]]
        points = [[100 * row["cuts"][c][0] if row["cuts"][c] else np.nan for c in columns] for row in own]
        axes.set_facecolor(PALE)
        drawn = axes.pcolormesh(
            np.ma.masked_invalid(np.array(points)),
            cmap="BuGn",
            vmin=0,
            vmax=max(1.0, 100 * deepest),
            edgecolors="white",
        )
        axes.set_title("whole block" if name == "depth" else name, fontsize=9, color=INK)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{fraction:.0%}" for fraction in shown[name]], fontsize=7)
        axes.set_yticks(np.arange(len(own)) + 0.5, [str(row["place"]) for row in own], fontsize=7)
        axes.invert_yaxis()
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("block; of embed: stream")
    figure.colorbar(drawn, ax=list(panels), label="top-1 lost, points", fraction=0.03)
    return svg_of(figure)
