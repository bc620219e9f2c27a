"""One writer a key: advisory locks that the kernel releases when their holder dies, so that none is ever stale.

The lock file also says, as JSON, who holds it. That text is for people; the lock itself is flock(2).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from .errors import LockedError

_POLL_S = 0.05

# Workers that a stage forks would inherit the lock and outlive a killed engine with it. They let go of it at birth; the
# engine's own hold is not touched by that, because flock belongs to the open file and the engine still has it open.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock: process id, host name, and since when (ISO 8601, UTC)."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def hold(
    path: Path, what: str, *, wait_s: float = 0.0, shared: bool = False, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the lock of `path` for the length of a `with` block.

    wait_s:   how long to wait for another holder; then LockedError names it.
    shared:   any number of shared holders, or one that is not.
    waiting:  told once, who is waited for.
    """
    handle = _acquire(path, what, wait_s, shared, waiting)
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        os.close(handle)  # which releases the lock


def _acquire(path: Path, what: str, wait_s: float, shared: bool, waiting: Callable[[str], None] | None) -> int:
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if _is_still(path, handle):
                _sign(handle)
                return handle
            os.close(handle)  # gc removed the file between open and lock: this lock excludes nobody
            continue
        except BlockingIOError:
            os.close(handle)
        except BaseException:
            os.close(handle)
            raise
        holder = read_holder(path)
        who = str(holder) if holder else "another process"
        if time.monotonic() >= deadline:
            raise LockedError(
                f"{what} is held by {who}",
                where=str(path),
                hint="try again when it has finished, or wait for it with --wait SECONDS",
            )
        if waiting and not told:
            waiting(f"waiting for {what}: held by {who}")
            told = True
        time.sleep(_POLL_S)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    holder = Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(holder)).encode(), 0)


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock file last; None when it does not say (it is being signed just now)."""
    try:
        fields = json.loads(path.read_bytes())
        return Holder(int(fields["pid"]), str(fields["host"]), str(fields["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def at_work(path: Path) -> Holder | None:
    """The other process of this host that signed a lock last and still lives. The lock itself is not tried: whoever
    wants it in that moment would be refused.
    """
    holder = read_holder(path)
    if holder is None or holder.host != socket.gethostname() or holder.pid == os.getpid():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is another user's, and lives
    return holder
