"""Facts about where a stage ran: recorded with every artifact, and part of the key of what is measured in seconds."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .manifest import sha256_of

LIBRARIES = (
    "sievit",
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "nncf",
    "numpy",
    "pillow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "pydantic",
    "typer",
)

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino", "tensorrt")  # that time is spent in

# CPU features that change which kernels ONNX Runtime and torch choose (x86, then Arm).
_FLAGS = re.compile(r"avx.*|amx.*|f16c|fma|sse4_.|sha_ni|asimd.*|sve.*|i8mm|bf16|fphp")
_GIT_TIMEOUT_S = 2.0
_SECRET_NAME = re.compile(r"(token|secret|passw|credential|api[-_]?key)", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


@cache
def facts() -> dict[str, Any]:
    """CPU model, its flags of interest, usable cores, memory, GPUs, operating system, Python. No host name, no user
    name.
    """
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "flags": flags,
        "cores": _usable_cores(),
        "cpu_quota": _cpu_quota(),
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def fingerprint() -> str:
    """12 hex digits: two hosts of equal fingerprint may share latency figures."""
    here = facts()
    parts = {name: here[name] for name in ("cpu", "flags", "cores", "cpu_quota", "memory_gb", "gpus")}
    runtime = {name: version(name) for name in RUNTIMES}
    return sha256_of(parts | runtime)[:12]


@cache
def version(distribution: str) -> str | None:
    """The installed version, from the distribution's record: nothing is imported. None where it is not installed."""
    from importlib import metadata  # it needs the whole of email, and help needs no version

    try:
        record = metadata.distribution(distribution).read_text("METADATA")
    except metadata.PackageNotFoundError:
        return None
    # `metadata.version` would parse the description with it, five times as long as looking for a line.
    found = re.search(r"^Version: *(\S+)", record or "", re.MULTILINE)
    return found[1] if found else metadata.version(distribution)


def libraries() -> dict[str, str]:
    """Installed versions of the packages that the numbers and the times come from."""
    return {name: found for name in (*LIBRARIES, *RUNTIMES) if (found := version(name)) is not None}


def device(wanted: str) -> str:
    """`cpu` or `cuda`: `auto` means cuda where an NVIDIA driver is loaded."""
    if wanted != "auto":
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a repository or where git does not answer in
    time.
    """

    def ask(*arguments: str) -> str:
        # A repository is data here: neither its file-system monitor nor its hooks may run for a question.
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        answer = subprocess.run(
            command, capture_output=True, check=True, timeout=_GIT_TIMEOUT_S, env=environment, stdin=subprocess.DEVNULL
        )
        return answer.stdout.decode(errors="replace").strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(arguments: Sequence[str]) -> str:
    """The command as it could be typed again: the program's name without its folder, no home folder, no secrets."""
    if not arguments:
        return ""
    program = Path(arguments[0]).name
    words = ["sievit" if program == "__main__.py" else program]
    hide_next = False
    for word in arguments[1:]:
        name, equals, _ = word.partition("=")
        if hide_next:
            word = "***"
        elif equals and _SECRET_NAME.search(name):
            word = f"{name}=***"
        hide_next = not equals and word.startswith("-") and bool(_SECRET_NAME.search(word))
        words.append(_URL_LOGIN.sub("***@", word))
    return shlex.join(_without_home(word) for word in words)


def _without_home(word: str) -> str:
    home = str(Path.home())
    return word.replace(f"{home}/", "~/") if len(home) > 1 else word


def cpu_seconds() -> float:
    """CPU time of this process and its ended children so far."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def reset_peak_memory() -> None:
    """Start `peak_memory_mb` anew. Where the kernel cannot, the figure stays that of the whole process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_mb() -> float:
    """The largest resident memory of this process since `reset_peak_memory`, in MB (10^6 bytes)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except OSError:
        pass  # no /proc: the figure of the whole process is the best there is
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _cpu() -> tuple[str, list[str]]:
    """Model name and flags of interest of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    words = (fields.get("flags") or fields.get("Features") or "").split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, sorted(word for word in words if _FLAGS.fullmatch(word))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota() -> float | None:
    """Cores' worth of time that a container may use, None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else round(int(quota) / int(period), 2)
    except (OSError, ValueError):
        return None


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver lists."""
    names: list[str] = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        names.append(match[1].strip() if match else "unknown")
    return names
