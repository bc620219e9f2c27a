"""What a sweep looks for, and which of its trials are worth having: estimates with intervals, and the Pareto front.

A number of a benchmark is an estimate. One trial is better than another in an objective only where their intervals do
not meet; a difference inside the noise is none. For accuracies of the same test images that is cautious: a paired test,
such as `sievit compare`, can tell files apart that this does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import SievitError, UsageError
from .report.reading import dig, listing, number

Name = Literal["top1", "speedup", "bytes", "macs", "parameters"]
HIGHER: dict[str, bool] = {"top1": True, "speedup": True, "bytes": False, "macs": False, "parameters": False}
DEFAULT = ("top1", "speedup")
_SETTING = ("provider", "batch", "threads", "io")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number and the ends of its interval; an exact one is its own interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


Measured = Mapping[str, Estimate]


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The objectives of a sweep, by default top1 and speedup. UsageError: an unknown name, or one given twice."""
    for name in names:
        if name not in HIGHER:
            raise UsageError(f"there is no objective {name!r}", hint=f"objectives: {', '.join(HIGHER)}")
    if len(set(names)) < len(names):
        raise UsageError("an objective is given twice", hint="name each once")
    return tuple(names) or DEFAULT


def measured(metrics: Mapping[str, Any], objectives: Sequence[str]) -> dict[str, Estimate]:
    """The objectives of the file that the main arm ships, in the benchmark's first setting.

    metrics: of the benchmark. The interval of top1 is Wilson's, that of speedup the benchmark's over its sessions,
    made wider by what the baseline showed against itself (A/A): trials are measured in runs of their own. Under several
    seeds: the means, accuracy with its interval over seeds, the rest from the least to the greatest of the seeds.

    SievitError: the benchmark lacks one of them.
    """
    rows = listing(metrics, "rows")
    first = [row for row in rows if all(dig(row, name) == dig(rows[0], name) for name in _SETTING)]
    shipped = [row for row in first if dig(row, "final") and (dig(row, "family") or dig(row, "arm")) == "main"]
    over = next((one for one in listing(metrics, "over_seeds") if dig(one, "arm") == "main"), None)
    floor = max(1.0, number(metrics, "noise_floor", "ratio_high") or 1.0)
    found = {}
    for name in objectives:
        each = [estimate for row in shipped if (estimate := _of_row(row, name, floor)) is not None]
        if not each or len(each) < len(shipped):
            raise SievitError(f"the benchmark has no {name} of the main arm's file", hint="leave its export stage in")
        found[name] = each[0] if len(each) == 1 else _of_seeds(name, each, over)
    return found


def _of_row(row: Mapping[str, Any], name: str, floor: float) -> Estimate | None:
    value = number(row, name)
    if value is None:
        return None
    low, high = (number(row, f"{name}_{end}") for end in ("low", "high"))
    low, high = value if low is None else low, value if high is None else high
    if name == "speedup" and dig(row, "verdict") != "baseline":
        low, high = low / floor, high * floor
    return Estimate(value, min(low, value), max(high, value))


def _of_seeds(name: str, each: Sequence[Estimate], over: Mapping[str, Any] | None) -> Estimate:
    mean = number(over, f"{name}_mean")
    value = sum(one.value for one in each) / len(each) if mean is None else mean
    low, high = number(over, f"{name}_low"), number(over, f"{name}_high")
    if low is None or high is None:
        low, high = min(one.low for one in each), max(one.high for one in each)
    return Estimate(value, min(low, value), max(high, value))


def better(name: str, one: Estimate, other: Estimate) -> bool:
    """Whether one is better than the other beyond both intervals."""
    return one.low > other.high if HIGHER[name] else one.high < other.low


def dominates(one: Measured, other: Measured) -> bool:
    """Better in an objective and worse in none, differences inside the noise left aside."""
    return any(better(name, one[name], other[name]) for name in one) and not any(
        better(name, other[name], one[name]) for name in one
    )


def front(trials: Sequence[Measured]) -> list[bool]:
    """Which trials are on the Pareto front: none of them dominates another, and one of them dominates each of the rest.

    For exact numbers these are the trials that no other dominates. With intervals "within the noise" does not carry
    over: b may be as accurate as a and faster, c as b and faster again, and c is less accurate than a. So a trial is
    left out only for one that is on the front itself. With three objectives and more it can go round (a over b over c
    over a); such trials count as equals, so that the front of a sweep is never empty.
    """
    count = len(trials)
    above = [{a for a in range(count) if a != b and dominates(trials[a], trials[b])} for b in range(count)]
    best: set[int] = set()
    left = set(range(count))
    while left:
        over = {b: _over(b, above, left) for b in left}
        top = {b for b in left if all(b in over[a] for a in over[b])}
        best |= top
        left -= top | {b for b in left if above[b] & top}
    return [b in best for b in range(count)]


def _over(start: int, above: Sequence[set[int]], left: set[int]) -> set[int]:
    """All of those left that stand above a trial, over others too."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        new = (above[waiting.pop()] & left) - found
        found |= new
        waiting += new
    return found
