"""What the host can do at most: multiply-adds a second of a large matrix product in ONNX Runtime, float, 8 bit, and on
a card half precision.

A file's share of it tells how much is lost to narrow layers, to moving data and to all that is no product. 1 is out of
reach: a network's products are smaller.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .child import Child
from .latency import Plan, Progress, Setting, Subject, load_command
from .sessions import GRAPHICS

SIDE = 1024  # of the square matrices: on a CPU larger ones were no faster
ON_CARD = 4096  # the smaller one leaves most of a card idle
SECONDS = 0.5
Kind = Literal["float", "half", "int8"]


@dataclass(frozen=True, slots=True)
class Peak:
    """One provider and thread count. gflops: 1e9 operations a second, two for each multiply-add."""

    provider: str
    threads: int
    kind: Kind
    gflops: float

    def as_json(self) -> dict[str, Any]:
        return {"provider": self.provider, "threads": self.threads, "kind": self.kind, "gflops": self.gflops}


def kind_of(precision: str, provider: str = "cpu") -> Kind:
    """Which product a file's work is compared with: int8 for 8-bit files, half for FP16 on a card, else float: the CPU
    has no products of half precision.
    """
    if precision == "int8":
        return "int8"
    return "half" if precision == "fp16" and provider in GRAPHICS else "float"


def gflops(macs: int, batch: int, ms: float) -> float:
    """1e9 operations a second of a call: macs of one image, two operations each. ms: of the whole batch."""
    return 2 * macs * batch / ms / 1e6


def peak(kind: Kind, setting: Setting, plan: Plan, progress: Progress) -> Peak:
    """Time the product by its median call, in a process of its own, pinned as the files are. Raises ChildFailed."""
    at = Setting(setting.provider, setting.threads, 1, setting.io)
    with tempfile.TemporaryDirectory() as folder, progress.task(f"peak ({kind})", 1) as task:
        path, side = Path(folder) / "product.onnx", ON_CARD if at.provider in GRAPHICS else SIDE
        onnx.save(product(kind, side), path)
        dtype = {"float": "float32", "half": "float16", "int8": "uint8"}[kind]
        subject = Subject(f"peak {kind}", path, "input", dtype, (1, side, side))
        with Child("worker", subject.name, limited=at.provider not in GRAPHICS) as child:
            child.ask(load_command("load", subject, at, folder), plan.timeout_s)
            child.ask({"do": "prepare", "shape": [1, *subject.image], "io": at.io}, plan.timeout_s)
            call_ms = child.ask({"do": "warm", "limit_s": plan.warm_up_s}, plan.timeout_s)["call_ms"]
            calls = max(5, round(min(SECONDS, plan.seconds) * 1e3 / call_ms))
            walls = child.ask({"do": "time", "calls": calls}, plan.timeout_s)["wall_ms"]
        task.advance()
    return Peak(at.provider, at.threads, kind, gflops(side**3, 1, float(np.median(walls))))


def peaks(rows: Sequence[dict[str, Any]], settings: Sequence[Setting], plan: Plan, progress: Progress) -> list[Peak]:
    """Of each provider and thread count, for the kinds of files whose MACs are known; in 8 bits on the CPU alone."""
    places = {(setting.provider, setting.threads): setting for setting in reversed(settings)}
    asked = {
        (kind_of(row["variant"], row["provider"]), places[row["provider"], row["threads"]]): None
        for row in rows
        if row["macs"] is not None
    }
    return [
        peak(kind, setting, plan, progress) for kind, setting in asked if kind != "int8" or setting.provider == "cpu"
    ]


def product(kind: Kind, side: int = SIDE) -> onnx.ModelProto:
    """An image-like input (batch, 1, side, side) times a constant (side, side): float32, float16, or uint8 by int8."""
    rng = np.random.default_rng(0)
    square = rng.standard_normal((side, side), dtype=np.float32)
    # Eight bits less one: without VNNI, sums of two full products do not fit into 16 bits, and kernels then differ.
    weights: dict[Kind, NDArray[Any]] = {
        "float": square,
        "half": square.astype(np.float16),
        "int8": rng.integers(-63, 64, (side, side), dtype=np.int8),
    }
    given, taken = {
        "float": (TensorProto.FLOAT, TensorProto.FLOAT),
        "half": (TensorProto.FLOAT16, TensorProto.FLOAT16),
        "int8": (TensorProto.UINT8, TensorProto.INT32),
    }[kind]
    node = helper.make_node("MatMulInteger" if kind == "int8" else "MatMul", ["input", "weight"], ["product"])
    shape: list[str | int | None] = ["batch", 1, side, side]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("input", given, shape)],
        [helper.make_tensor_value_info("product", taken, shape)],
        [numpy_helper.from_array(weights[kind], "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def share(row: dict[str, Any], known: Sequence[Peak]) -> dict[str, float | None]:
    """gflops reached by a row's p50, and peak_share of the peak of its kind; None where MACs or peak are not known."""
    if row["macs"] is None:
        return {"gflops": None, "peak_share": None}
    reached = gflops(row["macs"], row["batch"], row["p50_ms"])
    where = row["provider"], row["threads"], kind_of(row["variant"], row["provider"])
    top = next((one.gflops for one in known if (one.provider, one.threads, one.kind) == where), None)
    return {"gflops": reached, "peak_share": None if top is None else reached / top}
