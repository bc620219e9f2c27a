"""Before anything runs: stages look at their settings and at those of the stages they read, and may refuse.

`check_settings` is part of every plan: contradictions, and settings without effect. `check_stages` comes when it is
known which stages will execute, and may import torch. What a stage raises names a field of pipeline.yaml; it is shown
there, in the file or in the `--set` that wrote it, for the arm that it concerns. All refusals are told at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import host
from .diagnostics import Problems, Span, located
from .errors import SpecError
from .overrides import merge
from .stage import Preflight

if TYPE_CHECKING:
    from .document import Node as YamlNode
    from .plan import Node, Plan
    from .resolve import Inputs, Place
    from .spec import PipelineSpec
    from .store import Store


def check_stages(
    plan: Plan,
    nodes: Sequence[Node],
    store: Store,
    invalid_input: tuple[type[Exception], ...],
    inputs: Inputs | None = None,
) -> None:
    """Let these nodes look at what they will be given. inputs: of a single node that is run by itself.

    SpecError: what they refuse, all of it.
    """
    problems = Problems()
    for node in nodes:
        try:
            node.stage.preflight(seen(node, plan, store, inputs))
        except invalid_input as error:
            _keep(pointed(error, node, plan.spec), problems)
    problems.raise_if_any()


def check_settings(plan: Plan, invalid_input: tuple[type[Exception], ...]) -> None:
    """Refuse settings that contradict each other, and settings without effect. Reads nothing but the plan.

    SpecError: all of them.
    """
    problems = Problems()
    idle: dict[Place, Mapping[str, str]] = {}
    for node in plan.nodes:
        try:
            node.stage.coherent(seen(node, plan))
        except invalid_input as error:
            _keep(pointed(error, node, plan.spec), problems)
        idle[node.arm, node.entry.name] = node.stage.idle(seen(node, plan))
    for node in plan.nodes:
        arm = _named(node.arm)
        for field, why in idle[node.arm, node.entry.name].items():
            heirs = [
                them for (name, entry), them in idle.items() if entry == node.entry.name and _named(name) != "main"
            ]
            useful = arm == "main" and any(field not in them for them in heirs)
            if not useful and _written(node, field, plan.spec):
                path = f"{'stages' if arm == 'main' else f'arms.{arm}'}.{node.entry.name}.{field}"
                span = place_of(f"stages.{node.entry.name}.{field}", node, plan.spec)
                _keep(
                    located(f"{path} has no effect: {why}", span, "remove it, or change what makes it idle"), problems
                )
    problems.raise_if_any()


def _written(node: Node, field: str, spec: PipelineSpec) -> bool:
    """Whether this arm itself says something under a field.

    An override changes one thing of an experiment that the file describes: it is not refused for what the file's other
    settings thereby lose, only for setting something that has no effect itself.
    """
    arm = _overrides(node, spec)
    own = node.entry.node if arm is None else arm.mapping.get(node.entry.name)
    for step in field.split("."):
        own = own.mapping.get(step) if own is not None else None
    if own is None:
        return False
    return _overridden(own) if _overridden(node.entry.node) else own.value != {}


def _named(arm: str) -> str:
    """The arm as the file names it, whatever the seed."""
    return arm.partition("@")[0]


def _overrides(node: Node, spec: PipelineSpec) -> YamlNode | None:
    """What the file says under the node's arm; None for the main arm."""
    arm = _named(node.arm)
    return None if arm == "main" else spec.root.mapping["arms"].mapping[arm]


def _overridden(node: YamlNode) -> bool:
    """Whether something in it was written by an override."""
    inner = [*node.mapping.values(), *node.items]
    return any(_overridden(one) for one in inner) if inner else node.span.source.inline


def _keep(refusal: SpecError, problems: Problems) -> None:
    """Arms share lines of the file, and what is wrong with one of them is told once."""
    if refusal.where not in {one.where for one in problems.errors}:
        problems.keep(refusal)


def seen(node: Node, plan: Plan, store: Store | None = None, inputs: Inputs | None = None) -> Preflight:
    """What a stage sees of a node. Without a store, references to artifacts stay unseen."""
    reads: dict[str, Preflight] = {}
    several: dict[str, list[Preflight]] = {}
    there = dict(inputs.single) if inputs is not None else {}
    many = {one.role for one in node.stage.reads if one.many}
    for edge in node.inputs if inputs is None else ():
        if edge.source is not None:
            source = plan.node(*edge.source)
            assert source is not None
            one = seen(source, plan, store)
            several.setdefault(edge.role, []).append(one) if edge.role in many else reads.update({edge.role: one})
        elif edge.ref is not None and "@" in edge.ref and store is not None:
            there[edge.role] = store.resolve(edge.ref)
    return Preflight(
        config=node.entry.config,
        data=node.data,
        model=node.model,
        seed=node.seed,
        arm=node.arm,
        entry=node.entry.name,
        base=plan.spec.base,
        processes=plan.spec.launch.total,
        sharding=plan.spec.launch.sharding,
        reads=reads,
        many=several,
        inputs=there,
        device=host.device(plan.spec.device),
    )


def pointed(error: Exception, node: Node, spec: PipelineSpec) -> SpecError:
    """A stage's refusal at the field that it names, as this arm has it; without one at the stage."""
    field = str(getattr(error, "field", "")) or f"stages.{node.entry.name}"
    name = _named(node.arm)
    arm = "" if name == "main" else f" (arm '{name}')"
    return located(f"{error}{arm}", place_of(field, node, spec), str(getattr(error, "hint", "")))


def place_of(field: str, node: Node, spec: PipelineSpec) -> Span:
    """Where a field stands, or the nearest thing above it that is written: the value of a scalar, else the key."""
    section, _, path = field.partition(".")
    if section == "stages":
        # Names of stages may hold dots, so the name is matched as a whole.
        arm = spec.arms[node.arm]
        entries = [one for one in arm.entries if f"{path}.".startswith(f"{one.name}.")]
        entry = max(entries, key=lambda one: len(one.name), default=node.entry)
        return _deepest(entry.node, path.removeprefix(entry.name).strip("."), entry.key)
    root = spec.root
    own = _overrides(node, spec)
    if own is None or section not in own.mapping:
        return _deepest(root, field, root.keys.get(section, root.span))
    if section in root.mapping:
        return _deepest(merge(root.mapping[section], own.mapping[section]), path, own.keys[section])
    return _deepest(own, field, own.keys[section])


def _deepest(node: YamlNode, path: str, key: Span) -> Span:
    for step in path.split(".") if path else ():
        if step not in node.mapping:
            return key
        key, node = node.keys[step], node.mapping[step]
    return key if node.empty or isinstance(node.value, (dict, tuple)) else node.span
