"""What a reader must know of how a training went: lines that stay, and figures beside the curve."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from .training import Fitted


class Lines(Protocol):
    """Where lines go that stay on the screen and with the artifact."""

    def note(self, text: str) -> None: ...


def tell(fitted: Fitted, metrics: dict[str, Any], lines: Lines) -> None:
    """Early stopping, and steps that fp16 left out, where there were any."""
    if fitted.best is not None:
        best = fitted.best
        metrics["stop_early"] = asdict(best)
        lines.note(
            f"{'stopped' if best.stopped else 'trained all epochs,'} after epoch {best.last}; epoch {best.epoch} is "
            f"kept, top-1 {best.top1:.1%} on the calibration split"
        )
    if fitted.skipped:
        metrics["skipped_steps"] = fitted.skipped
        lines.note(f"fp16 left out {fitted.skipped} of {fitted.steps} steps, whose gradients overflowed")
