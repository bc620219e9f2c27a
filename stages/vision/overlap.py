"""What two tickets artifacts have in common, for `sievit diff`. Reads arrays block by block and imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..methods import InvalidInput
from ..methods.overlap import by_chance, jaccard, patch_jaccard


def overlap(left: Path, right: Path) -> dict[str, float | int | str]:
    """Name -> number. Choices from other images or other patches are not compared; then a text says why.

    Raises: InvalidInput when a folder holds no tickets of this version.
    """
    one, other = _record(left), _record(right)
    if one["data"]["train"] != other["data"]["train"]:
        return {"images": f"not compared: chosen from {_told(one['data'])}, and from {_told(other['data'])}"}
    here, there = (np.load(folder / "kept.npy", allow_pickle=False) for folder in (left, right))
    shared = len(np.intersect1d(here, there, assume_unique=True))
    found: dict[str, float | int | str] = {
        "images_in_both": shared,
        "images_in_either": len(here) + len(there) - shared,
        "images_jaccard": round(jaccard(here, there), 4),
        "images_jaccard_by_chance": round(by_chance(len(here), len(there), int(one["examples"]["of"])), 4),
    }
    return found | _patches(left, right, one["patches"], other["patches"])


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / "tickets.json").read_text(encoding="utf-8"))
        record["data"]["train"]["images"], record["patches"]["grid"], record["examples"]["of"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{folder}: not a readable tickets artifact ({type(error).__name__}: {error})", "run the ticket stage again"
        ) from error
    return record


def _told(data: dict[str, Any]) -> str:
    train = data["train"]
    return f"{train['images']} images of {train['image_size']} px (labels {train['labels']})"


def _patches(left: Path, right: Path, one: dict[str, Any], other: dict[str, Any]) -> dict[str, float | int | str]:
    """Of the training images; where one of the two keeps no ranks of them (online, drawn anew), of the test images."""
    if one["grid"] != other["grid"]:
        return {"patches": f"not compared: chosen from a grid of {one['grid']}, and of {other['grid']}"}
    for name, split in (("ranks.npy", "training"), ("ranks_test.npy", "test")):
        if (left / name).exists() and (right / name).exists():
            here, there = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for folder in (left, right))
            keep, other_keep = int(one["kept_per_image"]), int(other["kept_per_image"])
            return {
                "patches_mean_jaccard": round(patch_jaccard(here, keep, there, other_keep), 4),
                "patches_jaccard_by_chance": round(by_chance(keep, other_keep, int(one["of"])), 4),
                "patches_of": f"{len(here)} {split} images",
            }
    return {}
