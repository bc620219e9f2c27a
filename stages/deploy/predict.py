"""Classify images with an ONNX file and its sidecar: numpy and ONNX Runtime, nothing of the training side."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from ..methods import InvalidInput
from .preprocess import normalise
from .sessions import open_session
from .sidecar import Scores, read_sidecar
from .statistics import wilson


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 on a labelled set, with its 95 % Wilson interval."""

    correct: int
    images: int
    top1: float
    low: float
    high: float


def scores(
    path: Path,
    pixels: NDArray[np.uint8] | Callable[[int, int], NDArray[np.uint8]],
    count: int | None = None,
    *,
    provider: str = "cpu",
    threads: int = 1,
    batch: int = 64,
    done: Callable[[int], None] = lambda images: None,
) -> NDArray[np.float32]:
    """The network's scores, float32 [n, classes], in the order of the images.

    pixels: uint8 [n, size, size, 3], or a function (start, stop) -> such an array for sets that do not fit into memory,
    with `count` images in all. done: told the number of images after each batch. Raises InvalidInput.

    A file that takes its 8-bit ranges from the whole batch sees each image alone, whatever the batch: its answers would
    be those of the company it is in.
    """
    sidecar = read_sidecar(path)
    if isinstance(pixels, np.ndarray):
        total, fetch = len(pixels), _slices(pixels)
    elif count is None:
        raise ValueError("count is needed when pixels is a function")
    else:
        total, fetch = count, pixels
    if total == 0:
        raise InvalidInput("there are no images to classify", "check data.source and data.test")
    session = open_session(path, provider=provider, threads=threads)
    asked = session.get_inputs()[0]
    dtype = {"tensor(uint8)": "uint8", "tensor(float16)": "float16"}.get(asked.type, "float32")
    fixed = asked.shape[0] if isinstance(asked.shape[0], int) else None
    if _ranges_span_batch(path):
        batch = 1
    if fixed is None and provider == "tensorrt":
        fixed = min(batch, total)  # it builds an engine, for minutes, for every size that it meets
    step = 1 if batch == 1 else fixed or batch  # an image alone fills a fixed batch with itself
    parts = []
    for start in range(0, total, step):
        stop = min(total, start + step)
        inputs = normalise(fetch(start, stop), sidecar.preprocessing, dtype, sidecar.layout)
        padding = (fixed or len(inputs)) - len(inputs)  # fill up the last one
        filled = np.concatenate([inputs, np.repeat(inputs[-1:], padding, axis=0)]) if padding else inputs
        output = session.run([sidecar.output], {sidecar.input: filled})[0]
        parts.append(np.asarray(output, dtype=np.float32)[: len(inputs)])
        done(len(inputs))
    return np.concatenate(parts)


def _ranges_span_batch(path: Path) -> bool:
    """Whether an operator takes 8-bit ranges in each call, by what all their names begin with: parsing needs onnx."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"DynamicQuantize") >= 0


def _slices(pixels: NDArray[np.uint8]) -> Callable[[int, int], NDArray[np.uint8]]:
    return lambda start, stop: pixels[start:stop]


def answers(scored: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class that each image is given, int64 [n], from scores [n, classes]; -1 where a score is no number, which is
    never right.
    """
    return np.where(np.isfinite(scored).all(axis=1), scored.argmax(axis=1), -1)


def probabilities(scored: NDArray[np.float32], kind: Scores) -> NDArray[np.float64]:
    """Of each class, from scores [n, classes] that are of this kind. Those of a file that ends in sigmoids stand for a
    class each and need not add up to 1; they are its own, and are left so.
    """
    values = scored.astype(np.float64)
    match kind:
        case "logits":
            found: NDArray[np.float64] = softmax(values, axis=1)
        case "log_probabilities":
            found = np.exp(values)
        case "probabilities":
            found = values
    return found


def log_probabilities(scored: NDArray[np.float32], kind: Scores) -> NDArray[np.float64]:
    """The logarithms of probabilities that add up to 1, float64 [n, classes], from scores of this kind; finite where
    the scores are: a probability that was rounded to 0 counts as the smallest number of its type.
    """
    values = scored.astype(np.float64)
    if kind == "probabilities":
        values = np.log(np.maximum(values, np.finfo(np.float32).tiny))
    found: NDArray[np.float64] = log_softmax(values, axis=1)
    return found


def accuracy(scored: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """Top-1 of scores [n, classes] against labels [n]. NaN scores count as wrong."""
    correct, images = int((answers(scored) == labels).sum()), len(labels)
    low, high = wilson(correct, images)
    return Accuracy(correct, images, correct / images, low, high)
