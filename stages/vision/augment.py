"""Augmentation of a whole batch on its device, with the geometry kept, so that a patch ticket can follow its image.

Shift, zoom and flip are one affine map per image, applied by one grid_sample; `theta` (view -> image) goes back to
the caller, which maps ranks through it. RandAugment is timm's, image by image on the CPU before that; its geometric
operations would move patches without saying where, so with patch tickets only the colour operations are used. Mixup
and cutmix are timm's.

Draws are those of the whole batch, of which a process may compute some rows only: vectors of one draw for each image,
or a seed for each where an image takes as many draws as it likes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from .processes import Share
from .recipe import Augmentation

COLOUR_OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing",
)  # fmt: skip


class Augmenter:
    """uint8 batch -> float views and the map from view to image."""

    def __init__(self, settings: Augmentation, size: int, *, colour_only: bool) -> None:
        self.settings = settings
        self.size = size
        self.rand = None if settings.rand is None else _rand(settings.rand, size, colour_only)

    def __call__(
        self, pixels: np.ndarray, generator: torch.Generator, device: torch.device, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """Args: pixels (B, S, S, 3) uint8; generator on the CPU; share: which rows of a larger batch these are.
        Returns: views (B, 3, S, S) float32 in [0, 1]; theta (B, 2, 3), view to image coordinates in [-1, 1]."""
        batch = len(pixels) if share is None else share.count
        rows = torch.arange(batch) if share is None else torch.from_numpy(share.rows)
        if self.rand is not None:
            seeds = torch.randint(2**31, (batch,), generator=generator)[rows].tolist()
            pixels = np.stack([self._rand(image, seed) for image, seed in zip(pixels, seeds, strict=True)])
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float().div_(255.0)
        theta = self._theta(batch, generator)[rows]
        if self.settings.shift or self.settings.flip or self.settings.zoom < 1:
            grid = torch.nn.functional.affine_grid(theta.to(device), list(images.shape), align_corners=False)
            images = torch.nn.functional.grid_sample(images, grid, mode="bilinear", align_corners=False)
        if self.settings.erase:
            images = self._erase(images, batch, rows, generator)
        return images, theta

    def _rand(self, image: np.ndarray, seed: int) -> np.ndarray:
        """timm draws from Python's and numpy's global generators: seeded from ours, a resumed run draws the same."""
        assert self.rand is not None
        random.seed(seed)
        np.random.seed(seed)
        return np.asarray(self.rand(Image.fromarray(image)))

    def _theta(self, batch: int, generator: torch.Generator) -> Tensor:
        """(B, 2, 3). A shift without zoom is a whole number of pixels, so that it moves pixels and does not blur
        them.
        """
        s = self.settings
        scale = s.zoom + (1 - s.zoom) * torch.rand(batch, generator=generator)
        limit = s.shift * self.size
        pixels = torch.empty(batch, 2).uniform_(-1, 1, generator=generator) * limit
        if s.zoom == 1:
            pixels = pixels.round()
        # A zoomed crop also wanders inside the image.
        wander = torch.empty(batch, 2).uniform_(-1, 1, generator=generator) * (1 - scale).unsqueeze(1)
        mirror = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0) if s.flip else torch.ones(batch)
        theta = torch.zeros(batch, 2, 3)
        theta[:, 0, 0] = scale * mirror
        theta[:, 1, 1] = scale
        theta[:, :, 2] = pixels * 2 / self.size + wander
        return theta

    def _erase(self, images: Tensor, batch: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A box of noise over 2% to 20% of some images (Zhong et al. 2020)."""
        draws = torch.rand(batch, 5, generator=generator)[rows].tolist()
        seeds = torch.randint(2**31, (batch,), generator=generator)[rows].tolist()
        for image, draw, seed in zip(images, draws, seeds, strict=True):
            if draw[0] >= self.settings.erase:
                continue
            area = (0.02 + 0.18 * draw[1]) * self.size**2
            aspect = 0.3 ** (1 - 2 * draw[2])
            high = min(self.size, max(1, round((area * aspect) ** 0.5)))
            wide = min(self.size, max(1, round((area / aspect) ** 0.5)))
            top, left = int(draw[3] * (self.size - high + 1)), int(draw[4] * (self.size - wide + 1))
            noise = torch.rand(image.shape[0], high, wide, generator=torch.Generator().manual_seed(seed))
            image[:, top : top + high, left : left + wide] = noise.to(image.device)
        return images


def _rand(text: str, size: int, colour_only: bool) -> RandAugment:
    hparams = {"translate_const": int(size * 0.45), "img_mean": (128, 128, 128)}
    rand = rand_augment_transform(text, hparams, list(COLOUR_OPERATIONS) if colour_only else None)
    for operation in rand.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return rand


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm asks for 0 bits at its strongest, and for fewer beyond, which Pillow refuses; a black image teaches
    nothing.
    """
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


@dataclass(frozen=True)
class Mixed:
    """images (B, 3, S, S); soft targets (B, K); the share of each image's own content (1.0: nothing was mixed), and of
    every pixel, own (S, S) on the CPU.
    """

    images: Tensor
    targets: Tensor
    share: float
    own: Tensor


class Mixer:
    """timm's mixup and cutmix, one draw for a batch; image i is mixed with image B-1-i."""

    def __init__(self, mixup: float, cutmix: float, smoothing: float, classes: int) -> None:
        self.smoothing, self.classes = smoothing, classes
        self.mixer = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Mixed:
        """images (B, 3, S, S), which are written over, labels (B,)."""
        share, own = 1.0, torch.ones(images.shape[2:])
        if self.mixer is not None:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            np.random.seed(seed)
            share = float(self.mixer._mix_batch(images))
            # White mixed with black by the same draws: what is white is an image's own. No box need be known.
            pair = torch.stack([own, torch.zeros_like(own)]).unsqueeze(1)
            np.random.seed(seed)
            self.mixer._mix_batch(pair)
            own = pair[0, 0]
        return Mixed(images, mixup_target(labels, self.classes, share, self.smoothing), share, own)
