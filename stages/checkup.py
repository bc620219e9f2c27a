"""What `sievit doctor` tries in processes of their own, since a broken library may crash or hang: a tiny ONNX file on a
provider, and a product in torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .deploy.child import answering, serve

SIDE = 16  # of the matrices
WORST = 0.05  # of a sum of 16 products below 1: reduced precision (TF32) passes, a wrong kernel does not


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
