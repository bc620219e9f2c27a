"""Classify images with the model in this folder; onnxruntime, numpy and pillow are all it needs: predict.py IMAGE..."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageOps


def prepare(path: str | Path, stated: dict[str, Any], dtype: str, layout: str = "NCHW") -> NDArray[np.generic]:
    """An image file -> the network's input [1, channels, size, size], or channels last, as model.json says."""
    pre = {"resize": "bilinear", "crop": "none", "crop_pct": 1.0, "scale": 1 / 255, **stated}
    size, method = pre["size"], Image.Resampling[pre["resize"].upper()]
    picture: Image.Image = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip
        picture = Image.fromarray(np.clip(np.asarray(picture, np.float64) / 257, 0, 255).round().astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")
    wide = high = size
    if pre["crop"] == "center":
        shorter = round(size / pre["crop_pct"])
        wide, high = (max(shorter, round(side * (shorter / min(picture.size)))) for side in picture.size)
    left, top = (wide - size) // 2, (high - size) // 2
    picture = picture.resize((wide, high), method).crop((left, top, left + size, top + size))
    pixels = np.asarray(picture)[None]
    mean, std = (np.array(pre[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    if dtype == "uint8":
        grey = np.rint(pixels.mean(axis=3, keepdims=True, dtype=np.float32)).astype(np.uint8)
        pixels = grey if mean.size == 1 else pixels
        return pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2)
    pixels = pixels.transpose(0, 3, 1, 2)
    values = pixels.astype(np.float32) if mean.size == 3 else pixels.mean(axis=1, keepdims=True, dtype=np.float32)
    return ((values * np.float32(pre["scale"]) - mean) / std).astype(dtype)


def main() -> None:
    """Print the five likeliest classes of each image."""
    folder = Path(__file__).parent
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    asked = session.get_inputs()[0]
    dtype = {"tensor(uint8)": "uint8", "tensor(float16)": "float16"}.get(asked.type, "float32")
    for path in sys.argv[1:]:
        images = prepare(path, card["preprocessing"], dtype, card.get("layout", "NCHW"))
        images = np.repeat(images, asked.shape[0] if isinstance(asked.shape[0], int) else 1, axis=0)
        scores = session.run([card["output"]], {card["input"]: images})[0][0].astype(np.float64)
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        for place in np.argsort(-shares, kind="stable")[:5]:
            print(f"{path}\t{card['classes'][place]}\t{shares[place]:.4f}")


if __name__ == "__main__":
    main()
