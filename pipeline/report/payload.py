"""Files of an artifact that the report reads beside its manifest: JSON, and small photographs.

A report must not fail, nor leave the artifact, because of what such a file holds: what cannot be read counts as absent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_JSON = 4_000_000  # bytes; more than any stage writes for a reader
MOST_PHOTOGRAPH = 20_000  # bytes; what 96 pixels a side can take at worst
JPEG = b"\xff\xd8\xff"


def json_file(root: Path | None, name: str) -> Mapping[str, Any]:
    """The object in a JSON file of the artifact, or an empty one."""
    path = _inside(root, name)
    if path is None or path.stat().st_size > MOST_JSON:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def photograph(root: Path | None, name: str) -> str:
    """A small JPEG of the artifact as a data URI, or "". As the source of an <img> it is a picture and nothing else."""
    path = _inside(root, name)
    if path is None or path.stat().st_size > MOST_PHOTOGRAPH:
        return ""
    data = path.read_bytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}" if data.startswith(JPEG) else ""


def _inside(root: Path | None, name: str) -> Path | None:
    """The file, if it is one and lies within the artifact."""
    if root is None or not name:
        return None
    root = root.resolve()
    try:
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError):  # a name with a zero byte, or one that is too long
        return None
