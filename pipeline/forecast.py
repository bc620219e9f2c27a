"""What a run would do, without doing it: the same walk as the runner's, with nothing made.

Below a stage that has to run, keys are unknown: they depend on what that stage will leave. An honest forecast says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import keys
from .keys import Change
from .resolve import LEFT_TO_THE_STAGE, Facts, Inputs, Place, gather, place, sources

if TYPE_CHECKING:
    from .plan import Node, Plan
    from .store import Artifact, Store

State = Literal["cached", "run", "shared", "unknown"]


@dataclass(frozen=True)
class Forecast:
    """What will happen to one node.

    cached:  `ref` will be used.
    run:     nothing has this key; `reasons` are the differences to `compared_to`, the nearest artifact of the stage,
    if there is one.
    shared:  the arm `shared_with` will have made it by then.
    unknown: it depends on what the entry `waits_for` will leave; `reasons` are what its own settings and facts change
    against `compared_to`, whatever that will be.
    """

    node: Node
    state: State
    key: str | None = None
    ref: str | None = None
    reasons: tuple[Change, ...] = ()
    compared_to: str | None = None
    shared_with: str | None = None
    waits_for: str | None = None


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
        material = facts.material(node, gather(node, plan, made, store))
        stage, key = node.stage.name, keys.key_of(material)
        artifact = store.find(stage, key)
        if (stage, key) in planned:
            found.append(Forecast(node, "shared", key, shared_with=planned[stage, key]))
        elif artifact is not None and not force:
            made[place(node)] = artifact
            found.append(Forecast(node, "cached", key, artifact.ref))
        else:
            planned[stage, key] = node.arm
            near = keys.nearest(material, store.artifacts(stage))
            reasons = tuple(near[1]) if near else ()
            found.append(Forecast(node, "run", key, reasons=reasons, compared_to=near[0].ref if near else None))
    return found


def _own_changes(node: Node, facts: Facts, store: Store) -> tuple[str | None, tuple[Change, ...]]:
    """What a node changes by itself against the artifact that is nearest to it when nobody asks for the inputs."""
    texts = {edge.role: edge.ref for edge in node.inputs if edge.ref and edge.ref.startswith(LEFT_TO_THE_STAGE)}
    material = facts.material(node, Inputs(texts=texts))
    near = keys.nearest(material, store.artifacts(node.stage.name), leaving_out="inputs")
    return (near[0].ref, tuple(near[1])) if near else (None, ())
