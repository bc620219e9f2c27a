"""Joules that a machine spends while a stage runs, where it counts them: processors and their memory by RAPL, NVIDIA
GPUs by NVML.

The counters are the machine's and not a process's: whatever else runs at the time is in them. Where there are none, or
where only root may read them (the default of most Linux systems), the answer is None and never an estimate.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A counter of 2^32 microjoules, the smallest there are, is full after 10 s at 400 W; most are sixty times as large.
EVERY_S = 5.0


@dataclass
class Counter:
    """Something that counts joules up to `range` (None: without end) and then begins at 0 again. total: since it was
    first read, once `update` was called; None when it could not be read.
    """

    read: Callable[[], float]
    range: float | None
    before: float
    total: float | None = 0.0

    def update(self) -> None:
        """To be called more often than the counter is filled."""
        if self.total is None:
            return
        try:
            now = self.read()
        except Exception:  # a driver that no longer answers has errors of its own
            self.total = None
            return
        self.total += now - self.before + (self.range or 0.0 if now < self.before else 0.0)
        self.before = now


class Meter:
    """Counts within a `with`: joules of the processors, and where the stage computes on a GPU of the GPUs."""

    def __init__(self, device: str, powercap: Path = POWERCAP) -> None:
        self._counters = {"cpu": _processors(powercap), "gpu": _gpus() if device == "cuda" else []}
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)

    def __enter__(self) -> Meter:
        if any(self._counters.values()):
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def joules(self) -> dict[str, float | None] | None:
        """So far, of each kind; None for a kind that nothing counts, and for all where there is none."""
        if not any(self._counters.values()):
            return None
        self._update()
        return {kind: _sum(counters) for kind, counters in self._counters.items()}

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            self._update()

    def _update(self) -> None:
        with self._lock:
            for counters in self._counters.values():
                for counter in counters:
                    counter.update()


def _sum(counters: Sequence[Counter]) -> float | None:
    """All of them together; None where one is missing, since a part would look like the whole."""
    totals = [counter.total for counter in counters]
    known = [total for total in totals if total is not None]
    return round(sum(known), 3) if known and len(known) == len(totals) else None


def _processors(powercap: Path) -> list[Counter]:
    """RAPL's packages and the memory beside them. Cores and graphics are parts of a package, psys of the board counts
    all once more, and so do the same packages under another bus (intel-rapl-mmio).
    """
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if name.startswith("package") or name == "dram":
                full = float((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
                counters.append(_counter(partial(_microjoules, zone / "energy_uj"), full))
        except (OSError, ValueError):
            return []  # the sum over the others would pass for that of the machine
    return counters


def _microjoules(file: Path) -> float:
    return float(file.read_text(encoding="ascii")) / 1e6


def _gpus() -> list[Counter]:
    """NVML's counters of all GPUs of this machine, where nvidia-ml-py is installed and a driver answers."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [_counter(partial(_since_the_driver, nvml, handle), None) for handle in handles]
    except Exception:  # no package, no driver, or a GPU that does not count (older than Volta)
        return []


def _since_the_driver(nvml: Any, handle: Any) -> float:
    millijoules: int = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    return millijoules / 1e3


def _counter(read: Callable[[], float], full: float | None) -> Counter:
    return Counter(read, full, before=read())
