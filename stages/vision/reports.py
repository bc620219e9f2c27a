"""What a reader must know of how a training went: lines that stay, and figures beside the curve."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from ..methods.cost import TicketCost
from .dataset import Splits
from .training import Fitted


class Lines(Protocol):
    """Where lines go that stay on the screen and with the artifact."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


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


def cost(fitted: Fitted) -> dict[str, Any]:
    """What a training took, for the ledger; but for its seconds, to which a stage may have more to add."""
    return {
        "images": fitted.images,
        "tokens_per_image": round(fitted.tokens / fitted.images, 2),
        "epochs": round(fitted.passes, 3),
        "steps": fitted.steps,
        "train_macs": 3 * fitted.macs,
        "peak_gpu_memory_mb": fitted.peak_gpu_mb,
    }


def tell_splits(splits: Splits, lines: Lines) -> None:
    """What the user should know about the data before anything is computed from it."""
    lines.note(f"{len(splits.train)} training, {len(splits.calibration)} calibration, {len(splits.test)} test images")
    if splits.skipped:
        lines.warn(f"{len(splits.skipped)} broken images skipped, the first: {splits.skipped[0]}")
    if leaked := splits.leaked():
        lines.warn(f"{leaked} test images are also training images, pixel for pixel")


def ticket_savings(cost: TicketCost, spent: float) -> str:
    """What tickets save and cost, in a sentence. spent: MACs of the ticket stage for one training image."""
    text = f"training on a ticket costs {cost.cached / cost.dense:.0%} of training on the whole image"
    if cost.break_even is not None and cost.selector:
        text += (
            f", {cost.online / cost.dense:.0%} when the selector looks at every view (online); ranking an image once "
            f"(cached) pays after {cost.break_even:.2g} epochs"
        )
    if spent:
        text += f"; all of this stage, training included, pays after {spent / (cost.dense - cost.cached):.2g} epochs"
    return text
