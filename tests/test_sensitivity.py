"""Sensitivity: the table against networks that are masked by hand, what a stopped measurement is worth, and what prune
makes of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from test_latencies import ALL, MS, ROUNDING, neighbours, scores, total
from test_surgery import masked
from test_targets import context
from tiny_vision import image_folder, network, swin

from sievit.pipeline.cli import execute
from sievit.stages import __main__ as composition
from sievit.stages import sensitivity
from sievit.stages.importances import Judging
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Axis, Kept, KeptBlock, Pressure, Scores, at_dial, give_back
from sievit.stages.methods.cost import BlockWidths
from sievit.stages.methods.greedy_allocation import way
from sievit.stages.methods.sensitivity import Curve, LossWorth, Trial, alone, coarse_first, count_of, trials
from sievit.stages.sensitivity import Effort, SensitivityConfig
from sievit.stages.vision import block_shapes, dataset, evaluate, figures
from sievit.stages.vision.architecture import TokenDrop
from sievit.stages.vision.dataset import load_splits
from sievit.stages.vision.network import Network
from sievit.stages.vision.surgery import score
from sievit.stages.vision.weights import load_network

HALF = Effort(fractions=(0.5,), seconds=None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these networks."""
    monkeypatch.setattr(figures, "sensitivity", lambda *drawn: "<svg/>")


def measure(folder: Path, effort: Effort = HALF) -> Any:
    """The context of a measurement of the tiny network in `folder`, after it."""
    ctx = context(folder, SensitivityConfig(judging=Judging(importance="l1"), effort=effort))  # type: ignore[arg-type]
    sensitivity.run(ctx)
    return ctx


def table(ctx: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ctx.out / sensitivity.FILE).read_text())
    return found


# ---- the table


def highest(values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.tensor(sorted(sorted(range(len(values)), key=lambda at: -float(values[at]))[:count]))


def kept_by_hand(given: Scores, axis: str, place: int, count: int) -> Kept:
    """All of everything, but of one axis in one place only the `count` highest."""
    blocks: list[KeptBlock | None] = []
    for number, (heads, qk, v, mlp) in enumerate(zip(given.heads, given.qk, given.v, given.mlp, strict=True)):
        here = axis if number == place else ""
        which = highest(heads, count) if here == "heads" else torch.arange(len(heads))
        widths = {"qk": qk, "v": v}
        inside = {
            name: torch.stack([highest(row, count if here == name else len(row)) for row in part[which]])
            for name, part in widths.items()
        }
        units = highest(mlp, count if here == "mlp" else len(mlp))
        blocks.append(None if here == "depth" else KeptBlock(which, inside["qk"], inside["v"], units))
    embed = [highest(s, count if (axis, place) == ("embed", n) else len(s)) for n, s in enumerate(given.embed)]
    return Kept(tuple(blocks), tuple(embed))


def by_hand(net: Network, pixels: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and mean cross-entropy, an image at a time."""
    right, loss = 0, 0.0
    for image, label in zip(pixels, labels.tolist(), strict=True):
        x = (torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        with torch.inference_mode():
            answer = net(x[None])[0].double()
        right += int(answer.argmax()) == label
        loss += float(torch.logsumexp(answer, 0) - answer[label])
    return right / len(labels), loss / len(labels)


def test_every_row_is_what_the_masked_network_answers_on_the_calibration_split(tmp_path: Path) -> None:
    ctx = measure(tmp_path, Effort(fractions=(0.6, 0.3), seconds=None))
    found, net = table(ctx), load_network(tmp_path / "m")
    split, given = load_splits(ctx.data.model_dump(), tmp_path).calibration, score(net, "l1", 0)
    assert (found["whole"]["top1"], pytest.approx(found["whole"]["loss"], rel=1e-5)) == by_hand(
        net, split.pixels(), split.labels
    )
    assert {(row["axis"], row["place"]) for row in found["rows"]} == {
        *((axis, block) for axis in ("heads", "qk", "v", "mlp", "depth") for block in range(3)), ("embed", 0),
    }  # fmt: skip
    assert len(found["rows"]) == 2 * 13 + 3 and found["left"] == []
    for row in found["rows"]:
        of = {"heads": 3, "qk": 16, "v": 16, "mlp": 192, "embed": 48, "depth": 1}[row["axis"]]
        assert (row["of"], row["kept"]) == (of, round(row["fraction"] * of))
        oracle = masked(net, kept_by_hand(given, row["axis"], row["place"], row["kept"]))
        top1, loss = by_hand(oracle, split.pixels(), split.labels)
        assert row["loss"] == pytest.approx(loss, rel=1e-4), row
        assert row["top1"] == top1
    assert ctx.metrics["cuts"] == {"measured": 29, "of": 29}
    assert [figure.name for figure in ctx.figures] == ["sensitivity"]


@pytest.mark.usefixtures("no_pictures")
def test_the_test_split_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the test split was asked for {name}")

    real = dataset.load_splits
    monkeypatch.setattr(dataset, "load_splits", lambda *a: replace(real(*a), test=Forbidden()))
    assert table(measure(tmp_path))["rows"]


def test_streams_of_a_swin_are_cut_alone_and_the_last_block_of_a_stage_is_not_removed() -> None:
    net = swin(depths=[2, 1])
    given = score(net, "l1", 0)
    wanted = trials(given, (0.5,))
    assert [t.place for t in wanted if t.axis == "depth"] == [0, 1]
    assert [t.place for t in wanted if t.axis == "embed"] == [0, 1]
    kept = alone(given, Trial("embed", 1, 0.5))
    assert [len(stream) for stream in kept.embed] == [16, 16]
    assert all(count_of(kept, "mlp", block) == len(given.mlp[block]) for block in range(3))


def test_blocks_that_must_stay_and_what_cannot_be_cut_are_not_tried() -> None:
    wanted = trials(replace(scores(), fixed=frozenset({1})), (0.5,), frozenset({("qk", 0)}))
    assert [t.place for t in wanted if t.axis == "depth"] == [0, 2]
    assert [t.place for t in wanted if t.axis == "qk"] == [1, 2]


def test_the_picture_has_a_panel_an_axis_and_leaves_what_was_not_measured_empty() -> None:
    rows: list[dict[str, Any]] = [{"axis": "mlp", "place": n, "cuts": [(0.1 * n, 0.2), None]} for n in range(3)]
    rows.append({"axis": "depth", "place": 0, "cuts": [None, (0.3, 0.9)]})
    drawn = figures.sensitivity([0.5, 0.0], rows)
    for word in ("mlp", "whole block", "50%", "0%", "top-1 lost, points"):
        assert f">{word}<" in drawn
    assert drawn == figures.sensitivity([0.5, 0.0], rows)
    fewer = figures.sensitivity([0.5, 0.0], [{**row, "cuts": [None, row["cuts"][1]]} for row in rows])
    assert len(set(re.findall("fill: #......", drawn)) - set(re.findall("fill: #......", fewer))) == 3


# ---- a measurement that is stopped


@given(st.lists(st.sampled_from([n / 20 for n in range(1, 20)]), min_size=1, max_size=8, unique=True))
@settings(deadline=None)
def test_every_fraction_comes_once_the_deepest_first_and_each_closes_the_largest_gap(fractions: list[float]) -> None:
    ordered = coarse_first(fractions)
    assert sorted(ordered) == sorted(fractions) and ordered[0] == min(fractions)
    gaps = [min(abs(fraction - known) for known in (1.0, *ordered[:number])) for number, fraction in enumerate(ordered)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(gaps[1:]))


def test_everything_is_cut_deepest_before_anything_is_cut_to_a_fraction_between() -> None:
    wanted = trials(scores(), (0.75, 0.5, 0.25))
    assert len(wanted) == len(set(wanted)) == 3 * 13 + 3
    assert {t.fraction for t in wanted[:16]} == {0.25, 0.0}
    assert {(t.axis, t.place) for t in wanted[:16]} == {(t.axis, t.place) for t in wanted}


class Clock:
    """A second passes at every second look at it: each cut takes one."""

    def __init__(self) -> None:
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.looks // 2


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_ends_after_the_cut_that_uses_it_up_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "time", Clock())
    ctx = measure(tmp_path, Effort(fractions=(0.5,), seconds=4.0))
    found = table(ctx)
    assert [(row["axis"], row["place"]) for row in found["rows"]] == [
        ("depth", 0), ("depth", 1), ("depth", 2), ("mlp", 0),
    ]  # fmt: skip
    assert len(found["left"]) == 16 - 4
    (warning,) = ctx.progress.warnings
    assert warning == (
        "12 of 16 cuts were not reached in 4 s: mlp at 50% of 1, 2; heads at 50% of 0, 1, 2; v at 50% of 0, 1, 2; "
        "qk at 50% of 0, 1, 2; embed at 50% of 0"
    )
    assert ctx.ledger["seconds"] == 4.0


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_measurement_goes_on_and_looks_at_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looked = evaluate.top1_and_loss, 0

    def until(last: int | None) -> Callable[..., Any]:
        def look(*given: Any) -> Any:
            nonlocal looked
            if looked == last:
                raise KeyboardInterrupt
            looked += 1
            return real(*given)

        return look

    for stop in (1, 7):
        monkeypatch.setattr(evaluate, "top1_and_loss", until(stop))
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path / "killed")
    monkeypatch.setattr(evaluate, "top1_and_loss", until(None))
    ctx = measure(tmp_path / "killed")
    assert looked == 1 + 16
    assert table(ctx) == table(measure(tmp_path / "whole"))


@pytest.mark.usefixtures("no_pictures")
def test_a_fraction_that_rounds_to_another_ones_cut_takes_no_look_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three heads, 0.75 and 0.6 are two, 0.9 is all."""
    real, widths = evaluate.top1_and_loss, []

    def look(cut: Network, *given: Any) -> Any:
        widths.append([block.heads for block in cut.architecture.blocks])
        return real(cut, *given)

    monkeypatch.setattr(evaluate, "top1_and_loss", look)
    rows = [row for row in table(measure(tmp_path, Effort(fractions=(0.9, 0.75, 0.6), seconds=None)))["rows"]
            if (row["axis"], row["place"]) == ("heads", 1)]  # fmt: skip
    assert {row["fraction"]: row["kept"] for row in rows} == {0.6: 2, 0.75: 2, 0.9: 3}
    assert widths.count([3, 2, 3]) == 1


# ---- what is believed between the cuts


@given(st.lists(st.floats(0, 5), min_size=2, max_size=8))
@settings(deadline=None)
def test_a_curve_is_the_closest_one_that_never_falls_when_more_goes(losses: list[float]) -> None:
    """Against the formula of isotonic regression as a maximum of minima of means."""
    measured = {10 * (number + 1): loss for number, loss in enumerate(losses)}
    down = losses[::-1]  # rising in what goes
    fitted = [
        max(min(np.mean(down[i : j + 1]) for j in range(k, len(down))) for i in range(k + 1)) for k in range(len(down))
    ][::-1]
    curve = Curve(measured)
    for count, value in zip(measured, fitted, strict=True):
        assert curve.rise(count) == pytest.approx(value - fitted[-1], abs=1e-9)
    rises = [curve.rise(count) for count in range(10, 10 * len(losses) + 1)]
    assert all(fewer >= more - 1e-12 for fewer, more in pairwise(rises))
    assert rises[5] == pytest.approx((rises[0] + rises[10]) / 2)
    assert curve.rise(9) == inf


def test_what_cuts_lose_is_added_up_and_a_block_is_worth_what_is_left_of_it() -> None:
    worth = LossWorth({("mlp", 0): Curve({8: 1.0, 16: 0.5, 32: 0.2}), ("heads", 0): Curve({1: 0.6, 2: 0.2})}, {0: 1.0})
    whole, narrow = BlockWidths(2, 8, 8, 32), BlockWidths(2, 8, 8, 16)
    assert worth.lost_in_block(0, whole, narrow) == pytest.approx(0.3)
    assert worth.lost_in_block(0, narrow, replace(narrow, mlp=8, heads=1)) == pytest.approx(0.5 + 0.4)
    assert worth.lost_in_block(0, whole, None) == 1.0
    assert worth.lost_in_block(0, narrow, None) == pytest.approx(0.7)
    assert worth.lost_in_block(0, BlockWidths(1, 8, 8, 8), None) == 0.0, "0.8 and 0.4 are lost, more than all"
    for unknown in (replace(whole, mlp=4), replace(whole, qk=4)):
        assert worth.lost_in_block(0, whole, unknown) == inf
    assert worth.lost_in_block(1, whole, None) == worth.lost_in_stream(0, 48, 24) == inf


@pytest.mark.parametrize("family", ["deit", "distilled", "lv-vit", "reduced", "swin", "swin v2"])
def test_macs_of_blocks_and_of_all_else_are_those_of_the_network(family: str) -> None:
    before: Any = swin(family).architecture if "swin" in family else None
    if before is None:
        before = network("deit" if family == "reduced" else family).architecture
    if family == "reduced":
        before = before.with_tokens((TokenDrop(1, 5, fuse=True),))
    cost = block_shapes.macs(before)
    streams = [width // 2 for width in before.streams]
    narrow = before.cut([replace(b, heads=1, qk=8, v=4, mlp=24) for b in before.blocks], streams)
    for made in (before, narrow):
        own = [BlockWidths(b.heads, b.qk, b.v, b.mlp) for b in made.blocks]
        blocks = [
            cost.block(n, w, made.streams[stage]) for n, (w, stage) in enumerate(zip(own, made.stage_of, strict=True))
        ]
        assert sum(blocks) + cost.outside(made.streams) == made.macs()


# ---- how much to cut where


def test_of_cuts_that_lose_nothing_the_smallest_comes_first() -> None:
    free = {(axis, block): Curve({1: 1.0, 64: 1.0}) for axis in ("heads", "qk", "v", "mlp") for block in range(3)}
    worth = LossWorth({**free, ("embed", 0): Curve({4: 1.0, 24: 1.0})}, dict.fromkeys(range(3), 0.0))  # type: ignore[dict-item]
    stops = way(scores(), worth, MS, ALL, **ROUNDING)
    for before, after in pairwise(stops):
        saved = [total(before) - total(stop) for stop, _ in neighbours(before)]
        assert total(before) - total(after) == pytest.approx(min(one for one in saved if one > 0))


def test_no_axis_goes_further_than_it_was_measured() -> None:
    measured = {("mlp", 0): Curve({16: 1.0, 32: 0.0}), ("embed", 0): Curve({12: 1.0, 24: 0.0})}
    last = way(scores(), LossWorth(measured, {2: 0.5}), MS, ALL, **ROUNDING)[-1]  # type: ignore[arg-type]
    whole = BlockWidths(3, 8, 8, 32)
    assert (last.blocks, last.streams) == ((replace(whole, mlp=16), whole, None), (12,))


def test_what_rounding_left_over_goes_where_it_wins_most() -> None:
    given = scores()
    narrow = at_dial(given, 0.5, Pressure(mlp=Axis(1.0)), round_to=4, head_round_to=2)

    def units(kept: Kept) -> list[int]:
        return [count_of(kept, "mlp", block) for block in range(3)]

    for most in range(3):
        wider = give_back(
            given, narrow, lambda kept: sum(units(kept)), sum(units(narrow)) + 5, Axis(1.0), 4,
            lambda block, now, then, most=most: (block == most) * (then - now),
        )  # fmt: skip
        assert [w - n for w, n in zip(units(wider), units(narrow), strict=True)] == [4 * (b == most) for b in range(3)]


# ---- what prune makes of it, and the command

PIPELINE = """\
name: cut
seed: 1
data:  {source: images, image_size: 32, test_fraction: 0.3, calibration: 0.4}
model: {name: deit_tiny_patch16_224, weights: given.safetensors,
        args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  prune: {target: {macs: 0.9}, importance: l1, allocation: sensitivity,
          axes: {heads: 0, qk: 0, v: 0, embed: 0, depth: 0}, sensitivity: {fractions: [0.5, 0.25], seconds: null}}
"""


class Project:
    """A folder in which `sievit` is called: exit code, stdout and stderr."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd
        image_folder(folder / "images", per_class=12)
        net = network(classes=2)
        with torch.no_grad():
            for parameter in net.blocks[1].mlp.fc2.parameters():
                parameter.zero_()
        save_file(net.body.state_dict(), folder / "given.safetensors")
        self.write(PIPELINE)

    def write(self, text: str) -> None:
        (self.folder / "pipeline.yaml").write_text(text)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.capfd.readouterr()
        code = execute(composition.STAGES, (InvalidInput,), arguments, commands=composition.COMMANDS)
        return code, *self.capfd.readouterr()

    def made(self, stage: str) -> list[dict[str, Any]]:
        paths = sorted(self.folder.glob(f"artifacts/{stage}/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def sievit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("SIEVIT_STORE", raising=False)
    return Project(tmp_path, capfd)


def test_an_mlp_that_says_nothing_goes_first_and_the_measurement_is_shared_with_the_command(sievit: Project) -> None:
    code, out, err = sievit("sensitivity", "--quiet")
    assert (code, err) == (0, "")
    (made,) = sievit.made("sensitivity")
    root = next((sievit.folder / "artifacts" / "sensitivity").glob("[0-9a-f]*")).relative_to(sievit.folder)
    rows = {
        (r["axis"], r["place"], r["fraction"]): r for r in json.loads((root / "sensitivity.json").read_text())["rows"]
    }
    whole = made["metrics"]["whole"]
    rise = {place: rows["mlp", place, 0.25]["loss"] - whole["loss"] for place in range(3)}
    assert rise[1] == pytest.approx(0, abs=1e-6) and rise[0] > 1e-3 and rise[2] > 1e-3
    lines = out.splitlines()
    assert lines[0].startswith("made sensitivity@1  (main/prune:sensitivity, ")
    assert lines[1:4] == [f"in {root}", "", "Sensitivity: what is kept of one axis, all else whole"]
    assert lines[4].split() == ["Axis", "50%", "25%", "0%"]
    drop = 100 * (whole["top1"] - rows["mlp", 0, 0.25]["top1"])
    assert next(line for line in lines if line.startswith("mlp 0")).split()[-3:-1] == [
        f"{drop:.1f}", f"{rise[0]:+.3f}",
    ]  # fmt: skip
    assert f"on {made['metrics']['images']} calibration images by importance l1" in " ".join(out.split())
    assert lines[-2:] == [f"plot:  {root}/figures/sensitivity.svg", f"table: {root}/sensitivity.json"]
    assert (root / "figures" / "sensitivity.svg").is_file()
    assert max(map(len, lines)) <= 80
    assert sievit("prune", "--quiet")[0] == 0
    (pruned,) = sievit.made("prune")
    assert pruned["inputs"]["sensitivity"]["ref"] == "sensitivity@1"
    after = [block["mlp"] for block in pruned["metrics"]["widths"]["after"]]
    assert after[0] == after[2] == 192 and 48 <= after[1] < 96
    again = json.loads(sievit("sensitivity", "--json")[1])
    assert (again["state"], again["ref"]) == ("cached", "sensitivity@1")
    assert {str(sievit.folder / path) for path in again["files"].values()} >= {
        str(sievit.folder / root / "sensitivity.json")
    }


@pytest.mark.usefixtures("no_pictures")
def test_options_say_otherwise_than_the_file_and_without_prune_the_last_model_is_read(sievit: Project) -> None:
    line = ["sensitivity", "--json", "--seconds", "inf", "--importance", "random", "--fraction", "0.3"]
    first = json.loads(sievit(*line)[1])
    (made,) = sievit.made("sensitivity")
    assert made["config"]["effort"]["fractions"] == [0.3] and made["config"]["effort"]["seconds"] is None
    assert made["config"]["judging"]["importance"] == "random"
    assert made["inputs"] == {}, "the network is that of the model block"
    train = "  train: {epochs: 1, batch_size: 8}\n"
    sievit.write(PIPELINE.replace("  prune:", f"{train}  prune:"))
    assert sievit("sensitivity")[0] == 3, "there is no model yet"
    assert sievit("train", "--quiet")[0] == 0
    second = json.loads(sievit(*line)[1])
    assert second["ref"] == "sensitivity@2" != first["ref"]
    assert sievit.made("sensitivity")[1]["inputs"]["model"]["ref"] == "train@1"
    sievit.write(PIPELINE.split("  prune:")[0] + train)
    third = json.loads(sievit(*line)[1])
    assert (third["state"], third["ref"]) == ("cached", "sensitivity@2")
    runs = [path.read_text() for path in sievit.folder.glob("artifacts/runs/*/run.json")]
    assert runs and not any("sensitivity@" in run for run in runs), "a run is of what the file names"


@pytest.mark.usefixtures("no_pictures")
def test_a_budget_that_is_too_short_for_prune_names_the_remedy_and_cuts_nothing(
    sievit: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "time", Clock())
    sievit.write(PIPELINE.replace("seconds: null", "seconds: 4"))
    code, out, err = sievit("prune", "--quiet")
    assert (code, out) == (3, "")
    text = " ".join(err.split())
    assert "4 s did not reach mlp at 25% of 1, 2; mlp at 50% of 0, 1, 2" in text
    assert "help: set prune.sensitivity.seconds to 36 or more" in text, "29 cuts, and a quarter more"
    assert sievit.made("prune") == []
    assert "depth" not in text, "what is off is not asked for"


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("allocation: sensitivity", "allocation: uniform", "prune.sensitivity has no effect: allocation is uniform"),
        ("[0.5, 0.25]", "[0.5, 0.5]", "prune.sensitivity.fractions: names one twice"),
        ("[0.5, 0.25]", "[1.0]", "must be a number from 0.05 to 0.95"),
        ("[0.5, 0.25]", "[]", "fractions must be a list"),
        ("seconds: null", "seconds: 0", "seconds must be"),
        ("macs: 0.9}", "macs: 0.9, on: {batch: 8}}", "macs is counted, and allocation sensitivity weighs no time"),
        (", weights: given.safetensors", "", "the one of the model block is untrained"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    sievit: Project, written: str, instead: str, said: str
) -> None:
    assert written in PIPELINE
    sievit.write(PIPELINE.replace(written, instead))
    code, out, err = sievit("prune", "--quiet")
    assert (code, out) == (3, "")
    assert said in err and "pipeline.yaml:" in err
    assert not list(sievit.folder.glob("artifacts/sensitivity/*"))


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["--importance", "tailor"], "there is no importance 'tailor'"),
        (2, ["--fraction", "1.5"], "'--fraction': Input should be less than or equal to 0.95"),
        (2, ["--seconds", "0"], "'--seconds': Input should be greater than"),
        (2, ["--arm", "dense"], "the pipeline has no arm 'dense'"),
        (2, ["--input", "onnx=export@1"], "sensitivity has no input 'onnx'"),
        (3, ["--importance", "trained"], "no stage before it trains"),
        (3, ["--input", "model=train@7"], "there is no artifact of stage 'train'"),
        (3, ["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_clear_message(code: int, arguments: list[str], said: str, sievit: Project) -> None:
    found, out, err = sievit("sensitivity", *arguments)
    assert (found, out) == (code, "")
    assert said in err and "help: " in err and "Traceback" not in err
    assert json.loads(sievit("sensitivity", *arguments, "--json")[1])["error"]["code"] == code


def test_a_fraction_stands_there_once() -> None:
    with pytest.raises(ValidationError, match="names one twice"):
        Effort(fractions=(0.5, 0.5))
