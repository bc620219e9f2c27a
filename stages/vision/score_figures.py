"""Pictures of a choice of images, as SVG text: scores and where they were cut, the extremes, what each class kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .dataset import Images
from .figures import ACCENT, FAINT, INK, Picture, axes_of, svg_of
from .scoring import Examples, groups

SHOWN = 16  # images at each end
NAMED = 24  # classes whose names fit under their bars


def pictures(settings: Examples, train: Images, scores: np.ndarray, kept: np.ndarray) -> Iterator[Picture]:
    """What there is to see of a choice; nothing where everything is kept. scores (M,), kept (n,) indices."""
    if len(kept) == len(train):
        return
    chosen = np.zeros(len(train), bool)
    chosen[kept] = True
    share = f"{len(kept)} of {len(train)} images kept by {settings.method}"
    if settings.statistic is not None:
        name = "distance to the class centre" if settings.statistic == "distance" else f"{settings.statistic} score"
        if settings.method == "ccs":  # within its strata it chooses at random: its one cut is what it passes over
            edges = np.sort(scores)[len(scores) - int(settings.skip_hardest * len(scores)) :][:1]
            passed = f", the {settings.skip_hardest:.0%} with the highest scores passed over" if len(edges) else ""
            within = f"an even share of every stratum{passed}"
        else:
            edges = cuts(scores, chosen, groups(settings, train))
            within = "each class has its own cut" if settings.balanced else "one cut for all classes"
        yield Picture(
            "scores", histogram(scores, chosen, edges, name), "Scores of the training images", f"{share}; {within}."
        )
        order = np.argsort(-scores, kind="stable")
        for end, where in (("highest", order[:SHOWN]), ("lowest", order[::-1][:SHOWN])):
            titles = [_label(train.classes[train.labels[i]]) for i in where]
            svg = gallery(train.pixels(where), titles, scores[where], chosen[where])
            caption = f"Class and {name}; a green frame marks those that are kept."
            yield Picture(f"scores-{end}", svg, f"Images with the {end} scores", caption)
    before = np.bincount(train.labels, minlength=len(train.classes))
    after = np.bincount(train.labels[kept], minlength=len(train.classes))
    names = [_label(name) for name in train.classes]
    caption = f"{share}; the fewest, {after.min()}, of class {_label(train.classes[int(after.argmin())])}."
    yield Picture("kept-by-class", by_class(before, after, names), "Kept images of each class", caption)


def cuts(scores: np.ndarray, chosen: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Where the kept scores of each group end while those of others go on, at either side; ascending, each once."""
    order = np.argsort(within, kind="stable")
    starts = np.flatnonzero(np.diff(within[order], prepend=-1))
    own, kept = scores[order], chosen[order]
    lowest, highest = (f.reduceat(own, starts) for f in (np.minimum, np.maximum))
    lower = np.minimum.reduceat(np.where(kept, own, np.inf), starts)
    upper = np.maximum.reduceat(np.where(kept, own, -np.inf), starts)
    some = np.isfinite(lower)
    return np.unique(np.concatenate([lower[some & (lower > lowest)], upper[some & (upper < highest)]]))


def histogram(scores: np.ndarray, chosen: np.ndarray, edges: np.ndarray, name: str) -> str:
    """Kept and passed-over images by score, a dashed line at every cut. scores (M,), chosen (M,) bool."""
    figure, axes = axes_of(6, 3)
    parts = [scores[chosen], scores[~chosen]]
    bins = min(40, len(np.unique(scores)))
    axes.hist(parts, bins=bins, stacked=True, color=[ACCENT, FAINT], label=["kept", "passed over"])
    faint = max(0.15, 1 / max(1, len(edges)) ** 0.5)
    axes.vlines(edges, 0, 1, transform=axes.get_xaxis_transform(), color=INK, linestyle="--", lw=1, alpha=faint)
    axes.set_xlabel(name)
    axes.set_ylabel("images")
    _legend(axes)
    return svg_of(figure)


def gallery(pixels: np.ndarray, titles: Sequence[str], scores: np.ndarray, chosen: np.ndarray) -> str:
    """Images with class and score above, kept ones in a frame. pixels (n, S, S, 3) uint8."""
    from matplotlib.patches import Rectangle

    side, columns = pixels.shape[1], min(8, len(pixels))
    across, down = round(side * 1.15), round(side * 1.55)  # a line of text is about a fifth of an image
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * down, columns * across, 3), 255, np.uint8)
    figure, axes = axes_of(columns, rows * down / across)  # one picture for all: an axes for each takes seconds
    axes.set_axis_off()
    for index, (image, title, value, kept) in enumerate(zip(pixels, titles, scores, chosen, strict=True)):
        left, top = index % columns * across, (index // columns + 1) * down - side
        canvas[top : top + side, left : left + side] = image
        width, colour = (2.0, ACCENT) if kept else (0.5, FAINT)
        frame = Rectangle((left - 0.5, top - 0.5), side, side, fill=False, lw=width, ec=colour, clip_on=False)
        axes.add_patch(frame)
        middle = left + side / 2 - 0.5
        label = f"{title}\n{value:.3g}"
        axes.text(middle, top - side * 0.05, label, fontsize=7, color=INK, ha="center", va="bottom", parse_math=False)
    axes.imshow(canvas, interpolation="nearest")
    return svg_of(figure)


def by_class(before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> str:
    """Images of each class before and after; with many classes in order of what is left, without names."""
    figure, axes = axes_of(6, 3)
    order = np.arange(len(names)) if len(names) <= NAMED else np.argsort(-after, kind="stable")
    places = np.arange(len(names))
    axes.bar(places, before[order], color=FAINT, width=0.9, label="all")
    axes.bar(places, after[order], color=ACCENT, width=0.9, label="kept")
    axes.set_ylabel("images")
    if len(names) <= NAMED:
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=7, parse_math=False)
    else:
        axes.set_xlabel(f"{len(names)} classes, by what is left of them")
    _legend(axes)
    return svg_of(figure)


def _legend(axes: Any) -> None:
    """Above the picture, where no bar is."""
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _label(name: str) -> str:
    """A class name as a label: control characters have no place in an SVG, and folders may be called anything."""
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    return shown if len(shown) <= 20 else f"{shown[:19]}…"
