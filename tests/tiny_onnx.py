"""Tiny ONNX classifiers for the tests, built with onnx.helper: no torch, no exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sievit.stages.deploy.bundle import write_sidecar

PREPROCESSING = {
    "resize": "bilinear",
    "size": 8,
    "crop": "center",
    "crop_pct": 1.0,
    "scale": 1 / 255,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
}


def weights(size: int = 8, classes: int = 4, seed: int = 0) -> np.ndarray:
    """The matrix of `linear`, float32 [3 * size * size, classes]."""
    return np.random.default_rng(seed).standard_normal((3 * size * size, classes)).astype(np.float32)


def linear(
    path: Path, *, size: int = 8, classes: int = 4, seed: int = 0, batch: int | None = None, work: int = 0
) -> Path:
    """logits = flatten(input) @ weights(seed). work: so many further products of a square matrix, to take time."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat"], name="flatten")]
    initializers = [numpy_helper.from_array(weights(size, classes, seed), "weight")]
    last = "flat"
    if work:
        width = 3 * size * size
        initializers.append(numpy_helper.from_array(np.eye(width, dtype=np.float32), "eye"))
        for index in range(work):
            nodes.append(helper.make_node("MatMul", [last, "eye"], [f"h{index}"], name=f"work{index}"))
            last = f"h{index}"
    nodes.append(helper.make_node("MatMul", [last, "weight"], ["logits"], name="head"))
    return save(path, nodes, initializers, [batch or "batch", 3, size, size], [batch or "batch", classes])


def transformer(
    path: Path, *, size: int = 8, classes: int = 4, width: int = 32, blocks: int = 2, seed: int = 0
) -> Path:
    """Patch embedding, `blocks` pre-norm blocks of attention (one head) and MLP, mean over tokens, head."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    def random(name: str, *shape: int) -> str:
        return constant(name, (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def add(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def dense(x: str, name: str, rows: int, columns: int) -> str:
        product = add("MatMul", [x, random(f"{name}_w", rows, columns)], f"{name}_product")
        return add("Add", [product, constant(f"{name}_b", np.zeros(columns, np.float32))], name)

    def norm(x: str, name: str) -> str:
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        inputs = [x, constant(f"{name}_g", ones), constant(f"{name}_b", zeros)]
        return add("LayerNormalization", inputs, name, axis=-1)

    patches = add("Conv", ["input", random("patch", width, 3, 4, 4)], "patches", kernel_shape=[4, 4], strides=[4, 4])
    tokens = add("Reshape", [patches, constant("flat", np.array([0, width, -1], np.int64))], "tokens")
    x = add("Transpose", [tokens], "x", perm=[0, 2, 1])
    for block in range(blocks):
        normed = norm(x, f"norm1_{block}")
        query, key, value = (dense(normed, f"{name}_{block}", width, width) for name in ("query", "key", "value"))
        turned = add("Transpose", [key], f"turned_{block}", perm=[0, 2, 1])
        mixing = add("Softmax", [add("MatMul", [query, turned], f"scores_{block}")], f"mixing_{block}", axis=-1)
        mixed = add("MatMul", [mixing, value], f"mixed_{block}")
        x = add("Add", [x, dense(mixed, f"proj_{block}", width, width)], f"residual1_{block}")
        hidden = dense(norm(x, f"norm2_{block}"), f"fc1_{block}", width, 2 * width)
        x = add(
            "Add", [x, dense(add("Gelu", [hidden], f"gelu_{block}"), f"fc2_{block}", 2 * width, width)], f"out_{block}"
        )
    pooled = add("ReduceMean", [x, constant("axes", np.array([1], np.int64))], "pooled", keepdims=0)
    add("Gemm", [pooled, random("head_w", width, classes), constant("head_b", np.zeros(classes, np.float32))], "logits")
    return save(path, nodes, initializers, ["batch", 3, size, size], ["batch", classes])


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    shape: Sequence[int | str],
    output: Sequence[int | str],
    *,
    dtype: int = TensorProto.FLOAT,
    opset: int = 20,
    domains: Sequence[tuple[str, int]] = (),
) -> Path:
    """Write a model of one input `input` and one output `logits`."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("input", dtype, list(shape))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output))],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*domain) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="tiny")
    path.write_bytes(model.SerializeToString())
    return path


def sidecar(path: Path, classes: int = 4, names: Sequence[str] | None = None, **fields: Any) -> Path:
    """A sidecar for a file of this module. names: of the classes."""
    arguments: dict[str, Any] = {
        "preprocessing": PREPROCESSING,
        "classes": names or [f"class {index}" for index in range(classes)],
        "precision": "fp32",
        "parameters": 768,
        "macs": 768,
        "source": {"stage": "export", "key": "0" * 12, "digest": "0" * 64},
    }
    return write_sidecar(path, **(arguments | fields))


def pictures(count: int, size: int = 8, seed: int = 1) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(256, size=(count, size, size, 3), dtype=np.uint8)
