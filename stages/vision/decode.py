"""One image file -> uint8 pixels, or a named refusal. Everything here treats files as untrusted.

Rules: formats from an allow-list (Pillow would open PostScript named .jpg); a pixel limit checked on the header,
before anything is decompressed; EXIF rotation applied; 16-bit and palette images brought to 8-bit RGB; of an
animation the first frame; then the shorter side resized to the target and the centre cut out.
"""

from __future__ import annotations

import io
import warnings
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What to_square does, in the words of the sidecar of an exported file.
PICTURE: dict[str, Any] = {"resize": "bilinear", "crop": "center", "crop_pct": 1.0}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
# What counts as an image in a folder or a tar, by name; one of another format is refused by name, not passed over.
ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)


class BadImage(ValueError):
    """This file cannot be used; the text says why. Whether that stops the run is the data set's rule."""


def decode(file: IO[bytes], size: int, max_megapixels: float) -> np.ndarray:
    """File -> (size, size, 3) uint8. Raises: BadImage."""
    return to_square(picture(file, max_megapixels), size)


def picture(file: IO[bytes], max_megapixels: float) -> Image.Image:
    """File -> upright 8-bit RGB picture of its own size. Raises: BadImage."""
    content = file.read()
    if not content:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            # Our own limit below is the rule; Pillow's is a warning first and an error later.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_megapixels * 1e6:
                    raise BadImage(f"{width} x {height} pixels, above the limit of {max_megapixels:g} megapixels")
                if min(width, height) < 1 or max(width, height) > 100 * min(width, height):
                    raise BadImage(f"{width} x {height} pixels, too narrow to be an image of something")
                return _to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"far above the limit of {max_megapixels:g} megapixels") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    # Pillow's decoders raise all of these for broken files.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, KeyError, OverflowError, MemoryError) as error:
        raise BadImage(f"broken image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey: scale, where convert("RGB") would clip at 255
        wide = np.asarray(upright, dtype=np.float64)
        return Image.fromarray(np.clip(wide / 257.0, 0, 255).round().astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size` (bilinear, antialiased), centre cut out. Returns (size, size, 3) uint8."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        wide, high = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8)
