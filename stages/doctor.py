"""`sievit doctor`: what this machine has, what works, and what that means."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import typer

from sievit.pipeline import host, options
from sievit.pipeline.errors import SievitError
from sievit.pipeline.session import session_of, store_of

from .methods import InvalidInput

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from rich.console import RenderableType

    from sievit.pipeline.store import Store

State = Literal["ok", "note", "wrong"]
NEEDED = ("torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxruntime", "nncf", "pillow", "typer")
# module, what it is for, how to get it
EXTRAS = {
    "datasets": (
        "datasets",
        "data sets of the Hugging Face hub as data.source: hfds/...",
        "pip install 'sievit[hfds]'",
    ),
    "optuna": ("optuna", "sievit sweep --search", "pip install 'sievit[sweep]'"),
    "tensorboard": ("tensorboard", "track: {tensorboard: ...}", "pip install 'sievit[tensorboard]'"),
    "mlflow-skinny": ("mlflow", "track: {mlflow: ...}", "pip install 'sievit[mlflow]'"),
    "nvidia-ml-py": ("pynvml", "joules of NVIDIA GPUs in the ledger", "pip install 'sievit[energy]'"),
}
LITTLE_MEMORY_GB, LITTLE_DISK_GB = 4, 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. wrong: Sievit cannot run like that; means: what follows; do: what helps."""

    name: str
    state: State
    found: str
    means: str = ""
    do: str = ""


Ask = Callable[[dict[str, Any]], dict[str, Any]]


def doctor(
    context: typer.Context,
    store: options.StoreFolder = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Look at this machine: versions, providers that really work, CPU features, memory, disk, GPUs.

    Every execution provider that ONNX Runtime was built with runs a tiny file in a process of its own, and torch a
    product on every GPU. Each line says what it means and what to do. Exit code 1 when Sievit cannot run here.

        sievit doctor --json
    """
    from .checkup import ask
    from .deploy import isa

    session = session_of(context)
    findings = [
        *versions(),
        *runtimes(ask),
        *in_torch(ask),
        *processor(isa.processor_name(), isa.instruction_sets()),
        *room(store_of(store)),
        *extras(),
        Finding(
            "telemetry", "ok", "off", "what ONNX Runtime and nncf would send is switched off; Sievit sends nothing"
        ),
    ]
    session.console.result({"findings": [asdict(each) for each in findings]}, draw)
    if wrong := [each for each in findings if each.state == "wrong"]:
        names = ", ".join(each.name for each in wrong)
        raise SievitError(f"Sievit cannot run here: {names}", hint=wrong[0].do or "see the lines above")


def versions() -> Iterator[Finding]:
    """Python and the libraries that nothing runs without."""
    yield Finding("python", "ok", host.facts()["python"])
    wanted = _requirements()
    for name in NEEDED:
        alias = "onnxruntime-gpu" if name == "onnxruntime" and host.version("onnxruntime-gpu") else name
        version = host.version(alias)
        if version is None:
            yield Finding(name, "wrong", "not installed", "no stage runs without it", f"pip install {name}")
        elif name in wanted and not wanted[name].contains(version, prereleases=True):
            asks = f"Sievit needs {name} {wanted[name]}"
            yield Finding(name, "wrong", version, asks, f"pip install '{name}{wanted[name]}'")
        else:
            yield Finding(alias, "ok", version)
    if host.version("onnxruntime") and host.version("onnxruntime-gpu"):
        yield Finding(
            "onnxruntime", "note", "installed twice: with and without GPU",
            "they overwrite each other's files; which one is imported is chance",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )  # fmt: skip


def _requirements() -> dict[str, SpecifierSet]:
    """The versions that Sievit's own metadata allows, by name; empty where Sievit is not installed."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in metadata.requires("sievit") or ()]
    except metadata.PackageNotFoundError:
        return {}
    return {one.name: one.specifier for one in stated if one.marker is None}


def runtimes(ask: Ask) -> Iterator[Finding]:
    """The execution providers, each proven by a tiny file or told how to get it."""
    from .deploy.child import ChildFailed
    from .deploy.sessions import PROVIDERS, how_to_install

    try:
        built = ask({"do": "providers"})
    except (ChildFailed, InvalidInput) as error:
        yield Finding("onnxruntime", "wrong", "does not start", str(error), "install it again: pip install onnxruntime")
        return
    for name, (official, _, _) in PROVIDERS.items():
        at = f"provider {name}"
        if official not in built["available"]:
            yield Finding(at, "note", "not in this build", "only needed to measure there", how_to_install(name))
            continue
        cannot: State = "wrong" if name == "cpu" else "note"
        try:
            right = ask({"do": "provider", "name": name})["right"]
        except (ChildFailed, InvalidInput) as error:
            do = getattr(error, "hint", "") or "update its driver and libraries, or leave it out of benchmark.providers"
            yield Finding(at, cannot, "does not work", str(error), do)
            continue
        if right:
            yield Finding(at, "ok", "works", f"benchmark: {{providers: [{name}]}} can be measured here")
        else:
            yield Finding(at, cannot, "computes wrong results", "its figures would be worthless", "update its driver")


def in_torch(ask: Ask) -> Iterator[Finding]:
    """What stages compute on."""
    from .deploy.child import ChildFailed

    try:
        found = ask({"do": "torch"})
    except (ChildFailed, InvalidInput) as error:
        yield Finding("torch works", "wrong", "does not start", str(error), "install it again: pip install torch")
        return
    for gpu in found["gpus"]:
        if gpu["right"]:
            text = f"{gpu['name']}, {gpu['memory_gb']} GB"
            yield Finding("GPU", "ok", text, "device: auto trains, scores and evaluates on it")
        else:
            yield Finding("GPU", "wrong", f"{gpu['name']} computes wrong results", "", "update its driver")
    if not found["gpus"]:
        if host.device("auto") == "cuda":  # what `device: auto` would then take
            means = f"device: auto would take it, and torch (CUDA {found['cuda']}) sees no GPU"
            do = "update the driver, install torch for its CUDA version, or write device: cpu"
            yield Finding("GPU", "wrong", "a driver is loaded, torch cannot use it", means, do)
        else:
            yield Finding("GPU", "note", "none", "everything is computed on the CPU")


def processor(name: str, sets: list[str]) -> Iterator[Finding]:
    """What INT8 gains on this CPU, by its instruction sets as `isa` names them."""
    have = set(sets)
    if not have & {"avx2", "asimd"}:
        do = "measure on the machine that will serve"
        yield Finding("CPU", "note", name, "no vector instructions are known: all is slow", do)
        return
    if "amx_int8" in have:
        found, means = "AMX", "8-bit products in tiles: INT8 gains most here, at larger batches above all"
    elif have & {"avx_vnni", "avx512_vnni"}:
        found, means = "VNNI", "8-bit dot products: INT8 files are usually clearly faster than FP32 ones"
    elif have & {"asimddp", "i8mm"}:
        found, means = "dot products", "8-bit dot products: INT8 files are usually clearly faster than FP32 ones"
    else:
        found = "AVX-512 without VNNI" if "avx512f" in have else "AVX2 without VNNI" if "avx2" in have else "NEON"
        means = (
            "no 8-bit dot products: INT8 gains little over FP32 at batch 1 and its sums may saturate; quantize takes "
            "7-bit weights where it must, and the float file where INT8 does not pay"
        )
    half = [
        wide
        for flag, wide in (("avx512_bf16", "BF16"), ("amx_bf16", "BF16 tiles"), ("avx512_fp16", "FP16"))
        if flag in have
    ]
    more = f"; also {', '.join(half)}" if half else ""
    yield Finding("CPU", "ok", f"{name}: {found}{more}", means)


def room(store: Store) -> Iterator[Finding]:
    """Cores, memory and disk."""
    import psutil

    from sievit.pipeline.expectations import free_bytes

    from .deploy import isa

    cores, separate = isa.usable_cores(), isa.separate_cores(isa.usable_cores())
    quota = host.facts()["cpu_quota"]
    text = f"{len(cores)} usable, {len(separate)} physical" + (f", a quota of {quota}" if quota else "")
    few = len(separate) < 2
    means = "latencies share the one core with everything else" if few else "one is measured on while others work"
    yield Finding("cores", "note" if few else "ok", text, means)
    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, memory.available / 1e9
    low = free < LITTLE_MEMORY_GB
    yield Finding(
        "memory", "note" if low else "ok", f"{total:.1f} GB, {free:.1f} GB of it free",
        "training may run out of memory" if low else "images of up to 2 GB as uint8 are kept in it",
        "data: {in_memory: false}, smaller batch_size" if low else "",
    )  # fmt: skip
    disk = free_bytes(store.root) / 1e9
    low = disk < LITTLE_DISK_GB
    yield Finding(
        "disk", "note" if low else "ok", f"{disk:.1f} GB free for {store.root}",
        "`sievit plan` tells what a run will take",
        "`sievit gc` removes what no run needs; --store names another disk" if low else "",
    )  # fmt: skip


def extras() -> Iterator[Finding]:
    """What is of use and not needed."""
    for name, (module, purpose, how) in EXTRAS.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(name, "ok", host.version(name) or "installed", purpose)
        else:
            yield Finding(name, "note", "not installed", f"only needed for {purpose}", how)
    if shutil.which("git") is None:
        yield Finding(
            "git", "note", "not found", "manifests will not name the commit they were made from", "install git"
        )


SIGNS: dict[State, tuple[str, str]] = {"ok": ("+", "green"), "note": ("-", "yellow"), "wrong": ("x", "bold red")}


def draw(document: dict[str, Any]) -> RenderableType:
    """A sign, a name and what was found; below it what that means and what to do."""
    from rich.table import Table
    from rich.text import Text

    from sievit.pipeline.drawing import line

    drawn = Table.grid(padding=(0, 2, 0, 0))
    for wrap in (False, False, True):
        drawn.add_column(no_wrap=not wrap, overflow="fold")
    for each in document["findings"]:
        sign, style = SIGNS[each["state"]]
        rows = [line(each["found"]), *([line(each["means"], "dim")] if each["means"] else [])]
        rows += [line(f"do: {each['do']}", style)] if each["do"] else []
        drawn.add_row(Text(sign, style), line(each["name"]), Text("\n").join(rows))
    return drawn
