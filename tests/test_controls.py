"""What is a random control is told by settings; whether it was beaten is said in the first paragraph, and no more."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from report_run import ARMS, Bench, between, measurement, recipe, row, whole_run
from scipy import stats

from sievit.pipeline.plan import make_plan
from sievit.pipeline.report.controls import Control, contest, controls
from sievit.pipeline.report.facts import collect
from sievit.pipeline.report.page import render_html, render_markdown
from sievit.pipeline.report.sections import sections
from sievit.pipeline.report.verdict import Verdict, verdict
from sievit.pipeline.resolve import Facts
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.deploy.between_arms import between_arms
from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.variants import Variant

ROOT = Path(__file__).resolve().parents[1]
ACROSS = {("main", "benchmark")}
CHOSEN = {"examples": {"method": "el2n", "keep": 0.8}, "patches": {"method": "attention", "keep": 0.7}}
LOTS = {"examples": {"method": "random", "keep": 0.8}, "patches": {"method": "random_fixed", "keep": 0.7}}


def found(arms: dict[str, Any]) -> list[tuple[str, str, str]]:
    pairs = controls({"spec": {"nodes": recipe(arms)}}, ACROSS)
    return [(pair.arm, pair.control, pair.chosen) for pair in pairs]


def test_a_control_is_known_by_its_settings_whatever_it_is_called() -> None:
    assert found({"main": CHOSEN, "grapefruit": LOTS}) == [("main", "grapefruit", "examples and patches")]
    assert found({"main": LOTS, "chosen": CHOSEN}) == [("chosen", "main", "examples and patches")]
    cut, by_lot = ({**CHOSEN, "prune": {"importance": name, "target": {"macs": 0.5}}} for name in ("taylor", "random"))
    assert found({"main": cut, "lots": by_lot}) == [("main", "lots", "importance")]
    masked = {**CHOSEN, "prune": {"masks": {"method": "magnitude", "keep": 0.3}}}
    lots = {**CHOSEN, "prune": {"masks": {"method": "random", "keep": 0.3}}}
    assert found({"main": masked, "b": lots}) == [("main", "b", "masks")]


@pytest.mark.parametrize(
    "other",
    [
        {**LOTS, "examples": {"method": "random", "keep": 0.5}},  # fewer images
        {**CHOSEN, "examples": {"method": "grand", "keep": 0.8}},  # another method, no lot
        {**LOTS, "prune": {"importance": "taylor"}},  # a stage more
        {**LOTS, "proxy": {"epochs": 3}},  # a setting more
        {**CHOSEN, "source": "random"},  # a stage of that name, and no method
        CHOSEN,
    ],
)
def test_an_arm_that_differs_in_anything_else_is_no_control_even_if_it_is_called_random(other: dict[str, Any]) -> None:
    assert found({"main": CHOSEN, "random": other}) == []


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("data", ["other", "1e"]), ("model", {"name": "swin"})])
def test_an_arm_on_other_data_another_seed_or_model_is_no_control(name: str, value: Any) -> None:
    nodes = recipe({"main": CHOSEN, "random": LOTS})
    assert controls({"spec": {"nodes": nodes}}, ACROSS)
    for node in nodes:
        if node["arm"] == "random":
            node[name] = value
    assert controls({"spec": {"nodes": nodes}}, ACROSS) == ()


def test_an_arm_that_reads_another_network_is_no_control() -> None:
    nodes = recipe({"main": CHOSEN, "random": LOTS})
    shared = copy.deepcopy(nodes)
    for node in shared:
        if node["entry"] == "train":
            node["inputs"].append(["teacher", ["dense", "train"], None])
    assert len(controls({"spec": {"nodes": shared}}, ACROSS)) == 1, "both are taught by dense"
    next(node for node in shared if node["arm"] == "random" and node["entry"] == "train")["inputs"].pop()
    assert controls({"spec": {"nodes": shared}}, ACROSS) == ()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipeline.yaml", [("main", "random", "examples and patches")]),
        ("recipes/cifar10-cpu.yaml", [("main", "random", "examples and patches")]),
        ("recipes/lotus.yaml", [("main", "random", "patches")]),
        ("recipes/tri_level_examples.yaml", []),  # its random arm trains on other examples in another number of ways
        ("recipes/policies.yaml", []),  # its arms have epochs of their own, so that budgets are equal
    ],
)
def test_the_controls_of_our_own_pipelines_are_found_and_arms_that_differ_in_more_are_not(
    file: str, expected: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Facts, "data", lambda facts, node: "0f")  # no images are looked for here
    plan = make_plan(load_pipeline(ROOT / file, STAGES), STAGES)
    across = {(node.arm, node.entry.name) for node in plan.nodes if node.stage.across_arms}
    record = json.loads(json.dumps({"spec": Facts(plan, Store(tmp_path)).recipe()}))
    pairs = [(pair.arm, pair.control, pair.chosen) for pair in controls(record, across)]
    assert [pair for pair in pairs if pair[0] == "main"] == expected


def test_further_seeds_are_no_arms_of_their_own() -> None:
    nodes = recipe({"main": CHOSEN, "random": LOTS}, seeds=(0, 1, 2))
    assert controls({"spec": {"nodes": nodes}}, ACROSS) == (
        Control("main", "random", ("ticket.examples.method", "ticket.patches.method")),
    )


# ---- the first paragraph -------------------------------------------------------------------------------------------


def told(root: Path, lines: list[dict[str, Any]], arms: dict[str, Any] | None = None, **metrics: Any) -> Verdict:
    bench = Bench(root)
    config = {"providers": ["cpu"], "batch_sizes": [1, 8], "threads": [1]}
    bench.add("main", "benchmark", {**measurement(), "gates": {}, "between_arms": lines, **metrics}, config=config)
    record = bench.record(spec={"nodes": recipe(arms or ARMS)})
    return verdict(collect(record, bench.shelf))


def test_a_difference_that_the_test_does_not_decide_is_claimed_by_nobody(tmp_path: Path) -> None:
    found = told(tmp_path, [between("main", "random", 0.976, 0.972, 0.68, "not decided")])
    assert found.text.endswith(
        "Whether it beats its random control, arm random (the same, but examples by lot), is not decided: its top-1 is "
        "0.4 points more (95% interval −0.8 to 1.6 points; McNemar's p = 0.68 on the same 450 test images; one seed: "
        "said of these two networks, not of the method)."
    )
    assert " beats its random control" not in found.text.replace("Whether it beats", "")


def test_a_method_that_loses_to_chance_is_told_so_and_the_tone_is_not_good(tmp_path: Path) -> None:
    found = told(tmp_path, [between("main", "random", 0.93, 0.96, 0.004, "worse")])
    assert "It is worse than its random control, arm random" in found.text
    assert "by 3.0 points of top-1 (95% interval −4.2 to −1.8 points;" in found.text
    assert found.tone == "plain"
    assert told(tmp_path / "b", [between("main", "random", 0.96, 0.93, 0.004, "better")]).tone == "good"


def test_over_seeds_the_test_is_over_seeds_and_the_whole_paragraph_speaks_of_means(tmp_path: Path) -> None:
    seeds = (0, 1, 2)
    line = {"provider": "cpu", "batch": 1, "threads": 1, "io": "host", "seeds": list(seeds), "variant": ["int8"] * 3}
    over = [
        {**line, "arm": arm, "top1": [top1] * 3, "top1_mean": top1, "top1_low": top1 - 0.02, "top1_high": top1 + 0.01,
         "speedup": [2.31, 2.4, 2.2], "speedup_mean": 2.3, "bytes": [1, 1, 1]}
        for arm, top1 in (("main", 0.97), ("dense", 0.976))
    ]  # fmt: skip
    more = [row(f"main@seed{s}", "quantize", "int8", 0.9, 0.96, 2.4, final=True, family="main") for s in (1, 2)]
    lines = [
        between("main", "dense", 0.97, 0.976, 0.31, "not decided", seeds),
        between("main", "random", 0.97, 0.942, 0.03, "better", seeds),
    ]
    metrics = {"over_seeds": over, "rows": [*measurement()["rows"], *more]}
    found = told(tmp_path, lines, **metrics)
    assert found.text == (
        "In the mean over 3 seeds the compressed file is 2.30× as fast (each seed: 2.31×, 2.40×, 2.20×) as dense at "
        "batch 1 on 1 thread (cpu), with top-1 97.0% against 97.6% (95% intervals over seeds 95.0–98.0% and "
        "95.6–98.6%). It beats its random control, arm random (the same, but examples by lot), by 2.8 points of top-1 "
        "(95% interval 1.6 to 4.0 points; paired t test over 3 seeds, p = 0.030, the same 450 test images)."
    )
    assert "The difference in accuracy to dense is not decided (paired t test over 3 seeds, p = 0.31)." in found.remarks
    assert any(remark.startswith("The first seed alone: 2.31×, top-1 97.6% against 97.9%.") for remark in found.remarks)
    slow = row("main@seed1", "quantize", "int8", 2.0, 0.96, 1.0, final=True, family="main")
    one_slow = told(tmp_path / "slow", lines, over_seeds=over, rows=[*measurement()["rows"], slow])
    assert "is not measurably faster than dense" in one_slow.text, "one seed is not"


def test_without_a_test_on_the_same_images_nothing_is_decided(tmp_path: Path) -> None:
    said = "is not decided: no test of the two on the same images was recorded."
    assert told(tmp_path, []).text.endswith(said)
    bench = Bench(tmp_path / "b")
    bench.add("main", "train", {"top1": {"all": 0.9}})
    nodes = [node for node in recipe(ARMS) if node["entry"] != "benchmark"]
    assert verdict(collect(bench.record(spec={"nodes": nodes}), bench.shelf)).text.endswith(said)


def test_where_a_matrix_tested_the_two_its_claim_is_told_and_whole_images_before_tickets() -> None:
    pair = Control("main", "random", ("ticket.patches.method",))
    ends = {"value": 0.021, "low": 0.004, "high": 0.038, "p": 0.034, "expect": "greater", "verdict": "holds"}
    whole = {"left": "main/full", "right": "random/full", **ends}
    other = {"left": "main/ticket", "right": "random/ticket", **ends, "value": -0.03, "low": -0.05, "high": -0.01}
    mixed = {"left": "main/ticket", "right": "random/random", **ends, "value": 0.2}

    def said(*claims: dict[str, Any]) -> str:
        matrix = {"claims": list(claims), "seeds": [0, 1, 2], "test_images": 2000}
        return contest(pair, [{}, {"matrix": matrix}]).sentence

    start = "It beats its random control, arm random (the same, but patches by lot), by 2.1 points of top-1 ("
    test = "paired t test over 3 seeds, p = 0.034, the same 2,000 test images"
    assert said(mixed, other, whole) == f"{start}95% interval 0.4 to 3.8 points; {test})."
    tickets = said(mixed, other)
    assert "It is worse than its random control" in tickets and tickets.endswith("; both on ticket patches).")
    assert "no test of the two" in said(mixed), "each was tested on other patches"
    turned = {**whole, "left": "random/full", "right": "main/full"}
    assert "It is worse than its random control" in said(turned)


def test_an_arm_beside_main_and_its_control_stand_below_the_first_paragraph(tmp_path: Path) -> None:
    half = {**CHOSEN, "examples": {"method": "el2n", "keep": 0.5}}
    lots = {**half, "examples": {"method": "random", "keep": 0.5}}
    found = told(
        tmp_path, [between("lots", "half", 0.95, 0.97, 0.02, "worse")], {"main": CHOSEN, "half": half, "lots": lots}
    )
    assert "random control" not in found.text
    assert found.remarks[0].startswith(
        "Arm half beats its random control, arm lots (the same, but examples by lot), by 2.0"
    )
    assert "(95% interval 0.8 to 3.2 points;" in found.remarks[0]


def test_the_same_accuracy_is_no_difference(tmp_path: Path) -> None:
    pair = Control("main", "random", ("train.masks.method",))
    line = between("main", "random", 0.95, 0.95, 1.0, "not decided")
    assert (
        "its top-1 is as much (95% interval −1.2 to 1.2 points;" in contest(pair, [{"between_arms": [line]}]).sentence
    )


# ---- what the benchmark records of two arms ------------------------------------------------------------------------


def variants(root: Path, arms: dict[str, tuple[int, ...]]) -> tuple[list[Variant], dict[str, np.ndarray]]:
    """Final files of their own, and what each answers 200 images of class 1."""
    rng, answered, made = np.random.default_rng(3), {}, []
    for number, (arm, seed) in enumerate((arm, seed) for arm, seeds in arms.items() for seed in seeds):
        (root / str(number)).mkdir()
        path = tiny_onnx.linear(root / str(number) / "model.onnx", seed=number)
        tiny_onnx.sidecar(path)
        bundle = open_bundle(path)
        made.append(Variant(f"{arm}@seed{seed}", "export", True, bundle, arm, seed))
        answered[bundle.sha256] = (rng.random(200) < 0.6 + 0.1 * (number % 3)).astype(np.int64)
    assert len(answered) == len(made)
    return made, answered


def test_two_arms_under_one_seed_are_told_apart_by_mcnemars_exact_test(tmp_path: Path) -> None:
    made, answered = variants(tmp_path, {"main": (0,), "dense": (0,), "random": (0,)})
    labels = np.ones(200, np.int64)
    lines = between_arms(made, labels, answered)
    assert [(line["arm"], line["against"]) for line in lines] == [
        ("main", "dense"),
        ("main", "random"),
        ("dense", "random"),
    ]
    for line, (one, other) in zip(lines, [(0, 1), (0, 2), (1, 2)], strict=True):
        left, right = (answered[made[place].bundle.sha256] == 1 for place in (one, other))
        only_left = sum(bool(a and not b) for a, b in zip(left, right, strict=True))
        only_right = sum(bool(b and not a) for a, b in zip(left, right, strict=True))
        p = min(1.0, 2 * stats.binom.cdf(min(only_left, only_right), only_left + only_right, 0.5))
        assert line["p"] == pytest.approx(p)
        assert line["difference"] == pytest.approx((only_left - only_right) / 200)
        assert line["low"] < line["difference"] < line["high"]
        expected = "not decided" if p >= 0.05 else "better" if only_left > only_right else "worse"
        assert line["verdict"] == expected
    assert {line["verdict"] for line in lines} == {"not decided", "worse"}


def test_two_arms_under_several_seeds_are_told_apart_over_seeds(tmp_path: Path) -> None:
    made, answered = variants(tmp_path, {"main": (0, 1, 2), "random": (2, 0, 1), "alone": (9,)})
    (line,) = between_arms(made, np.ones(200, np.int64), answered)
    top1 = {(v.family, v.seed): float(answered[v.bundle.sha256].mean()) for v in made}
    pairs = [(top1["main", seed], top1["random", seed]) for seed in (0, 1, 2)]
    expected = stats.ttest_rel(*zip(*pairs, strict=True))
    assert line["seeds"] == [0, 1, 2]
    assert line["p"] == pytest.approx(expected.pvalue)
    assert line["by"] == "paired t over 3 seeds"


def test_files_that_are_not_shipped_take_no_part(tmp_path: Path) -> None:
    made, answered = variants(tmp_path, {"main": (0,), "dense": (0,)})
    assert between_arms([made[0]], np.ones(200, np.int64), answered) == []


# ---- what a reader is told of arms ---------------------------------------------------------------------------------


def test_the_page_says_what_each_arm_is_for_and_what_its_words_mean(tmp_path: Path) -> None:
    facts = collect(*whole_run(tmp_path))
    arms = (
        "main (the pipeline as it is written), dense (the baseline), random (random control of main, examples by lot)"
    )
    assert f"Arms: {arms}, float" in render_markdown(facts)
    page = render_html(facts)
    assert "<b>random</b> (random control of main, examples by lot)" in page
    for word in ("arm", "random control", "ticket", "top-1", "p50, p90, p99", "noise floor", "MACs"):
        assert f"<dt>{word}</dt>" in page


def test_every_two_arms_stand_with_difference_interval_and_p() -> None:
    found = {section.name: section for section in sections(measurement())}
    assert found["arms"].rows[1] == (
        "main", "random", "97.6%, 96.1%", "+1.5 points", "0.3 to 2.7 points", "0.021", "better"
    )  # fmt: skip
    assert "on the same 450 test images; p by McNemar's exact test; with one seed" in found["arms"].about
    assert [row[1] for row in found["arms"].rows] == ["dense", "random", "random"]


def test_of_many_measurements_the_first_seeds_final_files_stand_first_and_no_other_is_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = [
        row(f"{arm}{at}", "export", "fp32" if final else "fp16", 1.0, 0.9, 1.1, final=final, family=arm)
        for at in ("", "@seed1", "@seed2")
        for arm in ("main", "dense", "random")
        for final in (True, False)
    ]
    bench.add("main", "benchmark", {**measurement(), "rows": rows})
    page = render_html(collect(bench.record(), bench.shelf))
    first, _, others = page.partition('id="deployment-caption"')[2].partition('id="others-caption"')
    assert first.count('<th scope="row">') == 3 and "@seed" not in first.partition("<details>")[0]
    assert others.partition("</table>")[0].count('<th scope="row">') == len(rows) - 3
    assert "The other 15 of 18 measurements" in page
