"""What a folder of images holds, before a pipeline is written for it: classes, their sizes, broken files.

Files are listed as training lists them, and opened as it opens them. Of many images some are looked at, evenly over the
list, and it is said how many.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..methods import InvalidInput
from .decode import BadImage, picture
from .sources import Listing, list_sources

AT_MOST = 500  # images that are opened
SECONDS = 20.0  # for opening them


@dataclass(frozen=True, slots=True)
class Census:
    """What was seen. images: class -> how many are for training; test: how many there are for testing, None when they
    are still to be carved from the others. looked: how many were opened, of all; sides: the shorter side in pixels of
    those that could be read. broken: what could not, with the reason.
    """

    images: dict[str, int]
    test: int | None
    looked: int
    sides: tuple[int, ...]
    broken: tuple[str, ...]

    @property
    def total(self) -> int:
        """Images for training, or to be divided."""
        return sum(self.images.values())

    @property
    def whole(self) -> bool:
        """Whether every image was opened."""
        return self.looked == self.total + (self.test or 0)

    @property
    def side(self) -> int | None:
        """The median of the shorter sides, pixels; None when no image could be read."""
        return round(statistics.median(self.sides)) if self.sides else None


def take_census(
    source: str,
    base: Path,
    *,
    max_megapixels: float,
    at_most: int = AT_MOST,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Census:
    """List a source (a folder per class or a tar of one) and open up to `at_most` of its images, for `seconds`.

    base: the folder that a relative path is meant from. Raises: InvalidInput for what training could not list, and for
    a class with too few images to be divided.
    """
    train, test = list_sources({"source": source}, base)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    images = {name: int(count) for name, count in zip(train.classes, counts, strict=True)}
    _check_enough(images, 2 if test is not None else 3)
    listings = [train] if test is None else [train, test]
    everything = [(listing, index) for listing in listings for index in range(len(listing))]
    chosen = np.linspace(0, len(everything) - 1, min(at_most, len(everything))).round().astype(int)
    until = clock() + seconds
    sides: list[int] = []
    broken: list[str] = []
    for place in chosen.tolist():
        if (sides or broken) and clock() > until:
            break
        listing, index = everything[place]
        try:
            sides.append(_side(listing, index, max_megapixels))
        except BadImage as error:
            broken.append(f"{listing.name(index)}: {error}")
    return Census(images, None if test is None else len(test), len(sides) + len(broken), tuple(sides), tuple(broken))


def _side(listing: Listing, index: int, max_megapixels: float) -> int:
    with listing.open(index) as file:
        return min(picture(file, max_megapixels).size)


def _check_enough(images: dict[str, int], least: int) -> None:
    """Every class must be in every split."""
    name = min(images, key=lambda each: images[each])
    if images[name] < least:
        have = f"{images[name]} image{'s' * (images[name] != 1)}"
        splits = "training and calibration" if least == 2 else "training, calibration and test"
        raise InvalidInput(
            f"data: class {name!r} has {have}, and {splits} need one each", "give it more images, or leave it out"
        )
