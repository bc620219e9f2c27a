"""The fingerprint of data: content and names count, places and times do not, and a second look reads nothing."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sievit.pipeline import fingerprint as module
from sievit.pipeline import manifest
from sievit.pipeline.errors import InputError
from sievit.pipeline.fingerprint import fingerprint
from sievit.pipeline.settings import DataConfig

LONG_AGO = time.time() - 3600


@pytest.fixture
def settled(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images count as written long ago, so that their hashes are remembered."""
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    time.sleep(0.05)  # a tick of the file system's clock


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("cat/1.png", "cat/2.PNG", "dog/1.jpg"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture of " + name.encode())
    return folder


def of(base: Path, memo: Path | None = None, **config: Any) -> str:
    return fingerprint(DataConfig(**config), base, memo or base / "memo.json")


class Counted:
    """Counts the files that are read in full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        original = manifest.sha256_file

        def counted(path: Path) -> tuple[str, int]:
            self.paths.append(path.name)
            return original(path)

        monkeypatch.setattr(module, "sha256_file", counted)


def test_the_same_content_under_the_same_names_has_the_same_fingerprint_anywhere(images: Path, tmp_path: Path) -> None:
    first = of(tmp_path, source="images")
    shutil.copytree(images, tmp_path / "moved" / "elsewhere")
    for path in (tmp_path / "moved").rglob("*.png"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    assert of(tmp_path / "moved", source="elsewhere") == first == of(tmp_path, source=str(images))
    assert first.endswith("of 3 files")


def test_content_names_and_number_of_files_count(images: Path, tmp_path: Path) -> None:
    seen = [of(tmp_path, source="images")]
    (images / "cat" / "1.png").write_bytes(b"Picture of cat/1.png")
    seen.append(of(tmp_path, source="images"))
    (images / "cat" / "1.png").rename(images / "cat" / "3.png")
    seen.append(of(tmp_path, source="images"))
    (images / "cat" / "3.png").rename(images / "dog" / "3.png")
    seen.append(of(tmp_path, source="images"))
    (images / "dog" / "3.png").unlink()
    seen.append(of(tmp_path, source="images"))
    assert len(set(seen)) == len(seen)


def test_what_is_no_image_does_not_count(images: Path, tmp_path: Path) -> None:
    first = of(tmp_path, source="images")
    (images / "README.md").write_text("hello")
    (images / "cat" / "Thumbs.db").write_bytes(b"\0")
    assert of(tmp_path, source="images") == first


def test_a_file_with_the_same_size_and_time_but_other_content_is_noticed(
    settled: None, images: Path, tmp_path: Path
) -> None:
    path = images / "cat" / "1.png"
    first = of(tmp_path, source="images")
    before = path.stat()
    path.write_bytes(b"Picture of cat/1.png")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert of(tmp_path, source="images") != first


def test_a_second_look_reads_no_file(
    settled: None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    first = of(tmp_path, source="images")
    assert len(counted.paths) == 3
    assert of(tmp_path, source="images") == first
    assert len(counted.paths) == 3
    (images / "cat" / "1.png").write_bytes(b"another")
    assert of(tmp_path, source="images") != first
    assert counted.paths[3:] == ["1.png"]


def test_a_file_that_was_written_just_now_is_not_remembered(images: Path, tmp_path: Path) -> None:
    of(tmp_path, source="images")
    assert not (tmp_path / "memo.json").exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"a": 1}', b'{"a": [[1, 2], "x"]}', b"\xff", b"[" * 100_000])
def test_a_damaged_memo_costs_time_only(images: Path, tmp_path: Path, damage: bytes) -> None:
    first = of(tmp_path, source="images")
    (tmp_path / "memo.json").write_bytes(damage)
    assert of(tmp_path, source="images") == first


def test_a_memo_that_cannot_be_written_costs_time_only(settled: None, images: Path, tmp_path: Path) -> None:
    assert of(tmp_path, Path("/proc/none/memo.json"), source="images") == of(tmp_path, source="images")


def test_the_memo_forgets_files_that_are_gone(settled: None, images: Path, tmp_path: Path) -> None:
    of(tmp_path, source="images")
    (images / "dog" / "1.jpg").unlink()
    of(tmp_path, source="images")
    assert [Path(name).name for name in json.loads((tmp_path / "memo.json").read_bytes())] == ["1.png", "2.PNG"]


def test_links_are_followed_but_not_in_a_circle(images: Path, tmp_path: Path) -> None:
    plain = of(tmp_path, source="images")
    (images / "loop").symlink_to(images)
    (images / "cat" / "up").symlink_to(images / "cat")
    assert of(tmp_path, source="images") == plain
    shutil.move(images / "dog", tmp_path / "real")
    (images / "dog").symlink_to(tmp_path / "real")
    assert of(tmp_path, source="images") == plain


def test_links_to_each_other_do_not_multiply(tmp_path: Path) -> None:
    folders = [tmp_path / "web" / str(number) for number in range(12)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(folder.name.encode())
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert of(tmp_path, source="web").endswith(" of 12 files")


def test_a_broken_link_to_an_image_is_named(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "cat" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(InputError) as caught:
        of(tmp_path, source="images")
    assert caught.value.where == str(images / "cat" / "gone.png") and caught.value.exit_code == 3


def test_a_tar_counts_by_its_bytes(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(images, "images")
    first = of(tmp_path, source="x.tar")
    with (tmp_path / "x.tar").open("ab") as file:
        file.write(b"\0" * 512)
    assert of(tmp_path, source="x.tar") != first != of(tmp_path, source="images")


def test_the_test_split_counts_named_or_within(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "all" / "train")
    alone = of(tmp_path, source="all")
    named = of(tmp_path, source="all", test="images")
    shutil.copytree(images / "cat", tmp_path / "all" / "test" / "cat")
    assert len({alone, named, of(tmp_path, source="all")}) == 3


def test_a_builtin_is_its_name_and_the_version_that_carries_it(tmp_path: Path) -> None:
    expected = f"builtin:digits of scikit-learn {metadata.version('scikit-learn')}"
    assert of(tmp_path, source="builtin:digits") == expected


def test_a_download_counts_by_its_name_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    before = of(tmp_path, source="torch/cifar10", root="data")
    (tmp_path / "data" / "1.png").write_bytes(b"1")
    assert of(tmp_path, source="torch/cifar10", root="data") == before == of(tmp_path, source="torch/CIFAR10", root=".")
    assert before != of(tmp_path, source="torch/cifar100", root="data")


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="there is no folder") as caught:
        of(tmp_path, source="torch/cifar10", root="dataa")
    assert caught.value.field == "data.root" and "/data'?" in caught.value.hint


def test_a_data_set_of_the_hub_counts_by_its_name_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(source="hfds/cifar10")
    assert "goes unnoticed" in str(module.caveat(config)) and module.caveat(DataConfig()) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package datasets"):
        of(tmp_path, source="hfds/cifar10")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert of(tmp_path, source="hfds/cifar10") == "hfds/cifar10"


def test_the_names_after_torch_are_those_that_timm_knows() -> None:
    """timm's own words: what is not among them ends in its assertion, and what is among them ends otherwise."""
    from timm.data.dataset_factory import create_dataset

    for name in module.DOWNLOADED | module.BY_FILES:
        with pytest.raises(Exception) as caught:
            create_dataset(f"torch/{name}", root="/nowhere", split="train")
        assert "Unknown torchvision dataset" not in str(caught.value), name


def test_a_local_torch_folder_counts_by_its_files(images: Path, tmp_path: Path) -> None:
    first = of(tmp_path, source="torch/image_folder", root="images")
    (images / "cat" / "1.png").write_bytes(b"another")
    assert of(tmp_path, source="torch/image_folder", root="images") != first


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("builtin:digit", "there is no 'builtin:digit'", "did you mean 'builtin:digits'?"),
        ("imagse", "there is no ", "/images'?"),
        ("images/catt", "there is no ", "/images/cat'?"),
        ("nothing/like/it", "there is no ", "is there, but it has no 'nothing'"),
        ("empty", "holds no image", "a folder of images for each class"),
        ("images/cat", "holds images, but no folders", "a folder of images for each class"),
        ("images/cat/1.png", "is neither a folder nor a .tar", "a folder per class"),
        ("no\x00", "there is no ", ""),
        ("cifar10", "there is no ", "did you mean 'torch/cifar10'?"),
        ("torch:cifar10", "there is no ", "did you mean 'torch/cifar10'?"),
        ("torch/cifr10", "there is no 'torch/cifr10'", "did you mean 'torch/cifar10'?"),
        ("torch/x/cifar10", "there is no 'torch/x/cifar10'", "valid names: "),
        ("torch/cifar10", "torch/cifar10 needs a data.root", "set data.root"),
        ("hfds/", "followed by no name", "such as"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_what_is(
    images: Path, tmp_path: Path, source: str, message: str, hint: str
) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "class" / "notes.txt").write_text("")
    with pytest.raises(InputError) as caught:
        of(tmp_path, source=source)
    assert message in caught.value.message and hint in caught.value.hint and caught.value.field == "data.source"


def test_a_name_that_is_not_utf_8_is_counted(settled: None, images: Path, tmp_path: Path) -> None:
    first = of(tmp_path, source="images")
    (images / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    second = of(tmp_path, source="images")
    assert second != first and second == of(tmp_path, source="images")


def test_an_unreadable_image_is_named(images: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (images / "cat" / "1.png").chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        of(tmp_path, source="images")
