"""What is tried in processes of their own, since a broken library may crash or hang: a tiny ONNX file on a provider,
and a product in torch. `sievit doctor` tells all of it; a stage that names a provider asks before anything runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .deploy.child import Child, ChildFailed, answering, serve
from .methods import InvalidInput

WAIT_S = 120.0  # for a library to be imported and answer; TensorRT builds an engine first
SIDE = 16  # of the matrices
WORST = 0.05  # of a sum of 16 products below 1: reduced precision (TF32) passes, a wrong kernel does not


def ask(command: dict[str, Any]) -> dict[str, Any]:
    """The answer of a process of its own; see `main`. Raises: InvalidInput, ChildFailed when it crashes or hangs."""
    # Graphics drivers and torch reserve more address space than there is memory.
    with Child("checkup", command.get("name", command["do"]), package=__package__ or "", limited=False) as child:
        return child.ask(command, WAIT_S)


def require_running(providers: Sequence[str], threads: Sequence[int], fields: tuple[str, str]) -> None:
    """Refuse more threads than cores, a provider that is not installed, and one that is and does not run here. Raises:
    InvalidInput; fields: the settings that ask for providers and threads.
    """
    from .deploy.sessions import require_serving

    require_serving(providers, threads, fields)
    for name in providers:
        if name != "cpu" and (refusal := _refusal(name)) is not None:
            raise InvalidInput(*refusal, field=fields[0])


@cache
def _refusal(name: str) -> tuple[str, str] | None:
    """Why a provider does not run a product of matrices, and what to do; None where it does."""
    try:
        right = ask({"do": "provider", "name": name})["right"]
    except (ChildFailed, InvalidInput) as error:
        return str(error), getattr(error, "hint", "") or "`sievit doctor` tells what works here"
    return None if right else (f"provider {name} computes wrong results here", "update its driver")


def providers() -> dict[str, Any]:
    """ONNX Runtime's version, and the providers that its build has."""
    import onnxruntime as ort

    return {"version": ort.__version__, "available": ort.get_available_providers()}


def on_provider(name: str) -> dict[str, Any]:
    """Run a product of two matrices on a provider and compare it. Raises: InvalidInput when it does not start there."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from .deploy.sessions import open_session

    rng = np.random.default_rng(0)
    x, weight = (rng.random((SIDE, SIDE), dtype=np.float32) for _ in range(2))
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [SIDE, SIDE]) for end in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", ends[:1], ends[1:],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory(prefix="sievit-doctor-") as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(model, path)
        session = open_session(path, provider=name, shapes={"x": (SIDE, SIDE)})
        (y,) = session.run(None, {"x": x})
    return {"right": bool(np.abs(np.asarray(y) - x @ weight).max() < WORST)}


def in_torch() -> dict[str, Any]:
    """torch's version, and the GPUs that it sees and computes on."""
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    x = torch.rand(SIDE, SIDE)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            right = torch.allclose((x.to(f"cuda:{index}") @ x.to(f"cuda:{index}")).cpu(), x @ x, atol=WORST)
            memory = round(known.total_memory / 1e9, 1)
            found["gpus"].append({"name": known.name, "memory_gb": memory, "right": right})
    return found


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    for command, stream in serve():
        with answering(stream) as found:
            match command["do"]:
                case "providers":
                    found.update(providers())
                case "provider":
                    found.update(on_provider(command["name"]))
                case "torch":
                    found.update(in_torch())
                case other:
                    raise ValueError(f"unknown command {other}")


if __name__ == "__main__":
    main()
