"""Several processes on torch's own engine: how they are started, and what they say to each other beside tensors.

`start` runs a command line in so many processes with torch's launcher, as torchrun does; a user may as well call
torchrun. Each of them is then one of `Together`: a key-value store for JSON messages at once, and for every job that is
shared a process group (gloo on CPUs, nccl on GPUs) for tensors. A process that failed is not started again: torch's
launcher can hang in it on gloo. The next run goes on from the last checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..methods import InvalidInput

MEETING = timedelta(minutes=15)
ORPHANED_S = 20.0  # between asking an orphan to end and ending it
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Together:
    """This process among those that torchrun, or `start`, has started. A context: whoever follows is killed with its
    parent, the first is asked to end.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        self.nodes = max(1, self.size // self.here)
        self._parent = os.getppid()
        _end_with_parent(self._parent, signal.SIGKILL if self.rank else signal.SIGTERM)
        if self.rank:  # the first process says when it is over, and the launcher kills whoever does not hear it
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a partner that is missed is told by the engine

        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        self._store = PrefixStore("sievit", store)
        self._heard = self._told = 0
        self._store.set(f"process/{self.rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *error: object) -> None:
        # Where the first process hosts the store, it must not go before the others have heard its last word.
        if self.rank:
            self._store.set(f"over/{self.rank}", "")
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            deadline = time.monotonic() + ORPHANED_S
            names = [f"over/{rank}" for rank in range(1, self.size)]
            while not self._store.check(names) and time.monotonic() < deadline:
                time.sleep(0.05)

    def tell(self, message: Mapping[str, Any]) -> None:
        """To all others, who hear messages in order."""
        self._store.set(f"message/{self._told}", json.dumps(message))
        self._told += 1

    def hear(self) -> dict[str, Any]:
        """The next message, however long it takes."""
        name, pause = f"message/{self._heard}", 0.002
        while not self._store.check([name]):
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        self._heard += 1
        message: dict[str, Any] = json.loads(self._store.get(name))
        return message

    def report(self, number: int, word: Mapping[str, Any]) -> None:
        """Leave word of job `number`."""
        self._store.set(f"report/{number}/{self.rank}", json.dumps(word))

    def reports(self, number: int, wait_s: float) -> dict[int, dict[str, Any]]:
        """Rank -> its word on job `number`, of those that leave it within the time."""
        names = {rank: f"report/{number}/{rank}" for rank in range(1, self.size)}
        deadline = time.monotonic() + wait_s
        while not self._store.check(list(names.values())) and time.monotonic() < deadline:
            time.sleep(0.01)
        return {rank: json.loads(self._store.get(name)) for rank, name in names.items() if self._store.check([name])}

    def gone(self) -> list[int]:
        """Ranks of processes on this machine that have ended."""
        found = []
        for rank in range(1, self.size):
            host, pid = json.loads(self._store.get(f"process/{rank}"))
            if host == socket.gethostname() and _ended(pid):
                found.append(rank)
        return found

    @property
    def orphaned(self) -> bool:
        return os.getppid() != self._parent

    def open(self, number: int, device: str) -> None:
        """A process group for job `number`. Raises: InvalidInput when there are more processes than GPUs."""
        import torch
        from torch import distributed as dist

        if device == "cuda":
            check_gpus(self.here)
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore(f"job/{number}", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
        )

    def close(self) -> None:
        """End the group, whether it came about or not."""
        from torch import distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def broke(self, error: BaseException) -> bool:
        """Whether an error is only that the connection to another process broke."""
        from torch import distributed as dist

        gloo = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection" in str(error))
        return gloo or isinstance(error, dist.DistError)


def check_gpus(processes: int) -> None:
    """Raises: InvalidInput for more processes on a machine than it has GPUs."""
    import torch

    if (gpus := torch.cuda.device_count()) < processes:
        raise InvalidInput(
            f"launch.processes: {processes} processes on this machine need a GPU each, and torch sees {gpus}",
            f"start {gpus}, or set device: cpu" if gpus else "set device: cpu",
            field="launch.processes",
        )


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False  # no /proc: its parent will miss it soon
    return state in "ZX"  # dead, and not yet missed by its parent


def _end_with_parent(parent: int, number: signal.Signals) -> None:
    """Let no process outlive the one that started it, however that one ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), number)
        time.sleep(ORPHANED_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def start(arguments: Sequence[str], processes: int, nodes: int, rendezvous: str | None, device: str) -> tuple[int, str]:
    """Run `sievit` with these arguments in so many processes of this machine, which is one of `nodes` that do so.

    The first process alone speaks to the terminal. Returns: the exit code, and what is left to say: why it could not
    speak itself.
    Raises: InvalidInput when there are more processes than GPUs.
    """
    if device == "cuda":
        check_gpus(processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What goes wrong is told by ourselves. Each of torch's modules sets a level of its own, so none inherits this one.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="sievit-launch-") as folder:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            run_id="sievit",
            rdzv_backend="c10d",
            rdzv_endpoint=rendezvous or "localhost:0",
            max_restarts=0,
            local_addr="localhost" if nodes == 1 else None,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "sievit.stages", *arguments)
        except SignalException as stopped:
            return 128 + int(stopped.sigval), ""
        except ChildFailedError as failed:
            return _verdict({rank: one.exitcode for rank, one in failed.failures.items()}, failed, processes * nodes)
        except RendezvousError as error:
            raise InvalidInput(
                f"launch.rendezvous: the {nodes} nodes did not find each other at {rendezvous} ({error})",
                "start the same command on every node, with an address that all of them reach",
            ) from error
    return 0, ""


def _verdict(codes: Mapping[int, int], failed: Any, size: int) -> tuple[int, str]:
    """Exit code and what is left to say. codes: of the processes of this machine that ended with another than 0, by
    rank, negative for signals; the first of all speaks for itself unless a signal ended it.
    """
    rank, first = failed.get_first_failure()
    if codes.get(0, -1) > 0:
        return codes[0], ""
    if first.exitcode > 0:
        return int(first.exitcode), ""
    name = signal.Signals(-first.exitcode).name
    return 1, f"process {rank + 1} of {size} was ended by {name}"
