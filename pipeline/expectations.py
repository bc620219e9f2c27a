"""What a stage will take, judged by the most alike of those that have run: seconds, and bytes of the store's disk.

Alike is one of the same kind, on the same kind of host, images and network, with the same settings, whose inputs were
as large. Seeds do not count, nor do the names of arms and entries, nor settings that the stage calls costless; one that
differs in a duration is scaled by it. Where the size of an input is not known yet, or another one, what the very stage
took before is taken, and said to be of other inputs. Of anything else no number is made up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import fingerprint, host, keys
from .resolve import LEFT_TO_THE_STAGE, Facts, Place, place

if TYPE_CHECKING:
    from .forecast import Forecast
    from .plan import Node, Plan
    from .store import Artifact, Store

TO_RUN = ("run", "unknown")  # states of a forecast
APART = 0.1  # how far sizes may lie apart, as a share of the larger, and be called alike
_OF_THE_HOST = ("cpu", "cores", "cpu_quota", "gpus")
_NO_MATTER = {"data": {"root"}, "model": {"pretrained", "weights"}}  # where it lies, and what the weights are

Sizes = Mapping[str, Sequence[int | None]]  # role -> bytes of each input, None where nobody knows


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stage will take; None where nobody knows.

    bytes: its files, figures included. like: whose time it is, main/train. share: of that time, by a longer or shorter
    duration and by what a checkpoint has of it. alike: whether its inputs were as large.
    """

    seconds: float | None = None
    bytes: int | None = None
    like: str | None = None
    share: float = 1.0
    alike: bool = True

    @property
    def says(self) -> str:
        """In words: as main/train took, 0.7 × what main/train took on other inputs; "" where nobody knows."""
        if self.like is None:
            return ""
        took = f"as {self.like} took" if self.share == 1 else f"{self.share:.2g} × what {self.like} took"
        return took if self.alike else f"{took} on other inputs"


def expected(found: Sequence[Forecast], plan: Plan, store: Store, facts: Facts) -> dict[Place, Expected]:
    """What every stage takes that will run. Manifests are read; what is damaged tells nothing."""
    if not any(one.state in TO_RUN for one in found):
        return {}
    return _Judge(plan, store, facts).all_of(found)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A node that will run: its settings as a manifest has them, and how large its inputs will be."""

    node: Node
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class _Like:
    """An artifact that tells what a node will take. same: of the same settings, but for durations; own: it was made for
    the very stage.
    """

    artifact: Artifact
    share: float
    alike: bool
    same: bool
    own: bool

    @property
    def rank(self) -> tuple[bool, bool, bool, bool, str]:
        """The more alike, the greater; of equals, the newest."""
        return self.alike, self.share == 1, self.same, self.own, str(self.artifact.manifest["created"])


class _Judge:
    """One look at the store."""

    def __init__(self, plan: Plan, store: Store, facts: Facts) -> None:
        self.plan, self.store, self.facts = plan, store, facts
        self.made = {(one.kind_of_stage, one.key): one for one in store.artifacts()}
        self.of_kind: dict[str, list[Artifact]] = {}
        for one in self.made.values():
            self.of_kind.setdefault(one.kind_of_stage, []).append(one)
        self.sizes: dict[Place, int | None] = {}  # of what the nodes will have left, as far as that is sure

    def all_of(self, found: Sequence[Forecast]) -> dict[Place, Expected]:
        by_key: dict[tuple[str, str], int | None] = {}
        told: dict[Place, Expected] = {}
        for one in found:
            at, stage = place(one.node), one.node.stage.name
            artifact = self.made.get((stage, one.key or ""))
            if one.state in TO_RUN:
                told[at], self.sizes[at] = self._by_the_nearest(one)
            elif one.state == "shared":
                self.sizes[at] = by_key.get((stage, one.key or ""))
            else:
                self.sizes[at] = size_of(artifact) if artifact is not None else None
            if one.key is not None:
                by_key[stage, one.key] = self.sizes[at]
        return told

    def _by_the_nearest(self, one: Forecast) -> tuple[Expected, int | None]:
        """(what it takes, the size of its result if that is sure)."""
        node = one.node
        config, data, model = (each.model_dump(mode="json") for each in (node.entry.config, node.data, node.model))
        asked = _Asked(node, config, data, model, self._inputs(node))
        of_kind = self.of_kind.get(node.stage.name, [])
        candidates = [like for artifact in of_kind if (like := self._like(asked, artifact))]
        best = max(candidates, key=lambda like: like.rank, default=None)
        if best is None:
            return Expected(), None
        share = best.share * (one.resumes.left if one.resumes is not None else 1.0)
        manifest, size = best.artifact.manifest, size_of(best.artifact)
        name = f"{manifest['arm']}/{manifest['entry']}"
        told = Expected(float(manifest["seconds"]) * share, size, name, share, best.alike)
        return told, size if best.alike and best.same else None

    def _like(self, asked: _Asked, artifact: Artifact) -> _Like | None:
        """An artifact of the stage as far as it tells what a node will take; None where it tells nothing."""
        then, node, sizes = artifact.manifest, asked.node, asked.sizes
        if not then.get("whole", True) or not self._fits(asked, then):
            return None
        inputs, own = self._inputs_of(artifact), self._is_own(node, then)
        if {role: len(some) for role, some in inputs.items()} != {role: len(some) for role, some in sizes.items()}:
            return None
        alike = all(_near(_sum(inputs[role]), _sum(sizes[role])) for role in sizes)
        share, same = 1.0, True
        for change in keys.changes(then["config"], asked.config):
            if _covers(node.stage.costless(node.entry.config), change.field):
                same = False
            elif change.field in node.stage.paced_by(node.entry.config) and change.old and change.new and share == 1:
                share = change.new / change.old
            else:
                return None
        return _Like(artifact, share, alike, same, own) if alike or own else None

    def _fits(self, asked: _Asked, then: Mapping[str, Any]) -> bool:
        """Whether host, processes, images and network are of the same kind, as far as the stage uses them."""
        node, uses, there = asked.node, asked.node.stage.uses, then.get("host") or {}
        if then.get("device") != self.facts.device:
            return False
        if any(there.get(name) != host.facts()[name] for name in _OF_THE_HOST):
            return False
        if node.stage.shares and (then.get("processes") or {}).get("count", 1) != self.plan.spec.launch.total:
            return False
        if "data" in uses and not (_equal("data", then, asked.data) and self._as_many_images(node, then)):
            return False
        return "model" not in uses or _equal("model", then, asked.model)

    def _as_many_images(self, node: Node, then: Mapping[str, Any]) -> bool:
        old, new = then["key_material"]["data"]["fingerprint"], self.facts.data(node)
        counts = [fingerprint.count(text) for text in (old, new)]
        return old == new if None in counts else _near(*counts)

    def _is_own(self, node: Node, then: Mapping[str, Any]) -> bool:
        """Whether an earlier run of this pipeline made it for this very stage, under whatever seed."""
        family = str(then["arm"]).partition("@")[0]
        return (then["pipeline"], family, then["entry"]) == (
            self.plan.spec.name,
            node.arm.partition("@")[0],
            node.entry.name,
        )

    def _inputs(self, node: Node) -> Sizes:
        found: dict[str, list[int | None]] = {}
        for edge in node.inputs:
            if edge.source is not None:
                found.setdefault(edge.role, []).append(self.sizes.get(edge.source))
            elif edge.ref is not None and not edge.ref.startswith(LEFT_TO_THE_STAGE):
                found.setdefault(edge.role, []).append(size_of(self.store.resolve(edge.ref)))
        return found

    def _inputs_of(self, artifact: Artifact) -> Sizes:
        """What an artifact was made from; a part of its own work is no input."""
        inputs = artifact.manifest["inputs"]
        return {
            role: [self._size(one) for one in (inputs[role] if isinstance(inputs[role], list) else [inputs[role]])]
            for role in artifact.manifest["key_material"]["inputs"]
            if role in inputs
        }

    def _size(self, lineage: Mapping[str, Any]) -> int | None:
        artifact = self.made.get((lineage["stage"], lineage["key"]))
        return size_of(artifact) if artifact is not None else None


def _equal(block: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    old = then.get(block) or {}
    return all(old.get(name) == value for name, value in now.items() if name not in _NO_MATTER[block])


def _covers(costless: Iterable[str], field: str) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in costless)


def _sum(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _near(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and abs(one - other) <= APART * max(one, other)


def size_of(artifact: Artifact) -> int:
    """Bytes of an artifact's files, as its manifest states them."""
    return sum(int(each["bytes"]) for each in artifact.manifest["files"].values())


def free_bytes(folder: Path) -> int:
    """What is free on the disk that a folder lies on, or will: the nearest of its parents that exists is asked."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def too_large(needed: int, free: int, store: Store) -> list[str]:
    """A warning when so many bytes do not fit into those that are free, beside the ones that a run insists on."""
    from .store import MIN_FREE_BYTES

    if needed + MIN_FREE_BYTES <= free:
        return []
    needs, has = (f"{size / 1e6:,.0f} MB" for size in (needed, free))
    return [
        f"this will not fit: {needs} or more to write, {has} free on the disk of {store.root}; `sievit gc` frees some"
    ]
