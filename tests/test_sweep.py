"""Sweeps: what is tried, what is worth having, and that a sweep that was stopped ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import BENCHMARK, PIPELINE, QUANTIZE, STAGES, BadInput, _write

from sievit.pipeline import objectives, search_space
from sievit.pipeline.cli import execute
from sievit.pipeline.errors import SievitError, UsageError
from sievit.pipeline.objectives import Estimate
from sievit.pipeline.stage import Context, Stage

ROOT = Path(__file__).resolve().parents[1]

# ---- what is tried


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("prune.target.macs=0.3,0.5", [0.3, 0.5]),
        ("prune.importance=taylor, l1", ["taylor", "l1"]),
        ("quantize=null,{max_drop: 0.02}", [None, {"max_drop": 0.02}]),
        ("benchmark.batch_sizes=[1, 8],[8]", [[1, 8], [8]]),
        ("train.epochs=5", [5]),
    ],
)
def test_a_grid_takes_whatever_a_field_can_be_set_to(text: str, values: list[Any]) -> None:
    (tried,) = search_space.grid_of([text]).values()
    assert list(tried.ends) == values


@pytest.mark.parametrize(
    ("text", "low", "high", "log", "whole"),
    [
        ("finetune.lr=1e-4..1e-2:log", 1e-4, 1e-2, True, False),
        ("train.epochs=5..20", 5, 20, False, True),
        ("prune.target.macs=.25..1.0", 0.25, 1.0, False, False),
    ],
)
def test_a_search_takes_ranges_whole_and_logarithmic(
    text: str, low: float, high: float, log: bool, whole: bool
) -> None:
    (tried,) = search_space.search_of([text]).values()
    assert tried == search_space.Range(low, high, log) and tried.whole is whole


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (search_space.grid_of, "prune.target.macs", "FIELD=VALUES"),
        (search_space.grid_of, "prune.target.macs=", "FIELD=VALUES"),
        (search_space.grid_of, "prune.target.macs=0.3..0.5", "not a range"),
        (search_space.grid_of, "prune.target.macs=0.3,,0.5", "missing"),
        (search_space.grid_of, "prune.target.macs=0.3,0.3", "twice"),
        (search_space.grid_of, "prune.target.macs={a: 1", "closed"),
        (search_space.search_of, "finetune.lr=1e-2..1e-4", "lower number"),
        (search_space.search_of, "finetune.lr=0.0..1.0:log", "above 0"),
    ],
)
def test_a_wrong_range_is_refused_where_it_stands(
    read: Callable[[Sequence[str]], Any], text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read([text])
    assert caught.value.where.endswith(text) and caught.value.hint


def test_combinations_are_the_product_and_overrides_read_back() -> None:
    grid = search_space.grid_of(["a=1,2", "b=x,{c: 1.0e-5}"])
    found = list(search_space.combinations(grid))
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in ("x", {"c": 1e-5})]
    (again,) = search_space.grid_of([search_space.overrides({"b": {"c": 1e-5}})[0]]).values()
    assert again.ends == ({"c": 1e-5},)


def test_a_grid_of_too_many_combinations_is_refused() -> None:
    values = ",".join(map(str, range(101)))
    with pytest.raises(UsageError, match="10,201"):
        search_space.grid_of([f"a={values}", f"b={values}"])


# ---- what is worth having


def point(top1: float, speedup: float, wide: float = 0.0) -> dict[str, Estimate]:
    return {
        "top1": Estimate(top1, top1 - wide, top1 + wide),
        "speedup": Estimate(speedup, speedup - 10 * wide, speedup + 10 * wide),
    }


def test_the_front_of_exact_numbers_is_the_textbook_one() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(12)]
        textbook = [not any(x >= a and y >= b and (x, y) != (a, b) for x, y in points) for a, b in points]
        assert objectives.front([point(a, b) for a, b in points]) == textbook


def test_a_difference_inside_the_noise_is_none() -> None:
    near = [point(0.90, 2.0, 0.01), point(0.91, 2.0, 0.01)]
    assert objectives.front(near) == [True, True]
    # Slower beyond the noise, and more accurate only within it: there is no measurable reason to choose it.
    assert objectives.front([point(0.90, 3.0, 0.01), point(0.91, 2.0, 0.01)]) == [True, False]
    assert objectives.front([point(0.90, 3.0, 0.01), point(0.93, 2.0, 0.01)]) == [True, True]


def test_a_chain_of_small_losses_does_not_hide_the_most_accurate() -> None:
    """b is as accurate as a and faster, c as b and faster again; but c is less accurate than a beyond the noise."""
    chain = [point(0.94, 1.0, 0.011), point(0.92, 2.0, 0.011), point(0.90, 3.0, 0.011)]
    assert objectives.dominates(chain[1], chain[0]) and objectives.dominates(chain[2], chain[1])
    assert objectives.front(chain) == [True, False, True]


def test_no_trial_of_a_front_dominates_another_and_one_of_it_each_of_the_rest() -> None:
    draw = random.Random(1)
    for _ in range(50):
        trials = [point(draw.uniform(0.8, 1.0), draw.uniform(1, 3), draw.uniform(0, 0.04)) for _ in range(15)]
        on = objectives.front(trials)
        best = [trial for trial, yes in zip(trials, on, strict=True) if yes]
        assert not any(objectives.dominates(one, other) for one in best for other in best)
        for trial, yes in zip(trials, on, strict=True):
            assert yes or any(objectives.dominates(one, trial) for one in best)


def test_less_is_better_where_it_is() -> None:
    sizes = [{"bytes": Estimate(size, size, size)} for size in (3.0, 1.0, 2.0)]
    assert objectives.front(sizes) == [False, True, False]


def test_a_front_is_never_empty_though_noise_can_go_round() -> None:
    def of(**spans: tuple[float, float]) -> dict[str, Estimate]:
        return {name: Estimate(sum(span) / 2, *span) for name, span in spans.items()}

    # a over b by top1, b over c by speedup, c over a by size; all else lies within the noise.
    ring = [
        of(top1=(3, 4), speedup=(1.5, 3.5), bytes=(-2, -1)),
        of(top1=(1, 2), speedup=(3, 4), bytes=(-3.5, -1.5)),
        of(top1=(1.5, 3.5), speedup=(1, 2), bytes=(-4, -3)),
    ]
    assert [objectives.dominates(ring[i], ring[(i + 1) % 3]) for i in range(3)] == [True] * 3
    assert objectives.front(ring) == [True] * 3
    worse = of(top1=(0, 0.5), speedup=(0, 0.5), bytes=(5, 6))
    assert objectives.front([*ring, worse]) == [True] * 3 + [False]


ROW = {
    "arm": "main", "family": "main", "final": True, "provider": "cpu", "batch": 1, "threads": 1, "io": "host",
    "top1": 0.9, "top1_low": 0.88, "top1_high": 0.92, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.2,
    "bytes": 100,
}  # fmt: skip


def test_objectives_are_of_the_shipped_file_in_the_first_setting_with_the_noise_in_them() -> None:
    others = [{**ROW, "final": False, "top1": 0.1}, {**ROW, "arm": "dense", "family": "dense", "top1": 0.2}]
    later = {**ROW, "batch": 8, "top1": 0.3}
    metrics = {"rows": [*others, ROW, later], "noise_floor": {"ratio_high": 1.1}}
    found = objectives.measured(metrics, ("top1", "speedup", "bytes"))
    assert found["top1"] == Estimate(0.9, 0.88, 0.92)
    assert found["speedup"] == Estimate(2.0, pytest.approx(1.9 / 1.1), pytest.approx(2.2 * 1.1))
    assert found["bytes"] == Estimate(100, 100, 100)
    with pytest.raises(SievitError, match="no macs"):
        objectives.measured(metrics, ("macs",))
    with pytest.raises(SievitError, match="no top1"):
        objectives.measured({}, ("top1",))


def test_objectives_under_several_seeds_are_means_with_the_interval_over_seeds() -> None:
    rows = [ROW, {**ROW, "arm": "main@seed1", "top1": 0.8, "speedup": 4.0, "speedup_low": 3.8, "speedup_high": 4.2}]
    over = {"arm": "main", "top1_mean": 0.85, "top1_low": 0.5, "top1_high": 0.95, "speedup_mean": 8**0.5}
    found = objectives.measured({"rows": rows, "over_seeds": [over]}, ("top1", "speedup", "bytes"))
    assert found["top1"] == Estimate(0.85, 0.5, 0.95)
    assert found["speedup"] == Estimate(8**0.5, 1.9, 4.2)
    assert found["bytes"] == Estimate(100, 100, 100)


def test_an_unknown_objective_is_refused() -> None:
    assert objectives.chosen([]) == ("top1", "speedup")
    with pytest.raises(UsageError, match="latency"):
        objectives.chosen(["latency"])
    with pytest.raises(UsageError, match="twice"):
        objectives.chosen(["top1", "top1"])


# ---- the command, on fakes

MADE: list[float] = []  # max_drop of the main arm's quantize, each time it is made
SLOW: dict[float, type[BaseException]] = {}  # max_drop -> what its quantize ends in, once


def quantize(ctx: Context) -> None:
    MADE.append(ctx.config.max_drop)
    if (trouble := SLOW.pop(ctx.config.max_drop, None)) is not None:
        raise trouble("not this one")
    _write(ctx)


def benchmark(ctx: Context) -> None:
    """What a larger drop costs in accuracy it gives in speed; 7 images wide."""
    rows = []
    for one in ctx.many:
        drop = float(one.artifact.manifest["config"].get("max_drop", 0.0))
        top1, speedup = 0.9 - drop, 1 + 50 * drop
        rows.append({
            "arm": one.arm, "family": one.family, "entry": one.entry, "final": one.final, "provider": "cpu", "batch": 1,
            "threads": 1, "top1": top1, "top1_low": top1 - 0.004, "top1_high": top1 + 0.004, "speedup": speedup,
            "speedup_low": speedup, "speedup_high": speedup,
        })  # fmt: skip
    (ctx.out / "payload.txt").write_text(json.dumps(rows))
    ctx.metrics.update(rows=rows, gates={"accuracy_drop": 0.001, "speedup": 2.5}, noise_floor={"ratio_high": 1.01})


SMALL = re.sub(r"(?m)^  (random|finetune):.*\n", "", PIPELINE)  # two arms are enough here
SWEPT: tuple[Stage, ...] = tuple(
    {"quantize": replace(QUANTIZE, run=quantize), "benchmark": replace(BENCHMARK, run=benchmark)}.get(s.name, s)
    for s in STAGES
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipeline.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    MADE.clear()
    SLOW.clear()
    return tmp_path


def sievit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = execute(SWEPT, (BadInput,), ["sweep", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


GRID = ("--grid", "quantize.max_drop=0.01,0.02,0.03")


def test_a_grid_runs_each_combination_once_and_shares_what_is_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = sievit(capsys, *GRID)
    assert code == 0
    assert [t["settings"] for t in answer["trials"]] == [{"quantize.max_drop": d} for d in (0.01, 0.02, 0.03)]
    assert [t["state"] for t in answer["trials"]] == ["done"] * 3
    assert [t["values"]["top1"]["value"] for t in answer["trials"]] == pytest.approx([0.89, 0.88, 0.87])
    assert [t["front"] for t in answer["trials"]] == [True] * 3
    artifacts = folder / "artifacts"
    assert len(list(artifacts.glob("train/*/manifest.json"))) == 2, "main's and dense's, as in one run"
    assert len({t["run"] for t in answer["trials"]}) == 3
    for trial in answer["trials"]:
        assert (artifacts / "runs" / trial["run"] / "report.html").exists()
    # The trial is the run that `sievit run` would make.
    assert execute(SWEPT, (BadInput,), ["run", "--set", "quantize.max_drop=0.02", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["run"] == answer["trials"][1]["run"]
    assert {stage["state"] for stage in again["stages"]} == {"cached"}


def test_a_trial_that_fails_is_kept_with_its_reason_and_does_not_end_the_sweep(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SLOW[0.02] = BadInput
    code, answer = sievit(capsys, *GRID)
    assert code == 0
    assert [t["state"] for t in answer["trials"]] == ["done", "failed", "done"]
    failed = answer["trials"][1]
    assert "not this one" in failed["error"] and not failed["front"] and failed["values"] == {}
    made = len(MADE)
    sievit(capsys, *GRID)
    assert len(MADE) == made, "what has ended is not repeated"
    SLOW.update({0.04: BadInput, 0.05: BadInput})
    code, answer = sievit(capsys, "--grid", "quantize.max_drop=0.04,0.05")
    assert code == 1 and "every trial failed" in answer["error"]["message"]


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "search":
        pytest.importorskip("optuna")
    asked = GRID if kind == "grid" else ("--search", "quantize.max_drop=0.001..0.1:log", "--trials", "4", "--seed", "3")
    _, whole = sievit(capsys, *asked, "--store", "whole")
    third = whole["trials"][2]["settings"]["quantize.max_drop"]
    SLOW[third] = KeyboardInterrupt
    code, stopped = sievit(capsys, *asked, "--store", "stopped")
    assert code == 130 and "stopped in main/quantize" in stopped["error"]["message"]
    assert "same sweep" in stopped["error"]["hint"]
    kept = sorted((folder / "stopped/runs").glob("sweep-*/trials/*.json"))
    assert [json.loads(path.read_text())["state"] for path in kept] == ["done", "done", "waiting"]
    assert (kept[0].parent.parent / "report.html").exists()
    made = MADE.count(whole["trials"][0]["settings"]["quantize.max_drop"])
    code, again = sievit(capsys, *asked, "--store", "stopped")
    assert code == 0
    assert MADE.count(whole["trials"][0]["settings"]["quantize.max_drop"]) == made

    def facts(answer: dict[str, Any]) -> list[Any]:
        return [(t["number"], t["settings"], t["values"], t["state"], t["front"]) for t in answer["trials"]]

    assert facts(again) == facts(whole) and again["sweep"] == whole["sweep"]


def test_a_search_with_another_seed_tries_others_and_more_trials_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    search = ("--search", "quantize.max_drop=0.001..0.1", "--search", "train.epochs=2..5", "--search", "ticket=null,{}")
    _, two = sievit(capsys, *search, "--trials", "2")
    _, four = sievit(capsys, *search, "--trials", "4")
    assert four["sweep"] == two["sweep"] and four["trials"][:2] == two["trials"] and len(four["trials"]) == 4
    assert all(isinstance(t["settings"]["train.epochs"], int) for t in four["trials"])
    assert all(t["settings"]["ticket"] in (None, {}) for t in four["trials"])
    _, other = sievit(capsys, *search, "--trials", "1", "--seed", "1")
    assert other["sweep"] != two["sweep"]
    assert other["trials"][0]["settings"] != two["trials"][0]["settings"]


def test_a_search_may_keep_its_trials_in_a_database_and_keeps_to_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    asked = ("--search", "quantize.max_drop=0.01..0.1", "--trials", "1")
    monkeypatch.setenv("SIEVIT_STORAGE", f"sqlite:///{folder}/secret.db")
    code, answer = sievit(capsys, *asked)
    assert code == 0 and (folder / "secret.db").exists()
    for path in (folder / "artifacts").rglob("*"):
        assert not path.is_file() or b"secret.db" not in path.read_bytes(), f"{path} tells the URL"
    monkeypatch.delenv("SIEVIT_STORAGE")
    code, answer = sievit(capsys, *asked)
    assert code == 2 and "another storage" in answer["error"]["message"]
    code, answer = sievit(capsys, *asked, "--seed", "9", "--storage", "nodatabase://user:hidden@host/x")
    assert code == 2 and "hidden" not in json.dumps(answer)


def test_without_optuna_a_search_says_what_to_install_and_a_grid_works(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, answer = sievit(capsys, "--search", "quantize.max_drop=0.01..0.1")
    assert code == 2 and "sievit[sweep]" in answer["error"]["hint"]
    assert sievit(capsys, "--grid", "quantize.max_drop=0.01")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "nothing is swept"),
        ([*GRID, "--search", "train.epochs=2..3"], 2, "exclude"),
        ([*GRID, "--trials", "3"], 2, "--search"),
        ([*GRID, "--objective", "fps"], 2, "fps"),
        (["--grid", "quantise.max_drop=0.01"], 3, "quantise"),
        (["--grid", "quantize.max_drop=0.01,2.0"], 3, "max_drop"),
        (["--search", "quantize.max_drop=0.5..2.0"], 3, "max_drop"),
        ([*GRID, "--set", "quantize.max_drop=0.2"], 2, "twice"),
        ([*GRID, "--set", "benchmark=null", "--set", "gates=null"], 3, "benchmark"),
        ([*GRID, "--set", "launch.processes=2"], 2, "one process"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    arguments: list[str], code: int, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered, answer = sievit(capsys, *arguments)
    assert answered == code and told in json.dumps(answer["error"])
    assert not MADE and not (folder / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "where", "under"),
    [
        (["--grid", "quantize.max_drop=0.01,2.0,0.02"], "--grid quantize.max_drop=0.01,2.0,0.02", "2.0"),
        (["--grid", "quantize.max_drop= 2.0 , 0.01"], "--grid quantize.max_drop= 2.0 , 0.01", "2.0"),
        (["--grid", "quantise.max_drop=0.01"], "--grid quantise.max_drop=0.01", "quantise"),
        (["--grid", "train.weights=null,{method: l3, strength: 1}"], None, "l3"),
        (["--grid", "benchmark.batch_sizes=[1, 8],[1, 0]"], None, "0]"),
        (["--search", "quantize.max_drop=0.5..2.0:log"], "--search quantize.max_drop=0.5..2.0:log", "2.0"),
        ([*GRID, "--grid", "name.first=a,b"], "--grid name.first=a,b", "first"),
        ([*GRID, "--set", "quantize.max_drop=0.2"], "--grid quantize.max_drop=0.01,0.02,0.03", "max_drop"),
    ],
)
def test_a_mistake_in_a_swept_value_is_shown_in_the_option_that_was_typed(
    arguments: list[str], where: str | None, under: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(SWEPT, (BadInput,), ["sweep", *arguments]) in (2, 3)
    told = capsys.readouterr().err
    if "--set" not in arguments:
        assert "--set" not in told
    lines = told.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(f"  --> {where or ' '.join(arguments)}")]
    carets = lines[at + 1]
    pointed = lines[at][carets.index("^") :]
    assert pointed.startswith(under), told


def test_a_trial_that_takes_its_process_with_it_is_given_up_after_three(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, answer = sievit(capsys, "--grid", "quantize.max_drop=0.01,0.02")
    (path,) = (folder / "artifacts/runs").glob("sweep-*/trials/0001.json")
    for attempts, state in ((2, "done"), (3, "failed")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running", "attempts": attempts}))
        _, answer = sievit(capsys, "--grid", "quantize.max_drop=0.01,0.02")
        assert answer["trials"][1]["state"] == state
    assert "3 times" in answer["trials"][1]["error"]


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_several_processes_share_a_sweep_and_make_no_trial_twice(kind: str, folder: Path) -> None:
    program = (
        "import sys; from test_sweep import SWEPT, BadInput; from sievit.pipeline.cli import execute; "
        "sys.exit(execute(SWEPT, (BadInput,), sys.argv[1:]))"
    )
    asked = ["--grid", "quantize.max_drop=0.01,0.02,0.03,0.04,0.05,0.06"]
    if kind == "search":
        pytest.importorskip("optuna")
        asked = ["--search", "quantize.max_drop=0.01..0.06", "--trials", "6"]
    command = [sys.executable, "-c", program, "sweep", *asked, "--json"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / '.typing'}{os.pathsep}{ROOT / 'tests'}"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command, cwd=folder, env=environment, **options) for _ in range(2)]
    ends = [(one.communicate(timeout=60), one.returncode) for one in pair]
    assert [code for _, code in ends] == [0, 0], ends
    trials = [json.loads(path.read_text()) for path in (folder / "artifacts/runs").glob("sweep-*/trials/*.json")]
    assert len(trials) == 6 and {t["state"] for t in trials} == {"done"} and {t["attempts"] for t in trials} == {1}


def test_a_sweep_that_was_killed_takes_up_the_trial_that_it_was_in(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    program = (
        "import sys; from test_sweep import SWEPT, BadInput; from sievit.pipeline.cli import execute; "
        "sys.exit(execute(SWEPT, (BadInput,), sys.argv[1:]))"
    )
    asked = ["--search", "train.epochs=20..40", "--trials", "3", "--set", "train.pause=0.02", "--set", "gates=null"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / '.typing'}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, "sweep", *asked, "--json"]
    one = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((folder / "artifacts").glob("train/.work-*/checkpoint.json")) or len(trials_of(folder)) < 2:
        assert one.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    one.kill()
    one.wait()
    before = trials_of(folder)
    assert [t["state"] for t in before] == ["done", "running"]
    code, answer = sievit(capsys, *asked)
    assert code == 0 and [t["state"] for t in answer["trials"]] == ["done"] * 3
    assert answer["trials"][0]["finished"] == before[0]["finished"], "what has ended is not repeated"
    assert answer["trials"][1]["settings"] == before[1]["settings"] and answer["trials"][1]["attempts"] == 2


def trials_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "artifacts/runs").glob("sweep-*/trials/0*.json"))]


# ---- the pages


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_pages_show_every_trial_escaped_and_link_their_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SLOW[0.02] = BadInput
    wild = "<script>alert(1)</script>|*"
    named = ("--set", f"model.name={json.dumps(wild)}", "--grid", f"data.source={json.dumps(wild)},builtin:digits")
    _, answer = sievit(capsys, "--grid", "quantize.max_drop=0.01,0.02", *named)
    assert {t["state"] for t in answer["trials"]} >= {"failed"}
    page = Path(answer["report"])
    html, markdown = page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<script>alert" not in re.sub(r"`[^`]*`", "", markdown)
    tags = Page(html).tags
    assert not [a for tag, a in tags if tag in ("script", "img", "link") and str(a.get("src", "")).startswith("http")]
    links = [str(a["href"]) for tag, a in tags if tag == "a" and str(a.get("href", "")).startswith("..")]
    assert links and all((page.parent / link).exists() for link in links)
    assert len([a for tag, a in tags if tag == "th" and a.get("scope") == "row"]) == len(answer["trials"])
    table_rows = [line for line in markdown.splitlines() if re.match(r"\| (\*\*)?\d", line)]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table_rows]
    assert len(table_rows) == len(answer["trials"]) and len(set(cells)) == 1


def test_the_picture_has_a_point_a_trial_and_none_outside_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--objective", "top1"]):
        _, answer = sievit(capsys, *GRID, *more)
        html = Path(answer["report"]).read_text(encoding="utf-8")
        tags = Page(html).tags
        circles = [a for tag, a in tags if tag == "circle"]
        assert len(circles) == 3
        box = re.search(r'class="plot" viewBox="0 0 (\d+) (\d+)"', html)
        assert box is not None
        wide, high = map(float, box.groups())
        assert all(11 < float(str(a["cx"])) < wide - 11 and 11 < float(str(a["cy"])) < high - 11 for a in circles)
        drawn = [float(str(a["cy"])) for a in circles]
        top1 = [float(re.search(r"Top-1 ([\d.]+)%", title)[1]) for title in re.findall(r"<title>(trial [^<]*)<", html)]
        assert sorted(drawn) == [y for _, y in sorted(zip(top1, drawn, strict=True), reverse=True)]
    assert [t["front"] for t in answer["trials"]] == [True, False, False]


def test_the_table_on_the_terminal_marks_the_front(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(SWEPT, (BadInput,), ["sweep", *GRID, "--objective", "top1", "--quiet"]) == 0
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if line.startswith("* ")]
    assert len(marked) == 2 and marked[0].split()[1] == "0" and "89.0%" in marked[0]
    assert "max_drop=0.03" in out and max(map(len, out.splitlines()[:8])) <= 80


# ---- what gc leaves of a sweep


def collected(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Names of the run folders that gc removes."""
    assert execute(SWEPT, (BadInput,), ["gc", "--yes", "--json", *arguments]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    return [Path(each["path"]).name for each in removed if each["kind"] == "run"]


def told_by(page: Path) -> dict[str, Any]:
    """The trials as the sweep's page tells them: run -> whether it is a link, whether it is said to be collected."""
    html = page.read_text(encoding="utf-8")
    cells = re.findall(r"<td>(<a [^>]*>)?<code>([0-9a-f]{12})</code>(?:</a>)?(<small>collected</small>)?", html)
    return {run: (bool(link), bool(gone)) for link, run, gone in cells}


def test_gc_keeps_what_the_newest_sweep_found_worth_having_and_its_page_says_what_is_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, answer = sievit(capsys, *GRID, "--objective", "top1")
    runs = [trial["run"] for trial in answer["trials"]]
    front = [trial["run"] for trial in answer["trials"] if trial["front"]]
    assert 0 < len(front) < 3
    page, artifacts = Path(answer["report"]), folder / "artifacts"
    assert told_by(page) == dict.fromkeys(runs, (True, False))
    assert execute(SWEPT, (BadInput,), ["run", "--set", "quantize.max_drop=0.5", "--quiet"]) == 0
    capsys.readouterr()
    lost = [run for run in runs if run not in front]
    assert set(collected(capsys)) == set(lost)
    assert told_by(page) == {run: (run in front, run in lost) for run in runs}
    assert page.with_suffix(".md").read_text(encoding="utf-8").count("(collected)") == len(lost)
    assert "removed by <code>sievit gc</code>" in page.read_text(encoding="utf-8")
    links = re.findall(r'href="(\.\.[^"]+)"', page.read_text(encoding="utf-8"))
    assert len(links) == len(front) and all((page.parent / link).exists() for link in links)
    assert len(list(artifacts.glob("quantize/*/manifest.json"))) == len(front) + 1
    made = len(MADE)
    assert front == runs[:1]
    assert execute(SWEPT, (BadInput,), ["run", "--set", "quantize.max_drop=0.01", "--quiet"]) == 0
    capsys.readouterr()
    assert len(MADE) == made, "what is worth having has kept all that it was made of"
    _, again = sievit(capsys, *GRID, "--objective", "top1")
    assert [trial["collected"] for trial in again["trials"]] == [run in lost for run in runs]


def test_gc_lets_go_of_an_older_sweep_when_there_is_a_newer_one_of_the_pipeline(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, older = sievit(capsys, *GRID[:1], "quantize.max_drop=0.01,0.02", "--objective", "top1")
    _, newer = sievit(capsys, *GRID[:1], "quantize.max_drop=0.03,0.04", "--objective", "top1")
    best = {name: {t["run"] for t in sweep["trials"] if t["front"]} for name, sweep in (("o", older), ("n", newer))}
    assert not set(collected(capsys, "--keep-last", "2")) & (best["o"] | best["n"])
    removed = set(collected(capsys))
    assert best["o"] <= removed and not removed & best["n"]
    assert set(told_by(Path(older["report"])).values()) == {(False, True)}
