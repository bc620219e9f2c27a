"""`sievit init`: what it writes passes every check before a run, says what was seen, and never waits for nobody."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shipped import Answer, Sievit, sievit

from sievit.pipeline.plan import make_plan
from sievit.pipeline.preflight import check_settings, check_stages
from sievit.pipeline.spec import PipelineSpec, load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.starter import Wish, starter
from sievit.stages.vision.census import Census, take_census

__all__ = ["sievit"]
ROOT = Path(__file__).resolve().parents[1]


def photos(folder: Path, side: int = 320, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Grey images, wider than high."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            shade = np.full((side, side + 40, 3), 40 * place + number, np.uint8)
            Image.fromarray(shade).save(folder / name / f"{number}.png")
    return folder


def checked(path: Path) -> PipelineSpec:
    """The file, after all that is checked before the first stage runs."""
    spec = load_pipeline(path, STAGES)
    plan = make_plan(spec, STAGES)
    check_settings(plan, (InvalidInput,))
    check_stages(plan, plan.nodes, Store(path.parent / "artifacts"), (InvalidInput,))
    return spec


def written(answer: Answer) -> Path:
    assert answer.code == 0, answer.err
    return Path(answer.document["path"])


@pytest.mark.parametrize(
    ("side", "options", "size", "model"),
    [
        (320, (), 224, {"name": "deit_tiny_patch16_224", "pretrained": True}),
        (320, ("--model", "vit_base_patch16_384", "--target", "speedup=2.5", "--device", "cpu"), 384, {}),
        (320, ("--model", "swin_tiny_patch4_window7_224", "--target", "params=0.6"), 224, {}),
        (320, ("--model", "lvvit_s", "--target", "size_mb=40"), 224, {"pretrained": False}),
        (320, ("--model", "vit_small_patch14_dinov2"), 518, {"pretrained": True}),
        (64, ("--target", "latency_ms=3"), 64, {"pretrained": False}),
        (28, (), 32, {"pretrained": False}),
    ],
)
def test_what_is_written_for_a_folder_passes_every_check_before_a_run(
    side: int, options: tuple[str, ...], size: int, model: dict[str, Any], tmp_path: Path, sievit: Sievit
) -> None:
    photos(tmp_path / "photos", side)
    spec = checked(written(sievit("init", str(tmp_path), "--data", str(tmp_path / "photos"), *options, "--json")))
    assert (spec.data.source, spec.data.image_size) == ("photos", size)
    assert spec.model.model_dump() | model == spec.model.model_dump()
    assert list(spec.arms) == ["main", "dense", "random"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert spec.device == given.get("--device", "auto")
    assert spec.model.name == given.get("--model", "deit_tiny_patch16_224")
    prune = spec.arms["main"].entry("prune")
    assert prune is not None
    kind, _, value = given.get("--target", "macs=0.5").partition("=")
    assert prune.config.model_dump()["target"][kind] == float(value)
    if kind == "speedup":
        assert spec.gates.speedup == 2.5


@pytest.mark.parametrize(
    ("model", "said"),
    [("deit_tinny", "did you mean deit_tiny_patch16_224"), ("resnet18", "models that work"),
     ("vit_small_patch16_224.own", "Invalid pretrained tag")],
)  # fmt: skip
def test_a_model_that_cannot_go_through_is_refused_and_nothing_is_written(
    model: str, said: str, tmp_path: Path, sievit: Sievit
) -> None:
    answer = sievit("init", str(tmp_path), "--model", model)
    assert answer.code == 3 and said in answer.err
    assert not list(tmp_path.iterdir())


def test_the_starter_for_digits_is_the_projects_own_pipeline(tmp_path: Path, sievit: Sievit) -> None:
    mine = checked(written(sievit("init", str(tmp_path), "--json")))
    shipped = load_pipeline(ROOT / "pipeline.yaml", STAGES)
    assert (mine.data, mine.model, mine.gates) == (shipped.data, shipped.model, shipped.gates)
    for name, arm in shipped.arms.items():
        assert [(e.name, e.config) for e in mine.arms[name].entries] == [(e.name, e.config) for e in arm.entries]


def test_images_that_are_broken_are_counted_named_and_left_out(tmp_path: Path, sievit: Sievit) -> None:
    folder = photos(tmp_path / "photos", per_class=40)
    for number in range(4):
        (folder / "dog" / f"{number}.png").write_bytes(b"no picture")
    answer = sievit("init", str(tmp_path), "--data", str(folder))
    assert "80 images in 2 classes, 40 each, 320 px the median" in answer.out
    assert "looked at all of them, 4 broken" in answer.out
    assert answer.out.count("not an image in one of the formats") == 3 and "and 1 more" in answer.out
    text = (tmp_path / "pipeline.yaml").read_text()
    assert "# 4 of 80 opened are broken" in text
    assert checked(tmp_path / "pipeline.yaml").data.bad_images == "skip"


def test_of_many_images_some_are_looked_at_and_it_is_said_how_many(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", per_class=30)
    census = take_census(str(folder), tmp_path, max_megapixels=64, at_most=20)
    assert (census.total, census.looked, len(census.sides), census.whole) == (60, 20, 20, False)
    assert "20 of them were opened, and none is broken" in starter("a", Wish("photos"), census)
    clock = iter(range(100)).__next__
    late = take_census(str(folder), tmp_path, max_megapixels=64, seconds=5, clock=clock)  # a second an image
    assert 0 < late.looked < 10


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(400, 32, 30), (2_000, 32, 15), (20_000, 64, 3), (200_000, 128, 3)]
)
def test_batch_and_epochs_follow_from_how_many_images_there_are(
    images: int, batch: int, epochs: int, tmp_path: Path
) -> None:
    census = Census({"a": images // 2, "b": images - images // 2}, None, 500, (300,) * 500, ())
    path = tmp_path / "pipeline.yaml"
    path.write_text(starter("a", Wish("elsewhere"), census))
    train = load_pipeline(path, STAGES).arms["main"].entry("train")
    assert train is not None
    assert (train.config.batch_size, train.config.epochs) == (batch, epochs)  # type: ignore[attr-defined]
    seen = round(images * 0.9 * 0.75)
    assert f"# {epochs} epochs: {epochs * seen:,} images in all" in path.read_text()


def test_classes_out_of_balance_are_told() -> None:
    def text(few: int) -> str:
        return starter("a", Wish("x"), Census({"many": 500, "few": few}, 100, 500, (300,), ()))

    assert "out of balance" in text(100) and "out of balance" not in text(101)
    assert "600 images in 2 classes, 100 (few) to 500 (many), and 100 for testing" in text(100)


def test_a_class_name_cannot_leave_its_comment(tmp_path: Path) -> None:
    census = Census({"a\nseed: 7": 10, "b": 10_000}, None, 500, (300,), ())
    path = tmp_path / "pipeline.yaml"
    path.write_text(starter("a", Wish("strange: \"name' é"), census), encoding="utf-8")
    spec = load_pipeline(path, STAGES)
    assert (spec.seeds, spec.data.source) == ((0,), "strange: \"name' é")


@pytest.mark.parametrize(
    ("code", "options", "said"),
    [
        (3, ("--data", "nowhere"), "no data at nowhere"),
        (3, ("--data", "photos/cat"), "class"),
        (3, ("--data", "photos", "--data", "few"), "2 images"),
        (3, ("--data", "broken"), "none of the 6 images"),
        (3, ("--data", "builtin:cats"), "builtin:digits"),
        (2, ("--target", "macs"), "no value"),
        (2, ("--target", "macs=half"), "no number"),
        (2, ("--target", "macs=2"), "less than 1"),
        (2, ("--target", "mac=0.5"), "no target"),
        (2, ("--device", "gpu"), "cuda"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_hint_and_nothing_is_written(
    code: int, options: tuple[str, ...], said: str, tmp_path: Path, sievit: Sievit, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos")
    photos(tmp_path / "few", per_class=2)
    for path in photos(tmp_path / "broken", per_class=3).rglob("*.png"):
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    answer = sievit("init", "new", *options)
    assert (answer.code, answer.out) == (code, "")
    assert said in answer.err and "help: " in answer.err
    assert not (tmp_path / "new").exists()


def test_init_never_overwrites_unless_forced(tmp_path: Path, sievit: Sievit) -> None:
    mine = tmp_path / "pipeline.yaml"
    mine.write_text("mine")
    refused = sievit("init", str(tmp_path))
    assert refused.code == 2 and "--force" in refused.err
    assert mine.read_text() == "mine"
    assert sievit("init", str(mine), "--force").code == 0
    assert mine.read_text() != "mine"


def test_a_source_in_the_files_folder_is_named_from_there_and_another_one_in_full(
    tmp_path: Path, sievit: Sievit
) -> None:
    photos(tmp_path / "a" / "photos")
    inside = written(sievit("init", str(tmp_path / "a"), "--data", str(tmp_path / "a" / "photos"), "--json"))
    assert load_pipeline(inside, STAGES).data.source == "photos"
    outside = written(sievit("init", str(tmp_path / "b"), "--data", str(tmp_path / "a" / "photos"), "--json"))
    assert load_pipeline(outside, STAGES).data.source == str(tmp_path / "a" / "photos")


def asked(folder: Path, answers: list[str], *options: str) -> tuple[int, str]:
    """`sievit init` on a terminal of its own, its questions answered in turn."""
    program = "import sys; from sievit.stages.__main__ import main; sys.exit(main())"
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", program, "init", *options], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    said, deadline = "", time.monotonic() + 180
    try:
        while time.monotonic() < deadline:
            said += os.read(ours, 1 << 16).decode(errors="replace")
            if answers and said.rstrip(" ").endswith("]:"):
                os.write(ours, answers.pop(0).encode() + b"\n")
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    return running.wait(timeout=60), said


def test_on_a_terminal_it_asks_and_asks_again_what_it_cannot_understand(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    code, said = asked(tmp_path, ["nowhere", "photos", "", "macs=7", "speedup=3", "cpu"])
    assert code == 0, said
    assert "no data at nowhere" in said and "less than 1" in said
    spec = load_pipeline(tmp_path / "pipeline.yaml", STAGES)
    assert (spec.data.source, spec.model.name, spec.device) == ("photos", "deit_tiny_patch16_224", "cpu")
    assert spec.gates.speedup == 3.0


def test_what_an_option_says_is_not_asked_and_yes_asks_nothing(tmp_path: Path) -> None:
    options = ("--data", "builtin:digits", "--target", "macs=0.4", "--device", "cpu")
    code, said = asked(tmp_path, [""], *options)
    assert code == 0 and said.count("]:") == 1, said  # the model
    code, said = asked(tmp_path, [], "--yes", "--force")
    assert code == 0 and "]:" not in said
    assert load_pipeline(tmp_path / "pipeline.yaml", STAGES).device == "auto"
