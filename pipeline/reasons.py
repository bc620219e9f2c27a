"""Why a stage is made again, in words: keys are hashes, and a person wants to know what of the host, the images or the
inputs is another one.

A key's material tells that something changed; the manifest beside it tells what was there then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import fingerprint, host

if TYPE_CHECKING:
    from .keys import Change

_OF_THE_HOST = {
    "cpu": "CPU",
    "cores": "cores",
    "cpu_quota": "cores that the container may use",
    "memory_gb": "memory in GB",
    "gpus": "GPUs",
}


class Reason(NamedTuple):
    """A change of a key, and what it is in words."""

    field: str
    old: Any
    new: Any
    says: str


def in_words(changes: Sequence[Change], then: Mapping[str, Any], now: Mapping[str, Any], cache: Path) -> list[Reason]:
    """The changes, those of digests explained.

    then: the manifest of the artifact compared with. now: that of the other one; of a stage that has not run, its
    `inputs`, `data` and `model` as a manifest has them, and host and libraries are looked up. cache: of the store.
    """
    found = [Reason(*change, _words(change, then, now, cache)) for change in changes if not _is_input(change)]
    of_inputs = [change for change in changes if _is_input(change)]
    return [*found, *_of_inputs(of_inputs, then.get("inputs") or {}, now.get("inputs") or {})]


def _is_input(change: Change) -> bool:
    return change.field.startswith("inputs.")


def _words(change: Change, then: Mapping[str, Any], now: Mapping[str, Any], cache: Path) -> str:
    match change.field.split("."):
        case ["host"]:
            return _of_the_host(then, now)
        case ["data"]:
            return "the stage reads images now" if change.old is None else "the stage reads no images any more"
        case ["data", "fingerprint"]:
            return _of_the_images(change, now.get("data") or {}, cache)
        case ["model", "weights_sha256"] if change.old and change.new:
            return f"the weights in {(now.get('model') or {}).get('weights')} are not those of then"
        case ["files", name] if change.old and change.new:
            return f"what {name} names holds something else than then"
        case ["code_version"]:
            return f"the stage itself is another one: version {change.old} -> {change.new}"
        case ["packages", name]:
            return f"{name} {change.old or 'not installed'} -> {change.new or 'not installed'}"
        case _:
            return _plain(change)


def _plain(change: Change) -> str:
    """target.macs: 0.5 -> 0.4; digests only as far as a person compares them."""
    field = change.field.removeprefix("config.").replace("data.config.", "data.")
    return f"{field}: {_short(change.old)} -> {_short(change.new)}"


def _short(value: Any) -> str:
    from .drawing import WIDEST, shown

    text = "none" if value is None else shown(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


# ---- the host


def _of_the_host(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which of the facts that the host's fingerprint covers are others."""
    old, new = then.get("host") or {}, now.get("host") or host.facts()
    differing = [
        f"{title} {_fact(old.get(name))} -> {_fact(new.get(name))}"
        for name, title in _OF_THE_HOST.items()
        if old.get(name) != new.get(name)
    ]
    if old.get("cpu") == new.get("cpu"):
        lost, won = (sorted(set(a.get("flags") or ()) - set(b.get("flags") or ())) for a, b in ((old, new), (new, old)))
        differing += [f"CPU features {' '.join([*(f'+{flag}' for flag in won), *(f'-{flag}' for flag in lost)])}"] * (
            bool(lost or won)
        )
    had, has = then.get("libraries") or {}, now.get("libraries") or host.libraries()
    differing += [
        f"{name} {had.get(name, 'not installed')} -> {has.get(name, 'not installed')}"
        for name in host.RUNTIMES
        if had.get(name) != has.get(name)
    ]
    if not old or not differing:
        return "the host is another one, and its times with it"
    return f"the host: {'; '.join(differing)}"


def _fact(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


# ---- the images


def _of_the_images(change: Change, data: Mapping[str, Any], cache: Path) -> str:
    old, new = str(change.old), str(change.new)
    source = data.get("source")
    if fingerprint.count(old) is None or fingerprint.count(new) is None:
        return f"the images: {old} -> {new}"
    told = _files(fingerprint.contents(old, cache), fingerprint.contents(new, cache))
    if told:
        return f"the images in {source}: {told}"
    counts = [fingerprint.count(old), fingerprint.count(new)]
    files = f"; {counts[0]} files then, {counts[1]} now" if counts[0] != counts[1] else ""
    return f"the images in {source} are not those of then{files}"


def _files(old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> str:
    """2 added (train/cat/7.png, ...), 1 removed (...); "" where it is not known what there was."""
    if old is None or new is None:
        return ""
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and old[name] != new[name]],
    }
    return ", ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, ..."


# ---- the inputs


def _of_inputs(changes: Sequence[Change], then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Reason]:
    """A reason for each input that is another one. A role of many names them by arm, entry and seed."""
    roles: dict[str, list[Change]] = {}
    for change in changes:
        roles.setdefault(change.field.split(".")[1].partition("[")[0], []).append(change)
    for role, of_role in roles.items():
        said = list(_of_role(role, then.get(role), now.get(role)))
        yield from (Reason(f"inputs.{role}", old, new, says) for old, new, says in said)
        if not said:
            yield from (Reason(*change, _plain(change)) for change in of_role)


def _of_role(role: str, then: Any, now: Any) -> Iterator[tuple[str | None, str | None, str]]:
    """(reference then, reference now, words)."""
    old, new = _named(then), _named(now)
    many = isinstance(then, list) or isinstance(now, list)
    for name in dict.fromkeys([*old, *new]):
        was, is_ = old.get(name), new.get(name)
        if was is None and is_ is not None:
            yield (
                None,
                is_["ref"],
                f"{_label(is_, many)} ({is_['ref']}) is new among its {role}"
                if many
                else (f"it reads {is_['ref']} as its {role}, and read none"),
            )
        elif is_ is None and was is not None:
            yield (
                was["ref"],
                None,
                f"{_label(was, many)} ({was['ref']}) is no longer among its {role}"
                if many
                else (f"it reads no {role}, and read {was['ref']}"),
            )
        elif was is not None and is_ is not None and was["digest"] != is_["digest"]:
            yield was["ref"], is_["ref"], _another(role, was, is_, many)


def _named(value: Any) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The inputs of a role by what keeps its name when it is made anew."""
    if isinstance(value, list):
        return {(one.get("arm"), one.get("entry"), one.get("seed")): one for one in value}
    return {(): value} if isinstance(value, Mapping) else {}


def _label(one: Mapping[str, Any], many: bool) -> str:
    return f"{one.get('arm')}/{one.get('entry')}" if many else str(one.get("entry"))


def _another(role: str, was: Mapping[str, Any], is_: Mapping[str, Any], many: bool) -> str:
    if was.get("entry") == is_.get("entry"):
        return f"{_label(is_, many)} was made anew: {was['ref']} -> {is_['ref']}"
    return f"its {role} is {is_['ref']} of {is_.get('entry')}, and was {was['ref']} of {was.get('entry')}"
