"""The one way from pixels to the network's input, in numpy, as the sidecar says.

Training, export's parity check and this file must agree to the last digit that matters: most "ONNX lost seven points"
reports are two preprocessings of one model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..methods import InvalidInput
from .sidecar import Preprocessing

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def normalise(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, dtype: str = "float32", layout: str = "NCHW"
) -> NDArray[np.generic]:
    """pixels uint8 [n, h, w, 3] of the network's size -> [n, 3, h, w], or [n, h, w, 3] in layout NHWC.

    A network of uint8 input gets the bytes as they are, one of a single channel the mean of the three. Raises
    InvalidInput on another size or type.
    """
    size, channels = preprocessing.size, len(preprocessing.mean)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
        raise InvalidInput(
            f"images of type {pixels.dtype} and shape {list(pixels.shape)} do not fit",
            f"give uint8 [n,{size},{size},3], or resize with `fit`",
        )
    if dtype == "uint8":
        if channels == 1:
            pixels = np.rint(pixels.mean(axis=3, keepdims=True, dtype=np.float32)).astype(np.uint8)
        return np.ascontiguousarray(pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2))
    values = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    if channels == 1:
        values = values.mean(axis=1, keepdims=True, dtype=np.float32)
    values *= np.float32(preprocessing.scale)
    values -= np.asarray(preprocessing.mean, dtype=np.float32).reshape(1, channels, 1, 1)
    values /= np.asarray(preprocessing.std, dtype=np.float32).reshape(1, channels, 1, 1)
    values = values.transpose(0, 2, 3, 1) if layout == "NHWC" else values
    return np.ascontiguousarray(values.astype(dtype, copy=False))


def fit(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One picture uint8 [h, w, 3] of any size -> uint8 [size, size, 3] by the sidecar's resize and crop."""
    size = preprocessing.size
    picture = Image.fromarray(pixels)
    method = FILTERS[preprocessing.resize]
    if preprocessing.crop == "none":
        return np.asarray(picture.resize((size, size), method))
    shorter = round(size / preprocessing.crop_pct)
    factor = shorter / min(picture.size)
    width, height = (max(shorter, round(side * factor)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), method)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
