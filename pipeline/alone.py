"""The inputs of a stage that is run by itself: what its user names, else the newest of the stages before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import records
from .errors import InputError, UsageError
from .references import resolve
from .resolve import Inputs, Place, add, gather, place

if TYPE_CHECKING:
    from .plan import Edge, Node, Plan
    from .progress import Display
    from .stage import Reads
    from .store import Artifact, Store


def inputs_alone(plan: Plan, node: Node, store: Store, override: Mapping[str, str], progress: Display) -> Inputs:
    reads = {one.role: one for one in node.stage.reads}
    roles = list(dict.fromkeys([*reads, *(edge.role for edge in node.inputs)]))
    for role in override:
        if role not in roles:
            takes = f"it takes {', '.join(roles)}" if roles else "it takes none"
            raise UsageError(f"{node.stage.name} has no input {role!r}", hint=takes)
    inputs = Inputs()
    for role, text in override.items():
        _override(inputs, plan, node, store, role, text, reads.get(role))
    edges = [edge for edge in node.inputs if edge.role not in override]
    made: dict[Place, Artifact] = {}
    for edge in edges:
        if edge.source is not None and edge.source not in made:
            made[edge.source] = _newest(plan, store, edge, edge.source)
            arm, entry = edge.source
            newest = f"the newest that stage '{entry}' of arm '{arm}' has made"
            progress.note(f"{edge.role}: {made[edge.source].ref}, {newest}; --input {edge.role}=REF names another")
    found = gather(_with_edges(node, edges), plan, made, store)
    for role, artifact in found.single.items():
        inputs.single[role] = artifact
    inputs.many.update(found.many)
    inputs.texts.update(found.texts)
    return inputs


def _with_edges(node: Node, edges: Sequence[Edge]) -> Node:
    return replace(node, inputs=tuple(edges))


def _override(inputs: Inputs, plan: Plan, node: Node, store: Store, role: str, text: str, reads: Reads | None) -> None:
    many = reads is not None and reads.many
    for ref in text.split(",") if many else [text]:
        artifact = resolve(ref.strip(), store)
        writes = artifact.manifest.get("writes")
        if reads is not None and writes != reads.kind:
            raise InputError(
                f"{artifact.ref} holds {writes}, but {node.stage.name} reads {reads.kind} as {role!r}",
                where=f"--input {role}={text}",
                hint=f"name one that holds {reads.kind}: `sievit ls` lists them",
            )
        made_by = (str(artifact.manifest.get("arm")), str(artifact.manifest.get("entry")))
        add(inputs, role, artifact, made_by, plan, many=many)


def _newest(plan: Plan, store: Store, edge: Edge, source: Place) -> Artifact:
    """The newest artifact that stands for a node of this pipeline."""
    arm, entry = source
    name = plan.spec.name
    best: tuple[bool, str, Artifact] | None = None
    for record in records.all_runs(store):
        if record.pipeline != name:
            continue
        here = Path(record.path) == plan.spec.path.absolute()  # another file of the same name comes second
        for node in record.nodes:
            if (node.arm, node.entry) != source or node.key is None or node.finished is None:
                continue
            artifact = store.find(node.stage, node.key)
            if artifact is not None and (best is None or (here, node.finished) >= best[:2]):
                best = (here, node.finished, artifact)
    if best is not None:
        return best[2]
    by_manifest = [
        artifact
        for artifact in store.artifacts()
        if [artifact.manifest.get(field) for field in ("pipeline", "arm", "entry")] == [name, arm, entry]
    ]
    if by_manifest:
        return max(by_manifest, key=lambda artifact: str(artifact.manifest.get("created")))
    stage = next((node.stage.name for node in plan.nodes if place(node) == source), entry)
    raise InputError(
        f"there is no artifact of stage {stage!r} yet (arm {arm!r}, entry {entry!r})",
        where=f"input {edge.role!r}",
        hint=f"`sievit {stage} {plan.spec.path.name}` makes it, or name another one with --input {edge.role}=REF",
    )
