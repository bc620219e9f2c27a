"""What a run would do, without doing it: the same walk as the runner's, with nothing made.

Below a stage that has to run, keys are unknown: they depend on what that stage will leave. An honest forecast says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from . import keys
from .reasons import Reason, in_words
from .resolve import LEFT_TO_THE_STAGE, Facts, Inputs, Place, gather, place, sources

if TYPE_CHECKING:
    from .keys import Change
    from .plan import Node, Plan
    from .stage import Reached, Stage
    from .store import Artifact, Store

State = Literal["cached", "run", "shared", "unknown"]


@dataclass(frozen=True, slots=True)
class Resumption:
    """The checkpoints of a stage that is not finished. written: the newest, ISO 8601, UTC; reached: None where it does
    not say how far it is; holder: the process that is at work on it now, None of one that was stopped.
    """

    written: str
    reached: Reached | None
    holder: str | None = None

    @property
    def left(self) -> float:
        """The share of the work that is left, as far as is known."""
        return self.reached.left if self.reached is not None else 1.0

    @property
    def says(self) -> str:
        """In words: resumes after epoch 7 of 14."""
        if self.holder is not None:
            return f"is being made: {self.holder}"
        if self.reached is None:
            return f"goes on from a checkpoint of {self.written[:16].replace('T', ' ')} UTC"
        done, unit, total = math.floor(self.reached.done), self.reached.unit, math.ceil(self.reached.total)
        if self.reached.done == done:
            return f"resumes after {unit} {done} of {total}"
        return f"resumes in {unit} {done + 1} of {total}"


@dataclass(frozen=True)
class Forecast:
    """What will happen to one node.

    cached:  `ref` will be used.
    run:     nothing has this key; `reasons` are the differences to `compared_to`, the nearest artifact of the stage,
    if there is one, `resumes` what an attempt that was stopped has left of it.
    shared:  the arm `shared_with` will have made it by then.
    unknown: it depends on what the entry `waits_for` will leave; `reasons` are what its own settings and facts change
    against `compared_to`, whatever that will be.
    """

    node: Node
    state: State
    key: str | None = None
    ref: str | None = None
    reasons: tuple[Reason, ...] = ()
    compared_to: str | None = None
    shared_with: str | None = None
    waits_for: str | None = None
    resumes: Resumption | None = None


def check_references(plan: Plan, store: Store) -> None:
    """Refuse a plan that names an artifact which the store has not, before hours are spent on what comes before it."""
    for node in plan.nodes:
        for edge in node.inputs:
            if edge.ref is not None and "@" in edge.ref and not edge.ref.startswith("timm:"):
                store.resolve(edge.ref)


def forecast(plan: Plan, store: Store, *, force: bool = False, facts: Facts | None = None) -> list[Forecast]:
    """A forecast for each node of the plan, in its order. Manifests are read, files are not."""
    check_references(plan, store)
    facts = facts or Facts(plan, store)
    made: dict[Place, Artifact] = {}
    planned: dict[tuple[str, str], str] = {}  # (stage, key) -> the arm that will make it
    found: list[Forecast] = []
    for node in plan.nodes:
        missing = [source for source in sources(node) if source not in made]
        if missing:
            compared_to, own = _own_changes(node, facts, store)
            found.append(Forecast(node, "unknown", reasons=own, compared_to=compared_to, waits_for=missing[0][1]))
            continue
        inputs = gather(node, plan, made, store)
        material = facts.material(node, inputs)
        stage, key = node.stage.name, keys.key_of(material)
        artifact = store.find(stage, key)
        if (stage, key) in planned:
            found.append(Forecast(node, "shared", key, shared_with=planned[stage, key]))
        elif artifact is not None and not force:
            made[place(node)] = artifact
            found.append(Forecast(node, "cached", key, artifact.ref))
        else:
            planned[stage, key] = node.arm
            compared_to, reasons = _told(node, inputs, keys.nearest(material, store.artifacts(stage)), store)
            resumes = resumption(node.stage, key, store)
            found.append(Forecast(node, "run", key, reasons=reasons, compared_to=compared_to, resumes=resumes))
    return found


def resumption(stage: Stage, key: str, store: Store) -> Resumption | None:
    """What a stage that is not finished would go on from; None: it begins at the beginning."""
    work = store.work(stage.name, key)
    times = [path.stat().st_mtime for path in work.rglob("*") if path.is_file()]
    if not times:
        return None
    written = datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds")
    holder = store.at_work(stage.name, key)
    return Resumption(written, stage.reached(work), str(holder) if holder is not None else None)


def _own_changes(node: Node, facts: Facts, store: Store) -> tuple[str | None, tuple[Reason, ...]]:
    """What a node changes by itself against the artifact that is nearest to it when nobody asks for the inputs."""
    texts = {edge.role: edge.ref for edge in node.inputs if edge.ref and edge.ref.startswith(LEFT_TO_THE_STAGE)}
    inputs = Inputs(texts=texts)
    material = facts.material(node, inputs)
    return _told(node, inputs, keys.nearest(material, store.artifacts(node.stage.name), leaving_out="inputs"), store)


def _told(
    node: Node, inputs: Inputs, near: tuple[Artifact, list[Change]] | None, store: Store
) -> tuple[str | None, tuple[Reason, ...]]:
    """The artifact that a node is compared with, and the differences in words."""
    if near is None:
        return None, ()
    blocks = {"data": node.data, "model": node.model}
    now = {"inputs": inputs.as_json()} | {name: block.model_dump(mode="json") for name, block in blocks.items()}
    return near[0].ref, tuple(in_words(near[1], near[0].manifest, now, store.cache))
