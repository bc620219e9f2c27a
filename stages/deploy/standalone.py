"""predict.py of a pack: a program of at most 30 lines, written for the one file that it goes with.

It needs onnxruntime, numpy and pillow alone. What a file does not need (a crop, a division, a second channel layout)
does not stand in it, so that it can be read in a minute and taken over into somebody's own service.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from .sidecar import Preprocessing, Scores, Sidecar

START = '''\
"""Classify images with the model.onnx beside this file: python predict.py IMAGE..."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder = Path(__file__).parent
classes = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
for path in sys.argv[1:] or sys.exit(__doc__):
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # 16-bit grey, which convert would clip
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).round().astype(np.uint8))
    picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB").convert("RGB")
'''
END = """\
    for place in np.argsort(-shares, kind="stable")[:5]:
        print(f"{path}\\t{classes[place]}\\t{shares[place]:.4f}")
"""
SHARES: dict[Scores, str] = {  # as `predict.probabilities`
    "logits": "np.exp(scores - np.logaddexp.reduce(scores))",
    "probabilities": "scores",
    "log_probabilities": "np.exp(scores)",
}


def program(sidecar: Sidecar, dtype: str, batch: int | None) -> str:
    """Python source that prints the five likeliest classes of each image.

    dtype, batch: of the file's input, "float32", "float16" or "uint8", and a number where it is fixed.
    """
    images = f"np.repeat(images, {batch}, axis=0)" if batch not in (None, 1) else "images"
    asked, told = (json.dumps(name, ensure_ascii=False) for name in (sidecar.input, sidecar.output))
    answer = f"session.run([{told}], {{{asked}: {images}}})[0][0].astype(np.float64)"
    lines = [
        *_resize(sidecar.preprocessing),
        *_numbers(sidecar.preprocessing, dtype, sidecar.layout),
        f"scores = {answer}",
        f"shares = {SHARES[sidecar.scores]}",
    ]
    return START + "".join(f"    {line}\n" for line in lines) + END


def _resize(preprocessing: Preprocessing) -> Iterator[str]:
    """As `preprocess.fit`."""
    size, method = preprocessing.size, f"Image.Resampling.{preprocessing.resize.upper()}"
    if preprocessing.crop == "none":
        yield f"picture = picture.resize(({size}, {size}), {method})"
        return
    shorter = round(size / preprocessing.crop_pct)
    yield f"factor = {shorter} / min(picture.size)"
    yield f"wide, high = (max({shorter}, round(side * factor)) for side in picture.size)"
    yield f"left, top = (wide - {size}) // 2, (high - {size}) // 2"
    yield f"picture = picture.resize((wide, high), {method}).crop((left, top, left + {size}, top + {size}))"


def _numbers(preprocessing: Preprocessing, dtype: str, layout: str) -> Iterator[str]:
    """As `preprocess.normalise`."""
    order = "[None]" if layout == "NHWC" else ".transpose(2, 0, 1)[None]"
    yield "pixels = np.asarray(picture)" if dtype == "uint8" else "pixels = np.asarray(picture, np.float32)"
    if len(preprocessing.mean) == 1:
        yield "pixels = pixels.mean(axis=2, keepdims=True, dtype=np.float32)"
        if dtype == "uint8":
            yield "pixels = np.rint(pixels).astype(np.uint8)"
    if dtype == "uint8":
        yield f"images = pixels{order}"
        return
    yield f"mean, std = np.float32({list(preprocessing.mean)}), np.float32({list(preprocessing.std)})"
    yield f"pixels = (pixels * np.float32({preprocessing.scale!r}) - mean) / std"
    yield f"images = pixels{order}" + (".astype(np.float16)" if dtype == "float16" else "")
