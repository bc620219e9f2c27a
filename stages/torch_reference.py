"""Networks in PyTorch, eager and compiled, timed as the files are: a reference for what leaving PyTorch is worth.

Each network, mode and setting has processes of its own, one a session, pinned to the same cores, with the warm-up and
the slots of the files. They take no turns with the files, and so no verdict is spoken. Run as a module it is that
process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from sievit.pipeline.stage import Config

from .methods import InvalidInput

if TYPE_CHECKING:
    from .deploy.latency import Plan, Progress, Setting

Mode = Literal["eager", "compiled"]
DEVICES = {"cpu": "cpu", "cuda": "cuda"}  # provider -> device; others have no counterpart
ROUNDS = 10


class TorchReference(Config):
    """Networks that are timed in PyTorch beside the files."""

    networks: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="stages of the main arm that write a model, or of others: [finetune, dense/train]; or artifacts"
    )
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = Field(
        default=("eager", "compiled"), description="as written, and by torch.compile"
    )

    @model_validator(mode="after")
    def _each_once(self) -> TorchReference:
        for name in ("networks", "modes"):
            values = getattr(self, name)
            if twice := next((value for n, value in enumerate(values) if value in values[:n]), None):
                raise ValueError(f"{name}: {twice} stands there twice; name each once")
        if pretrained := next((name for name in self.networks if name.startswith("timm:")), None):
            raise ValueError(f"networks: {pretrained} is no stage of this pipeline and no artifact; name one")
        return self


def reference_rows(
    networks: dict[str, Path], modes: Sequence[Mode], settings: Sequence[Setting], plan: Plan, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each network (name -> folder of a model artifact), mode and setting on CPU or CUDA; data stays there.

    Times in ms; first_ms is the first call, in which compilation happens. Raises InvalidInput where torch.compile does
    not work, ChildFailed for a crash.
    """
    asked = [
        (name, mode, setting)
        for setting in settings
        if setting.provider in DEVICES and setting.io != "copy"
        for name in networks
        for mode in modes
    ]
    with progress.task("PyTorch", len(asked) * plan.sessions) as task, tempfile.TemporaryDirectory() as cache:
        rows = []
        for name, mode, setting in asked:
            row = {"network": name, "mode": mode, "provider": setting.provider, "batch": setting.batch}
            row |= {"threads": setting.threads, "io": setting.io}
            rows.append(row | _timed(networks[name], mode, setting, cache, plan, task.advance))
    return rows


def _timed(
    folder: Path, mode: Mode, setting: Setting, cache: str, plan: Plan, advance: Callable[[], None]
) -> dict[str, Any]:
    """Over all sessions."""
    import numpy as np

    from .deploy.child import Child
    from .deploy.isa import measuring_cores
    from .deploy.statistics import Slot, percentile_interval

    slots: list[Slot] = []
    first: list[float] = []
    memory: list[float] = []
    for session in range(plan.sessions):
        # Without a limit: torch reserves more address space than the machine has memory.
        with Child("torch_reference", f"PyTorch {mode}", package=__package__, limited=False) as child:
            load = {"do": "load", "folder": str(folder.absolute()), "mode": mode, "threads": setting.threads}
            load |= {"device": DEVICES[setting.provider], "batch": setting.batch, "cache": cache}
            loaded = child.ask(load | {"cores": measuring_cores(setting.threads)}, plan.timeout_s)
            first.append(loaded["first_ms"])
            call_ms = child.ask({"do": "warm", "limit_s": plan.warm_up_s}, plan.timeout_s)["call_ms"]
            calls = max(1, round(plan.seconds / plan.sessions / ROUNDS * 1e3 / max(call_ms, 1e-3)))
            for number in range(ROUNDS):
                seen = child.ask({"do": "time", "calls": calls}, plan.timeout_s)
                slots.append(Slot(session, number, np.asarray(seen["wall_ms"]), seen["cpu_ms"], seen["thread_ms"]))
            memory.append(child.ask({"do": "memory"}, plan.timeout_s)["peak_memory_mb"])
        advance()
    p50 = percentile_interval(slots, 50)
    return {
        "p50_ms": p50.value,
        "p50_low": p50.low,
        "p50_high": p50.high,
        "samples": sum(len(slot.wall_ms) for slot in slots),
        "first_ms": max(first),  # later sessions find what the first one compiled
        "peak_memory_mb": max(memory),
        "torch": loaded["torch"],
    }


def load(command: dict[str, Any]) -> tuple[Callable[[], object], float]:
    """In the process: the call to time, and milliseconds of the first one. Raises InvalidInput."""
    if command["cores"]:
        os.sched_setaffinity(0, command["cores"])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = command["cache"]
    import torch

    from .vision.attention import set_fused
    from .vision.weights import load_network

    torch.set_num_threads(command["threads"])
    device = torch.device(command["device"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as ONNX Runtime multiplies there: in TF32, where the card has it
    network = load_network(Path(command["folder"])).to(device)
    set_fused(network, True)  # the faster path, and the one that trained
    side = network.architecture.image_size
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(command["batch"], 3, side, side, generator=drawn).to(device)
    model: Callable[[torch.Tensor], torch.Tensor] = network
    if command["mode"] == "compiled":
        model = torch.compile(network, dynamic=False)

    def call() -> object:
        with torch.inference_mode():
            logits = model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits

    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        if command["mode"] != "compiled":
            raise
        raise InvalidInput(
            f"torch.compile does not work here: {type(error).__name__}: {str(error).strip()[:200]}",
            "install a C++ compiler, or benchmark.torch.modes: [eager]",
        ) from error
    return call, (time.perf_counter() - start) * 1e3


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    from importlib.metadata import version

    from .deploy.child import answering, serve
    from .deploy.worker import peak_memory_mb, time_calls, warm_up

    call: Callable[[], object] = lambda: None  # noqa: E731
    for command, stream in serve():
        with answering(stream) as content:
            match command["do"]:
                case "load":
                    call, first_ms = load(command)
                    content |= {"first_ms": first_ms, "torch": version("torch")}
                case "warm":
                    content |= warm_up(call, command["limit_s"])
                case "time":
                    content |= time_calls(call, command["calls"])
                case "memory":
                    content |= {"peak_memory_mb": peak_memory_mb()}
                case other:
                    raise ValueError(f"unknown command {other}")


if __name__ == "__main__":
    main()
