"""Writing that a kill cannot tear.

An artifact is written into a temporary folder beside its final name. Every file is synced, the manifest last; the
folder is synced, renamed, and its parent synced. Before the rename there is nothing, after it there is everything. A
small file (a counter, a run record) is written under another name, synced, and moved over the old one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import manifest as manifests
from .errors import STAGES_FAULT, SievitError

READ_ONLY = 0o444


def _no_step(operation: str, path: Path) -> None:
    """Nothing happens between the operations of a commit."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file operations of a commit, one method each.

    `step` is called before each with its name and path. It exists so that a test can end the process at the k-th
    operation for every k, and can check their order.
    """

    step: Callable[[str, Path], None] = _no_step

    def write(self, path: Path, data: bytes) -> None:
        """Create `path` with `data` and sync it. The path must not exist."""
        self.step("create", path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "wb", buffering=0) as file:
            self.step("write", path)
            view = memoryview(data)
            while view:  # an unbuffered write may take less than it was given
                view = view[file.write(view) :]
            self.step("sync", path)
            os.fsync(handle)

    def sync(self, path: Path) -> None:
        """Wait until a file's bytes, or a folder's names, are on the disk."""
        self.step("sync", path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def protect(self, path: Path) -> None:
        """Take the right to write away: an artifact does not change."""
        self.step("protect", path)
        path.chmod(READ_ONLY)

    def rename(self, source: Path, target: Path) -> None:
        """Move, and sync the folder in which the new name stands."""
        self.step("rename", target)
        source.rename(target)
        self.sync(target.parent)

    def replace(self, path: Path, data: bytes) -> None:
        """Set the content of a small file: the old content or the new one is there, never a part."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
        try:
            self.write(temporary, data)
            self.step("replace", path)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.sync(path.parent)


def payload_files(folder: Path) -> dict[str, Path]:
    """Every file below `folder`, by its name relative to it with forward slashes.

    SievitError: a link, a pipe or another thing that is neither file nor folder.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[path.relative_to(folder).as_posix()] = path
        elif not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
            raise SievitError(
                f"the stage left {path.name!r}, which is {kind}: only plain files can be kept", hint=STAGES_FAULT
            )
    return found


def seal(folder: Path, disk: Disk) -> dict[str, dict[str, Any]]:
    """Sync, protect and hash every payload file of a folder: the manifest's `files`."""
    found = payload_files(folder)
    if manifests.NAME in found:
        raise SievitError(
            f"the stage left a file named {manifests.NAME}, a name the engine needs for itself", hint=STAGES_FAULT
        )
    if all(manifests.is_figure(name) for name in found):
        raise SievitError("the stage ended without leaving a file: there is nothing to keep", hint=STAGES_FAULT)
    sealed: dict[str, dict[str, Any]] = {}
    for name, path in found.items():
        disk.sync(path)
        disk.protect(path)
        digest, size = manifests.sha256_file(path)
        sealed[name] = {"sha256": digest, "bytes": size}
    for below in sorted({path.parent for path in found.values()} - {folder}):
        disk.sync(below)
    return sealed


def publish(folder: Path, final: Path, manifest: Mapping[str, Any], disk: Disk) -> None:
    """Write the manifest into a sealed folder and give the folder its final name.

    An artifact that already has that name (the stage was forced) is moved aside first and removed last; `recover`
    moves it back when a kill falls between the two.
    """
    path = folder / manifests.NAME
    disk.write(path, manifests.as_text(manifest))
    disk.protect(path)
    disk.sync(folder)
    old = aside(final)
    if final.exists():
        disk.rename(final, old)
    disk.rename(folder, final)
    if old.exists():
        discard(old)


def aside(final: Path) -> Path:
    """Where a replaced artifact waits until the new one stands."""
    return final.with_name(f".old-{final.name}")


def recover(final: Path, disk: Disk) -> None:
    """Undo a replacement that a kill cut in two, or finish it. The caller holds the key's lock."""
    old = aside(final)
    if old.exists():
        if final.exists():
            discard(old)
        else:
            disk.rename(old, final)


def remove(folder: Path) -> None:
    """Delete a folder of the store. A manifest goes first, so that what a kill leaves does not look whole."""
    (folder / manifests.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def discard(folder: Path) -> None:
    """Delete a folder that nobody counts on, if it can be: what stays is swept by gc."""
    with contextlib.suppress(OSError):
        remove(folder)
