"""Why a stage is made again is told in words, not in hashes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fakes import PIPELINE
from test_cli import Sievit, folder, sievit
from test_runner import Bench, bench

from sievit.pipeline import host
from sievit.pipeline.forecast import forecast
from sievit.pipeline.keys import Change
from sievit.pipeline.reasons import in_words

__all__ = ["bench", "folder", "sievit"]
HASH = re.compile(r"\b[0-9a-f]{12,}\b")


def says(bench: Bench, entry: str, *overrides: str) -> list[str]:
    (one,) = (
        each
        for each in forecast(bench.plan(*overrides), bench.store)
        if (each.node.arm, each.node.entry.name) == ("main", entry)
    )
    return [reason.says for reason in one.reasons]


# ---- the host


def test_of_another_host_it_is_said_what_is_another_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    here, versions = dict(host.facts()), {"onnxruntime": "1.99.0", "openvino": "2030.1"}
    real = host.version
    monkeypatch.setattr(host, "facts", lambda: {**here, "cores": 512, "flags": ["avx99"], "gpus": ["H100"]})
    monkeypatch.setattr(host, "version", lambda name: versions.get(name) or real(name))
    (told,) = says(bench, "benchmark")
    for part in (
        "the host: ",
        f"cores {here['cores']} -> 512",
        f"GPUs {', '.join(here['gpus']) or 'none'} -> H100",
        "CPU features +avx99 -",
        f"onnxruntime {real('onnxruntime') or 'not installed'} -> 1.99.0",
        "openvino not installed -> 2030.1",
    ):
        assert part in told
    assert "memory" not in told and "CPU " in told and not HASH.search(told)


def test_every_fact_of_a_host_s_fingerprint_is_one_that_can_be_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes the fingerprint another one, a reason names it."""
    bench.run(until="benchmark")
    here, real = dict(host.facts()), host.version
    for name in here:
        monkeypatch.setattr(host, "facts", lambda name=name: {**here, name: ["new"] if name == "flags" else "new"})
        changed = says(bench, "benchmark")
        assert not changed or "new" in changed[0], name
    monkeypatch.setattr(host, "facts", lambda: here)
    for name in host.RUNTIMES:
        monkeypatch.setattr(host, "version", lambda one, name=name: "9.9" if one == name else real(one))
        assert f"{name} {real(name) or 'not installed'} -> 9.9" in says(bench, "benchmark")[0]


def test_a_host_of_which_nothing_was_recorded_is_another_one_all_the_same(tmp_path: Path) -> None:
    (reason,) = in_words([Change("host", "a" * 12, "b" * 12)], {}, {}, tmp_path)
    assert reason.says == "the host is another one, and its times with it"


# ---- the images


@pytest.fixture
def images(bench: Bench) -> Path:
    """A folder of files that are called images, which the pipeline reads."""
    root = bench.path.parent / "images"
    for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/3.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    bench.path.write_text(PIPELINE.replace("builtin:digits", "images"))
    return root


def test_of_changed_images_it_is_said_how_many_were_added_removed_and_changed(bench: Bench, images: Path) -> None:
    bench.run(until="ticket")
    (images / "train/cat/9.png").write_text("new")
    (images / "train/dog/8.png").write_text("new")
    (images / "train/cat/1.png").unlink()
    (images / "train/dog/1.png").write_text("another dog")
    expected = "2 added (train/cat/9.png, ...), 1 removed (train/cat/1.png), 1 changed (train/dog/1.png)"
    assert says(bench, "ticket") == [f"the images in images: {expected}"]


def test_images_of_which_no_list_was_kept_are_said_not_to_be_those_of_then(bench: Bench, images: Path) -> None:
    bench.run(until="ticket")
    (images / "train/cat/9.png").write_text("new")
    shutil.rmtree(bench.store.cache)
    assert says(bench, "ticket") == ["the images in images are not those of then; 4 files then, 5 now"]
    shutil.rmtree(bench.store.cache)
    (images / "train/cat/9.png").rename(images / "train/cat/1.png")
    assert says(bench, "ticket") == ["the images in images are not those of then"]


# ---- inputs, packages, code


def test_an_input_that_was_made_anew_is_named_with_both_references(bench: Bench) -> None:
    bench.run()
    bench.run("train.epochs=3", until="train", arms=["main"])
    newest = bench.store.resolve("train").ref
    (told,) = says(bench, "prune", "train.epochs=3")
    assert re.fullmatch(rf"train was made anew: train@\d -> {newest}", told)


def test_an_input_from_another_stage_is_named_as_such(bench: Bench) -> None:
    bench.run()
    told = says(bench, "export", "finetune=null")
    assert any(re.fullmatch(r"its model is prune@\d of prune, and was finetune@\d of finetune", one) for one in told)


def test_of_many_files_those_are_named_that_are_others_new_or_gone(bench: Bench) -> None:
    bench.run()
    told = says(bench, "benchmark", "quantize=null")
    assert any(re.fullmatch(r"main/quantize \(quantize@\d\) is no longer among its onnx", one) for one in told)
    bench.run("quantize.max_drop=0.5", until="quantize", arms=["main"])
    (one,) = says(bench, "benchmark", "quantize.max_drop=0.5", "arms.random.quantize.max_drop=0.01")
    assert re.fullmatch(r"main/quantize was made anew: quantize@\d -> quantize@\d", one)


def test_a_package_and_the_stage_s_own_code_are_named_with_both_versions(bench: Bench) -> None:
    bench.run(until="ticket")
    bench.swap("ticket", version=2)
    assert says(bench, "ticket") == ["the stage itself is another one: version 1 -> 2"]
    then = {"packages.timm": ("1.0.30", "1.0.31"), "packages.nncf": (None, "3.4.0")}
    told = in_words([Change(name, *both) for name, both in then.items()], {}, {}, bench.store.cache)
    assert [one.says for one in told] == ["timm 1.0.30 -> 1.0.31", "nncf not installed -> 3.4.0"]


def test_other_weights_and_files_are_named_and_other_settings_told_as_they_stand(tmp_path: Path) -> None:
    changes = [
        Change("model.weights_sha256", "a" * 64, "b" * 64),
        Change("files.path", "a" * 64, "b" * 64),
        Change("config.target.macs", 0.5, 0.4),
        Change("data.config.image_size", 32, 64),
    ]
    told = [one.says for one in in_words(changes, {}, {"model": {"weights": "vit.safetensors"}}, tmp_path)]
    assert told == [
        "the weights in vit.safetensors are not those of then",
        "what path names holds something else than then",
        "target.macs: 0.5 -> 0.4",
        "data.image_size: 32 -> 64",
    ]


def test_plan_and_explain_tell_no_hash(sievit: Sievit) -> None:
    sievit("run")
    sievit("train", "--set", "train.epochs=3")
    for answer in (
        sievit("plan", "--set", "train.epochs=3"),
        sievit("explain", "prune", "--set", "train.epochs=3"),
        sievit("explain", "train@latest"),
        sievit("explain", "finetune@3"),
    ):
        assert answer.code == 0 and not HASH.search(answer.out), answer.out
    assert "train was made anew: train@" in sievit("explain", "prune", "--set", "train.epochs=3").out
