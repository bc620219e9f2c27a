"""Reading JSON that may lack anything: a run can stop half-way, and a manifest may be older than this code.

Every function takes a value and a path of keys into it, and answers with an empty value of its type where the path
leads nowhere or to something of another type. The report then shows a dash instead of inventing a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def dig(source: object, *path: str) -> Any:
    """What lies at the path of keys, or None."""
    for key in path:
        if not isinstance(source, Mapping) or key not in source:
            return None
        source = source[key]
    return source


def number(source: object, *path: str) -> float | None:
    """A finite number, or None (NaN and infinity are not measurements)."""
    value = dig(source, *path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def text(source: object, *path: str) -> str:
    """A string or number as text, or ""."""
    value = dig(source, *path)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def mapping(source: object, *path: str) -> Mapping[str, Any]:
    """A mapping, or an empty one."""
    value = dig(source, *path)
    return value if isinstance(value, Mapping) else {}


def objects(source: object, *path: str) -> list[Mapping[str, Any]]:
    """The mappings in a list, or none."""
    return [one for one in listing(source, *path) if isinstance(one, Mapping)]


def listing(source: object, *path: str) -> Sequence[Any]:
    """A list, or an empty one."""
    value = dig(source, *path)
    return value if isinstance(value, list | tuple) else ()
