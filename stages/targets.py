"""What a cut has to reach, how far it can reach, and the search for the largest network that gets there.

No pipeline file names this module; `prune` searches by it. MACs and parameters are counted. Megabytes, milliseconds
and speed-ups belong to files, and candidates.py measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from .candidates import Files, Serving, name_of
from .methods import InvalidInput
from .vision.recipe import Settings

if TYPE_CHECKING:
    from .methods.allocation import Kept, Pressure, Scores
    from .vision.architecture import Architecture, SwinArchitecture

    Record = Architecture | SwinArchitecture

Kind = Literal["macs", "params", "size_mb", "latency_ms", "speedup"]


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
    """Refuse a provider that is not installed or does not start, and more threads than cores. at: a setting's place in
    pipeline.yaml.
    """
    from .checkup import require_running

    on = target.serving
    require_running([on.provider], [on.threads], (at("target.on.provider"), at("target.on.threads")))


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


def unreachable(
    target: Target, rows: Sequence[Reach], deepest: float = 1.0, nearest: float | None = None
) -> InvalidInput:
    """The refusal of a target beyond all that the axes can give, with what each of them gives. deepest: as in reach;
    nearest: how many times too much the best measured candidate needs, where some were measured.
    """
    from .methods.allocation import MOST

    asked = f"{target.asked:g}" if target.kind in ("size_mb", "latency_ms", "speedup") else f"{target.asked:.1%}"
    table = "\n".join(f"  {row.line()}" for row in rows)
    measured = "" if nearest is None else f" (the nearest that was measured needs {nearest:.2f} times as much)"
    host = "" if nearest is None else "run it again on a quieter host, time longer (target.on.seconds), "
    return InvalidInput(
        f"target {target.kind}: {asked} is out of reach{measured}; cut as far as it goes ({min(MOST, deepest):.0%}, "
        f"widths rounded), each axis by itself leaves\n{table}",
        f"{host}ask for less, switch an axis on or press it harder (prune.axes), or lower round_to"
        + (" or the smallest of prune.sensitivity.fractions" if deepest < 1 else ""),
    )


_COUNTED: dict[str, int] = {}  # a record holds a dict and cannot be hashed


def parameters(architecture: Record) -> int:
    """Of a network of this record."""
    from .vision.network import rebuild

    name = name_of(architecture)
    if name not in _COUNTED:
        _COUNTED[name] = rebuild(architecture, device="meta").parameter_count()
    return _COUNTED[name]


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
    refused: Callable[[float | None], InvalidInput],
) -> Found:
    """The largest network that meets the target.

    Args:
        propose: (cost, limit) -> the largest network whose cost is at most the limit.
        estimate: of the time that a network takes, in any unit.
        refused: what to raise when there is none: (how many times too much the nearest measured candidate needs, None
            where none was proposed).
    """
    from .methods.target_search import Trial, best, meet

    if (count := _counted(target)) is not None:
        kept = propose(count, target.asked * count(before))
        if kept is None:
            raise refused(None)
        return Found(kept, count(record_of(kept)) / count(before), [])

    guess, ask, measure = _measured(target, before, files, estimate)
    cuts: dict[str, Kept] = {}

    def candidate(limit: float) -> Record | None:
        kept = propose(guess, limit)
        if kept is None:
            return None
        record = record_of(kept)
        cuts[name_of(record)] = kept
        return record

    trials: list[Trial[Record]] = meet(ask, candidate, measure, tolerance=0.02 if target.kind == "size_mb" else 0.05)
    chosen = best(trials, ask)
    if chosen is None:
        raise refused(min((trial.cost / ask for trial in trials), default=None))
    rows = [{"asked": ask, "measured": trial.cost, "estimated": guess(trial.candidate)} for trial in trials]
    reached = 1 / chosen.cost if target.kind == "speedup" else chosen.cost
    return Found(cuts[name_of(chosen.candidate)], reached, rows)


def part_way(
    target: Target, before: Record, files: Files, estimate: Callable[[Record], float], along: float
) -> tuple[Callable[[Record], float], float]:
    """A cost and its limit for a cut that goes only a share `along` of the way: equal shares take equal ratios."""
    if (count := _counted(target)) is not None:
        return count, count(before) * target.asked**along
    guess, ask, _ = _measured(target, before, files, estimate)
    full = guess(before)
    return guess, full * (ask / full) ** along


def _counted(target: Target) -> Callable[[Record], float] | None:
    """What a target is a share of, where that is counted."""
    return {"macs": _macs, "params": _parameters}.get(target.kind)


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
