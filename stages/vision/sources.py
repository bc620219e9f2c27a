"""Where images come from: digits that ship with scikit-learn, class folders, tars, and timm's torch/... and hfds/...
data sets.

A source lists its samples without decoding them; `Listing.open` gives one as an open file or as an image. Tars are
read in place.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..methods import InvalidInput
from .decode import ENDINGS

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "validation", "valid")


@dataclass(frozen=True)
class Listing:
    """Samples of one split: labels (M,), class names, and for sample i its name and its bytes."""

    labels: np.ndarray
    classes: tuple[str, ...]
    name: Callable[[int], str]
    open: Callable[[int], IO[bytes]]

    def __len__(self) -> int:
        return len(self.labels)


def list_sources(data: Mapping[str, Any], base: Path) -> tuple[Listing, Listing | None]:
    """The training split and the test split of a data block; None when there is no test split of its own.

    Args: data: the fields of DataConfig; base: the folder that relative paths are meant from.
    Raises: InvalidInput naming the field, the path and the remedy.
    """
    source = str(data["source"])
    if source == "builtin:digits":
        return _digits(), None
    if source.startswith("builtin:"):
        raise InvalidInput(f"data.source: there is no {source!r}", "the one built-in data set is builtin:digits")
    prefix = source.split("/", 1)[0].lower() if "/" in source else ""
    if prefix in ("torch", "hfds"):
        return _timm(source, data, base, TRAIN_NAMES), _timm(source, data, base, TEST_NAMES)
    path = base / Path(source).expanduser()
    train, test = _find_splits(path)
    if data.get("test") is not None:
        test = base / Path(str(data["test"])).expanduser()
    listings = _list(train), (None if test is None else _list(test))
    if listings[1] is not None and listings[1].classes != listings[0].classes:
        raise InvalidInput(
            f"data: the classes of the test split differ from those of the training split "
            f"({_difference(listings[0].classes, listings[1].classes)})",
            f"training: {train}; test: {test}",
            field="data.source" if data.get("test") is None else "data.test",
        )
    return listings


def check_sources(data: Mapping[str, Any], base: Path) -> None:
    """List the samples and decode none. hfds/... is left out, which would be fetched for it.

    Raises: InvalidInput as `list_sources`, with the field that names what is wrong.
    """
    if str(data["source"]).lower().startswith(("builtin:", "hfds/")):
        return
    try:
        list_sources(data, base)
    except InvalidInput as error:
        error.field = error.field or "data.source"
        raise


def _difference(train: tuple[str, ...], test: tuple[str, ...]) -> str:
    only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    parts = [f"only in training: {only_train[:5]!r}"] if only_train else []
    return "; ".join(parts + ([f"only in test: {only_test[:5]!r}"] if only_test else []))


def _find_splits(path: Path) -> tuple[Path, Path | None]:
    """A folder that holds train and test (folders or tars) names both; anything else is the training split itself."""
    if not path.exists():
        raise InvalidInput(
            f"data.source: {path} does not exist", "name a folder with a folder per class, or a .tar of one"
        )
    if path.is_dir():
        for name in TRAIN_NAMES:
            for train in (path / name, path / f"{name}.tar"):
                if train.exists():
                    tests = [path / f"{t}{end}" for t in TEST_NAMES for end in ("", ".tar")]
                    return train, next((t for t in tests if t.exists()), None)
    return path, None


def _list(path: Path) -> Listing:
    _tell_timm()
    if path.suffix == ".tar" and path.is_file():
        return _tar(path)
    if path.is_dir():
        return _folder(path)
    raise InvalidInput(f"data: {path} is neither a folder nor a .tar file", "give a folder per class, or a .tar of one")


def _tell_timm() -> None:
    """Its readers pass over every image in silence that is not .png, .jpg or .jpeg."""
    from timm.data.readers.img_extensions import set_img_extensions

    set_img_extensions(ENDINGS)


def _folder(path: Path) -> Listing:
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    _check_folder(path)
    try:
        reader = ReaderImageFolder(str(path))
    except RuntimeError as error:
        raise InvalidInput(f"data: no images below {path}", "expected a folder per class with images inside") from error
    _refuse_same_leaf((str(Path(name).relative_to(path).parent) for name, _ in reader.samples), path)
    labels = np.array([target for _, target in reader.samples], dtype=np.int64)
    return Listing(labels, _classes(reader.class_to_idx, path), reader.filename, lambda i: reader[i][0])


def _check_folder(path: Path) -> None:
    """What timm's reader would pass over in silence: a loop of links, a class without images, images outside a
    class.
    """
    seen: set[Path] = set()
    for root, _, _ in os.walk(path, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            raise InvalidInput(f"data: {root} is reached twice through links", "remove the link that points back")
        seen.add(real)
    loose = [f.name for f in path.iterdir() if f.is_file() and f.suffix.lower() in ENDINGS]
    if loose:
        raise InvalidInput(
            f"data: {path} holds images outside any class folder, such as {loose[0]!r}", "move them into class folders"
        )
    for folder in sorted(f for f in path.iterdir() if f.is_dir()):
        if not any(f.suffix.lower() in ENDINGS for f in folder.rglob("*")):
            raise InvalidInput(f"data: class folder {folder} holds no image", "fill it or remove it")


def _refuse_same_leaf(folders: Iterable[str], path: Path) -> None:
    """timm names a class by the last folder alone: ant/small and bee/small would become one class "small"."""
    known: dict[str, str] = {}
    for folder in set(folders):
        leaf = Path(folder).name
        if known.setdefault(leaf, folder) != folder:
            raise InvalidInput(
                f"data: {path} has two folders {leaf!r}: {known[leaf]} and {folder}",
                "give a folder per class, one level deep",
            )


def _tar(path: Path) -> Listing:
    import tarfile

    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        # cache_tarinfo would leave a pickle beside the data.
        reader = ReaderImageInTar(str(path), cache_tarinfo=False, cache_tarfiles=False)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidInput(f"data: {path} is not a readable tar ({error})", "make it again, uncompressed") from error
    except ValueError as error:  # what timm raises when no member is an image
        raise InvalidInput(f"data: no images in {path}", "expected a folder per class inside the tar") from error
    labels = np.asarray(reader.targets, dtype=np.int64)

    def open_member(index: int) -> IO[bytes]:
        member, _, nested = reader.samples[index]
        if nested is not None:  # a tar within the tar
            return reader[index][0] or io.BytesIO()
        if not member.isreg():
            return io.BytesIO()
        # Read by offset from a file opened here and now: workers that share an open tar would share its position.
        with path.open("rb") as tar:
            tar.seek(member.offset_data)
            return io.BytesIO(tar.read(member.size))

    _refuse_same_leaf((str(Path(m.name).parent) for m, _, _ in reader.samples), path)
    return Listing(
        labels, _classes(reader.class_name_to_idx, path), lambda i: f"{path.name}:{reader.filename(i)}", open_member
    )


def _classes(index: Mapping[str, int], path: Path) -> tuple[str, ...]:
    classes = tuple(sorted(index, key=lambda name: index[name]))
    if len(classes) < 2:
        raise InvalidInput(
            f"data: {path} has {len(classes)} class", "classification needs a folder for each of two classes or more"
        )
    return classes


def _timm(source: str, data: Mapping[str, Any], base: Path, names: tuple[str, ...]) -> Listing:
    """torch/<name> and hfds/<name> through timm; the first split name that the data set knows is taken."""
    from timm.data.dataset_factory import create_dataset

    _tell_timm()
    root = base / Path(str(data["root"])).expanduser() if data.get("root") else None
    failures: list[str] = []
    for split in names:
        try:
            dataset = create_dataset(source, root=None if root is None else str(root), split=split, download=False)
            if root is not None and getattr(dataset, "root", None) == str(root) and source.endswith("folder"):
                raise FileNotFoundError(f"{root} has no folder {split}")  # timm would take the whole root for the split
            return _wrap(dataset, source)
        except (RuntimeError, OSError, ValueError, AssertionError, TypeError, ImportError, FileNotFoundError) as error:
            failures.append(f"{split}: {error}".splitlines()[0])
    why = failures[0].split(". ")[0]  # torchvision goes on to recommend an argument that nobody here can give
    if source.lower().startswith("torch/"):
        raise InvalidInput(
            f"data.root: {root or 'nothing'} does not hold {source} ({why})",
            "set data.root to the folder that torchvision downloaded it to",
            field="data.source" if root is None else "data.root",
        )
    raise InvalidInput(
        f"data.source: {source} has no usable split {' or '.join(names)} ({why})",
        "hfds/... needs the name of a data set of images on the hub, and the extra: pip install 'sievit[hfds]'",
    )


def _wrap(dataset: Any, source: str) -> Listing:
    """A map-style data set of (PIL image, label) pairs as a listing."""
    reader = getattr(dataset, "reader", None)
    labels = getattr(dataset, "targets", None)
    if labels is None:
        labels = (
            [dataset[i][1] for i in range(len(dataset))]
            if reader is None
            else [reader[i][1] for i in range(len(reader))]
        )
    names = getattr(dataset, "classes", None)
    classes = tuple(str(c) for c in names) if names else tuple(str(c) for c in sorted({int(x) for x in labels}))

    def open_sample(index: int) -> IO[bytes]:
        image = dataset[index][0]
        if not isinstance(image, Image.Image):
            raise InvalidInput(
                f"data.source: {source} yields {type(image).__name__}, not images",
                "name a data set of images, or a folder per class",
            )
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "BMP")  # uncompressed: the same pixels on the one decoding path
        buffer.seek(0)
        return buffer

    return Listing(np.asarray(labels, dtype=np.int64), classes, lambda i: f"{source}[{i}]", open_sample)


def _digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 (test set of UCI optdigits), each as a small grey bitmap."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255.0 / 16.0)).round().astype(np.uint8)

    def open_digit(index: int) -> IO[bytes]:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, "BMP")
        buffer.seek(0)
        return buffer

    return Listing(digits.target.astype(np.int64), tuple("0123456789"), lambda i: f"builtin:digits[{i}]", open_digit)
