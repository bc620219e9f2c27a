"""The store: `artifacts/<stage>/<key>/`, each folder immutable, none known to a database.

    artifacts/
      train/3fa9c1d20b7e/   manifest.json, payload files, figures/*.svg
      train/.work-<key>/    checkpoints of a stage that has not finished; survives a kill
      train/.tmp-<key>-*/   an artifact that is being written; never read, swept by gc
      train/.version        the last running version that was given out
      runs/<run id>/        run.json and the report
      .locks/ .cache/       who is writing what; hashes of data files

The manifests are the only truth about what there is. `.version` only keeps a number from being given out twice after
gc.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import commit, locks
from . import manifest as manifests
from .errors import InputError, IntegrityError
from .manifest import REMEDY
from .verify import damaged, verify_files

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_KEY = re.compile(r"[0-9a-f]{12}")
KEY_DIGITS = 12
_REF = re.compile(r"(?P<stage>[^@]+)(?:@(?P<which>.*))?", re.DOTALL)
MIN_FREE_BYTES = 50 * 2**20


@dataclass(frozen=True, eq=False)
class Artifact:
    """One version folder. Equality is identity: compare `digest` for content."""

    root: Path
    kind_of_stage: str
    key: str
    version: int
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def ref(self) -> str:
        """How people name it, such as train@7."""
        return f"{self.kind_of_stage}@{self.version}"

    @property
    def digest(self) -> str:
        """SHA-256 over the payload's names and contents: what later stages' keys depend on."""
        return str(self.manifest["digest"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage measured."""
        return dict(self.manifest["metrics"])

    @property
    def ledger(self) -> Mapping[str, Any]:
        """What the stage cost."""
        return dict(self.manifest["ledger"])

    def file(self, name: str) -> Path:
        """The path of a payload file. InputError when the artifact has none of that name."""
        files = self.manifest["files"]
        if name not in files:
            raise InputError(
                f"{self.ref} holds no file {name!r}", where=str(self.root), hint=f"it holds {', '.join(sorted(files))}"
            )
        return self.root / name


@dataclass
class Draft:
    """An artifact in the making, its key's lock held.

    out:  the folder that becomes the artifact.
    work: the folder for checkpoints; it survives everything but `commit`.
    """

    store: Store
    stage: str
    key: str
    out: Path
    work: Path

    def commit(self, fields: Mapping[str, Any]) -> Artifact:
        """Make `out` an artifact. `fields` are the manifest's fields besides those that only the store knows
        (schema, stage, key, version, files, digest)."""
        disk = self.store.disk
        files = commit.seal(self.out, disk)
        manifest = manifests.sealed(
            {
                "schema": manifests.SCHEMA,
                "stage": self.stage,
                "key": self.key,
                "version": self.store.next_version(self.stage),
                "digest": manifests.content_digest(files),
                **fields,
                "files": files,
            }
        )
        final = self.store.folder(self.stage, self.key)
        commit.publish(self.out, final, manifest, disk)
        commit.discard(self.work)
        return self.store.open(self.stage, self.key)


class Store:
    """Reads, makes and checks artifacts below `root`. Creating a Store touches nothing on the disk."""

    def __init__(self, root: Path, *, disk: commit.Disk | None = None) -> None:
        self.root = root
        self.disk = disk or commit.Disk()

    @property
    def runs(self) -> Path:
        """Where run records and reports are kept."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """What may be deleted at any time and is made again."""
        return self.root / ".cache"

    def folder(self, stage: str, key: str) -> Path:
        """The final folder of an artifact, whether it exists or not."""
        return self.root / stage / key

    def work(self, stage: str, key: str) -> Path:
        """The folder for checkpoints of an artifact that is not finished, whether it exists or not."""
        return self.root / stage / f".work-{key}"

    def at_work(self, stage: str, key: str) -> locks.Holder | None:
        """The other process of this host that makes an artifact now."""
        return locks.at_work(self.root / ".locks" / f"{stage}-{key}.lock")

    # ---- reading

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact of a key, None if there is none. Reads the manifest only; `verify` reads the files."""
        if not self.folder(stage, key).is_dir():
            return None
        return self.open(stage, key)

    def open(self, stage: str, key: str) -> Artifact:
        """The artifact of an existing folder. IntegrityError: its manifest is missing, damaged, another's or of a
        newer schema.
        """
        folder = self.folder(stage, key)
        what = f"{manifests.NAME} of {stage}@{key}"
        try:
            manifest = manifests.read_json(folder / manifests.NAME, what)
        except FileNotFoundError:
            raise IntegrityError(f"{what} is missing", where=str(folder), hint=REMEDY) from None
        schema = manifest.get("schema")
        if isinstance(schema, int) and schema > manifests.SCHEMA:
            raise IntegrityError(
                f"{what} was written by a newer Sievit (manifest schema {schema}, known here: {manifests.SCHEMA})",
                where=str(folder),
                hint="upgrade Sievit, or use another --store",
            )
        if not manifests.own_digest_holds(manifest):
            raise IntegrityError(
                f"{what} is not the one that was written: its own digest does not fit", where=str(folder), hint=REMEDY
            )
        if fault := manifests.fault(manifest):
            raise IntegrityError(f"{what} is incomplete: {fault}", where=str(folder), hint=REMEDY)
        if manifest["stage"] != stage or manifest["key"] != key:
            raise IntegrityError(
                f"{what} is that of {manifest['stage']}@{manifest['key']}: the folder was renamed or copied",
                where=str(folder),
                hint=REMEDY,
            )
        return Artifact(folder, stage, key, manifest["version"], manifest)

    def stages(self) -> list[str]:
        """The stage kinds of which there may be artifacts."""
        if not self.root.is_dir():
            return []
        return sorted(
            p.name for p in self.root.iterdir() if p.is_dir() and p.name != "runs" and _NAME.fullmatch(p.name)
        )

    def is_empty(self) -> bool:
        """Whether nothing has been finished in it. No manifest is read."""
        return not any(any((self.root / stage).glob(f"*/{manifests.NAME}")) for stage in self.stages())

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """All readable artifacts, of one stage kind or of all, by stage and version. `unreadable` lists the others."""
        return self.scan(stage)[0]

    def unreadable(self, stage: str | None = None) -> list[tuple[Path, IntegrityError]]:
        """The artifact folders whose manifest does not hold, and why."""
        return self.scan(stage)[1]

    def scan(self, stage: str | None = None) -> tuple[list[Artifact], list[tuple[Path, IntegrityError]]]:
        """Both of them, every manifest read once."""
        found: list[Artifact] = []
        broken: list[tuple[Path, IntegrityError]] = []
        for name in [stage] if stage else self.stages():
            folder = self.root / name
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if _KEY.fullmatch(path.name) and path.is_dir():
                    try:
                        found.append(self.open(name, path.name))
                    except IntegrityError as error:
                        broken.append((path, error))
        found.sort(key=lambda artifact: (artifact.kind_of_stage, artifact.version, artifact.key))
        return found, broken

    def resolve(self, ref: str) -> Artifact:
        """The artifact that a reference names: `train`, `train@latest`, `train@7` or `train@3fa9` (the beginning of a
        key).

        Digits alone are a version, never the beginning of a key: whether train@99 names anything must not depend on
        how a hash happens to begin. A whole key of digits is a key.
        InputError: no reference at all, or one that names nothing or two things.
        """
        match = _REF.fullmatch(ref)
        if not match or not _NAME.fullmatch(match["stage"]):
            raise InputError(
                f"{ref!r} is no artifact reference", hint="write train, train@latest, train@7 or train@3fa9"
            )
        stage, which = match["stage"], match["which"]
        if which is not None and not re.fullmatch(r"latest|[0-9]+|[0-9a-f]{1,12}", which):
            raise InputError(
                f"{ref!r} is no artifact reference: after @ comes a version, the beginning of a key, or `latest`",
                hint=f"write {stage}, {stage}@latest, {stage}@7 or {stage}@3fa9",
            )
        made = self.artifacts(stage)
        if not made:
            raise self._nothing_of(stage)
        if which in (None, "latest"):
            return made[-1]
        if str(which).isdecimal() and len(str(which)) < KEY_DIGITS:
            hits = [a for a in made if str(a.version) == which]
        else:
            hits = [a for a in made if a.key.startswith(str(which))]
        if len(hits) > 1:
            raise InputError(f"{ref!r} is ambiguous", hint=f"it may be {', '.join(f'{stage}@{a.key}' for a in hits)}")
        if not hits:
            raise InputError(f"there is no {ref}", where=str(self.root / stage), hint=_nearest(stage, str(which), made))
        return hits[0]

    def _nothing_of(self, stage: str) -> InputError:
        near = difflib.get_close_matches(stage, self.stages(), n=1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif self.stages():
            hint = f"there are artifacts of {', '.join(self.stages())}"
        else:
            hint = "the store is empty: `sievit run` fills it"
        return InputError(f"there is no artifact of stage {stage!r}", where=str(self.root), hint=hint)

    def verify(self, artifact: Artifact) -> None:
        """Read every byte and compare it with the manifest, and the manifest with itself.

        IntegrityError names the file, what was expected and what was found: a changed, missing or additional file, a
        link.
        """
        root = artifact.root
        if root.is_symlink():
            raise damaged(artifact.ref, "its folder is a symbolic link", root)
        if not root.is_dir():
            raise damaged(artifact.ref, "its folder is missing", root)
        fresh = self.open(artifact.kind_of_stage, artifact.key)
        if fresh.manifest["manifest_sha256"] != artifact.manifest["manifest_sha256"]:
            raise damaged(artifact.ref, "its manifest was replaced since it was read", root / manifests.NAME)
        verify_files(artifact.ref, root, artifact.manifest["files"])

    # ---- making

    @contextlib.contextmanager
    def draft(
        self, stage: str, key: str, wait_s: float = 0.0, *, waiting: Callable[[str], None] | None = None
    ) -> Iterator[Draft]:
        """Hold a key's lock and give a folder to write its artifact into.

        LockedError: another process makes this key and did not finish within `wait_s`. After a wait, `find` tells
        whether it left anything to do. What is not committed when the block ends is removed, all but the work folder.
        """
        parent = self.root / stage
        self.create()
        if not parent.is_dir():
            parent.mkdir(exist_ok=True)
            self.disk.sync(self.root)
        with locks.hold(self.lock_path(f"{stage}-{key}"), f"{stage}@{key}", wait_s=wait_s, waiting=waiting):
            commit.recover(self.folder(stage, key), self.disk)
            for left in parent.glob(f".tmp-{key}-*"):  # of a process that was killed: its lock is gone, so is it
                commit.discard(left)
            work = self.work(stage, key)
            work.mkdir(exist_ok=True)
            out = parent / f".tmp-{key}-{uuid.uuid4().hex}"
            out.mkdir()
            try:
                yield Draft(self, stage, key, out, work)
            finally:
                commit.discard(out)
                with contextlib.suppress(OSError):
                    work.rmdir()  # only if nothing was left in it

    def next_version(self, stage: str) -> int:
        """The next running version of a stage kind: above all there are and all there ever were."""
        counter = self.root / stage / ".version"
        with locks.hold(self.lock_path(f"version-{stage}"), f"the version counter of {stage}", wait_s=60):
            version = 1 + max([_count(counter), *(artifact.version for artifact in self.artifacts(stage))])
            self.disk.replace(counter, f"{version}\n".encode())
        return version

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep gc away for as long as a run relies on what it found."""
        with locks.hold(self.lock_path("store"), "the store", wait_s=60, shared=True):
            yield

    @contextlib.contextmanager
    def for_removal(self) -> Iterator[None]:
        """Have the store alone. LockedError: a run is using it."""
        with locks.hold(self.lock_path("store"), "the store"):
            yield

    def lock_path(self, name: str) -> Path:
        """The lock file of a name, its folder made."""
        folder = self.root / ".locks"
        self.create()
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(self.root, error) from error
        return folder / f"{name}.lock"

    def create(self) -> None:
        """Make the root folder if it is not there. A new one tells git to leave it alone."""
        try:
            if not self.root.is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                (self.root / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise _not_writable(self.root, error) from error

    def require_space(self) -> None:
        """Refuse before any work is done what would fail after it: a store that cannot be written, or has under 50
        MiB free.
        """
        self.create()
        try:
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise _not_writable(self.root, error) from error
        free = shutil.disk_usage(self.root).free
        if free < MIN_FREE_BYTES:
            raise InputError(
                f"only {free // 2**20} MiB are free for the store; at least {MIN_FREE_BYTES // 2**20} MiB are needed",
                where=str(self.root),
                hint="free some space (`sievit gc` removes artifacts nobody needs), or use another --store",
            )


def _not_writable(root: Path, error: OSError) -> InputError:
    return InputError(
        f"the store cannot be written ({error.strerror})",
        where=str(root),
        hint="give this user the right to write there, or use another --store",
    )


def _nearest(stage: str, which: str, made: list[Artifact]) -> str:
    """What may have been meant by a version or key that there is not."""
    near = difflib.get_close_matches(which, [a.key for a in made], n=1, cutoff=0.3) if not which.isdigit() else []
    if near:
        return f"did you mean {stage}@{near[0]}? `sievit ls {stage}` lists them"
    shown = ", ".join(a.ref for a in made[-5:])
    return f"there {'is' if len(made) == 1 else 'are'} {'… ' if len(made) > 5 else ''}{shown}"


def _count(counter: Path) -> int:
    """The last version given out; 0 when nobody wrote it down, since the manifests say it too."""
    try:
        return int(counter.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0
