"""Classify images with the model in this folder; onnxruntime, numpy and pillow are all it needs: predict.py IMAGE..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageOps


def prepare(path: str | Path, pre: dict, dtype: str) -> NDArray[np.generic]:  # type: ignore[type-arg]
    """An image file -> the network's input [1, channels, size, size], by the preprocessing of model.json."""
    picture: Image.Image = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip
        picture = Image.fromarray(np.clip(np.asarray(picture, np.float64) / 257, 0, 255).round().astype(np.uint8))
    picture = picture.convert("RGBA" if picture.mode == "P" and "transparency" in picture.info else "RGB")
    shorter = round(pre["size"] / pre["crop_pct"]) if pre["crop"] == "center" else pre["size"]
    wide, high = (max(shorter, round(side * (shorter / min(picture.size)))) for side in picture.size)
    if pre["crop"] == "none":
        wide = high = shorter
    left, top, size = (wide - pre["size"]) // 2, (high - pre["size"]) // 2, pre["size"]
    picture = picture.convert("RGB").resize((wide, high), Image.Resampling[pre["resize"].upper()])
    pixels = np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)[None]
    if dtype == "uint8":
        return pixels
    values = pixels.astype(np.float32) if len(pre["mean"]) == 3 else pixels.mean(axis=1, keepdims=True, dtype="float32")
    mean, std = (np.array(pre[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    return ((values * np.float32(pre["scale"]) - mean) / std).astype(dtype)


def main() -> None:
    """Print the five likeliest classes of each image."""
    folder = Path(__file__).parent
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    asked = session.get_inputs()[0]
    dtype = {"tensor(uint8)": "uint8", "tensor(float16)": "float16"}.get(asked.type, "float32")
    for path in sys.argv[1:]:
        images = prepare(path, card["preprocessing"], dtype)
        images = np.repeat(images, asked.shape[0] if isinstance(asked.shape[0], int) else 1, axis=0)
        scores = session.run([card["output"]], {card["input"]: images})[0][0].astype(np.float64)
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        for place in np.argsort(-shares, kind="stable")[:5]:
            print(f"{path}\t{card['classes'][place]}\t{shares[place]:.4f}")


if __name__ == "__main__":
    main()
