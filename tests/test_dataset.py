"""Splits, readers and untrusted images."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vision import data, image_folder, png, tar_of

from sievit.pipeline import fingerprint
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.dataset import at_most, load_splits, stratified
from sievit.stages.vision.decode import ENDINGS, BadImage, decode


def test_splits_are_disjoint_stratified_and_the_same_every_time() -> None:
    splits = load_splits(data(), Path())
    members = [set(part.members.tolist()) for part in (splits.train, splits.calibration, splits.test)]
    assert sum(map(len, members)) == len(set().union(*members)) == 1797
    for part in (splits.calibration, splits.test):
        share = np.bincount(part.labels, minlength=10) / len(part)
        assert share.max() < 0.13 and share.min() > 0.07
    load_splits.__globals__["_load"].cache_clear()
    again = load_splits(data(), Path())
    assert np.array_equal(again.test.members, splits.test.members)


def test_a_tar_gives_the_same_pixels_and_labels_as_its_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=10)
    tar = tar_of(folder, tmp_path / "images.tar")
    one, two = (load_splits(data(str(p)), Path()) for p in (folder, tar))
    for split in ("train", "calibration", "test"):
        assert np.array_equal(one[split].pixels(), two[split].pixels())
        assert np.array_equal(one[split].labels, two[split].labels)
    assert one.train.classes == ("ant", "bee")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "images.tar"], "nothing is left beside the data"


@pytest.mark.parametrize("tarred", [False, True])
def test_every_image_that_can_be_decoded_is_read_whatever_its_ending(tmp_path: Path, tarred: bool) -> None:
    """timm's readers pass over all but .png, .jpg and .jpeg in silence."""
    folder = image_folder(tmp_path / "images", per_class=12)
    endings = (".png", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".ppm", ".jfif", ".TIFF")
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        ending = endings[number % len(endings)]
        Image.open(path).save(path.with_suffix(ending), format="JPEG" if ending == ".jfif" else None)
        if path.suffix != ending:
            path.unlink()
    source = tar_of(folder, tmp_path / "images.tar") if tarred else folder
    splits = load_splits(data(str(source)), Path())
    assert sum(len(splits[name]) for name in ("train", "calibration", "test")) == 24


def test_what_is_read_as_an_image_is_what_the_fingerprint_counts() -> None:
    assert set(ENDINGS) == fingerprint.IMAGES


def test_images_on_disk_and_in_memory_are_the_same(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=10)
    memory, disk = (load_splits(data(str(folder), in_memory=m), Path()) for m in (True, False))
    tar = tar_of(folder, tmp_path / "images.tar")
    workers = load_splits(data(str(tar), in_memory=False, workers=2, bad_images="skip"), Path())
    order = np.array([3, 0, 2, 5, 1])
    expected = memory.train.pixels(order)
    assert disk.train.stored is None
    assert np.array_equal(disk.train.pixels(order), expected)
    assert np.array_equal(np.concatenate(list(disk.train.batches(order, 2))), expected)
    assert np.array_equal(np.concatenate(list(workers.train.batches(order, 2))), expected)


def test_train_and_test_beside_each_other_are_found_and_kept_apart(tmp_path: Path) -> None:
    image_folder(tmp_path / "d" / "train", per_class=6)
    tar_of(image_folder(tmp_path / "t", per_class=4), tmp_path / "d" / "test.tar")
    splits = load_splits(data(str(tmp_path / "d")), Path())
    assert (len(splits.train) + len(splits.calibration), len(splits.test)) == (12, 8)


def test_timms_torch_reader_works(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", per_class=6)
    image_folder(tmp_path / "val", per_class=3)
    splits = load_splits(data("torch/image_folder", root=str(tmp_path)), Path())
    assert (len(splits.test), splits.test.classes) == (6, ("ant", "bee"))


def test_leaked_test_images_are_counted(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", per_class=6)
    test = image_folder(tmp_path / "test", per_class=6)  # the same generator, the same images
    Image.new("RGB", (40, 40), (1, 2, 3)).save(test / "ant" / "000.png")
    assert load_splits(data(str(tmp_path)), Path()).leaked() == 11


def test_at_most_so_many_images_are_taken_of_every_class(tmp_path: Path) -> None:
    splits = load_splits(data(str(image_folder(tmp_path / "i", per_class=20)), max_train=10, max_test=4), Path())
    assert (len(splits.train), len(splits.test)) == (10, 4)
    assert np.bincount(splits.train.labels).tolist() == [5, 5]
    labels = np.repeat([0, 1, 2], 40)
    for count in (1, 5, 31, 119, 120, 500):
        chosen = at_most(labels, np.arange(120), count, np.random.default_rng(0))
        assert len(chosen) == min(count, 120)
        share = np.bincount(labels[chosen], minlength=3)
        assert share.max() - share.min() <= 1


def _broken(folder: Path, kind: str) -> None:
    target = folder / "ant" / "000.png"
    if kind == "empty file":
        target.write_bytes(b"")
    elif kind == "web page":
        target.write_bytes(b"<html>404</html>")
    elif kind == "half an image":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    elif kind == "postscript":
        target.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    elif kind == "too many pixels":
        target.write_bytes(png(3000, 3000).getvalue())
    elif kind == "one pixel high":
        target.write_bytes(png(20_000, 1).getvalue())


@pytest.mark.parametrize(
    "kind", ["empty file", "web page", "half an image", "postscript", "too many pixels", "one pixel high"]
)
def test_a_broken_image_is_named_and_refused_or_skipped(kind: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=10)
    _broken(folder, kind)
    with pytest.raises(InvalidInput, match=r"ant.000\.png"):
        load_splits(data(str(folder), max_megapixels=1.0), Path())
    skipping = load_splits(data(str(folder), max_megapixels=1.0, bad_images="skip"), Path())
    assert len(skipping.skipped) == 1
    assert "000.png" in skipping.skipped[0]
    assert len(skipping.train) + len(skipping.calibration) + len(skipping.test) == 19


def test_a_broken_image_that_is_streamed_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=10)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"junk")
    for workers in (0, 1):
        splits = load_splits(data(str(folder), in_memory=False, workers=workers), Path())
        with pytest.raises(InvalidInput, match=r"\.png: not an image") as caught:
            list(splits.train.batches(np.array([0, 1]), 2))
        assert "\n" not in str(caught.value)
        assert "bad_images" in caught.value.hint


def test_a_file_that_cannot_be_opened_is_a_broken_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=10)
    (folder / "ant" / "000.png").unlink()
    (folder / "ant" / "000.png").symlink_to(tmp_path / "gone.png")
    assert len(load_splits(data(str(folder), bad_images="skip"), Path()).skipped) == 1


def test_modes_and_rotation_are_brought_to_upright_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "I;16", "1", "LA"):
        buffer = io.BytesIO()
        Image.new(mode, (12, 9)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        buffer.seek(0)
        assert decode(buffer, 8, 1.0).shape == (8, 8, 3), mode
    wide = np.zeros((8, 8), dtype=np.uint16)
    wide[:, 4:] = 65535
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    buffer.seek(0)
    assert decode(buffer, 8, 1.0)[0, :, 0].tolist() == [0] * 4 + [255] * 4
    turned = Image.new("RGB", (20, 10))
    turned.paste((255, 0, 0), (0, 0, 10, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    buffer.seek(0)
    # 20 x 10 with red on the left is, upright, 10 x 20 with red on top; the centre cut shows half of each.
    upright = decode(buffer, 10, 1.0)
    assert upright[0, 5].tolist() == [255, 0, 0]
    assert upright[9, 5].tolist() == [0, 0, 0]


def test_a_bomb_is_refused_by_its_header() -> None:
    header = bytearray(png(10, 10).getvalue())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(BadImage, match="limit"):
        decode(io.BytesIO(bytes(header)), 32, 64.0)


def _arrange(root: Path, kind: str) -> str:
    folder = image_folder(root / "images")
    if kind == "missing":
        return str(root / "nowhere")
    if kind == "a file":
        (root / "x.txt").write_text("x")
        return str(root / "x.txt")
    if kind == "one class":
        return str(image_folder(root / "single", classes=("ant",)))
    if kind == "empty class":
        (folder / "cat").mkdir()
    if kind == "loose image":
        (folder / "ant" / "000.png").rename(folder / "000.png")
    if kind == "two folders of one name":
        for name in ("ant", "bee"):
            (folder / name / "small").mkdir()
            for file in sorted((folder / name).glob("*.png"))[:4]:
                file.rename(folder / name / "small" / file.name)
    if kind == "link loop":
        (folder / "ant" / "again").symlink_to(folder)
    if kind == "broken tar":
        (root / "x.tar").write_bytes(b"not a tar")
        return str(root / "x.tar")
    if kind == "empty tar":
        tarfile.open(root / "x.tar", "w").close()
        return str(root / "x.tar")
    if kind == "unknown builtin":
        return "builtin:letters"
    if kind == "torch without root":
        return "torch/cifar10"
    return str(folder)


@pytest.mark.parametrize(
    "kind",
    ["missing", "a file", "one class", "empty class", "loose image", "link loop",
        "two folders of one name", "broken tar", "empty tar",
     "unknown builtin", "torch without root"],
)  # fmt: skip
def test_an_unusable_source_is_refused_with_a_remedy(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_splits(data(_arrange(tmp_path, kind)), Path())
    assert caught.value.hint


def test_other_classes_in_the_test_split_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", classes=("ant", "wasp"))
    with pytest.raises(InvalidInput, match="wasp"):
        load_splits(data(str(tmp_path)), Path())


def test_a_stratified_share_never_takes_all_of_a_class() -> None:
    labels = np.array([0] * 50 + [1] * 2)
    first, rest = stratified(labels, np.arange(52), 0.9, np.random.default_rng(0))
    assert set(labels[first]) == set(labels[rest]) == {0, 1}


@pytest.mark.skipif(
    "SIEVIT_CIFAR10" not in os.environ, reason="SIEVIT_CIFAR10 names no folder with train.tar and test.tar"
)
def test_cifar10_tars_are_read_in_place() -> None:
    splits = load_splits(data(os.environ["SIEVIT_CIFAR10"], max_train=200, max_test=100), Path())
    assert len(splits.train.classes) == 10
    assert splits.train.pixels().shape == (200, 32, 32, 3)
