"""The ledger: what an arm cost to make, by what it was spent on, summed over its stages, against the baseline arm.

    training   forward and backward passes of the network that is made
    teacher    forward passes of whoever teaches or labels it
    scoring    what choosing took: proxy runs, adapting and asking the selector, trial trainings that look for masks
    other      time of stages that do neither: cutting, export, calibrating and choosing an 8-bit form; nobody counts
               their MACs

Evaluation costs all arms alike and has no MACs here; what a training looks at after its epochs is in its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .reading import mapping, number
from .steps import Step

MACS = ("train_macs", "teacher_macs", "scoring_macs")
SECONDS = ("train_seconds", "scoring_seconds", "other_seconds")
COSTS = (
    "images",
    "tokens_per_image",
    "epochs",
    "steps",
    *MACS,
    *SECONDS,
    "seconds",
    "energy_j",
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm (or one of its stages) cost. `partial` names the sums that miss a stage, so are lower bounds;
    `processes` is how many shared the work of the stage, of an arm the most that any of its stages had.
    """

    label: str
    values: Mapping[str, float | None]
    partial: Mapping[str, str] = field(default_factory=dict)  # name -> what is missing
    macs_ratio: float | None = None
    seconds_ratio: float | None = None
    parts: tuple[Cost, ...] = ()
    processes: float | None = None


def collect_costs(arms: Sequence[str], steps: Sequence[Step], baseline_arm: str) -> tuple[Cost, ...]:
    """The cost of every arm. An artifact that arms share counts in each: it is what that arm alone would cost."""
    costs = [_cost(arm, [s for s in steps if not s.across_arms and arm in (a for a, _ in s.places)]) for arm in arms]
    base = next((cost for cost in costs if cost.label == baseline_arm), None)
    return tuple(
        replace(
            cost,
            macs_ratio=_ratio(_all_macs(cost), _all_macs(base)),
            seconds_ratio=_ratio(_whole(cost, "seconds"), _whole(base, "seconds")),
        )
        for cost in costs
        if cost.parts
    )


def _cost(arm: str, steps: Sequence[Step]) -> Cost:
    """Sums over the stages of the arm; tokens an image are averaged over images."""
    parts, missing = [], []
    for step in steps:
        if not step.manifest:
            missing.append(step.places[0][1])
            continue
        entry = next(entry for a, entry in step.places if a == arm)
        parts.append(Cost(entry, _values(step), processes=number(step.manifest, "processes", "count")))
    partial = {name: f"without {', '.join(missing)}" for name in COSTS} if missing else {}
    totals: dict[str, float | None] = {}
    for name in COSTS:
        known = [(part, value) for part in parts if (value := part.values[name]) is not None]
        told = name in ("train_macs", "seconds", "energy_j")
        lacking = [part.label for part in parts if told and _unrecorded(part, name)]
        if lacking and known and name not in partial:
            partial[name] = f"{', '.join(lacking)} did not record it"
        if name == "tokens_per_image":
            weights = sum(part.values["images"] or 0 for part, _ in known)
            totals[name] = sum((p.values["images"] or 0) * v for p, v in known) / weights if weights else None
        else:
            totals[name] = sum(value for _, value in known) if known else None
    most = max((part.processes for part in parts if part.processes is not None), default=None)
    return Cost(arm, totals, partial, parts=tuple(parts), processes=most)


def _values(step: Step) -> dict[str, float | None]:
    """What one stage cost. Its time is training, scoring or other; one that trains and scores tells both."""
    ledger = mapping(step.manifest, "ledger")
    values = {name: number(ledger, name) for name in COSTS}
    own = values["seconds"] if values["seconds"] is not None else step.seconds
    scores = any(values[name] is not None for name in ("scoring_seconds", "scoring_macs"))
    trains = values["train_macs"] is not None or (bool(values["images"]) and not scores)
    values["train_seconds"] = own if trains else None
    values["other_seconds"] = None if trains or scores else own
    told = [value for name in SECONDS if (value := values[name]) is not None]
    values["seconds"] = sum(told) if told else None
    values["energy_j"] = _energy(step)
    return values


def _energy(step: Step) -> float | None:
    """Joules of CPU and GPU in the run that made the artifact, of whichever the host told."""
    told = [j for name in ("energy_cpu_j", "energy_gpu_j") if (j := number(step.manifest, name)) is not None]
    return sum(told) if told else None


def _unrecorded(part: Cost, name: str) -> bool:
    """Whether a stage that trained or scored does not say what that cost. Proxy runs are counted as scoring."""
    if name in ("seconds", "energy_j"):
        return part.values[name] is None
    return bool(part.values["images"]) and part.values["train_macs"] is None and part.values["scoring_macs"] is None


def _whole(cost: Cost | None, name: str) -> float | None:
    return None if cost is None or name in cost.partial else cost.values[name]


def _all_macs(cost: Cost | None) -> float | None:
    """MACs of training, teacher and scoring together: neither a ticket nor a teacher is free."""
    if cost is None or _whole(cost, "train_macs") is None:
        return None
    return sum(cost.values[name] or 0 for name in MACS)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
