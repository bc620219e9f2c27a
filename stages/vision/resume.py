"""What a checkpoint of a training is: the parts of a run, each with its own tensors and facts, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .tensors import read_tensors


class Part(Protocol):
    """Something of a run that must survive a kill. Parts are made in the same way again and then restored in order, so
    that a part may rely on those before it.
    """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: tensors, and facts for JSON."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Undo state()."""


def state(parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of all parts, for one file; names of parts hold no dot."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, part in parts.items():
        own, facts[name] = part.state()
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return tensors, facts


def restore(path: Path, parts: Mapping[str, Part]) -> None:
    """Give every part back what it had. Raises: InvalidInput for a file that is not whole."""
    tensors, facts = read_tensors(path)
    for name, part in parts.items():
        part.restore(having(tensors, f"{name}."), facts[name])


def having(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
