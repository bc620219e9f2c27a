"""The child process that times one ONNX file. One file a process: idle sessions of a shared process slow each other.

Imports numpy and ONNX Runtime alone, so that its memory is that of a deployment.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .child import answering, serve
from .sessions import node_times, open_session, placement

SEED = 20260101  # the inputs are the same for every variant


class Worker:
    """State between commands: the session, and the call that is timed."""

    def __init__(self) -> None:
        self.session: ort.InferenceSession | None = None
        self.provider = "cpu"
        self.input: dict[str, Any] = {}
        self.call: Callable[[], object] = lambda: None
        self.traces: tempfile.TemporaryDirectory[str] | None = None

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Pin the process, open the session (anew for TensorRT, whose engines are built for one shape)."""
        if cores := command["cores"]:
            os.sched_setaffinity(0, cores)
        self.provider, self.input = command["provider"], command["input"]
        if self.session is not None and self.provider != "tensorrt":
            return {}
        start = time.perf_counter()
        self.session = open_session(
            Path(command["path"]),
            provider=self.provider,
            threads=command["threads"],
            shapes={self.input["name"]: command["shape"]},
            cache=Path(command["cache"]),
            profile=Path(command["profile"]) if "profile" in command else None,
        )
        return {"load_ms": (time.perf_counter() - start) * 1e3, "providers": self.session.get_providers()}

    def trace(self, command: dict[str, Any]) -> dict[str, Any]:
        """As load, with every operator's time written down from here on."""
        self.traces = tempfile.TemporaryDirectory()
        return self.load(command | {"profile": str(Path(self.traces.name) / "profile")})

    def traced(self, command: dict[str, Any]) -> dict[str, Any]:
        """The operators in order of execution, each with its lower quartile over the calls since `trace`, ms."""
        assert self.session is not None and self.traces is not None
        with self.traces:
            nodes = node_times(Path(self.session.end_profiling()))
        self.session = self.traces = None
        return {"nodes": nodes}

    def prepare(self, command: dict[str, Any]) -> dict[str, Any]:
        """Make the inputs and run the first call."""
        assert self.session is not None
        inputs = random_input(command["shape"], self.input["dtype"])
        start = time.perf_counter()
        self.call = bind(self.session, self.input["name"], inputs, command["io"])
        self.call()
        return {"first_ms": (time.perf_counter() - start) * 1e3}

    def warm(self, command: dict[str, Any]) -> dict[str, Any]:
        """Call until the median is steady; see `warm_up`."""
        return warm_up(self.call, command["limit_s"])

    def time(self, command: dict[str, Any]) -> dict[str, Any]:
        """One slot: an untimed call, then `calls` timed ones."""
        return time_calls(self.call, command["calls"])

    def queries(self, command: dict[str, Any]) -> dict[str, Any]:
        """Answer queries that come at random, at so many a second; see `answer_queries`."""
        gaps = np.random.default_rng(command["seed"]).exponential(1 / command["rate"], command["queries"])
        return answer_queries(self.call, np.cumsum(gaps).tolist(), command["bound_ms"])

    def memory(self, command: dict[str, Any]) -> dict[str, Any]:
        """Peak resident memory of this process so far (Python and ONNX Runtime included), MB."""
        return {"peak_memory_mb": peak_memory_mb()}

    def place(self, command: dict[str, Any]) -> dict[str, Any]:
        """Profile one call in a session of its own: which provider ran which operators."""
        with tempfile.TemporaryDirectory() as folder:
            session = open_session(
                Path(command["path"]),
                provider=command["provider"],
                threads=command["threads"],
                shapes={command["input"]["name"]: command["shape"]},
                cache=Path(command["cache"]),
                profile=Path(folder) / "profile",
            )
            name = command["input"]["name"]
            session.run(None, {name: random_input(command["shape"], command["input"]["dtype"])})
            found = placement(Path(session.end_profiling()), command["provider"])
        return {"nodes": found.nodes, "kernels": found.kernels}


def peak_memory_mb() -> float:
    """Peak resident memory of this process, MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would begin at the size of the process that started this one
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1000 * 1.024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1000 * 1.024


def random_input(shape: list[int], dtype: str) -> NDArray[np.generic]:
    """Normal noise as normalised images have it, or bytes; the same for equal shapes."""
    rng = np.random.default_rng(SEED)
    if dtype == "uint8":
        return rng.integers(256, size=shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)


def bind(
    session: ort.InferenceSession, name: str, inputs: NDArray[np.generic], io: str, device: str = "cuda"
) -> Callable[[], object]:
    """The call to time. io: "host" (CPU), "copy" (to the card and back each call), "device" (all stays there)."""
    if io != "device":
        feed, outputs = {name: inputs}, [session.get_outputs()[0].name]
        return lambda: session.run(outputs, feed)
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(inputs, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    binding.synchronize_inputs()

    def run() -> ort.IOBinding:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()  # without it the clock would stop before the card does
        return binding

    return run


def warm_up(call: Callable[[], object], limit_s: float) -> dict[str, Any]:
    """Call until three windows in a row (10 calls or 20 ms each) have medians within 5 %, at most `limit_s` seconds."""
    medians: list[float] = []
    start = time.perf_counter()
    calls = 0
    while True:
        window: list[float] = []
        opened = time.perf_counter()
        while len(window) < 10 or time.perf_counter() - opened < 0.02:
            before = time.perf_counter()
            call()
            window.append(time.perf_counter() - before)
            if time.perf_counter() - start > limit_s:
                break
        calls += len(window)
        medians.append(float(np.median(window)))
        last = medians[-3:]
        steady = len(last) == 3 and max(last) <= 1.05 * min(last)
        if steady or time.perf_counter() - start > limit_s:
            return {"calls": calls, "steady": steady, "call_ms": medians[-1] * 1e3}


def time_calls(call: Callable[[], object], calls: int) -> dict[str, Any]:
    """Wall time of each call; processor time of the process and of this thread, mean a call. Milliseconds."""
    call()  # brings the caches back that another variant used meanwhile
    gc.disable()
    try:
        walls = [0] * calls
        process, thread = time.process_time_ns(), time.thread_time_ns()
        for index in range(calls):
            before = time.perf_counter_ns()
            call()
            walls[index] = time.perf_counter_ns() - before
        process, thread = time.process_time_ns() - process, time.thread_time_ns() - thread
    finally:
        gc.enable()
    return {
        "wall_ms": [wall / 1e6 for wall in walls],
        "cpu_ms": process / 1e6 / calls,
        "thread_ms": thread / 1e6 / calls,
    }


def answer_queries(
    call: Callable[[], object],
    arrivals: Sequence[float],
    bound_ms: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """A queue with one server, first come, first served: each query takes one call. arrivals: seconds from the start.

    Returns latency_ms, from a query's arrival to its answer, waiting included, and done: False where it was given up
    because more than one in a hundred, and one, had already missed the bound.
    """
    latencies: list[float] = []
    left = 1 + len(arrivals) // 100
    gc.disable()
    try:
        start = clock()
        for arrival in arrivals:
            while (early := start + arrival - clock()) > 0:
                if early > 0.002:  # a sleep ends late; the last moment is waited for on the core
                    sleep(early - 0.001)
            call()
            latencies.append((clock() - start - arrival) * 1e3)
            left -= latencies[-1] > bound_ms
            if left < 0:
                return {"latency_ms": latencies, "done": False}
    finally:
        gc.enable()
    return {"latency_ms": latencies, "done": True}


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    worker = Worker()
    for command, stream in serve():
        with answering(stream) as content:
            match command["do"]:
                case "ready":
                    pass
                case "load":
                    content |= worker.load(command)
                case "prepare":
                    content |= worker.prepare(command)
                case "warm":
                    content |= worker.warm(command)
                case "time":
                    content |= worker.time(command)
                case "queries":
                    content |= worker.queries(command)
                case "trace":
                    content |= worker.trace(command)
                case "traced":
                    content |= worker.traced(command)
                case "memory":
                    content |= worker.memory(command)
                case "place":
                    content |= worker.place(command)
                case other:
                    raise ValueError(f"unknown command {other}")


if __name__ == "__main__":
    main()
