"""How far the checkpoint of a training is, by its header alone: no tensor is read, and torch is not imported."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from .clock import Clock

MOST_BYTES = 64 * 2**20  # of a header; a larger one is not one of ours


def epochs(checkpoint: Path) -> tuple[float, float] | None:
    """(epochs done, epochs of the whole training) as clock.py counts them; None for a file that is absent or damaged.

    A safetensors file begins with the length of its header, 8 bytes little-endian, and the header is JSON.
    """
    try:
        with checkpoint.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MOST_BYTES)))
        clock = Clock(**json.loads(header["__metadata__"]["facts"])["run"]["clock"])
        return clock.now / clock.nominal, clock.total / clock.nominal
    except (OSError, struct.error, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
        return None
