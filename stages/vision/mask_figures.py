"""Pictures of how masks were found, as SVG text: what was tried, what was taken, what further fractions would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .figures import ACCENT, FAINT, INK, Picture, axes_of, svg_of
from .mask_settings import Essential, Magnitude, MaskSettings, Soup


def pictures(settings: MaskSettings | None, record: Mapping[str, Any]) -> Iterator[Picture]:
    """What there is to see of masks. record: what the training's metrics say of them."""
    match settings:
        case Essential():
            yield Picture(
                "essential",
                sweep(*_columns(record["tried"]), record["chosen"], record["bend"], settings.tolerance),
                "Weights kept against accuracy",
                f"Each level cut at once and trained for {settings.steps} steps. Dashed: what may be lost; upright: "
                "the level taken; dotted: where the curve bends most.",
            )
        case Soup() if record["rounds"]:
            yield Picture(
                "soup",
                soup(record["rounds"], settings.keep),
                "Weights kept, round by round",
                "Dots: of each weak mask; line: of the joined one; dashed: what is kept in the end.",
            )
        case Magnitude() if "rates" in record:
            yield Picture(
                "rates",
                rates(*_columns(record["rates"]), settings.keep),
                "Weights kept after training against accuracy",
                "Each fraction cut at once from the trained network, nothing trained after it. Upright: what is saved.",
            )


def _columns(rows: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [row["keep"] for row in rows], [row["top1"] for row in rows]


def sweep(keeps: Sequence[float], top1: Sequence[float], chosen: float, bend: float | None, tolerance: float) -> str:
    """Calibration top-1 by the fraction of the weights kept, the line that must not be crossed, the choice, and where
    the curve bends most.
    """
    figure, axes = axes_of(6, 3)
    axes.axhline(100 * (top1[0] - tolerance), color=FAINT, linestyle="--", linewidth=1)
    axes.plot([100 * keep for keep in keeps], [100 * one for one in top1], "o-", markersize=3, color=ACCENT)
    axes.axvline(100 * chosen, color=INK, linewidth=1)
    if bend is not None:
        axes.axvline(100 * bend, color=INK, linewidth=1, linestyle=":")
    axes.invert_xaxis()
    axes.set_xlabel("weights kept, %")
    axes.set_ylabel("top-1 on the calibration split, %")
    return svg_of(figure)


def rates(keeps: Sequence[float], top1: Sequence[float], saved: float) -> str:
    """Test top-1 by the fraction of the weights kept after training, and the fraction that is saved."""
    figure, axes = axes_of(6, 3)
    axes.plot([100 * keep for keep in keeps], [100 * one for one in top1], "o-", markersize=3, color=ACCENT)
    axes.axvline(100 * saved, color=INK, linewidth=1)
    axes.invert_xaxis()
    axes.set_xlabel("weights kept, %")
    axes.set_ylabel("top-1 on the test split, %")
    return svg_of(figure)


def soup(rounds: Sequence[Mapping[str, Any]], keep: float) -> str:
    """Fraction kept by each weak mask and by the joined one, by round, and what is kept in the end."""
    figure, axes = axes_of(6, 3)
    numbers = list(range(1, len(rounds) + 1))
    for number, row in zip(numbers, rounds, strict=True):
        axes.plot([number] * len(row["weak"]), [100 * one for one in row["weak"]], "o", markersize=3, color=FAINT)
    axes.plot(numbers, [100 * row["kept"] for row in rounds], "o-", markersize=4, color=ACCENT)
    axes.axhline(100 * keep, color=INK, linestyle="--", linewidth=1)
    axes.set_xticks(numbers)
    axes.set_xlabel("round")
    axes.set_ylabel("weights kept, %")
    return svg_of(figure)
