"""`sievit pack`: whole, the same each time, and of use to somebody who has nothing of ours."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny_onnx
from onnx import TensorProto, helper
from PIL import Image
from shipped import DENSE, MAIN, TRAIN, Sievit, classifier, commit, digest, measurement, row, sievit, store
from test_bundle import OUTSIDE, external

from sievit.pipeline.records import load
from sievit.pipeline.store import Store
from sievit.stages.card import Facts, card
from sievit.stages.deploy import packing
from sievit.stages.deploy.packing import check_pack, write_pack
from sievit.stages.deploy.preprocess import fit, normalise
from sievit.stages.deploy.sidecar import CROPS, RESIZES, Preprocessing, Scores, Sidecar, read_sidecar
from sievit.stages.deploy.standalone import program
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.decode import picture

__all__ = ["sievit", "store"]
FILES = ["README.md", "SHA256SUMS", "classes.txt", "model.json", "model.onnx", "predict.py"]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- what is in it


def test_what_the_main_arm_ships_is_packed_unless_something_else_is_named(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    main, dense = (store.open(*each).root / "model.onnx" for each in (("quantize", MAIN), ("export", DENSE)))
    copied = classifier(tmp_path / "elsewhere", seed=5)
    for model, original in [
        ([], main), (["dense"], dense), (["export@1"], dense), (["export"], dense), (["5f3a"], main),
        (["5f3a91/dense"], dense), (["main/quantize"], main), (["dense/export"], dense), ([str(copied)], copied),
    ]:  # fmt: skip
        folder = tmp_path / f"pack-{'-'.join(model).replace('/', '-')}"
        document = sievit("pack", *model, "--output", str(folder), "--json").document
        assert document["sha256"] == digest(original) == digest(folder / "model.onnx"), model
        assert names(folder) == FILES == sorted(document["files"])
        assert (folder / "model.json").read_bytes() == original.with_suffix(".json").read_bytes()
        assert (folder / "classes.txt").read_text().splitlines() == list("0123456789")


def test_a_run_that_did_not_get_so_far_does_not_take_the_place_of_a_whole_one(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    """Neither one that failed nor a single stage run again; and of a run that is named nothing else is taken."""
    whole = load(store, "5f3a")
    nodes = [replace(node, key="0" * 12, finished=None) if node.arm == "main" else node for node in whole.nodes]
    replace(whole, id="9" * 12, nodes=nodes, state="failed", finished="2026-11-02T11:00:00").save(store)
    other = commit(store, "export", "b" * 12, "dense", "onnx", weights=7)
    nodes = [replace(node, key=other.key) if node.arm == "dense" else replace(node, finished=None) for node in nodes]
    replace(whole, id="8" * 12, nodes=nodes, finished="2026-11-03T11:00:00").save(store)
    for arm, stage, key in (("main", "quantize", MAIN), ("dense", "export", DENSE)):
        document = sievit("pack", arm, "--output", f"pack-{arm}", "--json").document
        assert document["sha256"] == digest(store.open(stage, key).file("model.onnx")), arm
    answer = sievit("pack", "9999", "--output", "named")
    assert answer.code == 3 and "has made no file in run 999999999999" in answer.err
    assert "`sievit run pipeline.yaml` finishes it" in answer.err


def test_sha256sum_accepts_the_checksums_of_every_file(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    assert sievit("pack", "--output", "pack").code == 0
    told = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "pack", capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert sorted(line.removesuffix(": OK") for line in told.stdout.splitlines()) == [
        n for n in FILES if n != "SHA256SUMS"
    ]


def test_two_packs_of_a_file_have_the_same_bytes_and_so_have_their_zips(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    for number, name in enumerate(("first", "second")):
        assert sievit("pack", "--output", name, "--zip").code == 0
        for path in (tmp_path / name).iterdir():  # times of files must not matter
            os.utime(path, (1e9 + number, 1e9 + number))
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        (root,) = {name.partition("/")[0] for name in archive.namelist()}
        assert root.startswith("digits-main-")
        for name in FILES:
            assert archive.read(f"{root}/{name}") == (tmp_path / "first" / name).read_bytes()


def test_weights_beside_the_file_go_with_it_and_a_changed_one_is_noticed(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.data").write_bytes(tiny_onnx.weights().tobytes())
    tiny_onnx.sidecar(external(source, location="model.data"))
    assert sievit("pack", str(source / "model.onnx"), "--output", "pack").code == 0
    assert names(tmp_path / "pack") == sorted([*FILES, "model.data"])
    image = tmp_path / "a.png"
    Image.fromarray(tiny_onnx.pictures(1)[0]).save(image)
    assert sievit("predict", "pack", str(image)).code == 0
    kept = (tmp_path / "pack" / "model.json").read_text()
    (tmp_path / "pack" / "model.json").write_text(kept.replace("class 0", "class zero"))
    assert "model.json is not the file that was packed" in sievit("predict", "pack", str(image)).err
    (tmp_path / "pack" / "model.json").write_text(kept)
    weights = bytearray((tmp_path / "pack" / "model.data").read_bytes())
    weights[7] ^= 1
    (tmp_path / "pack" / "model.data").write_bytes(weights)
    answer = sievit("predict", "pack", str(image))
    assert answer.code == 3 and "model.data is not the file that was packed" in answer.err
    (tmp_path / "pack" / "model.data").unlink()
    assert "is missing beside it" in sievit("predict", "pack", str(image)).err


def test_a_list_of_checksums_is_held_to_for_what_it_is_asked_for(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {"a": b"a", "b": b"b", "c": b"c"})
    check_pack(tmp_path / "pack", ["a", "b"])
    (tmp_path / "pack" / "c").write_text("ours now")
    check_pack(tmp_path / "pack", ["a", "b"])
    (tmp_path / "pack" / "d").write_text("never listed")
    for other in "cd":
        with pytest.raises(InvalidInput, match=f"{other} is not the file that was packed"):
            check_pack(tmp_path / "pack", ["a", other])
    (tmp_path / "pack" / "b").unlink()
    with pytest.raises(InvalidInput, match="b is missing"):
        check_pack(tmp_path / "pack", ["a", "b"])


def test_a_list_of_checksums_of_other_files_is_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *other.iso\nSHA256 (more.iso) = 1\n")
    (tmp_path / "model.onnx").write_bytes(b"x")
    check_pack(tmp_path, ["model.onnx"])


# ---- the card


def test_the_card_has_the_numbers_of_the_newest_benchmark_of_this_very_file(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    mine = digest(store.open("quantize", MAIN).file("model.onnx"))
    newer = {"created": "2026-11-03T10:00:00+00:00"}
    rows = [row(mine, p50_ms=0.456, p50_low=0.45, p50_high=0.46), row(mine, p50_ms=3.21, batch=8)]
    commit(store, "benchmark", "c" * 12, "main", "measurement", metrics=measurement(rows, "Newer CPU"), **newer)
    other = measurement([row("0" * 64, p50_ms=8.88)], "Other CPU")
    commit(store, "benchmark", "e" * 12, "main", "measurement", metrics=other, created="2026-11-09T10:00:00+00:00")
    sievit("pack", "--output", "pack")
    text = (tmp_path / "pack" / "README.md").read_text()
    for told in [
        "Top-1 is 91.4% (90.0–92.5%) of 120 test images", "| cpu, batch 1, 1 thread | 0.456 (0.450–0.460) |",
        "cpu, batch 8, 1 thread | 3.21", "not said: 300 calls, 662 needed", "2.50× (2.40–2.60×)",
        "speed-up over dense export fp32", "Newer CPU", "ONNX Runtime 1.31.1", "3.2%", mine,
        MAIN, TRAIN, store.open("train", TRAIN).digest, "int8", "768", "10 classes", "8 x 8",
        "trained from random weights",
    ]:  # fmt: skip
        assert told in text, told
    for foreign in ("Other CPU", "Test CPU 9000", "8.88", "7.77", DENSE):
        assert foreign not in text


def test_without_a_benchmark_of_this_very_file_the_card_has_no_number(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    document = sievit("pack", str(classifier(tmp_path / "other", seed=9)), "--output", "pack", "--json").document
    assert document["measured"] is None
    text = (tmp_path / "pack" / "README.md").read_text()
    assert "No benchmark of this very file" in text and "Its accuracy was not measured" in text
    assert "does not know this file" not in text and "000000000000" in text, "what the sidecar says of its origin"
    assert " ms" not in text and text.count("not known") == 2


def test_a_copy_of_a_file_of_the_store_is_known_as_what_it_is(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.json"):
        shutil.copyfile(store.open("quantize", MAIN).root / name, tmp_path / f"copied{Path(name).suffix}")
    assert sievit("pack", "copied.onnx", "--output", "pack", "--json").document["measured"] == "benchmark@1"
    assert TRAIN in (tmp_path / "pack" / "README.md").read_text()


FACTS = Facts("m", "0" * 64, 1, "input", 20, "fp32", 1, 1, ["a"], {**asdict(Preprocessing(8))}, {})


def test_the_licence_of_pretrained_weights_is_the_one_that_timm_states() -> None:
    from timm.models import get_pretrained_cfg

    from sievit.stages.pack import _licence

    model = {"name": "deit_tiny_patch16_224", "pretrained": True, "weights": None}
    known = get_pretrained_cfg("deit_tiny_patch16_224").license
    assert known and _licence(model) == known
    text = card(replace(FACTS, model=model, weights_licence=known))
    assert f'license: "{known}"' in text and 'base_model: "timm/deit_tiny_patch16_224"' in text
    for other in ({"weights": "mine.safetensors"}, {"pretrained": False}, {"name": "nothing_of_timm"}):
        assert _licence(model | other) is None
    assert "license:" not in card(replace(FACTS, model=model | {"weights": "x"})), "weights from a file: not known"


def test_a_folder_of_images_is_named_in_the_card_but_not_where_it_lies(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    from shipped import DATA

    data = DATA | {"source": "/home/somebody/private/flowers"}
    commit(store, "export", "f" * 12, "main", "onnx", weights=3, data=data)
    sievit("pack", "export@2", "--output", "pack")
    text = (tmp_path / "pack" / "README.md").read_text()
    assert "flowers" in text and "somebody" not in text


# ---- refusals


def test_a_folder_that_is_not_empty_or_a_zip_that_is_there_is_refused_and_left(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zipped.zip").write_text("mine")
    assert sievit("pack", "--output", "empty").code == 0
    for arguments in (["full"], ["empty"], ["full/mine.txt"], ["zipped", "--zip"]):
        answer = sievit("pack", "--output", *arguments)
        assert answer.code == 3 and "is there already" in answer.err, arguments
    assert names(tmp_path / "full") == ["mine.txt"] and (tmp_path / "zipped.zip").read_text() == "mine"
    assert not (tmp_path / "zipped").exists()


@pytest.mark.parametrize("broken", ["copyfile", "copyfileobj"])
def test_a_pack_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    source = tmp_path / "source"
    source.write_bytes(b"x")
    monkeypatch.setattr(packing.shutil, broken, full)
    with pytest.raises(OSError, match="No space left"):
        write_pack(tmp_path / "pack", {"a": b"a", "b": source}, tmp_path / "pack.zip")
    assert names(tmp_path) == ["source"] and [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["../a", "/a", "a\nb", "a\\b", "a/../../b"])
def test_a_name_that_leads_out_or_breaks_the_checksums_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be packed"):
        write_pack(tmp_path / "pack", {name: b""})
    assert not list(tmp_path.iterdir())


def foreign(folder: Path, kind: str) -> Path:
    """A file that must not be handed over, with a sidecar that fits its digest."""
    folder.mkdir()
    whole = tiny_onnx.linear(folder / "model.onnx")
    tiny_onnx.sidecar(whole)
    flat = [helper.make_node("Flatten", ["input"], ["logits"])]
    cast = [helper.make_node("Cast", ["input"], ["logits"], to=TensorProto.FLOAT)]
    evil = [helper.make_node("Magic", ["input"], ["logits"], domain="evil")]
    match kind:
        case "truncated":
            whole.write_bytes(whole.read_bytes()[:800])
        case "empty":
            whole.write_bytes(b"")
        case "a web page":
            whole.write_bytes(b"<!doctype html><html></html>")
        case "wrong rank":
            tiny_onnx.save(whole, flat, [], ["batch", 77], ["batch", 77])
        case "wrong type":
            tiny_onnx.save(whole, cast, [], [1, 3, 8, 8], [1, 3, 8, 8], dtype=TensorProto.INT64)
        case "custom operators":
            tiny_onnx.save(whole, evil, [], ["b", 3, 8, 8], ["b", 4], domains=[("evil", 1)])
        case "future opset":
            tiny_onnx.save(whole, flat, [], ["b", 3, 8, 8], ["b", 192], opset=99)
        case "another file":
            whole.write_bytes(tiny_onnx.linear(folder / "other.onnx", seed=1).read_bytes())
        case "labels of another length":
            card = json.loads(whole.with_suffix(".json").read_text())
            whole.with_suffix(".json").write_text(json.dumps(card | {"classes": card["classes"][:3]}))
    if kind != "another file":  # the digest fits: what is told is what is wrong
        card = json.loads(whole.with_suffix(".json").read_text())
        whole.with_suffix(".json").write_text(json.dumps(card | {"sha256": digest(whole)}))
    return whole


FOREIGN = {
    "truncated": "is not",
    "empty": "is empty",
    "a web page": "is not an ONNX file",
    "wrong rank": "its input has not four dimensions",
    "wrong type": "its input is not of float or uint8",
    "custom operators": "uses operators of the domain 'evil'",
    "future opset": "uses opset 99",
    "another file": "is not the file that model.json describes",
    "labels of another length": "has 4 scores an image, its sidecar names 3 classes",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_sound_classifier_is_neither_packed_nor_used(sievit: Sievit, tmp_path: Path, kind: str) -> None:
    path = foreign(tmp_path / "foreign", kind)
    Image.fromarray(tiny_onnx.pictures(1)[0]).save(tmp_path / "a.png")
    for arguments in (
        ["pack", str(path), "--output", "pack"],
        ["predict", str(path), "a.png"],
        ["compare", str(path), str(path)],
    ):
        answer = sievit(*arguments)
        assert (answer.code, answer.out) == (3, ""), answer
        assert FOREIGN[kind] in " ".join(answer.err.split()) and "Traceback" not in answer.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.png", "foreign"]


@pytest.mark.parametrize("entries", OUTSIDE, ids=str)
def test_weights_outside_the_folder_are_not_packed(tmp_path: Path, sievit: Sievit, entries: dict[str, str]) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(tiny_onnx.weights().tobytes())
    (inner / "inside").write_bytes(secret.read_bytes())
    (inner / "link").symlink_to(secret)
    (inner / "folder").symlink_to(tmp_path)
    (inner / "hard").hardlink_to(secret)
    external(inner, **entries)
    (inner / "model.json").write_text("{}")
    assert sievit("pack", str(inner / "model.onnx"), "--output", "pack").code == 3
    assert not (tmp_path / "pack").exists()


def test_what_names_no_file_is_refused_with_what_there_is(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for model, told in [
        ("dens", "did you mean 'dense'?"), ("train@1", "holds model, not an ONNX file"),
        ("5f3a91/nobody", "has no arm 'nobody'"), ("photos", "holds no model.onnx"),
        ("nowhere.onnx", "does not exist"), ("export@9", "there is no export@9"),
    ]:  # fmt: skip
        answer = sievit("pack", model, "--output", "pack")
        assert answer.code == 3 and told in answer.err, answer
    assert sievit("pack").code == 2, "where to?"


def test_an_arm_whose_last_file_is_not_made_is_not_replaced_by_an_earlier_one(
    sievit: Sievit, store: Store, tmp_path: Path
) -> None:
    record = load(store, "5f3a91")
    commit(store, "export", "9" * 12, "main", "onnx", weights=4)
    last = record.node("main", "quantize")
    last.key, last.finished = None, None
    record.touched = {("main", "quantize")}
    record.save(store)
    answer = sievit("pack", "--output", "pack")
    assert answer.code == 3 and "stage 'quantize' of arm 'main' has made no file" in answer.err


def test_a_damaged_artifact_is_not_packed(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    path = store.open("quantize", MAIN).file("model.json")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"bilinear", b"nearest "))
    answer = sievit("pack", "--output", "pack")
    assert answer.code == 4 and not (tmp_path / "pack").exists()


# ---- predict.py


def images(folder: Path) -> list[Path]:
    """Files of odd sizes and kinds."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8))

    turned = Image.Exif()
    turned[0x0112] = 6
    palette = noise(23, 31).convert("P")
    saved = [
        ("wide.png", noise(17, 41, 3), {}), ("tall.png", noise(53, 19, 3), {}), ("tiny.png", noise(3, 2, 3), {}),
        ("own.png", noise(8, 8, 3), {}), ("grey.png", noise(11, 13), {}), ("alpha.png", noise(9, 30, 4), {}),
        ("turned.jpg", noise(20, 33, 3), {"exif": turned}), ("holes.png", palette, {"transparency": 3}),
        ("deep.png", Image.fromarray(rng.integers(65536, size=(14, 21)).astype(np.uint16)), {}),
        ("line.png", noise(1, 60, 3), {}),
    ]  # fmt: skip
    for name, image, options in saved:
        image.save(folder / name, **options)
    return [folder / name for name, _, _ in saved]


class Runtime:
    """In the place of onnxruntime: an answer for every image, and what the program fed it."""

    def __init__(self) -> None:
        self.fed: list[Any] = []

    def InferenceSession(self, path: Path, providers: list[str]) -> Runtime:
        return self

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        assert names == ["logits"]
        self.fed.append(feeds["input"])
        return [np.zeros((len(feeds["input"]), 4), np.float32)]


def fed(source: str, folder: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a program gives to the network for each image."""
    program, runtime = folder / "predict.py", Runtime()
    program.write_text(source, encoding="utf-8")
    (folder / "classes.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, paths)])
    runpy.run_path(str(program), run_name="__main__")
    return runtime.fed


def described(pre: Preprocessing, dtype: str, layout: str, scores: Scores = "logits") -> Sidecar:
    stated: dict[str, Any] = {"precision": "fp32", "parameters": 1, "macs": 1, "opset": 20, "sha256": "", "source": {}}
    classes = tuple("abcd")
    return Sidecar("input", "logits", layout, dtype, scores, pre, classes, raw={}, **stated)


FORMS = (("float32", "NCHW"), ("float16", "NCHW"), ("float32", "NHWC"), ("uint8", "NCHW"), ("uint8", "NHWC"))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("crop", CROPS)
def test_the_packed_program_prepares_images_as_we_do_to_the_last_digit(
    tmp_path: Path, resize: str, crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = images(tmp_path)
    pictures = [np.asarray(picture(io.BytesIO(path.read_bytes()), 64.0)) for path in paths]
    for size, crop_pct in ((8, 1.0), (15, 0.875), (32, 0.9)):
        for mean in ((0.485, 0.456, 0.406), (0.5,)):
            std = (0.229, 0.224, 0.225)[: len(mean)]
            pre = Preprocessing(size, 1 / 255, mean, std, resize, crop, crop_pct)
            for dtype, layout in FORMS:
                theirs = fed(program(described(pre, dtype, layout), dtype, None), tmp_path, paths, monkeypatch)
                for path, pixels, given in zip(paths, pictures, theirs, strict=True):
                    ours = normalise(fit(pixels, pre)[None], pre, dtype, layout)
                    assert ours.dtype == given.dtype and np.array_equal(ours, given), (path.name, size, dtype)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "layout"), FORMS)
@pytest.mark.parametrize("scores", get_args(Scores))
def test_the_packed_program_has_30_lines_at_most(
    crop: str, channels: int, dtype: str, layout: str, scores: Scores
) -> None:
    pre = Preprocessing(224, 1 / 255, (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels], crop=crop)
    lines = program(described(pre, dtype, layout, scores), dtype, 8).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120


def test_the_packed_program_fills_up_a_fixed_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pre = images(tmp_path)[0], Preprocessing(8)
    source = program(described(pre, "float32", "NCHW"), "float32", 3)
    (given,) = fed(source, tmp_path, [path], monkeypatch)
    pixels = np.asarray(picture(io.BytesIO(path.read_bytes()), 64.0))
    assert np.array_equal(given, np.repeat(normalise(fit(pixels, pre)[None], pre), 3, axis=0))


def test_names_that_a_file_gives_its_tensors_are_text_to_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = 'it\'s a "name"\\\n{0}'
    source = program(replace(described(Preprocessing(8), "float32", "NCHW"), input=odd), "float32", None)
    monkeypatch.setattr(Runtime, "run", lambda self, names, feeds: (self.fed.append([*feeds]), [np.zeros((1, 4))])[1])
    assert fed(source, tmp_path, images(tmp_path)[:1], monkeypatch) == [[odd]]


@pytest.mark.parametrize("name", ["a\nb", "a\r", "a\x0b", "\x0ca", "a\x85b", "a\u2028b"])
def test_a_class_name_that_would_be_two_lines_or_a_shorter_one_is_refused(
    sievit: Sievit, tmp_path: Path, name: str
) -> None:
    path = tiny_onnx.linear(tmp_path / "model.onnx")
    tiny_onnx.sidecar(path, names=[name, "b", "c", "d"])
    answer = sievit("pack", str(path), "--output", "pack")
    assert answer.code == 3 and "holds a line break" in answer.err
    assert not (tmp_path / "pack").exists()


def test_the_packed_program_tells_how_it_is_called(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    sievit("pack", "--output", "pack")
    told = subprocess.run([sys.executable, "-I", "pack/predict.py"], capture_output=True, text=True)
    assert told.returncode == 1 and "predict.py IMAGE..." in told.stderr


def test_the_packed_program_runs_alone_and_answers_as_sievit_does(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    sievit("pack", "--output", "pack")
    (tmp_path / "images").mkdir()
    paths = list(map(str, images(tmp_path / "images")))
    watched = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "loaded = {name.partition('.')[0] for name in sys.modules}; "
        "print(loaded & {'sievit', 'torch', 'scipy', 'onnx', 'timm', 'typer'})"
    )
    # -I: neither this checkout nor the current folder can be imported.
    told = subprocess.run(
        [sys.executable, "-I", "-c", watched, "pack/predict.py", *paths], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    *lines, modules = told.stdout.splitlines()
    assert modules == "set()"
    ours = [
        [answer["image"], each["class"], f"{each['probability']:.4f}"]
        for answer in sievit("predict", "pack", *paths, "--json").lines
        for each in answer["classes"]
    ]
    assert [line.split("\t") for line in lines] == ours
    assert len(ours) == 5 * len(paths)


def test_a_sidecar_that_was_packed_reads_as_before(sievit: Sievit, store: Store, tmp_path: Path) -> None:
    sievit("pack", "--output", "pack")
    before = read_sidecar(store.open("quantize", MAIN).file("model.onnx"))
    assert read_sidecar(tmp_path / "pack" / "model.onnx") == before
