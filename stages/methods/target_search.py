"""The largest candidate whose measured cost meets a target, when what guides the search is only an estimate.

A limit on the estimate proposes a candidate, the candidate is measured, and the limit is moved by what the
measurement says: by the ratio of asked to measured at first, later along a straight line in logarithms through two
candidates, one on either side once there are such. A handful of candidates is enough wherever estimate and truth rise
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

TRIES = 6


@dataclass(frozen=True, slots=True)
class Trial(Generic[T]):
    """A measured candidate. limit: on the estimate, under which it was proposed."""

    limit: float
    candidate: T
    cost: float


def meet(
    asked: float,
    propose: Callable[[float], T | None],
    measure: Callable[[T], float],
    *,
    tolerance: float = 0.05,
    tries: int = TRIES,
) -> list[Trial[T]]:
    """The candidates that were tried, up to the first whose cost lies within `tolerance` below what was asked.

    Args:
        propose: the largest candidate whose estimate is at most the limit, in the unit of `asked`; None when even the
            smallest is above.
        measure: the true cost of a candidate.
    Ends early where a limit proposes a candidate that was tried already: there is none between the two.
    """
    aim = (1 - tolerance / 2) * asked
    limit = aim
    trials: list[Trial[T]] = []
    while len(trials) < tries:
        candidate = propose(limit)
        if candidate is None or any(candidate == trial.candidate for trial in trials):
            break
        trials.append(Trial(limit, candidate, measure(candidate)))
        if (1 - tolerance) * asked <= trials[-1].cost <= asked:
            break
        limit = _next_limit(trials, aim)
    return trials


def best(trials: Sequence[Trial[T]], asked: float) -> Trial[T] | None:
    """The costliest that meets the target; None when none does."""
    return max((trial for trial in trials if trial.cost <= asked), key=lambda trial: trial.cost, default=None)


def _next_limit(trials: Sequence[Trial[T]], aim: float) -> float:
    above = min((t for t in trials if t.cost > aim), key=lambda t: t.cost, default=None)
    below = max((t for t in trials if t.cost <= aim), key=lambda t: t.cost, default=None)
    if above is not None and below is not None and above.limit > below.limit:
        return _along(below, above, aim)
    last = trials[-1]
    before = trials[-2] if len(trials) > 1 else None
    if before is None or (last.cost - before.cost) * (last.limit - before.limit) <= 0:
        return last.limit * aim / last.cost
    return _along(before, last, aim)


def _along(first: Trial[T], second: Trial[T], aim: float) -> float:
    """Where a line through two candidates in logarithms reaches the aim, at most a factor of two away from the
    second's limit.
    """
    steepness = math.log(second.limit / first.limit) / math.log(second.cost / first.cost)
    moved = steepness * math.log(aim / second.cost)
    return second.limit * math.exp(min(math.log(2), max(-math.log(2), moved)))
