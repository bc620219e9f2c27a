"""The three splits every stage sees: train, calibration (carved from train), test.

The test split is never used to choose anything. Which image is in which split depends on the data alone, not on the
pipeline's seed, so that seeds and arms are compared on the same images. Small data sets stay in memory as uint8;
large ones are decoded when asked for, by worker processes if there are any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..methods import InvalidInput
from ..methods.example_selection import balanced_prefix
from .decode import BadImage, decode
from .sources import Listing, list_sources

SPLIT_SEED = 20_240_501  # fixed: see the module's docstring
MEMORY_LIMIT = 2 * 1024**3  # bytes of uint8 pixels that may stay in memory unless told otherwise
REMEDY = "repair or remove it, or set data.bad_images: skip"
Split = Literal["train", "calibration", "test"]


@dataclass(frozen=True)
class Images:
    """One split. labels (M,) int64; pixels come as uint8 (n, S, S, 3) at the image size of the data block."""

    listing: Listing
    members: np.ndarray  # (M,) positions in the listing
    size: int
    max_megapixels: float
    workers: int
    stored: np.ndarray | None  # (M, S, S, 3) when in memory

    def __len__(self) -> int:
        return len(self.members)

    @property
    def labels(self) -> np.ndarray:
        labels: np.ndarray = self.listing.labels[self.members]
        return labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.listing.classes

    def fingerprint(self) -> dict[str, Any]:
        """What tells this split from another: how many images, of what size, and a digest of labels and class names.
        Pixels are not read.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode() + self.labels.astype("<i8").tobytes()).hexdigest()
        return {"images": len(self), "image_size": self.size, "labels": digest[:16]}

    def fewer(self, count: int | None) -> Images:
        """At most so many of them, every class in proportion; None: all."""
        chosen = at_most(self.labels, np.arange(len(self)), count, np.random.default_rng(SPLIT_SEED))
        stored = None if self.stored is None else self.stored[chosen]
        return replace(self, members=self.members[chosen], stored=stored)

    def name(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        return self.listing.name(int(self.members[index]))

    def pixels(self, indices: np.ndarray | None = None) -> np.ndarray:
        """uint8 (n, S, S, 3). Raises: InvalidInput naming a broken image."""
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        if self.stored is not None:
            return self.stored if indices is None else self.stored[chosen]
        return (
            np.stack([self[int(i)] for i in chosen])
            if len(chosen)
            else np.empty((0, self.size, self.size, 3), np.uint8)
        )

    def __getitem__(self, index: int) -> np.ndarray:
        """One image, (S, S, 3) uint8: what torch's DataLoader asks for."""
        if self.stored is not None:
            pixels: np.ndarray = self.stored[index]
            return pixels
        try:
            return self.decoded(index)
        except BadImage as error:
            raise InvalidInput(f"{self.name(index)}: {error}", REMEDY) from error

    def decoded(self, index: int) -> np.ndarray:
        """One image from its file, (S, S, 3) uint8. Raises: BadImage."""
        try:
            file = self.listing.open(int(self.members[index]))
        except OSError as error:
            raise BadImage(f"cannot be opened ({error.strerror or error})") from error
        with file:
            return decode(file, self.size, self.max_megapixels)

    def batches(self, order: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """uint8 batches in the given order, decoded ahead by workers when the images are not in memory."""
        if self.stored is not None or self.workers == 0:
            for start in range(0, len(order), size):
                yield self.pixels(order[start : start + size])
            return
        from torch.utils.data import DataLoader

        loader: DataLoader[Any] = DataLoader(
            _Streamed(self, order),  # type: ignore[arg-type]
            batch_size=size,
            num_workers=self.workers,
            collate_fn=list,
        )
        for batch in loader:
            broken = next((item for item in batch if isinstance(item, str)), None)
            if broken is not None:
                raise InvalidInput(broken, REMEDY)
            yield np.stack(batch)


@dataclass(frozen=True)
class _Streamed:
    """Images in an order, for worker processes: what is wrong with one comes back as text, since an exception of a
    worker reaches the user as a traceback."""

    images: Images
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> np.ndarray | str:
        try:
            return self.images[int(self.order[position])]
        except InvalidInput as error:
            return str(error)


@dataclass(frozen=True)
class Splits:
    """All three, with what a reader should know: images skipped as broken, and test images that also are in
    training.
    """

    train: Images
    calibration: Images
    test: Images
    skipped: tuple[str, ...]

    def __getitem__(self, split: Split) -> Images:
        return {"train": self.train, "calibration": self.calibration, "test": self.test}[split]

    def leaked(self) -> int | None:
        """Test images that are, pixel for pixel, also training or calibration images; None when not in memory."""
        train, calibration, test = self.train.stored, self.calibration.stored, self.test.stored
        if train is None or calibration is None or test is None:
            return None
        known = {hashlib.sha1(image.tobytes()).digest() for part in (train, calibration) for image in part}
        return sum(hashlib.sha1(image.tobytes()).digest() in known for image in test)


def load_split(data: Mapping[str, Any], base: Path, split: Split) -> Images:
    """One split of a data block. See load_splits."""
    return load_splits(data, base)[split]


def load_splits(data: Mapping[str, Any], base: Path) -> Splits:
    """The splits of a data block (the fields of DataConfig), cached for the stages that follow in this process.

    Raises: InvalidInput for missing paths, broken images (named, unless they are to be skipped), too few images a
    class.
    """
    return _load(json.dumps(dict(data), sort_keys=True, default=str), base)


@lru_cache(maxsize=2)
def _load(text: str, base: Path) -> Splits:
    data = json.loads(text)
    train_listing, test_listing = list_sources(data, base)
    rng = np.random.default_rng(SPLIT_SEED)
    everything = np.arange(len(train_listing))
    if test_listing is None:
        test_listing = train_listing
        test, rest = stratified(train_listing.labels, everything, data["test_fraction"], rng)
    else:
        test, rest = np.arange(len(test_listing)), everything
    calibration, train = stratified(train_listing.labels, rest, data["calibration"], rng)
    train = at_most(train_listing.labels, train, data["max_train"], rng)
    test = at_most(test_listing.labels, test, data["max_test"], rng)
    skipped: list[str] = []
    splits = Splits(
        _images(train_listing, train, data, skipped),
        _images(train_listing, calibration, data, skipped),
        _images(test_listing, test, data, skipped),
        tuple(skipped),
    )
    for name, images in (("training", splits.train), ("calibration", splits.calibration), ("test", splits.test)):
        missing = set(range(len(images.classes))) - set(images.labels.tolist())
        if missing:
            raise InvalidInput(
                f"data: class {images.classes[min(missing)]!r} has no image in the {name} split",
                "give each class more images, or change calibration, test_fraction, max_train or max_test",
            )
    return splits


def stratified(
    labels: np.ndarray, members: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split members in two, `share` of every class (rounded, at least 1 of a class with 2) in the first; both
    ascending.
    """
    first: list[np.ndarray] = []
    for label in np.unique(labels[members]):
        of_class = members[labels[members] == label]
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        first.append(rng.permutation(of_class)[:count])
    chosen = np.sort(np.concatenate(first))
    return chosen, np.setdiff1d(members, chosen, assume_unique=True)


def at_most(labels: np.ndarray, members: np.ndarray, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """`count` of the members (all, when there are no more), every class in proportion, the total exact; ascending."""
    if count is None or count >= len(members):
        return members
    shuffled = rng.permutation(members)
    return np.sort(shuffled[balanced_prefix(labels[shuffled], count)])


def _images(listing: Listing, members: np.ndarray, data: Mapping[str, Any], skipped: list[str]) -> Images:
    size = int(data["image_size"])
    images = Images(listing, members, size, float(data["max_megapixels"]), int(data["workers"]), None)
    in_memory = data["in_memory"]
    if in_memory is None:
        in_memory = len(members) * size * size * 3 <= MEMORY_LIMIT
    skip = data["bad_images"] == "skip"
    if not in_memory and not skip:
        return images
    good, bad, pixels = [], [], []
    for position in range(len(members)):
        try:
            decoded = images.decoded(position)
        except BadImage as error:
            bad.append(f"{images.name(position)}: {error}")
            continue
        good.append(position)
        if in_memory:
            pixels.append(decoded)
    if bad and not skip:
        shown = "\n    ".join(bad[:5]) + (f"\n    and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise InvalidInput(
            f"{len(bad)} broken image{'s' * (len(bad) > 1)}:\n    {shown}",
            "repair or remove them, or set data.bad_images: skip",
        )
    skipped.extend(bad)
    kept = members[np.asarray(good, dtype=np.int64)]
    return replace(images, members=kept, stored=np.stack(pixels) if in_memory and pixels else None)
