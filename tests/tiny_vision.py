"""A network of a few thousand weights and generated images: what the vision tests share. Small enough for all stages
in seconds.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sievit.stages.vision.network import Network, create
from sievit.stages.vision.swin import Swin

ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", ARGS),
    "deit": ("deit_tiny_patch16_224", ARGS),
    "distilled": ("deit_tiny_distilled_patch16_224", ARGS),
    "layer scale": ("deit3_small_patch16_224", ARGS),
    "registers, average pool": ("vit_base_patch16_reg4_gap_256", ARGS),
    "lv-vit": ("lvvit_s", {**ARGS, "stem_dim": 4}),
}
# 16 x 16 patches of 2 px in windows of 4: shifted blocks in both stages.
SWIN_ARGS: dict[str, Any] = {
    "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
}  # fmt: skip
SWINS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN_ARGS),
    "swin v2": ("swinv2_tiny_window8_256", SWIN_ARGS),
}


def swin(family: str = "swin", *, classes: int = 5, seed: int = 0, **more: Any) -> Swin:
    """As network, with weights so large that attention is far from uniform."""
    name, args = SWINS[family]
    torch.manual_seed(seed)
    made = create(name, classes=classes, image_size=32, args={**args, **more}).eval()
    assert isinstance(made, Swin)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def network(family: str = "deit", *, classes: int = 5, seed: int = 0, **more: Any) -> Network:
    """In eval mode, with biases and norms away from their initial zeros and ones, so that a mistake in them shows."""
    name, args = FAMILIES[family]
    torch.manual_seed(seed)
    made = create(name, classes=classes, image_size=32, args={**args, **more}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def data(source: str = "builtin:digits", **fields: Any) -> dict[str, Any]:
    """The fields of a data block."""
    from sievit.pipeline.settings import DataConfig

    return DataConfig(source=source, **fields).model_dump()


def image_folder(root: Path, *, per_class: int = 8, classes: tuple[str, ...] = ("ant", "bee"), size: int = 40) -> Path:
    """A folder per class of small PNGs: a class is a colour, an image a brightness, so that it can be learned."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            pixels[..., number % 3] += 120
            Image.fromarray(pixels).save(root / name / f"{index:03}.png")
    return root


def tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, file.relative_to(folder))
    return path


def png(width: int, height: int, mode: str = "RGB") -> io.BytesIO:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
