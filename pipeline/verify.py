"""Comparing what is stored with what was stored: every byte, whenever it is relied on.

SHA-256 over 30 MB takes a tenth of a second. Sizes and times alone would be faster and would miss a flipped bit, so
they are not taken for an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest as manifests
from .errors import IntegrityError


def verify_files(ref: str, root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a folder with the `files` of its manifest: name -> {"sha256", "bytes"}.

    IntegrityError: a file is changed, missing, additional, a link or no plain file.
    """
    present = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name, path in present.items():
        if path.is_symlink():
            raise damaged(ref, f"{name} is a symbolic link", path)
        if name not in files and name != manifests.NAME:
            raise damaged(ref, f"{name} is not one of its files: it was added later", path)
    for name, expected in files.items():
        if name not in present:
            raise damaged(ref, f"{name} is missing", root / name)
        _verify_file(ref, name, present[name], expected)


def _verify_file(ref: str, name: str, path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise damaged(ref, f"{name} is not a plain file", path)
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise damaged(ref, f"{name} has {size} bytes, expected {expected['bytes']}", path)
        digest, _ = manifests.sha256_file(path)
    except OSError as error:
        raise damaged(ref, f"{name} cannot be read ({error.strerror})", path) from error
    if digest != expected["sha256"]:
        raise damaged(ref, f"{name} has SHA-256 {digest}, expected {expected['sha256']}", path)


def damaged(ref: str, why: str, path: Path) -> IntegrityError:
    """The error for an artifact that is not what was stored, with the remedy."""
    return IntegrityError(f"{ref} is not what was stored: {why}", where=str(path), hint=manifests.REMEDY)
