"""What a run made: each artifact once, with the arms that share it, its pictures, notes and lineage."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import SievitError
from .reading import dig, listing, mapping, number, text


class Stored(Protocol):
    """What the report needs of an artifact."""

    @property
    def root(self) -> Path: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...


class Shelf(Protocol):
    """What the report needs of the store."""

    @property
    def root(self) -> Path: ...
    def find(self, stage: str, key: str, /) -> Stored | None: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG of a stage. `uri` is "" when it could not be embedded; `absent` then says why."""

    file: str
    title: str
    caption: str
    uri: str = ""
    absent: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """One artifact, or one node that made none. `places` are the (arm, entry) pairs that share it."""

    stage: str
    places: tuple[tuple[str, str], ...]
    state: str
    ref: str
    key: str
    error: str
    hint: str
    absent: str
    manifest: Mapping[str, Any]
    seconds: float | None
    inputs: tuple[tuple[str, str], ...] = ()
    command: str = ""
    notes: tuple[Note, ...] = ()
    pictures: tuple[Picture, ...] = ()
    across_arms: bool = False
    root: Path | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        return mapping(self.manifest, "metrics")

    @property
    def name(self) -> str:
        """The entry, and the kind of stage where that is another word."""
        entry = self.places[0][1]
        return entry if entry == self.stage else f"{entry} ({self.stage})"

    @property
    def arms(self) -> str:
        return "all arms" if self.across_arms else ", ".join(dict.fromkeys(arm for arm, _ in self.places))


def collect_steps(record: Mapping[str, Any], store: Shelf) -> tuple[Step, ...]:
    """One step an artifact (arms share them), in the order of the run."""
    merged: dict[tuple[str, ...], Step] = {}
    for node in listing(record, "nodes"):
        place = (text(node, "arm"), text(node, "entry") or text(node, "stage"))
        stage, key = text(node, "stage"), text(node, "key")
        identity = (stage, key) if key else ("", *place)
        known = merged.get(identity)
        if known is None:
            merged[identity] = _step(node, place, stage, key, store)
        else:
            state = "done" if "done" in (known.state, text(node, "state")) else known.state
            merged[identity] = replace(known, places=(*known.places, place), state=state)
    return tuple(merged.values())


def _step(node: Any, place: tuple[str, str], stage: str, key: str, store: Shelf) -> Step:
    state = text(node, "state") or "waiting"
    error = dig(node, "error")
    step = Step(
        stage=stage,
        places=(place,),
        state=state,
        ref=text(node, "ref"),
        key=key,
        error=text(error, "message") or text(error),
        hint=text(error, "hint"),
        absent="",
        manifest={},
        seconds=number(node, "seconds") or None,  # a record starts with 0
        across_arms=not place[0],
    )
    if state not in ("done", "cached"):
        return replace(step, absent=f"{place[1]} has no result (state: {state})")
    try:
        artifact = store.find(stage, key)
    except (SievitError, OSError, ValueError) as problem:
        return replace(step, absent=f"{step.ref or stage} cannot be read: {problem}")
    if artifact is None:
        return replace(step, absent=f"{step.ref or stage} is no longer in the store")
    manifest = artifact.manifest
    recorded = number(manifest, "seconds")  # what making it took; a cache hit took nothing
    return replace(
        step,
        manifest=manifest,
        ref=step.ref or f"{stage}@{text(manifest, 'version') or key}",
        seconds=recorded if recorded is not None else step.seconds,
        inputs=_inputs(manifest),
        command=shown_command(dig(manifest, "command")),
        notes=tuple(
            Note(text(note, "level") or "note", text(note, "text") or text(note)) for note in listing(manifest, "notes")
        ),
        pictures=tuple(_picture(figure, artifact.root) for figure in listing(manifest, "figures")),
        across_arms=step.across_arms or _reads_many(manifest),
        root=artifact.root,
    )


def _reads_many(manifest: Mapping[str, Any]) -> bool:
    """Whether it stands once for all arms: no other stage has inputs in lists, or rows of several arms."""
    lists = any(isinstance(given, list) for given in mapping(manifest, "inputs").values())
    return lists or bool(listing(manifest, "metrics", "rows"))


def _inputs(manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    found = []
    for role, given in mapping(manifest, "inputs").items():
        for one in given if isinstance(given, list) else [given]:
            found.append((role, text(one, "ref") or text(one) or text(one, "key")))
    return tuple(found)


def _picture(figure: Any, root: Path) -> Picture:
    """The SVG as a data URI. As the source of an <img>, scripts and outside references in it cannot run."""
    name = text(figure, "file") or text(figure, "name")
    picture = Picture(Path(name).stem, text(figure, "title") or name, text(figure, "caption"))
    root = root.resolve()
    for path in ((root / name).resolve(), (root / "figures" / name).resolve()):
        if path.suffix == ".svg" and path.is_relative_to(root) and path.is_file():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return replace(picture, uri=f"data:image/svg+xml;base64,{data}")
    return replace(picture, absent="the file of this picture is not in the artifact")


def leave_out(steps: tuple[Step, ...], characters: int) -> tuple[Step, ...]:
    """Leave out the largest pictures until the page is shorter by so many characters, so that it can be sent."""
    sizes = sorted((len(p.uri), i, j) for i, step in enumerate(steps) for j, p in enumerate(step.pictures))
    dropped = set()
    while sizes and characters > 0:
        size, i, j = sizes.pop()
        characters -= size
        dropped.add((i, j))
    if not dropped:
        return steps
    why = "left out to keep the page below 3 MB; it lies in the figures folder of the artifact"
    return tuple(
        replace(
            step,
            pictures=tuple(
                replace(p, uri="", absent=why) if (i, j) in dropped else p for j, p in enumerate(step.pictures)
            ),
        )
        for i, step in enumerate(steps)
    )


def shown_command(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else text(value)
