"""Before anything runs: each stage that is about to execute looks at what it will be given, and may refuse.

What a stage raises names a field of pipeline.yaml; it is shown there, in the file or in the `--set` that wrote it, for
the arm that it concerns. All refusals are told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .diagnostics import Problems, Span, located
from .errors import SpecError
from .overrides import merge
from .stage import Preflight

if TYPE_CHECKING:
    from .document import Node as YamlNode
    from .plan import Node, Plan
    from .resolve import Inputs
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
            refusal = pointed(error, node, plan.spec)
            if refusal.where not in {one.where for one in problems.errors}:  # arms share lines of the file
                problems.keep(refusal)
    problems.raise_if_any()


def seen(node: Node, plan: Plan, store: Store | None = None, inputs: Inputs | None = None) -> Preflight:
    """What a stage sees of a node. Without a store, references to artifacts stay unseen."""
    reads: dict[str, Preflight] = {}
    there = dict(inputs.single) if inputs is not None else {}
    many = {one.role for one in node.stage.reads if one.many}
    for edge in node.inputs if inputs is None else ():
        if edge.source is not None and edge.role not in many:
            source = plan.node(*edge.source)
            assert source is not None
            reads[edge.role] = seen(source, plan, store)
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
        reads=reads,
        inputs=there,
    )


def pointed(error: Exception, node: Node, spec: PipelineSpec) -> SpecError:
    """A stage's refusal at the field that it names, as this arm has it; without one at the stage."""
    field = str(getattr(error, "field", "")) or f"stages.{node.entry.name}"
    return located(str(error), place_of(field, node, spec), str(getattr(error, "hint", "")))


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
    own = root.mapping["arms"].mapping[node.arm] if node.arm != "main" and "arms" in root.mapping else None
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
