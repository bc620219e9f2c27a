"""What a stage will take is what one like it took, and is made up of nothing else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes import PIPELINE, _write
from test_cli import Sievit, folder, sievit
from test_runner import Bench, bench

from sievit.pipeline import fingerprint, host, manifest
from sievit.pipeline.expectations import Expected, expected
from sievit.pipeline.forecast import forecast
from sievit.pipeline.resolve import Facts
from sievit.pipeline.stage import Context, Reached
from sievit.pipeline.store import Artifact

__all__ = ["bench", "folder", "sievit"]
BOTH = "arms:\n  other: {ticket: {examples: {method: random}}}\n"


def rewrite(artifact: Artifact, **changes: Any) -> None:
    """Give an artifact's manifest other facts."""
    path = artifact.root / manifest.NAME
    artifact.root.chmod(0o755)
    path.chmod(0o644)
    path.write_bytes(manifest.as_text(manifest.sealed({**artifact.manifest, **changes})))


def took(bench: Bench, ref: str, seconds: float) -> None:
    rewrite(bench.store.resolve(ref), seconds=seconds)


def takes(bench: Bench, *overrides: str) -> dict[str, Expected]:
    """arm/entry -> what it will take."""
    plan = bench.plan(*overrides)
    facts = Facts(plan, bench.store)
    told = expected(forecast(plan, bench.store, facts=facts), plan, bench.store, facts)
    return {"/".join(at): one for at, one in told.items()}


def sized(ctx: Context) -> None:
    """A ticket is as large as what it keeps."""
    _write(ctx)
    (ctx.out / "kept.bin").write_bytes(bytes(round(100_000 * ctx.config.examples.keep)))


@pytest.fixture
def two(bench: Bench) -> Bench:
    """Two arms, of which the other chooses its images in another way; main has run, and its training took 100 s."""
    bench.path.write_text(PIPELINE.partition("arms:")[0] + BOTH)
    bench.swap("ticket", run=sized)
    bench.run(arms=["main"])
    took(bench, "train", 100.0)
    return bench


# ---- whose time it is


def test_the_time_of_the_same_stage_in_another_arm_is_not_taken_before_its_inputs_are_known(two: Bench) -> None:
    assert takes(two)["other/train"] == takes(two)["other/ticket"] == Expected()
    two.run(arms=["other"], until="ticket")
    told = takes(two)["other/train"]
    assert (told.seconds, told.like, told.says) == (100.0, "main/train", "as main/train took")


def test_on_inputs_of_another_size_another_arm_s_time_is_none(two: Bench) -> None:
    smaller = "arms.other.ticket.examples.keep=0.4"  # main keeps 0.8
    two.run(smaller, arms=["other"], until="ticket")
    assert takes(two, smaller)["other/train"] == Expected()
    nearly = "arms.other.ticket.examples.keep=0.75"
    two.run(nearly, arms=["other"], until="ticket")
    assert takes(two, nearly)["other/train"].seconds == 100.0


def test_on_inputs_of_another_size_a_stage_takes_what_it_took_itself_and_says_so(two: Bench) -> None:
    smaller = "ticket.examples.keep=0.4"
    for made in (False, True):
        if made:
            two.run(smaller, arms=["main"], until="ticket")
        told = takes(two, smaller)["main/train"]
        assert (told.seconds, told.says) == (100.0, "as main/train took on other inputs")


def test_another_setting_gives_no_time_and_a_costless_one_the_same(two: Bench) -> None:
    assert takes(two, "train.weights.strength=0.5")["main/train"] == Expected()
    assert takes(two, "train.weights=null")["main/train"] == Expected()
    two.swap("train", costless=lambda config: ("weights.strength",))
    assert takes(two, "train.weights.strength=0.5")["main/train"].says == "as main/train took"
    two.swap("train", costless=lambda config: ("weights",))
    assert takes(two, "train.weights.strength=0.5")["main/train"].seconds == 100.0
    two.swap("train", costless=lambda config: ("weight",))
    assert takes(two, "train.weights.strength=0.5")["main/train"] == Expected(), "a part of a name covers nothing"


def test_a_duration_scales_what_is_in_proportion_to_it_and_nothing_else(two: Bench) -> None:
    told = takes(two, "train.epochs=5")["main/train"]  # of 20
    assert (told.seconds, told.says) == (25.0, "0.25 × what main/train took")
    assert takes(two, "train.epochs=5", "train.weights=null")["main/train"] == Expected()
    assert takes(two, "train.epochs=null", "train.steps=5")["main/train"] == Expected(), "of other units"
    took(two, "finetune", 50.0)
    assert takes(two, "finetune.epochs=4")["main/finetune"] == Expected(), "it is not said to be in proportion"


def test_the_seed_does_not_count_and_the_very_settings_come_before_the_newest(two: Bench) -> None:
    two.run("train.epochs=10", arms=["main"], until="train")
    took(two, "train@2", 7.0)
    assert takes(two, "seed=1")["main/train"].seconds == 100.0
    two.run("seed=2", arms=["main"], until="train")
    took(two, "train@3", 90.0)
    assert takes(two, "seed=1")["main/train"].seconds == 90.0, "of equals the newest"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda"},
        {"host": {**host.facts(), "cpu": "another"}},
        {"host": {**host.facts(), "cores": 512}},
        {"whole": False},
    ],
    ids=["device", "cpu", "cores", "resumed"],
)
def test_what_ran_elsewhere_or_was_resumed_tells_no_time(two: Bench, changes: dict[str, Any]) -> None:
    for artifact in two.store.artifacts("train"):
        rewrite(artifact, **changes)
    assert takes(two, "seed=1")["main/train"] == Expected()


def test_another_network_or_image_size_tells_no_time(two: Bench) -> None:
    for override in ("model.args={}", "data.image_size=64"):
        assert takes(two, override)["main/train"] == Expected()
    assert takes(two, "model.pretrained=true")["main/train"].seconds == 100.0


def test_as_many_images_take_as_long_and_many_more_are_not_known(two: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"then": "sha256:a of 100 files", "nearly": "sha256:b of 95 files", "more": "sha256:c of 120 files"}

    def of(name: str) -> None:
        monkeypatch.setattr(fingerprint, "fingerprint", lambda *given: texts[name])

    of("then")
    two.run(arms=["main"])
    took(two, "train", 60.0)
    of("nearly")
    assert takes(two)["main/train"].seconds == 60.0
    of("more")
    assert takes(two)["main/train"] == Expected()


def test_a_stage_that_went_on_from_a_checkpoint_says_that_its_seconds_are_not_of_all_its_work(bench: Bench) -> None:
    bench.run(until="train", arms=["main"])
    assert bench.store.resolve("train").manifest["whole"] is True
    key = bench.store.resolve("train").key
    left = bench.store.work("train", key)
    bench.store.resolve("train").root.rename(bench.path.parent / "away")
    left.mkdir()
    (left / "checkpoint.json").write_text(json.dumps([15, "0" * 64]))
    bench.run(until="train", arms=["main"])
    assert bench.store.resolve("train").metrics["resumed_at"] == 15
    assert bench.store.resolve("train").manifest["whole"] is False


# ---- what is left of it


@pytest.fixture
def stopped(two: Bench) -> Bench:
    """The training of seed 1 has been stopped after 15 of its 20 epochs."""
    two.run("seed=1", arms=["main"], until="ticket")
    (key,) = (one.key for one in forecast(two.plan("seed=1"), two.store) if one.node.stage.name == "train" and one.key)
    work = two.store.work("train", str(key))
    work.mkdir()
    (work / "checkpoint.json").write_text(json.dumps([15, "0" * 64]))
    os.utime(work / "checkpoint.json", (1_764_153_060, 1_764_153_060))  # 2025-11-26 10:31 UTC
    return two


def reached(work: Path) -> Reached:
    return Reached(json.loads((work / "checkpoint.json").read_text())[0], 20)


def resumes(bench: Bench) -> str | None:
    (one,) = (each for each in forecast(bench.plan("seed=1"), bench.store) if each.node.entry.name == "train"
              and each.node.arm == "main")  # fmt: skip
    return one.resumes.says if one.resumes is not None else None


def test_a_stopped_stage_says_where_it_goes_on_and_counts_what_is_left(stopped: Bench) -> None:
    assert resumes(stopped) == "goes on from a checkpoint of 2025-11-26 10:31 UTC"
    assert takes(stopped, "seed=1")["main/train"].seconds == 100.0, "how much is left is not known"
    stopped.swap("train", reached=reached)
    assert resumes(stopped) == "resumes after epoch 15 of 20"
    told = takes(stopped, "seed=1")["main/train"]
    assert (told.seconds, told.says) == (25.0, "0.25 × what main/train took")
    stopped.swap("train", reached=lambda work: Reached(15.3, 20))
    assert resumes(stopped) == "resumes in epoch 16 of 20"


def test_an_empty_work_folder_is_no_checkpoint(stopped: Bench) -> None:
    for path in (stopped.store.root / "train").glob(".work-*/*"):
        path.unlink()
    assert resumes(stopped) is None


def test_a_stage_that_another_process_makes_now_is_not_said_to_be_stopped(stopped: Bench) -> None:
    (work,) = (stopped.store.root / "train").glob(".work-*")
    lock = stopped.store.root / ".locks" / f"train-{work.name.removeprefix('.work-')}.lock"
    with subprocess.Popen(["true"]) as child:
        pass  # which has ended; the parent of this process lives
    for pid, begins in ((child.pid, "goes on from"), (os.getppid(), f"is being made: process {os.getppid()} on ")):
        lock.write_text(json.dumps({"pid": pid, "host": socket.gethostname(), "since": "2026-11-26T10:31:00"}))
        assert (resumes(stopped) or "").startswith(begins)
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-11-26T10:31:00"}))
    assert (resumes(stopped) or "").startswith("goes on from"), "of another host nothing is known"


# ---- how the command tells it


def test_a_first_plan_says_that_nobody_knows_the_minutes(sievit: Sievit, folder: Path) -> None:
    assert "17 of 17 stages to run; no minutes: nothing has run here yet" in sievit("plan").out
    (folder / "artifacts" / "train").mkdir(parents=True)
    assert "nothing has run here yet" in sievit("plan").out, "a stage that was stopped at once has left a folder"
    sievit("ticket")
    told = sievit("plan", "--set", "ticket.examples.keep=0.3").out
    assert "no minutes: nothing like them has run here yet" in told
    assert "no run like it yet" not in told, "once is enough"


def test_a_sum_says_of_how_many_stages_it_is(sievit: Sievit) -> None:
    sievit("run")
    answer = sievit("plan", "--set", "train.weights.strength=0.5")
    # main/train and random/train are of settings that nobody has run; what comes after each has run before.
    closing = " ".join(answer.out.split("\n\n")[-1].split())
    assert closing.startswith("11 of 17 stages to run, about ") and " for 9 of them, " in closing
    assert "; nothing like the other 2 has run here yet" in closing
    document = sievit("plan", "--set", "train.weights.strength=0.5", "--json").document
    of = {f"{each['arm']}/{each['entry']}": each for each in document["stages"]}
    assert document["without_forecast"] == 2
    assert of["main/train"]["expected_seconds"] is None and of["main/train"]["expected_says"] == ""
    assert of["random/prune"]["expected_says"] == "as random/prune took on other inputs"
    known = [each["expected_seconds"] for each in document["stages"] if each["state"] in ("run", "unknown")]
    assert document["expected_seconds"] == pytest.approx(sum(each for each in known if each is not None), abs=1e-3)
    assert "no run like it yet" in answer.out and "as main/prune took" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


def test_a_plan_tells_that_a_stopped_stage_goes_on(sievit: Sievit) -> None:
    sievit("train", "--set", "train.fail=true")
    sievit("ticket")
    assert sievit("train", "--set", "train.fail=true").code == 3
    answer = sievit("plan", "--set", "train.fail=true")
    assert "goes on from a checkpoint of 20" in " ".join(answer.out.split())
    assert ", and goes on from a checkpoint of 20" in sievit("explain", "train", "--set", "train.fail=true").out
    (stage,) = [
        each for each in sievit("plan", "--set", "train.fail=true", "--json").document["stages"] if each["resumes"]
    ]
    assert (stage["arm"], stage["entry"], stage["resumes"]["reached"]) == ("main", "train", None)


# ---- the checkpoint of a real training


def test_the_checkpoint_of_a_training_tells_its_epochs_without_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sievit.stages import finetune, train
    from sievit.stages.vision.tensors import write_tensors

    clock = {"nominal": 40, "total": 560, "epoch": 7, "position": 10, "steps": 40}
    path = tmp_path / "training.safetensors"
    for stage in (train.STAGE, finetune.STAGE):
        assert stage.reached(tmp_path) is None
        write_tensors(path, {"weight": torch.zeros(9)}, {"run": {"clock": clock, "curve": []}})
        found = stage.reached(tmp_path)
        assert found is not None and (found.done, found.total, found.unit) == (7.25, 14.0, "epoch")
        whole = path.read_bytes()
        for damaged in (whole[:4], whole[:40], b"\xff" * 40, b""):
            path.write_bytes(damaged)
            assert stage.reached(tmp_path) is None
        path.unlink()


def test_settings_are_costless_only_where_training_cannot_end_early() -> None:
    from sievit.stages import finetune, train

    for stage in (train.STAGE, finetune.STAGE):
        whole = stage.config.model_validate({"epochs": 4})
        early = stage.config.model_validate({"epochs": 4, "stop_early": {"patience": 1}})
        assert "lr" in stage.costless(whole) and "epochs" in stage.paced_by(whole)
        assert not stage.costless(early) and not stage.paced_by(early)
        for field in stage.costless(whole):
            assert field.partition(".")[0] in stage.config.model_fields, field
