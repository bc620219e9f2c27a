"""The content digest of a data source, from its files alone: no image is decoded and no tensor library imported.

Reading 140 GB to learn that nothing changed would be absurd, so the hash of a file is remembered under its path,
size, times and inode. This memo is for data only, which belongs to the user; what the store holds is hashed each time.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .diagnostics import nearest, suggest
from .errors import InputError, SievitError
from .host import version
from .manifest import sha256_file, sha256_of

if TYPE_CHECKING:
    from .spec import DataConfig
    from .stage import Progress

BUILTIN = {"digits": "scikit-learn"}  # name -> the distribution that carries it
IMAGES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tif",
        ".tiff",
        ".avif",
    }
)
TARS = frozenset({".tar"})

_COUNTED = IMAGES | TARS

# Data sets that torchvision downloads into `root`, and checks when it reads them: their name stands for their content.
DOWNLOADED = frozenset(
    {"cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist", "places365", "inaturalist", "inat"}
)

# Data sets that lie in `root` as files which somebody put there, and that count by these.
BY_FILES = frozenset({"imagenet", "image_folder", "folder"})

_NAMED = sorted([f"builtin:{name}" for name in BUILTIN] + [f"torch/{name}" for name in DOWNLOADED | BY_FILES])

# A file changed within the clock tick of its hashing could change again unnoticed, so such a hash is not remembered.
_SETTLED_NS = 2 * 10**9

# What changed since is told file by file for a source of at most so many; of a larger one, that something did.
_LISTED = 100_000
_DIGITS = 16

_Stamp = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode


def fingerprint(data: DataConfig, base: Path, memo_path: Path, progress: Progress | None = None) -> str:
    """What the data source holds, as a short text: equal texts mean equal images under equal names.

    base: the folder that relative paths are meant from. memo_path: a file to remember hashes in; may be absent or
    deleted. InputError with the field at fault: no such path, no class folders in it, a name that nobody knows; without
    one: an unreadable file.
    """
    source = _absolute(base, data.source)
    kind, _, name = data.source.partition(":")
    if kind == "builtin":
        return _builtin(name)
    family, slash, name = data.source.partition("/")
    label = ""
    if slash and family.lower() == "hfds":
        return _hfds(name)
    if slash and family.lower() == "torch":
        source = _torch(data, base)
        if name.lower() in DOWNLOADED:
            return f"torch/{name.lower()} of torchvision {_version('torchvision')}"
        label = f"torch/{name.lower()} "
    memo = _Memo(memo_path)
    try:
        field = "data.root" if label else "data.source"
        parts = {"source": _tree(source, field, memo, progress)}  # with its train and test folders, or tars
        if data.test is not None:
            parts["test"] = _tree(_absolute(base, data.test), "data.test", memo, progress)
    finally:
        memo.save()  # after Ctrl-C too: what was hashed need not be hashed again
    files = sum(len(part) for part in parts.values())
    text = f"{label}sha256:{sha256_of(parts)} of {files} file{'s' if files > 1 else ''}"
    if files <= _LISTED:
        _keep_contents(text, parts, memo_path.parent)
    return text


def contents(text: str, cache: Path) -> dict[str, str] | None:
    """Name -> the beginning of its SHA-256, of every file that a fingerprint is of; None where it was not kept, or was
    deleted. Names of a test split of its own begin with `data.test/`.
    """
    try:
        stored = json.loads(_listing(text, cache).read_bytes())
        return {str(name): str(digest) for name, digest in stored.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _keep_contents(text: str, parts: dict[str, list[list[object]]], cache: Path) -> None:
    """Keep what a fingerprint is of, to tell later what has changed since. It may be lost at any time."""
    path = _listing(text, cache)
    if path.exists():
        return
    names = {
        f"{'data.test/' if part == 'test' else ''}{name}": str(digest)[:_DIGITS]
        for part, rows in parts.items()
        for name, _, digest in rows
    }
    _write(path, json.dumps(names))


def _listing(text: str, cache: Path) -> Path:
    return cache / "data" / f"{sha256_of(text)[:_DIGITS]}.json"


def _write(path: Path, text: str) -> None:
    """Write if the disk lets us: what is lost is found out again."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    with suppress(OSError, SievitError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)


def count(text: str) -> int | None:
    """How many files a fingerprint is of; None for a source that counts by its name."""
    found = re.search(r" of (\d+) files?$", text)
    return int(found[1]) if found else None


def _absolute(base: Path, text: str) -> Path:
    return (base / Path(text).expanduser()).absolute()


def caveat(data: DataConfig) -> str | None:
    """What a fingerprint cannot see, as a sentence for the user; None when it sees everything."""
    if not data.source.lower().startswith("hfds/"):
        return None
    return f"{data.source} counts by its name: a change on the hub goes unnoticed until a stage is made with --force"


def _builtin(name: str) -> str:
    if name not in BUILTIN:
        raise _wrong("data.source", f"there is no 'builtin:{name}'", suggest(f"builtin:{name}", _NAMED, kind="names"))
    return f"builtin:{name} of {BUILTIN[name]} {_version(BUILTIN[name])}"


def _hfds(name: str) -> str:
    if not name:
        raise _wrong("data.source", "hfds/ is followed by no name", "such as hfds/uoft-cs/cifar10")
    if importlib.util.find_spec("datasets") is None:
        raise _wrong("data.source", "hfds/... needs the package datasets", "pip install 'sievit[hfds]'")
    return f"hfds/{name}"


def _torch(data: DataConfig, base: Path) -> Path:
    """The folder of one of torchvision's data sets, which has to be there: nothing is downloaded in passing."""
    name = data.source.partition("/")[2]
    if name.lower() not in DOWNLOADED | BY_FILES:
        raise _wrong(
            "data.source", f"there is no {data.source!r}", suggest(f"torch/{name.lower()}", _NAMED, kind="names")
        )
    if data.root is None:
        hint = "set data.root to the folder that torchvision downloaded it to"
        raise _wrong("data.source", f"{data.source} needs a data.root", hint)
    folder = _absolute(base, data.root)
    if not folder.is_dir():
        raise _wrong("data.root", f"there is no folder {str(folder)!r}", _nearest_sibling(folder))
    return folder


def _wrong(field: str, message: str, hint: str) -> InputError:
    return InputError(f"{field}: {message}", where=field, hint=hint, field=field)


def _version(distribution: str) -> str:
    if (found := version(distribution)) is None:
        message = f"{distribution} is not installed, which the data set comes from"
        raise _wrong("data.source", message, f"pip install {distribution}")
    return found


def _tree(source: Path, field: str, memo: _Memo, progress: Progress | None) -> list[list[object]]:
    """[relative path, size in bytes, sha256] of every image and tar of a source, sorted by path; one row for a file."""
    try:
        if source.is_file():
            if source.suffix not in TARS:
                hint = "give a folder with a folder per class, or a .tar of one"
                raise _wrong(field, f"{str(source)!r} is neither a folder nor a .tar", hint)
            found = {"": (str(source), source.stat())}
        elif source.is_dir():
            found = {name: (path, info) for name, path, info in _walk(source)}
        else:
            bare = next((name for name in _NAMED if re.split("[:/]", name)[1] == source.name.lower()), None)
            near = bare or nearest(source.name, _NAMED)
            hint = f"did you mean {near!r}?" if near else _nearest_sibling(source)
            raise _wrong(field, f"there is no {str(source)!r}", hint)
    except OSError as error:
        raise _unreadable(error.filename or str(source), error) from error
    if not any(name == "" or "/" in name or name.endswith(tuple(TARS)) for name in found):
        what = f"{str(source)!r} holds {'images, but no folders' if found else 'no image'}"
        raise _wrong(field, what, "it needs a folder of images for each class")
    memo.forget_missing_below(source, {path for path, _ in found.values()})
    digests = {name: memo.get(path, info) for name, (path, info) in found.items()}
    unknown = [name for name, digest in digests.items() if digest is None]
    with progress.task("hash the data", len(unknown)) if progress and unknown else nullcontext() as task:
        for name in unknown:
            digests[name] = _hashed(*found[name], memo)
            if task is not None:
                task.advance()
    return [[_text(name), found[name][1].st_size, digests[name]] for name in sorted(found)]


def _hashed(path: str, info: os.stat_result, memo: _Memo) -> str:
    try:
        return memo.put(path, info, *sha256_file(Path(path)))
    except OSError as error:
        raise _unreadable(path, error) from error


def _text(name: str) -> str:
    """A file name as text that JSON can hold, even one that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(root: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """(relative path, path, stat) of all images and tars below `root`.

    Links are followed, but no folder is entered twice: links to each other would otherwise multiply without end.
    Entries come sorted, so that it does not depend on the disk under which of its names such a folder counts. Paths are
    text because a million Path objects take a while.
    """
    entered: set[tuple[int, int]] = set()
    todo = [("", str(root))]
    while todo:
        prefix, folder = todo.pop()
        info = Path(folder).stat()
        if (info.st_dev, info.st_ino) in entered:
            continue
        entered.add((info.st_dev, info.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                wanted = f".{entry.name.rpartition('.')[2].lower()}" in _COUNTED
                try:
                    target = entry.stat()
                except OSError as error:
                    if wanted:
                        raise _unreadable(entry.path, error) from error
                    continue  # a broken link to something that is no image
                if stat.S_ISDIR(target.st_mode):
                    todo.append((f"{prefix}{entry.name}/", entry.path))
                elif wanted and stat.S_ISREG(target.st_mode):
                    yield f"{prefix}{entry.name}", entry.path, target


def _nearest_sibling(path: Path) -> str:
    """What is there instead of a missing path."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    with suppress(OSError):
        names = sorted(entry.name for entry in parent.iterdir())
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        if near:
            return f"did you mean {str(parent / near[0])!r}?"
    return f"{str(parent)!r} is there, but it has no {path.name!r}"


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"the data cannot be read ({error.strerror})", where=path, hint="repair or remove it")


class _Memo:
    """path -> (stamp, sha256), kept in one JSON file that may be lost at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        self.started_ns = time.time_ns()
        self.entries: dict[str, tuple[_Stamp, str]] = {}
        try:
            stored = json.loads(path.read_bytes())
            self.entries = {str(name): (_stamp_of(*stamp), str(digest)) for name, (stamp, digest) in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            self.entries = {}  # absent or damaged: everything is hashed again

    def get(self, path: str, info: os.stat_result) -> str | None:
        known = self.entries.get(path)
        return known[1] if known and known[0] == _stamp(info) else None

    def put(self, path: str, info: os.stat_result, digest: str, size: int) -> str:
        if size != info.st_size or _stamp(Path(path).stat()) != _stamp(info):
            raise InputError("the data changed while it was read", where=path, hint="wait until nothing writes there")
        if self.started_ns - max(info.st_mtime_ns, info.st_ctime_ns) > _SETTLED_NS:
            self.entries[path] = (_stamp(info), digest)
            self.changed = True
        return digest

    def forget_missing_below(self, source: Path, present: set[str]) -> None:
        below = f"{source}{os.sep}"
        gone = [name for name in self.entries if name.startswith(below) and name not in present]
        for name in gone:
            del self.entries[name]
        self.changed = self.changed or bool(gone)

    def save(self) -> None:
        """Keep the memo if the disk lets us; without it the next look is slower and just as right."""
        if not self.changed:
            return
        _write(self.path, json.dumps(self.entries))


def _stamp(info: os.stat_result) -> _Stamp:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def _stamp_of(size: int, mtime_ns: int, ctime_ns: int, inode: int) -> _Stamp:
    return size, mtime_ns, ctime_ns, inode
