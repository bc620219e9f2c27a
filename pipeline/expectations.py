"""What a stage will take, judged by what artifacts of its kind took before: seconds, and bytes of the store's disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Node
    from .store import Artifact, Store


@dataclass(frozen=True, slots=True)
class Took:
    """What the newest artifact of a kind took; None where there is none. bytes: its files, figures included."""

    seconds: float | None = None
    bytes: int | None = None


Earlier = Mapping[tuple[str, ...], Took]


def earlier(store: Store) -> Earlier:
    """What the newest artifact of each kind took, under (stage,) and under (stage, arm, entry). Reads manifests only;
    what is damaged tells nothing.
    """
    took: dict[tuple[str, ...], Took] = {}
    for artifact in store.artifacts():
        manifest = artifact.manifest
        spent = Took(float(manifest["seconds"]), size_of(artifact))
        took[(artifact.kind_of_stage,)] = spent
        took[(artifact.kind_of_stage, manifest["arm"], manifest["entry"])] = spent
    return took


def took_by(node: Node, took: Earlier) -> Took:
    """What a node will take: as its own last artifact did, else as the newest of its stage, else nobody knows."""
    kind = node.stage.name
    return took.get((kind, node.arm, node.entry.name)) or took.get((kind,)) or Took()


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
