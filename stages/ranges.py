"""Ranges of activations, recorded once: the static 8-bit form of an ONNX file as nncf leaves it.

No pipeline file names this stage. `quantize` asks for it where its schemes have `static`, and the engine records what
is not in the store yet. So another max_drop, provider or scheme does not look at the calibration images again.

reads    an onnx file, tickets (optional): their examples are the calibration images, else the calibration split
writes   static.onnx: pairs of QuantizeLinear and DequantizeLinear, SmoothQuant's factors not folded yet
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sievit.pipeline.errors import SievitError
from sievit.pipeline.stage import Config, Context, Reads, Stage

from .methods import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "static.onnx"
READS = (Reads("onnx", "onnx"), Reads("tickets", "tickets", optional=True))


class RangesConfig(Config):
    """What the recorded form depends on; quantize's manual says what the settings mean."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"timeout"})

    images: int = Field(ge=1, description="calibration images; fewer if there are fewer")
    alpha: float | None = Field(description="strength of SmoothQuant; null: without")
    bits: Literal[7, 8] = Field(description="bits of the weights")
    symmetric: bool = Field(description="zero points of activations are 0")
    timeout: float = Field(gt=0, description="seconds after which the quantizer is ended")


def run(ctx: Context) -> None:
    """Show the images to nncf in a process of its own."""
    import numpy as np

    from .deploy.child import ChildFailed
    from .deploy.eight_bit import record_ranges

    config: RangesConfig = ctx.config
    pixels, origin = calibration_images(ctx, config.images)
    source, shown = ctx.inputs["onnx"].file("model.onnx"), ctx.work / "calibration.npy"
    np.save(shown, pixels, allow_pickle=False)
    try:
        bits, symmetric = config.bits, config.symmetric
        record_ranges(source, ctx.out / FILE, shown, config.alpha, bits, config.timeout, symmetric=symmetric)
    except ChildFailed as error:
        raise FormFailed(error, source) from error
    ctx.metrics |= {"images": len(pixels), "calibrated_on": origin}


def recorded(ctx: Context, config: RangesConfig) -> Path:
    """The form for the context's file and tickets: from the store, or recorded now."""
    role = "ranges" if config.alpha is None else f"ranges-{config.alpha:g}"
    return ctx.part(STAGE, config, role=role, reads=[one.role for one in READS]).artifact.file(FILE)


class FormFailed(SievitError):
    """A form that cannot be made, because a quantizer crashed, hung or refused the graph, or that does not run."""

    def __init__(self, error: Exception, source: Path) -> None:
        hint = "leave quantize out (quantize: null), or export with opset 20"
        super().__init__(str(error), where=str(source), hint=hint)


def calibration_images(ctx: Context, count: int) -> tuple[NDArray[np.uint8], str]:
    """At most `count` of them, uint8 [n, size, size, 3], balanced over classes, and where they come from."""
    import numpy as np

    from .vision.dataset import load_split

    tickets = ctx.inputs.get("tickets")
    images = load_split(ctx.data.model_dump(), ctx.base, "calibration" if tickets is None else "train")
    kept = np.arange(len(images))
    if tickets is not None:
        kept = np.load(tickets.file("kept.npy"), allow_pickle=False)
        if kept.ndim != 1 or not len(kept) or kept.min() < 0 or kept.max() >= len(images):
            raise InvalidInput(
                f"the tickets do not belong to this training split of {len(images)} images",
                "make them on the same data",
            )
    chosen = balanced(images.labels, kept, count, ctx.seed)
    return images.pixels(chosen), "calibration split" if tickets is None else "ticket examples"


def balanced(labels: NDArray[np.int64], members: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """At most `count` of `members` (indices into labels), class by class in turn, ascending; repeatable."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.sort(members))
    of_label = labels[shuffled]
    turn = np.empty(len(shuffled), dtype=np.int64)
    for label in np.unique(of_label):
        places = np.flatnonzero(of_label == label)
        turn[places] = np.arange(len(places))
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:count]])


STAGE = Stage(
    name="ranges",
    version=4,  # raise quantize's with it: its key does not cover this code
    config=RangesConfig,
    run=run,
    reads=READS,
    writes="measurement",
    manual=__doc__,
    packages=("onnx", "onnxruntime", "nncf"),
    uses=frozenset({"data", "seed"}),
)
