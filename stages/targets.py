"""What a cut has to reach, how far it can reach, and candidates measured as the files that would be served.

No pipeline file names this module; `prune` searches by it. MACs and parameters are counted. Megabytes, milliseconds
and speed-ups belong to files: a candidate is exported with random weights, since its shape alone counts, and timed in
ONNX Runtime beside the dense network's file, each in a process of its own, interleaved (deploy/latency.py). What was
measured is written down at once, so that a search that is killed goes on with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from .deploy.providers import Provider
from .methods import InvalidInput
from .vision.recipe import Settings

if TYPE_CHECKING:
    from sievit.pipeline.stage import Context

    from .deploy.latency import Setting, Subject
    from .methods.allocation import Kept, Pressure, Scores
    from .vision.architecture import Architecture, SwinArchitecture

    Record = Architecture | SwinArchitecture

OPSET = 20
Kind = Literal["macs", "params", "size_mb", "latency_ms", "speedup"]


class Serving(Settings):
    """How the file is going to be served, and how long a candidate is timed."""

    provider: Provider = Field("cpu", description="ONNX Runtime execution provider")
    batch: int = Field(1, ge=1, le=4096, description="images at once")
    threads: int = Field(1, ge=1, le=1024, description="threads of one operator, pinned to as many cores")
    seconds: float = Field(
        1.5, gt=0, le=3600, description="timed calls of each of the two files, seconds, over three sessions"
    )


class Target(Settings):
    """What must be left. Exactly one, and how files are served where it is timed."""

    macs: float | None = Field(None, gt=0, lt=1, description="fraction of the multiply-accumulates kept")
    params: float | None = Field(None, gt=0, lt=1, description="fraction of the parameters kept")
    size_mb: float | None = Field(None, gt=0, description="size of the exported FP32 file at most, MB (10^6 bytes)")
    latency_ms: float | None = Field(None, gt=0, description="p50 of the exported FP32 file at most, milliseconds")
    speedup: float | None = Field(None, gt=1, description="how many times faster the FP32 file is, at least")
    on: Serving | None = Field(
        None, description="where latency_ms and speedup are measured; null: cpu, batch 1, 1 thread"
    )

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            both = f"; {' and '.join(given)} are given: set one of them to null" if given else ""
            raise ValueError(f"give exactly one of {', '.join(_KINDS[:-1])} and {_KINDS[-1]}{both}")
        return self

    @property
    def kind(self) -> Kind:
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def asked(self) -> float:
        return float(getattr(self, self.kind))

    @property
    def timed(self) -> bool:
        """Whether reaching it is a question of milliseconds."""
        return self.kind in ("latency_ms", "speedup")

    @property
    def serving(self) -> Serving:
        return self.on or Serving()


_KINDS: tuple[Kind, ...] = ("macs", "params", "size_mb", "latency_ms", "speedup")


def check_serving(target: Target, at: Callable[[str], str]) -> None:
    """Refuse a provider that is not installed, and more threads than cores. at: a setting's place in pipeline.yaml."""
    from .deploy.isa import usable_cores
    from .deploy.sessions import require_provider

    serving = target.serving
    try:
        require_provider(serving.provider)
    except InvalidInput as error:
        error.field = at("target.on.provider")
        raise
    if serving.threads > (cores := len(usable_cores())):
        raise InvalidInput(
            f"target.on.threads: {serving.threads} threads were asked for, this process may use {cores} cores",
            "lower it",
            field=at("target.on.threads"),
        )


# ---------------------------------------------------------------------------------------------- how far it can reach


@dataclass(frozen=True, slots=True)
class Reach:
    """The least that an axis leaves when it alone is cut as far as it goes, as fractions of the whole network; time: by
    estimate, None without one.
    """

    axis: str
    macs: float
    params: float
    time: float | None

    def line(self) -> str:
        time = "" if self.time is None else f"   {1 / self.time:5.2f} x faster"
        return f"{self.axis:<14} {self.macs:6.1%} of the MACs   {self.params:6.1%} of the parameters{time}"


def reach(
    scores: Scores,
    axes: Pressure,
    before: Record,
    estimate: Callable[[Record], float] | None,
    rounding: Mapping[str, int],
    deepest: float = 1.0,
) -> list[Reach]:
    """Each axis by itself, also those that are off, and all that are on together. deepest: the share of an axis that
    may go, whole blocks apart.
    """
    from .methods.allocation import Axis, Pressure, at_dial
    from .vision.surgery import kept_architecture

    def row(name: str, pressure: Pressure) -> Reach:
        after = kept_architecture(before, at_dial(scores, 1.0, pressure, **rounding))
        time = None if estimate is None else estimate(after) / estimate(before)
        return Reach(name, after.macs() / before.macs(), parameters(after) / parameters(before), time)

    rows = []
    on = {}
    for name in ("heads", "qk", "v", "mlp", "embed", "depth"):
        axis: Axis = getattr(axes, name)
        label = name if axis.press else f"{name} (off)"
        most = 1.0 if name == "depth" else deepest
        on[name] = Axis(min(most, axis.press), axis.blocks)
        rows.append(row(label, Pressure(**{name: Axis(most, axis.blocks)})))
    return [*rows, row("all that are on", Pressure(**on))]


def summary(rows: Sequence[Reach]) -> str:
    """One line."""
    return ", ".join(f"{row.axis} {row.macs:.0%}" for row in rows)


def unreachable(target: Target, rows: Sequence[Reach], deepest: float = 1.0) -> InvalidInput:
    """The refusal of a target beyond all that the axes can give, with what each of them gives. deepest: as in reach."""
    from .methods.allocation import MOST

    asked = f"{target.asked:g}" if target.kind in ("size_mb", "latency_ms", "speedup") else f"{target.asked:.1%}"
    table = "\n".join(f"  {row.line()}" for row in rows)
    return InvalidInput(
        f"target {target.kind}: {asked} is out of reach; cut as far as it goes ({min(MOST, deepest):.0%}, widths "
        f"rounded), each axis by itself leaves\n{table}",
        "ask for less, switch an axis on or press it harder (prune.axes), or lower round_to"
        + (" or the smallest of prune.sensitivity.fractions" if deepest < 1 else ""),
    )


_COUNTED: dict[str, int] = {}  # a record holds a dict and cannot be hashed


def parameters(architecture: Record) -> int:
    """Of a network of this record."""
    from .vision.network import rebuild

    name = _name(architecture)
    if name not in _COUNTED:
        _COUNTED[name] = rebuild(architecture, device="meta").parameter_count()
    return _COUNTED[name]


# ------------------------------------------------------------------------------------------------ measured candidates


class Files:
    """The dense network and candidates as files; every shape is exported and timed once."""

    def __init__(self, ctx: Context, dense: Record, target: Target) -> None:
        self._ctx, self._dense, self._target = ctx, dense, target
        self._ledger = ctx.work / "candidates.json"
        self._known: dict[str, dict[str, float]] = {}
        if self._ledger.is_file():
            self._known = json.loads(self._ledger.read_text(encoding="utf-8"))

    def megabytes(self, architecture: Record) -> float:
        """Size of the exported file, MB."""
        return self._look_up("size", architecture, self._size)["size_mb"]

    def timing(self, architecture: Record) -> dict[str, float]:
        """A candidate beside the dense file: p50_ms, dense_p50_ms, speedup with its interval, and noise, the ratio that
        the dense file shows against itself.
        """
        return self._look_up("time", architecture, self._time)

    def _look_up(
        self, what: str, architecture: Record, measure: Callable[[Record], dict[str, float]]
    ) -> dict[str, float]:
        name = f"{what}-{_name(architecture)}"
        if name not in self._known:
            self._known[name] = measure(architecture)
            _write(self._ledger, self._known)
        return self._known[name]

    def _size(self, architecture: Record) -> dict[str, float]:
        return {"size_mb": self._path(architecture).stat().st_size / 1e6}

    def _time(self, architecture: Record) -> dict[str, float]:
        from sievit.pipeline.errors import SievitError

        from .deploy.child import ChildFailed
        from .deploy.comparison import noise_floors
        from .deploy.latency import Plan, measure
        from .deploy.statistics import percentile_interval, ratio_interval

        setting = setting_of(self._target.serving)
        dense, candidate = (
            subject_of(name, self._path(record), record)
            for name, record in (("dense", self._dense), ("candidate", architecture))
        )
        plan = Plan(self._target.serving.seconds, sessions=3, warm_up_s=0.5, seed=self._ctx.seed)
        try:
            results = measure([dense, candidate], [setting], plan, self._ctx.progress)
        except ChildFailed as error:
            raise SievitError(
                f"a candidate could not be timed: {error}", hint="see the log; it may be the host"
            ) from error
        slots = results["candidate", setting].slots
        ratio = ratio_interval(results["dense", setting].slots, slots, self._ctx.seed)
        return {
            "p50_ms": percentile_interval(slots, 50).value,
            "dense_p50_ms": percentile_interval(results["dense", setting].slots, 50).value,
            "speedup": ratio.value,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
            "noise": noise_floors(results, "dense", [setting])[setting].factor,
        }

    def _path(self, architecture: Record) -> Path:
        """The file of a shape, exported when it is not there yet."""
        from .vision.onnx_export import export_shape

        path = self._ctx.work / f"{_name(architecture)}.onnx"
        if not path.is_file():
            with self._ctx.progress.task("exporting a candidate", 1) as task:
                temporary = path.with_suffix(".part")
                export_shape(architecture, temporary, OPSET)
                temporary.replace(path)
                task.advance()
        return path


def setting_of(serving: Serving) -> Setting:
    from .deploy.latency import Setting
    from .deploy.sessions import GRAPHICS

    io = "device" if serving.provider in GRAPHICS else "host"
    return Setting(serving.provider, serving.threads, serving.batch, io)


def subject_of(name: str, path: Path, architecture: Record) -> Subject:
    from .deploy.latency import Subject

    side = architecture.image_size
    return Subject(name, path, "input", "float32", (3, side, side))


def _name(architecture: Record) -> str:
    text = json.dumps(architecture.as_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Found:
    """The cut that meets the target. reached: in the target's own unit. trials: what was measured on the way."""

    kept: Kept
    reached: float
    trials: list[dict[str, float]]


def search(
    target: Target,
    propose: Callable[[Callable[[Record], float], float], Kept | None],
    record_of: Callable[[Kept], Record],
    before: Record,
    files: Files,
    estimate: Callable[[Record], float],
) -> Found | None:
    """The largest network that meets the target; None when no cut does, as far as can be told.

    Args:
        propose: (cost, limit) -> the largest network whose cost is at most the limit.
        estimate: of the time that a network takes, in any unit.
    Raises: InvalidInput when all measured candidates miss the target.
    """
    from .methods.target_search import Trial, best, meet

    if target.kind in ("macs", "params"):
        count = _macs if target.kind == "macs" else _parameters
        kept = propose(count, target.asked * count(before))
        return None if kept is None else Found(kept, count(record_of(kept)) / count(before), [])

    guess, ask, measure = _measured(target, before, files, estimate)
    cuts: dict[str, Kept] = {}

    def candidate(limit: float) -> Record | None:
        kept = propose(guess, limit)
        if kept is None:
            return None
        record = record_of(kept)
        cuts[_name(record)] = kept
        return record

    trials: list[Trial[Record]] = meet(ask, candidate, measure, tolerance=0.02 if target.kind == "size_mb" else 0.05)
    if not trials:
        return None
    chosen = best(trials, ask)
    rows = [{"asked": ask, "measured": trial.cost, "estimated": guess(trial.candidate)} for trial in trials]
    if chosen is None:
        nearest = min(trial.cost for trial in trials)
        raise InvalidInput(
            f"target {target.kind}: {len(trials)} candidates were measured, and the nearest needs {nearest / ask:.2f} "
            "times what was asked for",
            "run it again on a quieter host, time longer (target.on.seconds), or ask for less",
        )
    reached = 1 / chosen.cost if target.kind == "speedup" else chosen.cost
    return Found(cuts[_name(chosen.candidate)], reached, rows)


def part_way(
    target: Target, before: Record, files: Files, estimate: Callable[[Record], float], along: float
) -> tuple[Callable[[Record], float], float]:
    """A cost and its limit for a cut that goes only a share `along` of the way: equal shares take equal ratios."""
    if target.kind in ("macs", "params"):
        count = _macs if target.kind == "macs" else _parameters
        return count, count(before) * target.asked**along
    guess, ask, _ = _measured(target, before, files, estimate)
    full = guess(before)
    return guess, full * (ask / full) ** along


def _macs(architecture: Record) -> float:
    return float(architecture.macs())


def _parameters(architecture: Record) -> float:
    return float(parameters(architecture))


def _weights_mb(architecture: Record) -> float:
    """Of a float32 file; what stands in it beside them is the graph."""
    return parameters(architecture) * 4 / 1e6


def _measured(
    target: Target, before: Record, files: Files, estimate: Callable[[Record], float]
) -> tuple[Callable[[Record], float], float, Callable[[Record], float]]:
    """What guides the search, what is asked, and the measured truth, all in one unit that falls with the cut."""
    if target.kind == "size_mb":
        graph = files.megabytes(before) - _weights_mb(before)
        return (lambda a: _weights_mb(a) + graph), target.asked, files.megabytes
    full = estimate(before)
    if target.kind == "speedup":  # as the share of the dense file's time
        return (lambda a: estimate(a) / full), 1 / target.asked, (lambda a: 1 / files.timing(a)["speedup"])
    dense_ms = files.timing(before)["p50_ms"]
    return (lambda a: estimate(a) / full * dense_ms), target.asked, (lambda a: files.timing(a)["p50_ms"])


def in_words(target: Target, reached: float) -> str:
    """Asked and reached, in the target's unit."""
    on = target.serving
    place = f" ({on.provider}, batch {on.batch}, {on.threads} thread{'s' * (on.threads != 1)})" if target.timed else ""
    match target.kind:
        case "size_mb":
            return f"asked for {target.asked:g} MB at most, reached {reached:.2f} MB"
        case "latency_ms":
            return f"asked for {target.asked:g} ms at most{place}, measured {reached:.3g} ms"
        case "speedup":
            return f"asked for {target.asked:g} times faster{place}, measured {reached:.2f} times"
        case kind:
            return f"asked for {target.asked:.1%} of the {kind}, reached {reached:.1%}"
