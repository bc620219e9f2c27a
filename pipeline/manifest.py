"""The manifest: the one file of an artifact that says what the others are, and that nobody has changed it since.

A manifest is plain JSON. It is read strictly, because Python's reader takes NaN, lets the last of two equal keys win
and falls over deep nesting; and it carries a digest of itself, so that an edited number is noticed like an edited
weight.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from .errors import IntegrityError

SCHEMA = 1
NAME = "manifest.json"
FIGURES = "figures"  # the one folder of an artifact that its content digest leaves out
REMEDY = "`sievit gc --damaged` removes what is damaged; the next run makes it again"

_FIELDS: dict[str, type] = {
    "schema": int,
    "stage": str,
    "key": str,
    "version": int,
    "digest": str,
    "key_material": dict,
    "inputs": dict,
    "metrics": dict,
    "ledger": dict,
    "files": dict,
}
_MAX_BYTES = 64 * 2**20
_MAX_DEPTH = 64
_BLOCK = 2**20


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: keys sorted, no spaces, no NaN. Equal values have equal bytes.

    Keys that are not text become text first (JSON knows no others), so that a value and its stored copy agree.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path) -> tuple[str, int]:
    """SHA-256 (64 hex digits) and size in bytes of a file's content."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The identity of a payload: over sorted (name, sha256), figures left out. Later stages' keys depend on it."""
    payload = sorted((name, entry["sha256"]) for name, entry in files.items() if not is_figure(name))
    return sha256_of(payload)


def is_figure(name: str) -> bool:
    """Whether a file of an artifact is a picture of it rather than part of it."""
    return name.startswith(f"{FIGURES}/")


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest in it."""
    plain = json.loads(json.dumps(fields, allow_nan=False))
    plain.pop("manifest_sha256", None)
    return {**plain, "manifest_sha256": sha256_of(plain)}


def own_digest_holds(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest is, value for value, the one that was written."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return manifest.get("manifest_sha256") == sha256_of(rest)


def fault(manifest: Mapping[str, Any]) -> str | None:
    """What a manifest of this schema lacks, or None. A digest proves that nothing changed, not that it was right at
    first.
    """
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            return f"the field {name!r} is missing or of another type"
    for name, entry in manifest["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"the file name {name!r} leads out of the folder"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or not isinstance(entry.get("bytes"), int)
        ):
            return f"the entry of the file {name!r} is incomplete"
    return None


def as_text(value: Any) -> bytes:
    """JSON for a file that people read too."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of the store. `what` names it in the message.

    Refused with IntegrityError: unreadable or oversized files, text that is no JSON object, two equal keys, NaN and
    infinities, integers of thousands of digits, nesting beyond 64 levels. FileNotFoundError is left to the caller.
    """

    def refuse(why: str) -> NoReturn:
        raise IntegrityError(f"{what} cannot be read: {why}", where=str(path), hint=REMEDY)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            refuse(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse(f"{text} is no finite number")
        return value

    try:
        if path.stat().st_size > _MAX_BYTES:
            refuse(f"it is larger than {_MAX_BYTES} bytes")
        value = json.loads(
            path.read_bytes(),
            object_pairs_hook=pairs,
            parse_float=number,
            parse_constant=lambda name: refuse(f"{name} is no number"),
        )
    except FileNotFoundError:
        raise
    except RecursionError:
        refuse("it is nested too deeply")
    except OSError as error:
        refuse(error.strerror or str(error))
    except ValueError as error:  # not JSON, not UTF-8, or an integer of too many digits
        refuse(str(error))
    if not isinstance(value, dict):
        refuse("it holds no JSON object")
    if _depth(value) > _MAX_DEPTH:
        refuse("it is nested too deeply")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest = 0
    todo = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            todo.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list):
            todo.extend((child, depth + 1) for child in item)
    return deepest
