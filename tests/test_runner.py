"""The runner: what depends on a change runs again, nothing else does, and every failure is told."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import PIPELINE, STAGES, BadInput

from sievit.pipeline import records
from sievit.pipeline.errors import (
    InputError,
    IntegrityError,
    Interrupted,
    LockedError,
    SievitError,
    SpecError,
    Terminated,
    UsageError,
)
from sievit.pipeline.forecast import forecast
from sievit.pipeline.plan import Plan, make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.records import RunRecord
from sievit.pipeline.runner import Manner, run, run_stage
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Context, Stage
from sievit.pipeline.store import Store

MAIN = ["ticket", "train", "prune", "finetune", "export", "quantize"]


class Told(Silent):
    """Keeps what the user would have read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


class Bench:
    """A pipeline file with a store beside it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipeline.yaml"
        self.path.write_text(PIPELINE)
        self.store = Store(folder / "artifacts")
        self.stages: Sequence[Stage] = STAGES
        self.told = Told()

    def plan(self, *overrides: str) -> Plan:
        return make_plan(load_pipeline(self.path, self.stages, overrides), self.stages)

    def run(self, *overrides: str, force: bool = False, **options: Any) -> RunRecord:
        manner = Manner(self.told, (BadInput,), force, command=("/usr/bin/sievit", "run", "pipeline.yaml"))
        return run(self.plan(*overrides), self.store, manner, **options)

    def alone(
        self, entry: str, *overrides: str, arm: str = "main", force: bool = False, **options: Any
    ) -> records.NodeRecord:
        plan = self.plan(*overrides)
        node = plan.node(arm, entry)
        assert node is not None
        return run_stage(plan, node, self.store, Manner(self.told, force=force), **options).node(arm, entry)

    def swap(self, name: str, **changes: Any) -> None:
        """Replace parts of one stage's declaration."""
        self.stages = tuple(replace(s, **changes) if s.name == name else s for s in self.stages)

    def add_arm(self, arm: str) -> None:
        self.path.write_text(PIPELINE.replace("arms:\n", f"arms:\n  {arm}\n"))

    def digests(self) -> dict[str, str]:
        return {f"{a.kind_of_stage}/{a.key}": a.digest for a in self.store.artifacts()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here, and a disk takes its time
    return Bench(tmp_path)


def did(record: RunRecord) -> dict[str, set[str]]:
    """arm -> the entries that this run made anew."""
    made: dict[str, set[str]] = {}
    for node in record.nodes:
        if node.state == "done" and (node.arm, node.entry) in record.touched:
            made.setdefault(node.arm, set()).add(node.entry)
    return made


# ---- theorem 6: a second run does nothing


def test_a_second_run_does_nothing_and_says_so(bench: Bench) -> None:
    first = bench.run()
    assert first.state == "complete" and not first.did_nothing
    assert {node.state for node in first.nodes} == {"done"}
    files = {path: path.stat().st_mtime_ns for path in bench.store.root.glob("*/*/*") if "runs" not in path.parts}
    second = bench.run()
    assert second.did_nothing and {node.state for node in second.nodes} == {"cached"}
    assert second.id == first.id and [n.ref for n in second.nodes] == [n.ref for n in first.nodes]
    assert {p: p.stat().st_mtime_ns for p in bench.store.root.glob("*/*/*") if "runs" not in p.parts} == files


def test_a_second_run_over_megabytes_takes_far_under_a_second(bench: Bench) -> None:
    for stage in STAGES:
        bench.swap(stage.name, run=lambda ctx, fake=stage.run: (ctx.out / "w").write_bytes(b"w" * 2**21) and fake(ctx))
    bench.run()
    started = time.process_time()  # not of the clock: the other core is busy with other tests
    assert bench.run().did_nothing
    assert time.process_time() - started < 0.4


def test_a_forecast_after_a_run_promises_nothing_to_do(bench: Bench) -> None:
    bench.run()
    assert {each.state for each in forecast(bench.plan(), bench.store)} == {"cached"}


# ---- theorem 5: changing one field re-runs exactly what depends on it


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("ticket.examples.keep=0.7", {"main": {*MAIN, "benchmark"}, "random": {*MAIN}}),
        ("arms.random.ticket.examples.keep=0.7", {"random": {*MAIN}, "main": {"benchmark"}}),
        ("train.weights.strength=0.1", {"main": {*MAIN[1:], "benchmark"}, "random": {*MAIN[1:]}}),
        ("prune.target.macs=0.4", {"main": {*MAIN[2:], "benchmark"}, "random": {*MAIN[2:]}}),
        ("quantize.max_drop=0.02", {"main": {"quantize", "benchmark"}, "random": {"quantize"}}),
        ("benchmark.threads=[1, 2]", {"main": {"benchmark"}}),
        ("seed=1", {arm: {*MAIN} for arm in ("main", "random")} | {"dense": {"ticket", "train", "finetune", "export"}}),
        ("gates.speedup=1.5", {}),
        ("data.workers=3", {}),
        ("name=other", {}),
    ],
)
def test_changing_one_field_reruns_exactly_what_depends_on_it(
    bench: Bench, override: str, again: dict[str, set[str]]
) -> None:
    first = bench.run()
    if override == "seed=1":
        again["main"].add("benchmark")
    predicted = [each for each in forecast(bench.plan(override), bench.store) if each.state != "cached"]
    second = bench.run(override)
    assert did(second) == again
    assert {(each.node.arm, each.node.entry.name) for each in predicted} == {
        (arm, entry) for arm, entries in again.items() for entry in entries
    }
    assert bench.run().did_nothing and bench.run(override).did_nothing
    assert (second.id == first.id) == (override == "")


def test_a_raised_code_version_reruns_the_stage(bench: Bench) -> None:
    bench.run()
    bench.swap("export", version=2)
    made = did(bench.run())
    assert {entry for entries in made.values() for entry in entries} == {"export"}  # the content is the same: cut off


def test_equal_content_cuts_off_what_comes_after(bench: Bench) -> None:
    """`ticket` keeps 0.8 instead of 0.80001, runs again, and leaves the very same ids: nothing below it runs."""

    def rounded(ctx: Context) -> None:
        (ctx.out / "payload.txt").write_text(f"{ctx.config.examples.keep:.2f}")

    bench.swap("ticket", run=rounded)
    bench.run()
    assert did(bench.run("ticket.examples.keep=0.80001")) == {"main": {"ticket"}, "random": {"ticket"}}


def test_arms_share_what_has_the_same_key(bench: Bench) -> None:
    bench.add_arm("twin: {quantize: {max_drop: 0.02}}")
    record = bench.run()
    for entry in MAIN[:-1]:
        twin = record.node("twin", entry)
        assert twin.state == "cached" and twin.ref == record.node("main", entry).ref
    assert record.node("twin", "quantize").state == "done"


def test_the_seed_that_a_stage_is_given_is_the_pipeline_s(bench: Bench) -> None:
    seeds: list[int] = []

    def note(ctx: Context) -> None:
        seeds.append(ctx.seed)
        (ctx.out / "x").write_text(str(ctx.seed))

    bench.swap("ticket", run=note)
    bench.run("seed=7", until="ticket", arms=["main"])
    assert seeds == [7]


def test_the_weights_file_counts_by_its_content(bench: Bench) -> None:
    weights = bench.path.parent / "w.safetensors"
    weights.write_bytes(b"1")
    bench.run("model.weights=w.safetensors", until="train", arms=["main"])
    weights.rename(weights.with_name("v.safetensors"))
    assert bench.run("model.weights=v.safetensors", until="train", arms=["main"]).did_nothing
    weights.with_name("v.safetensors").write_bytes(b"2")
    assert did(bench.run("model.weights=v.safetensors", until="train", arms=["main"])) == {"main": {"train"}}
    with pytest.raises(InputError, match="weights cannot be read"):
        bench.run("model.weights=none.safetensors", until="train")


def test_inputs_of_the_benchmark_are_labelled_and_the_last_of_an_arm_is_final(bench: Bench) -> None:
    bench.run()
    rows = bench.store.resolve("benchmark").metrics["rows"]
    assert [(row["arm"], row["entry"], row["final"]) for row in rows] == [
        ("main", "export", False),
        ("main", "quantize", True),
        ("dense", "export", True),
        ("random", "export", False),
        ("random", "quantize", True),
    ]
    inputs = bench.store.resolve("benchmark").manifest["inputs"]["onnx"]
    assert [(one["arm"], one["entry"]) for one in inputs] == [(row["arm"], row["entry"]) for row in rows]


def test_a_manifest_tells_where_the_artifact_comes_from(bench: Bench) -> None:
    bench.run()
    prune = bench.store.resolve("prune@1")
    train = bench.store.resolve("train@1")
    manifest = prune.manifest
    expected = {
        "ref": "train@1",
        "stage": "train",
        "key": train.key,
        "digest": train.digest,
        "arm": "main",
        "entry": "train",
    }
    assert manifest["inputs"]["model"] == expected
    assert manifest["command"] == "sievit run pipeline.yaml"
    assert (manifest["pipeline"], manifest["arm"], manifest["entry"]) == ("digits", "main", "prune")
    assert manifest["config"]["target"]["macs"] == 0.5 and manifest["seed"] == 0
    assert manifest["libraries"]["torch"] and manifest["host"]["cores"] >= 1
    assert manifest["seconds"] >= 0 and manifest["cpu_seconds"] >= 0 and manifest["peak_memory_mb"] > 1
    assert train.manifest["figures"] == [{"file": "figures/curve.svg", "title": "Training curve", "caption": ""}]
    assert train.file("figures/curve.svg").read_text().startswith("<svg")


def test_notes_of_a_stage_are_shown_and_kept(bench: Bench) -> None:
    def talk(ctx: Context) -> None:
        ctx.progress.note("a note")
        ctx.progress.warn("a warning")
        (ctx.out / "x").write_text("x")

    bench.swap("ticket", run=talk)
    bench.run(until="ticket", arms=["main"])
    notes = [{"level": "note", "text": "a note"}, {"level": "warning", "text": "a warning"}]
    assert bench.store.resolve("ticket").manifest["notes"] == notes
    assert bench.told.lines == ["a note", "warning: a warning"]


def test_a_reference_to_timm_is_left_to_the_stage(bench: Bench) -> None:
    bench.run("finetune.distill.teacher=timm:regnety_160", until="finetune", arms=["main"])
    finetune = bench.store.resolve("finetune")
    assert finetune.manifest["references"] == {"teacher": "timm:regnety_160"}
    assert "teacher" not in finetune.manifest["inputs"]


def test_a_reference_to_an_artifact_is_an_input_like_any_other(bench: Bench) -> None:
    bench.run()
    bench.run("finetune.distill.teacher=train@2", until="finetune", arms=["main"])
    assert bench.store.resolve("finetune").manifest["inputs"]["teacher"]["ref"] == "train@2"
    with pytest.raises(InputError, match="there is no train@99"):
        bench.run("finetune.distill.teacher=train@99")


# ---- selection


def test_until_makes_an_entry_and_what_it_needs(bench: Bench) -> None:
    record = bench.run(until="prune")
    assert did(record) == {"main": {"ticket", "train", "prune"}, "random": {"ticket", "train", "prune"}}
    assert record.node("main", "export").state == "waiting" and record.state == "complete"
    assert bench.run(until="prune").did_nothing


def test_arms_makes_these_arms_and_leaves_out_what_compares_all(bench: Bench) -> None:
    assert did(bench.run(arms=["dense"])) == {"dense": {"ticket", "train", "finetune", "export"}}
    assert did(bench.run(arms=["main", "random"])) == {"main": {*MAIN}, "random": {*MAIN}}
    assert did(bench.run(arms=["dense"], until="benchmark")) == {"main": {"benchmark"}}


def test_only_makes_an_entry_and_nothing_that_it_needs(bench: Bench) -> None:
    with pytest.raises(InputError, match="main/ticket has not been made with these settings"):
        bench.run(only=["prune"], arms=["main"])
    bench.run(until="train")
    assert did(bench.run(only=["prune"], arms=["main"])) == {"main": {"prune"}}


def test_a_later_run_keeps_what_the_record_said_of_the_rest(bench: Bench) -> None:
    bench.run(until="train", arms=["main"])
    record = bench.run(until="ticket", arms=["dense"])
    assert record.node("main", "train").ref == "train@1"
    loaded = records.load(bench.store, record.id[:5])
    assert loaded.node("main", "train").state == "done" and loaded.node("dense", "ticket").state == "done"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"until": "prun"}, "did you mean 'prune'?"),
        ({"only": ["xyz"]}, "there are ticket, train"),
        ({"arms": ["dens"]}, "did you mean 'dense'?"),
        ({"arms": ["dense"], "until": "prune"}, ""),
    ],
)
def test_a_selection_of_nothing_is_refused(bench: Bench, options: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench.run(**options)
    assert hint in caught.value.hint and not bench.store.root.exists()


def test_force_makes_everything_again_once(bench: Bench) -> None:
    bench.run()
    before = bench.digests()
    counted: list[str] = []

    def count(ctx: Context) -> None:
        counted.append(ctx.arm)
        STAGES[0].run(ctx)

    bench.swap("ticket", run=count)
    bench.add_arm("twin: {quantize: {max_drop: 0.02}}")
    record = bench.run(force=True)
    assert record.node("main", "ticket").ref == record.node("twin", "ticket").ref == "ticket@4"
    assert counted == ["main", "dense", "random"]  # the twin takes what main made a moment ago
    assert before.items() <= bench.digests().items()


# ---- damage


def damaged(bench: Bench, ref: str) -> Path:
    path = bench.store.resolve(ref).file("payload.txt")
    path.chmod(0o644)
    path.write_text("x" * 65)
    return path


def test_a_damaged_hit_stops_the_run_with_exit_code_4(bench: Bench) -> None:
    bench.run()
    path = damaged(bench, "train@1")
    with pytest.raises(IntegrityError) as caught:
        bench.run()
    assert caught.value.exit_code == 4 and "train@1" in caught.value.message and caught.value.where == str(path)
    record = records.newest(bench.store)
    assert record is not None and record.state == "failed"
    assert [record.node("main", entry).state for entry in MAIN[:3]] == ["cached", "failed", "waiting"]


def test_both_remedies_for_damage_lead_to_the_same_content(bench: Bench) -> None:
    from sievit.pipeline.collect import collect

    bench.run()
    before = bench.digests()
    damaged(bench, "train@1")
    assert [removal.kind for removal in collect(bench.store, damaged=True)] == ["damaged"]
    assert did(bench.run()) == {"main": {"train"}}
    assert bench.digests() == before
    damaged(bench, "train@4")
    bench.run(force=True)
    assert bench.digests() == before and bench.run().did_nothing


def test_a_damaged_input_named_by_reference_is_not_read(bench: Bench) -> None:
    bench.run()
    damaged(bench, "train@2")
    with pytest.raises(IntegrityError, match="train@2"):
        bench.run("finetune.distill.teacher=train@2", until="finetune", arms=["main"])


# ---- failures


def failing(bench: Bench, error: BaseException) -> Callable[..., RunRecord]:
    def fail(ctx: Context) -> None:
        (ctx.out / "half").write_text("half")
        (ctx.work / "checkpoint").write_text("kept")
        raise error

    bench.swap("prune", run=fail)
    return bench.run


@pytest.mark.parametrize(
    ("error", "kind", "code", "message", "hint"),
    [
        (BadInput("the images are black"), InputError, 3, "the images are black", "give another one"),
        (ZeroDivisionError("oops"), SievitError, 1, "main/prune failed with ZeroDivisionError: oops", "--debug"),
        (MemoryError(), SievitError, 1, "main/prune ran out of memory", "smaller batch"),
        (OSError(errno.ENOSPC, "No space left"), SievitError, 1, "the disk is full: ", "free some space"),
        (RuntimeError("write: No space left on device (28)"), SievitError, 1, "the disk is full: ", "free some space"),
        (LockedError("held", where="there"), LockedError, 5, "held", ""),
        (KeyboardInterrupt(), Interrupted, 130, "stopped in main/prune", "`sievit run pipeline.yaml`"),
    ],
)
def test_every_failure_of_a_stage_is_one_readable_error(
    bench: Bench, error: BaseException, kind: type[SievitError], code: int, message: str, hint: str
) -> None:
    with pytest.raises(SievitError) as caught:
        failing(bench, error)(arms=["main"])
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert caught.value.message.startswith(message) and hint in caught.value.hint
    assert caught.value.where.startswith("main/prune")
    assert [path.name[:6] for path in (bench.store.root / "prune").iterdir()] == [".work-"]
    record = records.newest(bench.store)
    assert record is not None
    stopped = code == 130
    assert record.state == ("interrupted" if stopped else "failed")
    states = ["done", "done", "waiting" if stopped else "failed", *["waiting"] * 3]
    assert [record.node("main", entry).state for entry in MAIN] == states


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", Path("x")])
def test_metrics_that_json_cannot_hold_are_an_error(bench: Bench, value: Any) -> None:
    def odd(ctx: Context) -> None:
        (ctx.out / "x").write_text("x")
        ctx.metrics["top1"] = value

    bench.swap("ticket", run=odd)
    with pytest.raises(SievitError, match="metrics are no plain JSON"):
        bench.run()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x\n"])
def test_a_figure_s_name_cannot_lead_elsewhere(bench: Bench, name: str) -> None:
    bench.swap("ticket", run=lambda ctx: ctx.figure(name, "<svg/>", title="t"))
    with pytest.raises(SievitError, match="plain file stems"):
        bench.run()


def test_keep_going_does_what_does_not_depend_on_the_failure(bench: Bench) -> None:
    with pytest.raises(SievitError, match="ZeroDivisionError"):
        failing(bench, ZeroDivisionError())(keep_going=True)
    record = records.newest(bench.store)
    assert record is not None and record.state == "failed"
    done = {f"{node.arm}/{node.entry}" for node in record.nodes if node.state == "done"}
    before = {f"{arm}/{entry}" for arm in ("main", "random") for entry in ("ticket", "train")}
    assert done == before | {f"dense/{entry}" for entry in ("ticket", "train", "finetune", "export")}
    assert record.node("main", "finetune").state == record.node("main", "benchmark").state == "waiting"


def test_after_a_failure_the_next_run_goes_on_from_there(bench: Bench) -> None:
    with pytest.raises(SievitError):
        failing(bench, ZeroDivisionError())()
    bench.stages = STAGES
    record = bench.run()
    assert record.node("main", "train").state == "cached" and record.node("main", "prune").state == "done"


def test_a_missing_data_source_is_refused_before_anything_is_written(bench: Bench) -> None:
    with pytest.raises(SpecError, match=r"there is no .*imagse"):
        bench.run("data.source=imagse")
    assert not list(bench.store.root.glob("[a-z]*"))


def test_a_full_disk_is_refused_before_a_stage_starts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    bench.swap("ticket", run=lambda ctx: started.append(ctx.entry))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(InputError, match="are free for the store"):
        bench.run()
    assert not started


# ---- gates


def test_gates_stand_in_the_record_and_a_missed_one_is_an_error_with_exit_code_6(bench: Bench) -> None:
    record = bench.run()
    assert record.gates == {
        "accuracy_drop": {"measured": 0.001, "bound": 0.01, "passed": True},
        "speedup": {"measured": 2.5, "bound": 2.0, "passed": True},
    }
    assert records.missed_gates(record) is None
    error = records.missed_gates(bench.run("gates.speedup=3.0"))
    assert error is not None and error.exit_code == 6 and error.message == "speedup is 2.5, the bound is 3"


def test_a_bound_that_nobody_measured_is_missed_and_rounding_misses_none() -> None:
    judged = records.judge({"accuracy_drop": 0.01, "speedup": None}, {})
    assert judged == {"accuracy_drop": {"measured": None, "bound": 0.01, "passed": False}}
    assert records.judge({"accuracy_drop": 0.01}, {"accuracy_drop": 0.93 - 0.92})["accuracy_drop"]["passed"]


# ---- single stages


def test_a_stage_alone_reads_the_newest_of_the_stage_before_it_and_says_which(bench: Bench) -> None:
    bench.run(until="train")
    node = bench.alone("prune")
    assert (node.state, node.ref) == ("done", "prune@1")
    told = "model: train@1, the newest that stage 'train' of arm 'main' has made; --input model=REF names another"
    assert told in bench.told.lines
    assert bench.alone("finetune").ref == "finetune@1"
    assert bench.store.resolve("finetune").manifest["inputs"]["model"]["ref"] == "prune@1"
    assert bench.alone("finetune").state == "cached"


def test_a_stage_alone_takes_what_other_settings_made_last(bench: Bench) -> None:
    bench.run(until="train", arms=["main"])
    bench.alone("train", "train.epochs=3")
    assert bench.alone("prune").ref == "prune@1"
    assert bench.store.resolve("prune").manifest["inputs"]["model"]["ref"] == "train@2"


def test_a_stage_alone_finds_its_input_without_any_run_record(bench: Bench) -> None:
    bench.run(until="train", arms=["main"])
    shutil.rmtree(bench.store.runs)
    assert bench.alone("prune").state == "done"


def test_a_stage_alone_takes_the_input_it_is_given(bench: Bench) -> None:
    bench.run(until="train")
    dense = records.newest(bench.store)
    assert dense is not None
    bench.alone("prune", inputs_override={"model": "train@2"})
    assert bench.store.resolve("prune").manifest["inputs"]["model"]["ref"] == "train@2"
    with pytest.raises(UsageError) as usage:
        bench.alone("prune", inputs_override={"modle": "train@2"})
    assert "it takes model, tickets" in usage.value.hint
    with pytest.raises(InputError, match="ticket@1 holds tickets, but prune reads model as 'model'"):
        bench.alone("prune", inputs_override={"model": "ticket@1"})


def test_a_benchmark_alone_takes_several_files(bench: Bench) -> None:
    bench.run()
    node = bench.alone("benchmark", inputs_override={"onnx": "export@1, export@2"})
    assert node.state == "done"
    rows = bench.store.resolve(str(node.ref)).metrics["rows"]
    assert [(row["arm"], row["final"]) for row in rows] == [("main", False), ("dense", True)]
    assert bench.alone("benchmark").ref == "benchmark@1"


def test_a_stage_alone_without_an_input_says_how_to_make_one(bench: Bench) -> None:
    with pytest.raises(InputError) as caught:
        bench.alone("prune")
    assert "there is no artifact of stage 'train' yet" in caught.value.message
    assert "`sievit train pipeline.yaml`" in caught.value.hint
    assert not bench.store.runs.exists()


def test_a_whole_run_after_single_stages_finds_them_done(bench: Bench) -> None:
    for entry in MAIN:
        assert bench.alone(entry).state == "done"
    assert did(bench.run(arms=["main"])) == {}


# ---- two processes, signals


CHILD = """
    import sys
    from pathlib import Path
    from fakes import STAGES, BadInput
    from sievit.pipeline.errors import SievitError
    from sievit.pipeline.plan import make_plan
    from sievit.pipeline.progress import Lines
    from sievit.pipeline.runner import Manner, run
    from sievit.pipeline.spec import load_pipeline
    from sievit.pipeline.store import Store

    path, wait_s, *overrides = sys.argv[1:]
    plan = make_plan(load_pipeline(Path(path), STAGES, overrides), STAGES)
    command = ["sievit", "run", "pipeline.yaml"]
    try:
        manner = Manner(Lines(sys.stdout), (BadInput,), wait_s=float(wait_s), command=command)
        record = run(plan, Store(Path(path).parent / "artifacts"), manner, until="train", arms=["main"])
    except SievitError as error:
        print(error.text(), flush=True)
        raise SystemExit(error.exit_code)
    print(record.node("main", "train").state, flush=True)
"""


@contextmanager
def child(bench: Bench, wait_s: float, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(bench.path), str(wait_s), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the child ended without saying {text!r}")


SLOW = "train.pause=0.15"


def test_of_two_processes_one_makes_the_artifact_and_the_other_finds_it(bench: Bench) -> None:
    with child(bench, 60, SLOW) as first:
        read_until(first, "main/train ...")
        with child(bench, 60, SLOW) as second:
            outputs = [second.communicate(timeout=30)[0], first.communicate(timeout=30)[0]]
    assert outputs[1].endswith("done\n") and outputs[0].endswith("cached\n")
    assert "waiting for train@" in outputs[0] and f"process {first.pid} on " in outputs[0]
    assert [artifact.ref for artifact in bench.store.artifacts("train")] == ["train@1"]


def test_a_process_that_may_not_wait_names_the_other_with_exit_code_5(bench: Bench) -> None:
    with child(bench, 0, SLOW) as first:
        read_until(first, "main/train ...")
        with child(bench, 0, SLOW) as second:
            said = second.communicate(timeout=30)[0]
        assert second.returncode == 5 and f"is held by process {first.pid} on " in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_the_checkpoint_and_says_how_to_go_on(bench: Bench, number: int, code: int) -> None:
    with child(bench, 0, SLOW) as process:
        read_until(process, "main/train ...")
        time.sleep(0.3)
        process.send_signal(number)
        said = process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert "run the same command again (`sievit run pipeline.yaml`)" in said and "last checkpoint" in said
    left = [path.name[:6] for path in (bench.store.root / "train").iterdir()]
    assert left == [".work-"]
    record = records.newest(bench.store)
    assert record is not None and record.state == "interrupted" and record.node("main", "train").state == "waiting"
    assert bench.run(SLOW, until="train", arms=["main"]).node("main", "train").state == "done"
    assert bench.store.resolve("train").metrics["resumed_at"] > 0


def test_sigterm_cannot_be_swallowed_by_a_stage(bench: Bench) -> None:
    def deaf(ctx: Context) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception:
            ctx.progress.note("swallowed")

    bench.swap("ticket", run=deaf)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        bench.run()
    assert bench.told.lines == [] and signal.getsignal(signal.SIGTERM) is before
