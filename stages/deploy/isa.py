"""Facts about the machine that explain a latency: processor, instruction sets, cores, governor, frequency, load.

Linux says most of it under /proc and /sys; elsewhere the facts that cannot be read are left out, never guessed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

# What decides how fast matrix products run: vectors, 8-bit dot products, bfloat16, tiles.
FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
CORES = Path("/sys/devices/system/cpu")


def host_facts() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory, frequency, governor, load averages."""
    cores = usable_cores()
    facts: dict[str, Any] = {
        "processor": processor_name(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "instruction_sets": instruction_sets(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(cores),
        "physical_cores": len(separate_cores(cores)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "virtual_machine": "hypervisor" in _cpuinfo("flags").split(),
    }
    if governor := _read(CORES / "cpu0/cpufreq/scaling_governor"):
        facts["governor"] = governor
    if megahertz := _cpuinfo("cpu MHz"):
        facts["megahertz"] = round(float(megahertz))
    if hasattr(os, "getloadavg"):
        facts["load_average"] = [round(value, 2) for value in os.getloadavg()]
    return facts


def processor_name() -> str:
    """As the system names it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of `FLAGS` that the processor has."""
    have = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in FLAGS if flag in have]


def usable_cores() -> list[int]:
    """Numbers of the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def separate_cores(cores: list[int]) -> list[int]:
    """One logical core of each physical one: two hardware threads of a core share its multipliers."""
    chosen: dict[str, int] = {}
    for core in cores:
        siblings = _read(CORES / f"cpu{core}/topology/thread_siblings_list") or str(core)
        chosen.setdefault(siblings, core)
    return sorted(chosen.values())


def measuring_cores(threads: int) -> list[int]:
    """The cores to pin `threads` threads to: the last ones, since core 0 serves most interrupts.

    [] where the system cannot pin, or has fewer cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = usable_cores()
    separate = separate_cores(cores)
    pool = separate if len(separate) >= threads else cores
    return pool[-threads:] if len(pool) >= threads else []


def busy_cores(seconds: float = 0.3) -> float | None:
    """How many cores were busy with anything (stolen time included) during the next `seconds`; None if unknown."""
    before = _jiffies()
    time.sleep(seconds)
    after = _jiffies()
    if before is None or after is None or after[1] == before[1]:
        return None
    idle, total = after[0] - before[0], after[1] - before[1]
    return round((1 - idle / total) * (os.cpu_count() or 1), 2)


def times_throttled() -> int | None:
    """How often the cores were slowed down for heat since boot, all counted; None where the system does not count."""
    counters = [_read(path) for path in CORES.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    return sum(int(count) for count in counters if count) if any(counters) else None


def graphics_cards() -> list[str]:
    """Names and drivers of NVIDIA cards, [] without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def busy_card() -> float | None:
    """The largest share of time that an NVIDIA card was at work just now, 0 to 1; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    shares = [int(line) / 100 for line in answer.stdout.split() if line.isdigit()]
    return max(shares, default=None) if answer.returncode == 0 else None


def _jiffies() -> tuple[int, int] | None:
    """(idle, all) jiffies of all cores together since boot."""
    line = _read(Path("/proc/stat")).partition("\n")[0].split()
    if not line or line[0] != "cpu":
        return None
    values = [int(value) for value in line[1:9]]  # user nice system idle iowait irq softirq steal
    return values[3] + values[4], sum(values)


def _cpuinfo(name: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or hidden in a container
        return ""
