"""Trackers: told what happens, never in its way."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes import PIPELINE, STAGES, BadInput

from sievit.pipeline import track
from sievit.pipeline.cli import execute
from sievit.pipeline.plan import make_plan
from sievit.pipeline.spec import load_pipeline

SMALL = re.sub(r"(?m)^  (random|finetune|dense):.*\n|^arms:\n|^gates:.*\n", "", PIPELINE)


class Kept:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.scalars: list[tuple[str, float, int]] = []
        self.values: dict[str, float] = {}
        self.pages: list[str] = []
        self.states: list[str] = []

    def _do(self, what: str) -> None:
        if what == self.failing:
            raise ConnectionError("nobody answers")

    def scalar(self, name: str, value: float, step: int) -> None:
        self._do("scalar")
        self.scalars.append((name, value, step))

    def final(self, values: Mapping[str, float]) -> None:
        self._do("final")
        self.values |= values

    def report(self, html: Path, markdown: Path) -> None:
        self._do("report")
        self.pages += [html.read_text(encoding="utf-8")[:15], markdown.read_text(encoding="utf-8")[:2]]

    def close(self, state: str) -> None:
        self._do("close")
        self.states.append(state)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipeline.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    return tmp_path


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = execute(STAGES, (BadInput,), ["run", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    tracker = Kept()
    monkeypatch.setattr(track, "opened", lambda name, spec, run: tracker)
    return tracker


ON = ("--set", "track.tensorboard=seen")


def test_a_tracker_is_told_values_metrics_and_the_report(kept: Kept, run: Run) -> None:
    code, _ = run(*ON)
    assert code == 0
    losses = [(value, step) for name, value, step in kept.scalars if name == "main/train/loss"]
    assert losses[0] == (1.0, 1) and losses[-1] == (pytest.approx(1 / 20), 20), "the first and the last are told"
    assert kept.values["main/train/epochs"] == 20 and kept.values["main/ticket/size"] == 65
    assert kept.pages == ["<!doctype html>", "##"]
    assert kept.states == ["complete", "complete"]


def test_values_come_at_most_once_a_second_and_the_last_at_the_end(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: clock[0])
    told: list[tuple[Mapping[str, float], int]] = []
    task = track._WatchedTask(Silent(), lambda values, step: told.append((dict(values), step)))
    for step in range(25):
        clock[0] = step * 0.1
        task.advance(1, loss=float(step))
    task.close()
    assert [step for _, step in told] == [1, 11, 21, 25]
    assert told[-1][0] == {"loss": 24.0}
    task.close()
    assert len(told) == 4, "nothing is told twice"


class Silent:
    def advance(self, steps: int = 1, **values: float) -> None: ...


def test_no_key_and_no_run_depends_on_trackers(kept: Kept, run: Run) -> None:
    _, plain = run()
    assert not kept.scalars and not kept.states
    _, tracked = run(*ON)
    assert tracked["run"] == plain["run"]
    assert {stage["state"] for stage in tracked["stages"]} == {"cached"}
    assert not kept.states, "a run in which all was there tells nothing"


@pytest.mark.parametrize("failing", ["scalar", "final", "report", "close"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    failing: str, kept: Kept, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept.failing = failing
    assert execute(STAGES, (BadInput,), ["run", *ON]) == 0
    told = capfd.readouterr().err
    assert "track.tensorboard is left out" in told and "nobody answers" in told
    manifests = [json.loads(path.read_text()) for path in (folder / "artifacts").glob("train/*/manifest.json")]
    notes = [note for manifest in manifests for note in manifest["notes"]]
    kept_in_manifest = any(note["level"] == "warning" and "nobody answers" in note["text"] for note in notes)
    assert kept_in_manifest == (failing == "scalar")


def test_a_tracker_that_cannot_be_opened_fails_no_run(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "seen").write_text("a file where a folder should be")
    pytest.importorskip("tensorboard")
    code, answer = run(*ON)
    assert code == 0 and answer["state"] == "complete"


def test_a_failed_run_is_told_as_failed(kept: Kept, run: Run) -> None:
    code, _ = run(*ON, "--set", "train.fail=true")
    assert code == 3
    assert set(kept.states) == {"failed"} and kept.pages


def test_what_is_not_installed_is_named_before_anything_runs(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    code, answer = run(*ON)
    assert code == 3 and "sievit[tensorboard]" in answer["error"]["hint"]
    assert "--set track.tensorboard" in answer["error"]["where"]
    assert not list((folder / "artifacts").glob("*/*/manifest.json"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("track.mlflow=https://me:secret@host/x", "MLFLOW_TRACKING_USERNAME"),
        ("track.mlflow=mlruns", "mlflow"),
        ("track.wandb=x", "wandb"),
    ],
)
def test_a_wrong_tracker_is_refused(text: str, told: str, run: Run) -> None:
    code, answer = run("--set", text)
    assert code == 3 and told in json.dumps(answer["error"])


def test_trackers_are_imported_only_where_they_are_used(run: Run, kept: Kept) -> None:
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("tensorboard", "mlflow")]
    run()
    assert loaded == [name for name in sys.modules if name.partition(".")[0] in ("tensorboard", "mlflow")]


def test_tensorboard_reads_what_was_written(run: Run, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    code, answer = run(*ON)
    assert code == 0
    where = folder / "seen" / f"digits-{answer['run']}"
    events = [event for path in sorted(where.iterdir()) for event in EventFileLoader(str(path)).Load()]
    values = {(value.tag, event.step): value for event in events for value in event.summary.value}
    assert values["main/train/loss", 20].tensor.float_val[0] == pytest.approx(1 / 20)
    assert values["final/main/train/epochs", 0].tensor.float_val[0] == 20
    assert values["report", 0].tensor.string_val[0].startswith(b"## digits")


@pytest.mark.slow
def test_mlflow_holds_one_run_for_a_run_that_went_on(folder: Path, run: Run) -> None:
    pytest.importorskip("mlflow")
    on = ("--set", "track.mlflow=sqlite:///told.db")
    assert run(*on, "--until", "train")[0] == 0
    code, answer = run(*on)
    assert code == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/told.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.tags["sievit.run"] == answer["run"] and found.info.status == "FINISHED"
    assert found.data.metrics["final/main/train/epochs"] == 20
    assert found.data.metrics["main/train/loss"] == pytest.approx(1 / 20)
    assert {one.path for one in client.list_artifacts(found.info.run_id)} == {"report.html", "report.md"}
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert not (folder / "mlruns").exists()


def test_numbers_of_nested_metrics_are_told_and_flags_and_tables_are_not() -> None:
    found = track._numbers({"top1": 0.5, "ok": True, "rows": [1, 2], "drop": {"mean": 1, "word": "x"}}, "main/prune")
    assert found == {"main/prune/top1": 0.5, "main/prune/drop/mean": 1.0}


def test_names_of_seeds_are_plain_for_mlflow() -> None:
    assert track._plain("main@seed1/train/loss") == "main-seed1/train/loss"


def test_the_track_section_is_part_of_the_file_and_of_no_recipe(folder: Path) -> None:
    path = folder / "pipeline.yaml"
    plain = make_plan(load_pipeline(path, STAGES), STAGES)
    path.write_text(SMALL + "track: {tensorboard: seen}\n")
    tracked = make_plan(load_pipeline(path, STAGES), STAGES)
    assert tracked.spec.track.tensorboard == "seen" and plain.spec.track.tensorboard is None
    assert tracked.nodes == plain.nodes
