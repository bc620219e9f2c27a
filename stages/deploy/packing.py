"""Folders to hand over: whole or not there at all, the same bytes each time, with checksums for `sha256sum -c`."""

from __future__ import annotations

import re
import shutil
import uuid
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..methods import InvalidInput
from .sidecar import sha256_of

SUMS = "SHA256SUMS"
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")

Contents = Mapping[str, bytes | Path]  # name in the folder -> its content, or the file that has it


def require_room(folder: Path, archive: Path | None) -> None:
    """Raises InvalidInput where something stands already that is not an empty folder."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise InvalidInput(f"{folder} is there already and is no empty folder", "name another --output, or remove it")
    if archive is not None and archive.exists():
        raise InvalidInput(f"{archive} is there already", "name another --output, or remove it")


def write_pack(folder: Path, contents: Contents, archive: Path | None = None, *, root: str = "model") -> None:
    """Write a folder and its SHA256SUMS, and a zip of both in which they lie below `root`.

    Built aside and renamed: after an error, or a kill, neither has its name. Raises InvalidInput for a folder that is
    not empty and for names that lead out of it or that the checksum file cannot hold.
    """
    require_room(folder, archive)
    for name in contents:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or re.search(r"[\\\r\n]", name):
            raise InvalidInput(f"a file named {name!r} cannot be packed", "give it a plain name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    aside = folder.with_name(f".{folder.name}.{mark}")
    zipped = folder.with_name(f".{folder.name}.{mark}.zip")
    try:
        aside.mkdir()
        for name, content in contents.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, aside / name)
            else:
                (aside / name).write_bytes(content)
        sums = "".join(f"{sha256_of(aside / name)}  {name}\n" for name in sorted(contents))
        (aside / SUMS).write_text(sums, encoding="utf-8")
        if archive is not None:
            _zip(aside, [*contents, SUMS], zipped, root)
        aside.rename(folder)
        if archive is not None:
            zipped.rename(archive)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        zipped.unlink(missing_ok=True)


def _zip(folder: Path, names: Collection[str], target: Path, root: str) -> None:
    """Stored, not deflated: weights hardly shrink, and what zlib makes of them differs from version to version."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(names):
            entry = zipfile.ZipInfo(f"{root}/{name}", FIRST_DAY)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, a plain file: the same on every host
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def check_pack(folder: Path, names: Sequence[str]) -> None:
    """Compare files of a folder, by their names in it, with its SHA256SUMS. Where that does not list the first of them
    it is somebody else's list, or there is none, and nothing is compared.

    Raises: InvalidInput naming the file that is missing, not listed, or another one.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    lines = map(_LINE.fullmatch, sums.read_text(encoding="utf-8", errors="replace").splitlines())
    listed = {match[2]: match[1] for match in lines if match is not None}
    if names[0] not in listed:
        return
    for name in names:
        if not (folder / name).is_file():
            raise InvalidInput(f"{folder / name} is missing", "copy the whole folder again")
        if listed.get(name) != sha256_of(folder / name):
            raise InvalidInput(
                f"{folder / name} is not the file that was packed: its SHA-256 is not the one in {SUMS}",
                "copy the whole folder again",
            )
