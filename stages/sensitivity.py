"""How much a network suffers on each axis of each block: calibration accuracy and loss when it alone is cut.

No pipeline file names this stage. `sievit sensitivity` asks for it, and `prune` does where allocation is sensitivity;
whoever asks for the same network, importance and effort shares it.

Every axis of every block (heads, qk, v, mlp), every residual stream (embed) and every block as a whole (depth) is cut
alone, to each of `fractions`, by the importance that prune would cut by and with no recovery. A cut network has the
outputs of the masked one, so it is the cut one that is evaluated. All is measured on the calibration split; the test
split is never read.

The deepest fraction of everything and whole blocks come first, then the fractions between. What `seconds` do not reach
is told and left out, never guessed. What was measured is written down at once, so that a killed measurement goes on.

reads    model (optional: else model.pretrained or model.weights); tickets (optional: of gradients)
writes   sensitivity.json: for every cut what is kept, top-1 and mean cross-entropy; what was not reached
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config, Context, Preflight, Reads, Stage

from .importances import Judging, check_given
from .vision.notes import write_whole
from .vision.recipe import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from .methods.allocation import Kept, Scores
    from .methods.sensitivity import LossWorth, Place, Trial
    from .vision.network import Network

FILE = "sensitivity.json"
AXES = ("heads", "qk", "v", "mlp", "depth", "embed")  # the order of the table
READS = ("model", "tickets")
Fraction = Annotated[float, Field(ge=0.05, le=0.95)]


class Effort(Settings):
    """How finely and for how long sensitivity is measured."""

    fractions: tuple[Fraction, ...] = Field(
        (0.75, 0.5, 0.25), min_length=1, max_length=8, description="kept of an axis, beside all of it"
    )
    seconds: float | None = Field(
        120.0, gt=0, description="how long cuts are tried; the one at its end is finished; null: until all are done"
    )
    images: int | None = Field(
        1024, ge=1, description="calibration images at most, the same share of every class; null: all"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Effort:
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError("fractions: names one twice; name each once")
        return self


class SensitivityConfig(Config):
    """What is cut by which importance, and how thoroughly."""

    judging: Judging = Field(default_factory=Judging, description="what decides which parts go first")
    effort: Effort = Field(default_factory=Effort, description="how finely and for how long it is measured")


@dataclass(frozen=True)
class Answer:
    """Top-1, a fraction, and mean cross-entropy on the calibration images."""

    top1: float
    loss: float


@dataclass(frozen=True)
class Row:
    """A cut of one axis of one place and nothing else. kept, of: heads, widths, units, channels, or 1 for a block."""

    axis: str
    place: int
    fraction: float
    kept: int
    of: int
    top1: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """A measurement as it was written. loss: of the whole network. left: what was not reached in time. seconds: that
    the measured cuts took.
    """

    loss: float
    rows: tuple[Row, ...]
    left: tuple[Trial, ...]
    seconds: float

    @property
    def enough(self) -> float:
        """Seconds that all cuts take, as far as those that were measured can tell, and a quarter more."""
        return 1.25 * self.seconds * (len(self.rows) + len(self.left)) / len(self.rows)

    def missing(self, needed: Iterable[Place]) -> list[Trial]:
        """What was not reached of these axes and places."""
        places = set(needed)
        return [trial for trial in self.left if (trial.axis, trial.place) in places]

    def worth(self) -> LossWorth:
        """For an allocation of whatever was measured whole."""
        from .methods.sensitivity import Curve, LossWorth

        points: dict[Any, dict[int, float]] = {}
        for row in self.rows:
            points.setdefault((row.axis, row.place), {row.of: self.loss})[row.kept] = row.loss
        curves = {place: Curve(measured) for place, measured in points.items() if place[0] != "depth"}
        whole = {row.place: row.loss - self.loss for row in self.rows if row.axis == "depth"}
        return LossWorth(curves, whole)


def sensitivity_of(ctx: Context, judging: Judging, effort: Effort) -> Sensitivity:
    """Of the network that the asking stage reads: from the store, or measured."""
    from .methods.sensitivity import Trial

    config = SensitivityConfig(judging=judging, effort=effort)
    made = ctx.part(STAGE, config, role=STAGE.name, reads=READS)
    found = json.loads(made.artifact.file(FILE).read_text(encoding="utf-8"))
    return Sensitivity(
        found["whole"]["loss"],
        tuple(Row(**row) for row in found["rows"]),
        tuple(Trial(**trial) for trial in found["left"]),
        float(made.artifact.ledger["seconds"]),
    )


def run(ctx: Context) -> None:
    """Importance, then one cut after the other until all are done or the time is over."""
    from .importances import given, judge
    from .methods.sensitivity import everything, trials
    from .vision.dataset import load_splits
    from .vision.device import open_device
    from .vision.evaluate import top1_and_loss
    from .vision.surgery import cut

    config: SensitivityConfig = ctx.config
    device = open_device(ctx.device)
    splits = load_splits(ctx.data.model_dump(), ctx.base)
    network, preprocessing = given(ctx, splits)
    network, normalise = network.to(device), preprocessing.normaliser(device)
    scores, _ = judge(ctx, config.judging, network, splits, normalise, device)
    images = splits.calibration.fewer(config.effort.images)

    def look(kept: Kept) -> Answer:
        return Answer(*top1_and_loss(cut(network, kept).to(device), images, normalise, device))

    measured = _Measured(ctx.work / "measured.json")
    whole = measured.known.get("whole") or measured.add("whole", look(everything(scores)), 0.0)
    wanted = trials(scores, config.effort.fractions, _uncuttable(network))
    rows: list[Row] = []
    left: list[Trial] = []
    with ctx.progress.task("cuts", len(wanted)) as task:
        for one in _tried(scores, wanted, measured, config.effort.seconds, look):
            rows.append(one) if isinstance(one, Row) else left.append(one)
            task.advance()
    found = {"images": len(images), "whole": asdict(whole)}
    found |= {"rows": [asdict(row) for row in rows], "left": [asdict(trial) for trial in left]}
    (ctx.out / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ctx.ledger |= {"seconds": round(measured.seconds, 3), "images": len(images) * len(measured.known)}
    _show(ctx, rows, left, whole, len(images))


class _Measured:
    """What is known so far, on the disk as soon as it is. seconds: that the cuts took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = 0.0
        self.known: dict[str, Answer] = {}
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.seconds = stored["seconds"]
            self.known = {name: Answer(**answer) for name, answer in stored["known"].items()}

    def add(self, name: str, answer: Answer, seconds: float) -> Answer:
        self.seconds += seconds
        self.known[name] = answer
        known = {name: asdict(answer) for name, answer in self.known.items()}
        write_whole(self._path, {"seconds": self.seconds, "known": known})
        return answer


def _tried(
    scores: Scores, wanted: Sequence[Trial], measured: _Measured, seconds: float | None, look: Callable[[Kept], Answer]
) -> Iterator[Row | Trial]:
    """A row for every cut that the time allows, and the others as they are. A fraction that rounds to the cut of
    another one, or to none, takes no time.
    """
    from .methods.sensitivity import alone, count_of, everything

    whole = everything(scores)
    for trial in wanted:
        kept = alone(scores, trial)
        count, of = (count_of(one, trial.axis, trial.place) for one in (kept, whole))
        name = "whole" if count == of else f"{trial.axis}-{trial.place}-{count}"
        if name not in measured.known:
            if seconds is not None and measured.seconds >= seconds:
                yield trial
                continue
            began = time.monotonic()
            answer = look(kept)
            measured.add(name, answer, time.monotonic() - began)
        yield Row(trial.axis, trial.place, trial.fraction, count, of, **asdict(measured.known[name]))


def _uncuttable(network: Network) -> frozenset[Place]:
    """Queries and keys that a norm spans."""
    from .vision.surgery import narrows_queries

    return frozenset(("qk", n) for n, block in enumerate(network.blocks) if not narrows_queries(block.attn))


def _show(ctx: Context, rows: Sequence[Row], left: Sequence[Trial], whole: Answer, images: int) -> None:
    """Metrics for the table, the picture, and a line for what was not reached."""
    from .vision import figures

    config: SensitivityConfig = ctx.config
    fractions = sorted(config.effort.fractions, reverse=True)
    lost = {(row.axis, row.place, row.fraction): (whole.top1 - row.top1, row.loss - whole.loss) for row in rows}
    seen = {(one.axis, one.place) for one in rows} | {(one.axis, one.place) for one in left}
    places = sorted(seen, key=lambda place: (AXES.index(place[0]), place[1]))
    table = [
        {"axis": axis, "place": place, "cuts": [lost.get((axis, place, f)) for f in (*fractions, 0.0)]}
        for axis, place in places
    ]
    cuts = [row for row in rows if row.kept < row.of and row.fraction in (0.0, fractions[-1])]
    ranked = sorted(cuts, key=lambda row: row.loss - whole.loss)
    ctx.metrics |= {
        "importance": config.judging.importance,
        "images": images,
        "whole": asdict(whole),
        "cuts": {"measured": len(rows), "of": len(rows) + len(left)},
        "sensitivity": {"fractions": [*fractions, 0.0], "rows": table},
        "most": [_in_words(row, whole) for row in ranked[:-4:-1]],
        "least": [_in_words(row, whole) for row in ranked[:3]],
        "not_reached": not_reached(left),
    }
    if left:
        total = len(rows) + len(left)
        ctx.progress.warn(
            f"{len(left)} of {total} cuts were not reached in {config.effort.seconds:g} s: {not_reached(left)}"
        )
    ctx.figure(
        "sensitivity",
        figures.sensitivity(ctx.metrics["sensitivity"]["fractions"], table),
        title="Sensitivity",
        caption=f"Top-1 lost on {images} calibration images when one axis of one block is cut alone, by importance "
        f"{config.judging.importance}; {whole.top1:.1%} uncut. Grey: not measured.",
    )


def _in_words(row: Row, whole: Answer) -> str:
    """Such as "mlp of block 3 at 25%: loss +0.412"."""
    what = f"block {row.place} as a whole" if row.axis == "depth" else f"{_place(row)} at {row.fraction:.0%}"
    lost = 100 * (whole.top1 - row.top1)
    told = f"{abs(lost):.1f} points of top-1 {'lost' if lost >= 0 else 'gained'}"
    return f"{what}: loss {row.loss - whole.loss:+.3f}, {told}"


def _place(one: Row | Trial) -> str:
    return f"embed of stream {one.place}" if one.axis == "embed" else f"{one.axis} of block {one.place}"


def not_reached(left: Sequence[Trial]) -> str:
    """Such as "mlp at 50% of 3, 4; whole blocks 5"; "" for none."""
    groups: dict[str, list[int]] = {}
    for trial in left:
        what = "whole blocks" if trial.axis == "depth" else f"{trial.axis} at {trial.fraction:.0%} of"
        groups.setdefault(what, []).append(trial.place)
    return "; ".join(f"{what} {', '.join(map(str, places))}" for what, places in groups.items())


def preflight(seen: Preflight) -> None:
    """Refuse a device that is not there, a network that nothing has trained, and importance that nothing has handed
    on.
    """
    from .vision.device import check_device

    check_device(seen.device)
    entry = seen.entry.partition(":")[0]
    check_given(seen, seen.config.judging.importance, lambda path: f"stages.{entry}.{path}")


STAGE = Stage(
    name="sensitivity",
    version=1,  # raise prune's with it: a prune's key covers the settings of this stage and not its code
    config=SensitivityConfig,
    run=run,
    reads=(Reads("model", "model", optional=True), Reads("tickets", "tickets", optional=True)),
    writes="measurement",
    manual=__doc__,
    packages=("torch", "timm", "torch-pruning", "scipy"),
    uses=frozenset({"data", "model", "seed", "device"}),
    timed=lambda config: config.effort.seconds is not None,  # a slower host reaches less
    preflight=preflight,
)
