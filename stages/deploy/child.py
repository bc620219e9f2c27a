"""Child processes that die with their parent, speak JSON lines, and cannot hang it.

Timing needs processes of its own (idle ONNX Runtime threads slow their neighbours), and a model from elsewhere may
crash, loop for ever or ask for a terabyte. A child answers one JSON line a command on its original stdout; whatever
libraries print goes to a log file, whose end is quoted when something fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import psutil

from ..methods import InvalidInput

PR_SET_PDEATHSIG = 1
# A model's own settings must not reach its measurement; telemetry stays off; numpy needs no threads in a child.
CLEARED = ("ORT_LOAD_CONFIG_FROM_MODEL", "ORT_TENSORRT_ENGINE_CACHE_ENABLE", "ORT_TENSORRT_FP16_ENABLE")
SET = {"NNCF_CI": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class ChildFailed(RuntimeError):
    """A child crashed, hung, or said that a command failed; the message says which."""


class Child:
    """A running child process. Close it, or use it as a context manager."""

    def __init__(self, module: str, label: str, *, package: str = "", limited: bool = True) -> None:
        """module: calls `serve`; a sibling of this file, or of another package. label: how errors name it.

        limited: address space no larger than the machine's memory, so that a model which asks for a terabyte fails
        alone (graphics drivers and torch reserve more than that, hence the choice).
        """
        self.label = label
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        environment = {name: value for name, value in os.environ.items() if name not in CLEARED} | SET
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        # -P: the working folder must not be able to shadow a module.
        path = f"{package or __package__}.{module}"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", path, str(os.getpid()), "limited" if limited else "free"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._buffer = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, command: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises InvalidInput when the child refuses the input, ChildFailed when it crashes or exceeds `timeout_s`.
        """
        self.send(command)
        return self.receive(str(command.get("do", "command")), timeout_s)

    def send(self, command: Mapping[str, Any]) -> None:
        """Write one command; the answer is read with `receive`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._died(str(command.get("do", "command"))) from None

    def receive(self, doing: str, timeout_s: float) -> dict[str, Any]:
        """The next answer; see `ask`."""
        line = self._line(doing, time.monotonic() + timeout_s, timeout_s)
        answer: dict[str, Any] = json.loads(line)
        if "invalid" in answer:
            raise InvalidInput(answer["invalid"], answer.get("hint", ""))
        if "failed" in answer:
            raise ChildFailed(f"{self.label}: {doing} failed: {answer['failed']}{self._log_end()}")
        return answer

    def close(self) -> None:
        """End the child at once; it keeps nothing that is worth a farewell."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # a command that the child did not live to read
                    stream.close()

    def _line(self, doing: str, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self._process.kill()
                raise ChildFailed(f"{self.label}: no answer to {doing} within {timeout_s:g} s; its process was ended")
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                raise self._died(doing)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, doing: str) -> ChildFailed:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ChildFailed(f"{self.label}: its process ended during {doing} ({how}){self._log_end()}")

    def _log_end(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 2000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return "; its log ends: " + " | ".join(lines[-3:]) if lines else ""


def serve() -> Iterator[tuple[dict[str, Any], IO[bytes]]]:
    """In the child: the commands as they come, each with the stream for its answer; ends when the parent is gone."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries print to stdout as they like; from here on that is the log
    if sys.argv[2] == "limited":
        limit = max(psutil.virtual_memory().total + psutil.swap_memory().total, 4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        yield json.loads(line), answers


def answer(stream: IO[bytes], content: Mapping[str, Any]) -> None:
    """In the child: answer a command."""
    stream.write(json.dumps(content).encode() + b"\n")


@contextmanager
def answering(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """In the child: fill the yielded mapping; an exception becomes an answer that the parent raises again."""
    content: dict[str, Any] = {}
    try:
        yield content
    except InvalidInput as error:
        answer(stream, {"invalid": str(error), "hint": error.hint})
    except Exception as error:  # reported to the parent, which names the command and quotes the log
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        answer(stream, {"failed": f"{type(error).__name__}: {text[:500]}"})
    else:
        answer(stream, content)


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere the end of its input has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)
