"""From a node of the plan to its key: which artifacts it reads, and what its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import fingerprint as fingerprints
from . import host, keys
from .errors import InputError
from .manifest import sha256_of
from .preflight import pointed
from .stage import Labelled, Progress

if TYPE_CHECKING:
    from .plan import Node, Plan
    from .spec import ModelConfig
    from .store import Artifact, Store

Place = tuple[str, str]  # arm, entry: where a node stands in the plan

LEFT_TO_THE_STAGE = "timm:"  # references that begin so are no artifacts: the stage knows what to do with them


@dataclass(frozen=True)
class Inputs:
    """What a node reads. `many` has the inputs of roles that take the files of all arms; `texts` are left to the
    stage.
    """

    single: dict[str, Artifact] = field(default_factory=dict)
    many: dict[str, list[Labelled]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def artifacts(self) -> list[Artifact]:
        """All of them, without their roles."""
        return [*self.single.values(), *(one.artifact for ones in self.many.values() for one in ones)]

    def as_json(self) -> dict[str, Any]:
        """The manifest's `inputs`: role -> which artifact, a list for the roles of many."""
        return {role: _lineage(artifact) for role, artifact in self.single.items()} | {
            role: [_lineage(one.artifact) | _label(one) for one in ones] for role, ones in self.many.items()
        }


def _label(one: Labelled) -> dict[str, Any]:
    return {"arm": one.arm, "entry": one.entry, "final": one.final, "seed": one.seed}


def _lineage(artifact: Artifact) -> dict[str, Any]:
    return {
        "ref": artifact.ref,
        "stage": artifact.kind_of_stage,
        "key": artifact.key,
        "digest": artifact.digest,
        "arm": artifact.manifest.get("arm"),
        "entry": artifact.manifest.get("entry"),
    }


def place(node: Node) -> Place:
    """Arm and entry of a node."""
    return node.arm, node.entry.name


def sources(node: Node) -> list[Place]:
    """The nodes whose artifacts a node reads."""
    return [edge.source for edge in node.inputs if edge.source is not None]


def gather(node: Node, plan: Plan, made: Mapping[Place, Artifact], store: Store) -> Inputs:
    """The artifacts that a node reads, given those of the nodes before it. InputError: a reference names nothing."""
    inputs = Inputs()
    takes_many = {reads.role for reads in node.stage.reads if reads.many}
    for edge in node.inputs:
        if edge.source is not None:
            add(inputs, edge.role, made[edge.source], edge.source, plan, many=edge.role in takes_many)
        elif edge.ref is not None and edge.ref.startswith(LEFT_TO_THE_STAGE):
            inputs.texts[edge.role] = edge.ref
        elif edge.ref is not None:
            inputs.single[edge.role] = store.resolve(edge.ref)
    return inputs


def add(inputs: Inputs, role: str, artifact: Artifact, source: Place, plan: Plan, *, many: bool) -> None:
    """Put an artifact that stands for the node `source` under a role."""
    if many:
        arm, entry = source
        node = plan.node(arm, entry)
        # An artifact that does not depend on the seed is shared, and its manifest knows only the first that made it.
        seed = int(artifact.manifest["seed"]) if node is None else node.seed
        inputs.many.setdefault(role, []).append(Labelled(arm, entry, artifact, _is_final(source, plan), seed))
    else:
        inputs.single[role] = artifact


def _is_final(source: Place, plan: Plan) -> bool:
    """Whether no later entry of the same arm writes the same kind: then this is what the arm ships."""
    kinds = {place(node): node.stage.writes for node in plan.nodes}
    if source not in kinds:
        return True
    same = [at for at, kind in kinds.items() if at[0] == source[0] and kind == kinds[source]]
    return same[-1] == source


def caveats(plan: Plan) -> list[str]:
    """What the keys of a plan cannot see."""
    found = [fingerprints.caveat(node.data) for node in plan.nodes if "data" in node.stage.uses]
    return list(dict.fromkeys(note for note in found if note is not None))


class Facts:
    """What keys depend on beyond the settings. Each is looked up once a run, and only if a stage uses it."""

    def __init__(self, plan: Plan, store: Store, progress: Progress | None = None) -> None:
        self.device = host.device(plan.spec.device)
        self._plan = plan
        self._memo = store.cache / "data-hashes.json"
        self._progress = progress
        self._data: dict[str, str] = {}
        self._weights: dict[str, str | None] = {}
        self._files: dict[Place, dict[str, list[str]]] = {}

    def data(self, node: Node) -> str:
        """The fingerprint of a node's data source. SpecError: what the data block names is not there."""
        spec, config = self._plan.spec, node.data
        name = sha256_of(config.model_dump(mode="json"))
        if name not in self._data:
            try:
                self._data[name] = fingerprints.fingerprint(config, spec.base, self._memo, self._progress)
            except InputError as error:
                raise pointed(error, node, spec) if error.field else error from None
        return self._data[name]

    def weights(self, model: ModelConfig) -> str | None:
        """The digest of a local checkpoint."""
        name = str(model.weights)
        if name not in self._weights:
            self._weights[name] = keys.weights_digest(model, self._plan.spec.base)
        return self._weights[name]

    def files(self, node: Node) -> dict[str, list[str]]:
        """Digests of the files that a node's settings name. SpecError: one of them cannot be read."""
        if place(node) not in self._files:
            spec, named = self._plan.spec, node.stage.files(node.entry.config)
            try:
                self._files[place(node)] = keys.file_digests(named, spec.base, f"stages.{node.entry.name}")
            except InputError as error:
                raise pointed(error, node, spec) from None
        return self._files[place(node)]

    def material(self, node: Node, inputs: Inputs) -> dict[str, Any]:
        """Everything that the node's result depends on."""
        uses = node.stage.uses
        return keys.material(
            node.stage,
            node.entry.config,
            inputs=inputs.single,
            many=inputs.many,
            references=inputs.texts,
            files=self.files(node),
            data=node.data,
            data_fingerprint=self.data(node) if "data" in uses else "",
            model=node.model,
            weights_digest=self.weights(node.model) if "model" in uses else None,
            seed=node.seed,
            device=self.device,
            host_fingerprint=host.fingerprint() if node.stage.uses_host(node.entry.config) else "",
        )

    def recipe(self) -> dict[str, Any]:
        """Everything that a whole run depends on: settings after overrides, data, code and package versions."""
        spec = self._plan.spec
        return {
            "pipeline": spec.name,
            "device": self.device,
            "gates": spec.gates.model_dump(mode="json"),
            "nodes": [
                {
                    "arm": node.arm,
                    "entry": node.entry.name,
                    "stage": node.stage.name,
                    "code_version": node.stage.version,
                    "packages": keys.versions(node.stage.packages),
                    "config": node.entry.config.model_dump(mode="json"),
                    "inputs": [[edge.role, edge.source, edge.ref] for edge in node.inputs],
                    "seed": node.seed,
                    "data": [node.data.model_dump(mode="json"), self.data(node)],
                    "model": node.model.model_dump(mode="json"),
                }
                for node in self._plan.nodes
            ],
        }
