"""What the report promises: it says what the manifests say, claims no more, and shows all text as text."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_run import (
    RUN,
    SPEC_TEXT,
    Bench,
    Shelf,
    measurement,
    prune_metrics,
    quantize_metrics,
    row,
    svg,
    train_metrics,
    whole_run,
)

from sievit.pipeline.errors import InputError, IntegrityError
from sievit.pipeline.report import numbers
from sievit.pipeline.report import page as report
from sievit.pipeline.report.facts import collect
from sievit.pipeline.report.stages import deeds
from sievit.pipeline.report.steps import Step
from sievit.pipeline.report.verdict import verdict

VOID = {"meta", "link", "img", "br", "rect", "line", "circle", "input", "hr"}
HOSTILE = "<script>alert(1)</script>"


@dataclass
class Page(HTMLParser):
    """The page as elements: every opened tag is closed in order, text is kept by element."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag, f"</{tag}> closes another element, at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attrs for tag, attrs in self.tags if tag == name)

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("style", "script")).split())


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert not page.open, f"left open: {page.open}"
    return page


def written(record: dict[str, Any], shelf: Shelf, spec_text: str = SPEC_TEXT) -> tuple[Page, str]:
    html, markdown = report.write(record, shelf, spec_text=spec_text)
    return parsed(html.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> tuple[dict[str, Any], Shelf]:
    return whole_run(tmp_path)


def measured(root: Path, rows: list[dict[str, Any]], **metrics: Any) -> tuple[dict[str, Any], Shelf]:
    """A run of a single benchmark with these rows."""
    bench = Bench(root)
    bench.add("main", "benchmark", {**measurement(), "gates": {}, "rows": rows, **metrics})
    return bench.record(spec={}), bench.shelf


def sentence(run: tuple[dict[str, Any], Shelf]) -> str:
    return verdict(collect(*run)).text


# ---- the verdict ------------------------------------------------------------------------------------------------


def test_the_verdict_names_speed_and_accuracy_with_their_intervals(run: tuple[dict[str, Any], Shelf]) -> None:
    expected = (
        "The compressed file is 2.31× as fast (95% interval 2.22–2.43×) as dense at batch 1 on 1 thread (cpu), "
        "with top-1 97.6% against 97.9% (95% intervals 96.0–98.5% and 96.3–98.8%). "
        "It beats its random control, arm random (the same, but examples by lot), by 1.5 points of top-1 (95% interval "
        "0.3 to 2.7 points; McNemar's p = 0.021 on the same 450 test images; one seed: said of these two networks, not "
        "of the method)."
    )
    page, markdown = written(*run)
    assert sentence(run) == expected
    assert expected in page.text
    assert f"**{expected}**" in markdown


def test_the_verdict_speaks_of_the_first_configured_setting(run: tuple[dict[str, Any], Shelf]) -> None:
    facts = collect(*run)  # the manifest lists a row of batch 8 first, the config batch 1
    assert facts.shipped is not None
    assert (facts.shipped.batch, facts.shipped.variant) == (1, "int8")


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (0.95, 1.02, 1.09, "is not measurably faster than dense: its speed-up is 1.02×"),  # the interval holds 1
        (1.003, 1.012, 1.02, "is not measurably faster than dense"),  # within what two runs of one file differ by
        (0.70, 0.74, 0.78, "is slower than dense: its speed-up is 0.74×"),
        (1.30, 1.40, 1.50, "is 1.40× as fast (95% interval 1.30–1.50×)"),
        (None, 1.40, None, "without an interval to judge it by"),
    ],
)
def test_the_verdict_claims_no_speed_that_the_interval_does_not_show(
    tmp_path: Path, low: float | None, value: float, high: float | None, words: str
) -> None:
    ends = {"speedup_low": low, "speedup_high": high}
    dense = row("dense", "export", "fp32", 2.0, 0.97, 1.0, final=True)
    said = sentence(measured(tmp_path, [row("main", "export", "fp32", 1.9, 0.97, value, final=True, **ends), dense]))
    assert words in said
    assert ("as fast (" in said) == words.startswith("is 1.40")


def test_without_a_dense_arm_the_verdict_says_that_speed_is_open(tmp_path: Path) -> None:
    said = sentence(measured(tmp_path, [row("main", "export", "fp32", 1.6, 0.97, final=True)], baseline=None))
    assert "p50 1.60 ms (95% interval 1.57–1.65)" in said
    assert said.endswith("whether it is faster is open, because there is no dense arm to compare it with.")


def test_what_may_be_chance_and_a_busy_host_are_said(tmp_path: Path) -> None:
    """Chance by McNemar's test on the same images: intervals that overlap say nothing of it."""
    rows = [row("main", "export", "fp32", 1.0, 0.97, 2.0, final=True), row("dense", "export", "fp32", 2.0, 0.975, 1.0)]
    names = {"arm": "main", "entry": "export", "variant": "fp32"}
    flips = [{**names, "against": {**names, "arm": "dense"}, "images": 450, "lost": 22, "won": 1, "p": 0.00001}]
    remarks = " ".join(verdict(collect(*measured(tmp_path, rows, disturbed=True, flips=flips))).remarks)
    said = "The difference in accuracy to dense is more than chance (McNemar's p < 0.001, on the same images)."
    assert said in remarks
    assert "busy" in remarks
    flips[0]["p"] = 0.3
    remarks = " ".join(verdict(collect(*measured(tmp_path / "e", rows, flips=flips))).remarks)
    assert "may be chance (McNemar's p = 0.3" in remarks
    assert verdict(collect(*measured(tmp_path / "c", rows))).tone == "good"
    assert verdict(collect(*measured(tmp_path / "d", rows, disturbed=True))).tone == "plain"
    flips[0]["arm"] = "random"
    remarks = " ".join(verdict(collect(*measured(tmp_path / "b", rows, flips=flips))).remarks)
    assert "chance" not in remarks, "of another file nothing is said"


def test_gates_are_shown_met_missed_or_not_measured(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run
    record["gates"]["speedup"] = {"measured": 1.4, "bound": 2.0, "passed": False}
    page, markdown = written(record, shelf)
    assert "Speed-up of p50 against dense: at least 2.00×; measured 1.40×: missed" in page.text
    assert "Top-1 lost against dense: at most 1.0 points; measured 0.3 points: met" in page.text
    assert "Gate missed: Speed-up of p50" in markdown
    assert verdict(collect(record, shelf)).tone == "bad"
    unmeasured, shelf = whole_run(shelf.root / "again")
    unmeasured["nodes"] = unmeasured["nodes"][:3]
    unmeasured["gates"] = {}
    assert "at least 2.00×; not measured" in written(unmeasured, shelf)[0].text


# ---- runs that did not end well -----------------------------------------------------------------------------------


def test_a_failed_run_says_where_and_why(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "train", train_metrics(0.97))
    bench.node(
        "main",
        "prune",
        state="failed",
        key="0123456789ab",
        error="nothing was pruned: target.macs is 1.0\nset it lower",
    )
    bench.node("main", "export")
    page, markdown = written(bench.record("failed", finished=None), bench.shelf)
    said = "The run failed in main / prune: nothing was pruned: target.macs is 1.0. 1 of 3 stages are done."
    assert said in page.text
    assert said in markdown
    assert "target.macs is 1.0 set it lower" in page.text  # the whole message stands with its stage
    assert "export has no result (state: waiting)" in page.text
    assert "Top-1 97.0% on the test split" in page.text  # what was done is still reported


def test_an_interrupted_run_says_where_and_that_it_can_go_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.node("main", "train", state="running", key="0123456789ab")
    page, _ = written(bench.record("interrupted", finished=None), bench.shelf)
    assert "The run was interrupted in main / train." in page.text
    assert "the same command goes on from there" in page.text


def test_an_artifact_that_is_gone_is_named_and_nothing_is_invented(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run
    benchmark = next(node for node in record["nodes"] if node["stage"] == "benchmark")
    (shelf.root / "benchmark" / benchmark["key"] / "manifest.json").unlink()
    page, markdown = written({**record, "gates": {}}, shelf)
    assert "Nothing can be said: benchmark@1 is no longer in the store." in page.text
    assert "×" not in markdown.split("### Training ledger")[0].replace("at least 2.00×", "")
    assert "Deployment" not in markdown


def test_a_damaged_artifact_does_not_stop_the_report(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run

    class Damaged(Shelf):
        def find(self, stage: str, key: str) -> Any:
            if stage == "prune":
                raise IntegrityError("the manifest was changed")
            return super().find(stage, key)

    page, _ = written(record, Damaged(shelf.root))
    assert "prune@1 cannot be read: the manifest was changed" in page.text


@pytest.mark.parametrize("record", [{"id": "a1"}, {"id": "a1", "nodes": None}, {"id": "a1", "nodes": [{}, None, 3]}])
def test_a_record_that_lacks_nearly_everything_still_makes_a_page(tmp_path: Path, record: dict[str, Any]) -> None:
    page, markdown = written(record, Shelf(tmp_path), spec_text="")
    assert "unnamed" in page.text
    assert markdown.startswith("## unnamed")


def test_what_an_export_proved_is_said_in_words(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    parity = {"max_abs": 2.4e-6, "images": 128, "top1_agreement": 1.0, "batches": [1, 7]}
    parity |= {"by_attention": {"plain": 2.4e-6, "fused": 1e-6}}
    parity |= {"kept_sets": {"blocks": 2, "equal": 0.99, "agreement": 1.0, "tied": 1, "wrong": 0}}
    half = {"written": True, "largest": 812.0, "node": "node_add_3", "module": "blocks.1", "bytes": 700_000}
    half |= {"max_abs": 1e-3, "top1_agreement": 1.0}
    bench.add("main", "export", {"parity": parity, "input": "pixels", "half": half})
    missed = {"written": False, "largest": 70000.0, "node": "node_add_3", "module": None}
    bench.add("main", "export", {"half": missed}, entry="other")
    page, _ = written(bench.record(), bench.shelf)
    for said in (
        "at batch 1 and 7, against fused attention and plain products.",
        "Tokens kept by 2 blocks: the same on 100% of the images, on 1 of them but for tokens of equal score.",
        "The file takes raw pixels, uint8 [N, S, S, 3].",
        "the largest number is 812.0, in blocks.1.",
        "No FP16 file: node_add_3 reaches 70,000.0.",
    ):
        assert said in page.text, said


def test_metrics_of_the_wrong_shape_become_dashes_not_errors(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    wrong: list[Any] = [None, 3, "text", [], [1, None], {"a": 1}, {"before": 3}, True]
    names: tuple[str, ...] = (
        "examples",
        "patches",
        "top1",
        "curve",
        "asked",
        "reached",
        "widths",
        "parity",
        "half",
        "input",
        "nodes",
        "speedup",
        "rows",
    )
    names += ("feasible", "candidates", "rounds", "multiples")
    for stage in ("ticket", "train", "prune", "finetune", "export", "quantize", "benchmark", "other"):
        for i, value in enumerate(wrong):
            fields: dict[str, Any] = {"ledger": value, "inputs": value, "notes": value, "command": value, "host": value}
            bench.add(
                "main", stage, dict.fromkeys((*names, "noise_floor", "host"), value), entry=f"{stage}{i}", **fields
            )
    page, _ = written(bench.record(), bench.shelf)
    assert "benchmark7" in page.text


def test_a_run_id_that_would_leave_the_folder_is_refused(tmp_path: Path) -> None:
    for bad in ("../x", "", "a/b", ".", None):
        with pytest.raises(InputError, match="no usable id"):
            report.write({"id": bad}, Shelf(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- tables -------------------------------------------------------------------------------------------------------


def test_the_ledger_sums_the_stages_of_an_arm_by_what_they_were_for_and_sets_them_against_dense(
    run: tuple[dict[str, Any], Shelf],
) -> None:
    facts = collect(*run)
    costs = {cost.label: cost for cost in facts.costs}
    assert set(costs) == {"main", "dense", "random", "float"}
    main, dense = costs["main"], costs["dense"]
    train, tune = 19_400, 9_696
    assert main.values["images"] == 3000 + train + tune  # those of the proxy runs that scored the examples, too
    assert main.values["tokens_per_image"] == pytest.approx((train * 52 + tune * 65) / (train + tune))
    assert main.values["epochs"] == 28
    assert main.values["train_macs"] == pytest.approx(3 * train * 45.6e6 * 0.8 + 1.5e12)
    assert (main.values["teacher_macs"], main.values["scoring_macs"]) == (4.4e11, 4.1e11)
    every = (3 * train * 45.6e6 * 0.8 + 1.5e12 + 4.4e11 + 4.1e11) / (3 * 24_240 * 45.6e6)
    assert main.macs_ratio == pytest.approx(every)  # neither scoring nor a teacher is free
    assert main.values["train_seconds"] == pytest.approx(64.2 * 0.8 + 21)
    assert main.values["scoring_seconds"] == 8.2
    assert main.values["other_seconds"] == 3 * 12.5  # prune, export, quantize: nobody trains or scores there
    assert main.values["seconds"] == pytest.approx(64.2 * 0.8 + 21 + 8.2 + 3 * 12.5)
    assert main.seconds_ratio == pytest.approx(main.values["seconds"] / (64.2 + 0.01 + 12.5))
    assert dense.macs_ratio == 1
    quantize = {"other_seconds": 2 * 12.5, "seconds": main.values["seconds"] - 12.5}  # which `float` does without
    assert costs["float"].values == {**main.values, **quantize}  # shared stages count in each arm


def test_calibrating_an_8_bit_file_is_no_cost_of_training(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "train", train_metrics(0.9), ledger={"images": 100, "train_macs": 1e9, "seconds": 2.0})
    bench.add("main", "quantize", quantize_metrics(), ledger={"images": 0, "seconds": 7.0})
    (cost,) = collect(bench.record(), bench.shelf).costs
    assert (cost.values["train_seconds"], cost.values["other_seconds"], cost.values["seconds"]) == (2.0, 7.0, 9.0)
    page, markdown = written(bench.record(), bench.shelf)
    assert "Cost of training" not in page.text + markdown
    line = next(line for line in markdown.splitlines() if line.startswith("| main | 100 |"))
    assert [cell.strip().replace("\u202f", " ") for cell in line.split("|")[5:11]] == [
        "1.00 G", "–", "–", "2.00 s", "–", "7.00 s"
    ]  # fmt: skip


def test_a_sum_that_misses_a_stage_is_a_lower_bound_without_a_ratio(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "train", train_metrics(0.9), ledger={"images": 100, "train_macs": 1e9, "seconds": 2.0})
    bench.add("main", "finetune", train_metrics(0.9), ledger={"images": 50, "seconds": 1.0})
    bench.add("dense", "train", train_metrics(0.9), ledger={"images": 100, "train_macs": 1e9, "seconds": 2.0})
    facts = collect(bench.record(), bench.shelf)
    main = next(cost for cost in facts.costs if cost.label == "main")
    assert (main.values["train_macs"], main.macs_ratio) == (1e9, None)
    assert main.partial["train_macs"] == "finetune did not record it"
    assert main.seconds_ratio == pytest.approx(1.5)
    assert "≥ 1.00 G" in report.render_markdown(facts).replace("\u202f", " ")


def test_every_row_reaches_the_deployment_table_and_a_missing_value_says_why(run: tuple[dict[str, Any], Shelf]) -> None:
    page, markdown = written(*run)
    table = markdown.split("### Deployment")[1].split("\n\n")[1].splitlines()
    assert len(table) - 2 == len(measurement()["rows"])
    reasons = [attrs["title"] for attrs in page.all("span") if attrs.get("class") == "missing"]
    assert "131 calls, 662 needed" in reasons


def test_accuracy_and_percentiles_stand_with_their_intervals_in_page_and_markdown(
    run: tuple[dict[str, Any], Shelf],
) -> None:
    page, markdown = written(*run)
    assert "97.6% 96.0–98.5% 0.894 0.876–0.921 1.07 0.983–1.16 1.25 1.16–1.43 1.70 1.52–1.97" in page.text
    assert "Top-1 is of 450 test images." in page.text
    assert "131 calls, 662 needed" in page.text  # seen, and not in a tooltip alone
    table = markdown.split("### Deployment")[1].split("\n\n")[1].splitlines()
    heads = [head.strip() for head in table[0].strip("|").split("|")]
    assert heads[2:7] == ["Top-1 of 450 images", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert lines[0][2:7] == [
        "97.6% (96.0–98.5%)",
        "0.894 (0.876–0.921)",
        "1.07 (0.983–1.16)",
        "1.25 (1.16–1.43)",
        "1.70 (1.52–1.97)",
    ]
    assert "– (131 calls, 662 needed)" in [line[6] for line in lines]
    assert {len(line) for line in lines} == {len(heads)}


def test_what_arms_share_stands_once(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run
    facts = collect(record, shelf)
    shared = [step for step in facts.steps if step.ref == "train@1"]
    assert [step.arms for step in shared] == ["main, float"]
    page, _ = written(record, shelf)
    pictures = sum(len(json.loads(p.read_text())["figures"]) for p in shelf.root.glob("*/*/manifest.json"))
    assert len(list(page.all("img"))) - 5 == pictures == 6  # five flipped images stand beside


def test_a_training_with_masks_tells_density_trials_and_rates() -> None:
    density = {"global": 0.3, "weights": 331776}
    masks: dict[str, Any] = {"method": "soup", "keep": 0.3, "density": density, "chosen": "magnitude"}
    masks |= {"tried": {"soup": 0.5, "magnitude": 0.75}}
    step = Step("train", (), "", "", "", "", "", "", {"metrics": {"masks": masks}}, None)
    assert deeds(step) == (
        "Weights by soup: 30.0% of 331,776 are not zero, asked 30.0%.",
        "On the calibration split: soup 50.0%, magnitude 75.0%; taken: magnitude.",
    )
    rates = [{"keep": 1.0, "top1": 0.9}, {"keep": 0.3, "top1": 0.25}]
    after = {"method": "magnitude", "density": density, "before": {"global": 0.3}, "rates": rates}
    assert deeds(replace(step, stage="finetune", manifest={"metrics": {"masks": after}})) == (
        "Weights by magnitude: 30.0% of 331,776 are not zero, 30.0% before.",
        "Weights kept after training, and top-1 on the test split: 100%: 90.0%, 30.0%: 25.0%.",
    )


def test_each_stage_tells_what_was_asked_and_what_was_reached(run: tuple[dict[str, Any], Shelf]) -> None:
    page, markdown = written(*run)
    told = (
        "Examples by el2n: kept 970 of 1,212 (80.0%), asked 80.0%.",
        "Top-1 95.1% on the test split with ticket patches only.",
        "Asked for 50.0% of MACs; reached 48.1% of MACs, 46.7% of parameters.",
        "logits differ by at most 2.4e-6, same top-1 on 100%, at batch 1 and 7.",
        "Chosen: INT8, because it is 1.25x faster and loses 0.2 points.",
        "Top-1 on the calibration split: FP32 97.8% → INT8 97.6% (drop 0.2 points, 1.0 points allowed).",
    )
    for sentence_ in told:
        assert sentence_ in page.text
        assert sentence_ in markdown


def test_widths_stand_before_and_after_for_every_block(run: tuple[dict[str, Any], Shelf]) -> None:
    html = report.render_html(collect(*run))
    page = parsed(html)
    last = prune_metrics()["widths"]["after"][-1]
    assert f"384 → {last['mlp']}" in page.text
    assert "Embedding 96 → 80" in page.text
    section = html.partition('<section id="widths"')[2].partition("</section>")[0]
    assert section.count('<svg class="bar"') == 2 * (6 * 4 + 1)


def test_lineage_names_reference_key_inputs_and_command(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run
    page, _ = written(record, shelf)
    for node in record["nodes"]:
        assert node["ref"] in page.text
        assert node["key"] in page.text
    assert "model finetune@1" in page.text
    assert "sievit run pipeline.yaml --store artifacts" in page.text
    assert SPEC_TEXT.split("\n")[2] in "".join(data for _, data in page.texts)


# ---- safety and self-containment ----------------------------------------------------------------------------------


def hostile_run(root: Path) -> tuple[dict[str, Any], Shelf]:
    bench = Bench(root)
    bad_row = row(HOSTILE, HOSTILE, "fp32", 1.0, 0.9, 1.0, provider=HOSTILE, verdict=HOSTILE, final=True)
    bench.add(
        HOSTILE,
        "benchmark",
        {"rows": [bad_row], "host": {HOSTILE: HOSTILE}, "baseline": {"arm": "x", "entry": "y"}},
        entry=HOSTILE,
        data={"source": HOSTILE, "classes": [HOSTILE, 'b"><img src=x onerror=alert(1)>']},
        notes=[{"level": HOSTILE, "text": HOSTILE}],
        command=HOSTILE,
        inputs={HOSTILE: {"ref": HOSTILE}},
        pictures=[("a.svg", HOSTILE, HOSTILE, svg("x") + HOSTILE)],
    )
    bench.node("main", HOSTILE, state="failed", error=HOSTILE)
    return bench.record("failed", pipeline=HOSTILE, command=HOSTILE, spec={"device": HOSTILE}), bench.shelf


def test_a_class_named_script_shows_as_text(tmp_path: Path) -> None:
    page, markdown = written(*hostile_run(tmp_path), spec_text=f"name: {HOSTILE}\n")
    kinds = [attrs.get("type") for attrs in page.all("script")]
    assert kinds in ([None], ["application/json", None])  # our own, data for it, and no other
    assert f"2 classes: {HOSTILE}" in page.text
    assert all((attrs.get("src") or "").startswith("data:image/svg+xml;base64,") for attrs in page.all("img"))
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    outside_code = re.sub(r"(`+)[^`].*?\1", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside_code
    assert "&lt;script&gt;" in outside_code


def test_only_the_pages_own_script_may_run(run: tuple[dict[str, Any], Shelf]) -> None:
    import hashlib

    html, _ = report.write(*run)
    page = parsed(html.read_text(encoding="utf-8"))
    assert [attrs.get("type") for attrs in page.all("script")] == ["application/json", None]
    _, script = [data for tag, data in page.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv"))
    assert policy is not None
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in policy


def test_the_page_asks_nothing_of_the_network(run: tuple[dict[str, Any], Shelf]) -> None:
    page, _ = written(*run)
    targets = [
        attrs[name] or "" for _, attrs in page.tags for name in ("src", "href", "srcset", "data") if name in attrs
    ]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    style = "".join(data for tag, data in page.texts if tag == "style")
    assert "@import" not in style
    assert "url(" not in style


def test_a_picture_outside_the_artifact_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret.svg").write_text(svg("secret"))
    bench = Bench(tmp_path / "store")
    figures = [
        {"file": name, "title": "t", "caption": ""} for name in ("../../../secret.svg", str(tmp_path / "secret.svg"))
    ]
    bench.add("main", "train", train_metrics(0.9), figures=figures)
    page, _ = written(bench.record(), bench.shelf)
    assert list(page.all("img")) == []
    assert "the file of this picture is not in the artifact" in page.text


def test_a_page_with_fifty_large_pictures_stays_below_3_mb(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    large = svg("x" * 60_000)
    pictures = [(f"p{i}.svg", f"Picture {i}", "", large if i else svg("small")) for i in range(50)]
    bench.add("main", "ticket", {}, pictures=pictures)
    html, _ = report.write(bench.record(), bench.shelf)
    page = parsed(html.read_text(encoding="utf-8"))
    assert html.stat().st_size < 3_000_000
    shown = len(list(page.all("img")))
    rest = html.stat().st_size - sum(len(str(attrs["src"])) for attrs in page.all("img"))
    assert shown == 1 + (report.MOST_BYTES - rest) // (len(large) * 4 // 3)  # as many as there is room for
    assert page.text.count("left out to keep the page below 3 MB") == 50 - shown
    assert all(f"Picture {i}" in page.text for i in range(50))


def test_names_of_close_points_cover_no_other_name_mark_or_whisker(tmp_path: Path) -> None:
    close = [
        row(arm, entry, variant, p50 + 0.01 * index, 0.976 + 0.001 * index, 2.0, final=entry == "quantize")
        for index, arm in enumerate(("main", "random", "attention"))
        for entry, variant, p50 in (("quantize", "int8", 1.0), ("export", "fp32", 1.05))
    ]
    html, _ = report.write(*measured(tmp_path, [*close, row("dense", "export", "fp32", 2.1, 0.979, 1.0, final=True)]))
    drawn = re.search(r'<svg class="plot".*?</svg>', html.read_text(encoding="utf-8"), re.DOTALL)
    assert drawn is not None
    points = [child for child in ElementTree.fromstring(drawn[0]) if child.get("class", "").startswith("point")]
    assert [point.get("class") for point in points].index("point shipped") == len(points) - 1  # on top of the others
    names: list[tuple[float, float, float, float]] = []  # left, top, right, bottom: 8 px a letter at 13 px
    marks: list[tuple[float, float, float, float]] = []
    for point in points:
        (label,), (circle,) = point.findall("text"), point.findall("circle")
        x, y, wide = float(label.get("x", "")), float(label.get("y", "")), 8 * len(label.text or "")
        left = x if label.get("text-anchor") == "start" else x - wide
        names.append((left, y - 10, left + wide, y + 3))
        x, y = float(circle.get("cx", "")), float(circle.get("cy", ""))
        marks.append((x - 6, y - 6, x + 6, y + 6))
        for whisker in point.findall("line[@class='whisker']"):
            marks.append(tuple(float(whisker.get(end, "")) for end in ("x1", "y1", "x2", "y2")))  # type: ignore[arg-type]
    assert (len(names), len(marks)) == (7, 21)
    for place, name in enumerate(names):
        for other in names[place + 1 :] + marks:
            apart = name[0] >= other[2] or other[0] >= name[2] or name[1] >= other[3] or other[1] >= name[3]
            assert apart, (points[place].findtext("text"), other)


# ---- reading it -----------------------------------------------------------------------------------------------------


def test_the_page_can_be_read_by_keyboard_and_screen_reader(run: tuple[dict[str, Any], Shelf]) -> None:
    page, _ = written(*run)
    assert [attrs["lang"] for attrs in page.all("html")] == ["en"]
    for landmark in ("header", "main", "nav", "footer"):
        assert len(list(page.all(landmark))) == 1
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    linked = {(attrs["href"] or "")[1:] for attrs in page.all("a")}
    labelled = {name for _, attrs in page.tags for name in (attrs.get("aria-labelledby") or "").split()}
    assert linked | labelled <= set(ids)
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.all("svg"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(list(page.all("caption"))) == len(list(page.all("table")))
    scrolling = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert len(scrolling) == len(list(page.all("table")))
    assert all(attrs.get("tabindex") == "0" for attrs in scrolling)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_the_markdown_tables_have_as_many_cells_in_every_row(tmp_path: Path) -> None:
    record, shelf = hostile_run(tmp_path)
    record["pipeline"] = "a|b `c`"
    for node in record["nodes"]:
        node["entry"] = "x|y\nz"
    for markdown in (written(record, shelf)[1], written(*whole_run(tmp_path / "whole"))[1]):
        for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, table


def test_a_report_replaces_the_one_before_and_leaves_nothing_else(run: tuple[dict[str, Any], Shelf]) -> None:
    record, shelf = run
    report.write(record, shelf)
    html, markdown = report.write({**record, "pipeline": "renamed"}, shelf)
    assert sorted(path.name for path in (shelf.root / "runs" / RUN).iterdir()) == ["report.html", "report.md"]
    assert "<h1>renamed</h1>" in html.read_text(encoding="utf-8")
    assert "## renamed" in markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        ("significant", 0.01234, "0.0123"),
        ("significant", 9.996, "10.0"),
        ("significant", 12345.6, "12,346"),
        ("significant", 0, "0"),
        ("big", 999_960, "1.00 M"),
        ("big", 5_526_000, "5.53 M"),
        ("big", 1.26e9, "1.26 G"),
        ("size", 999, "999 bytes"),
        ("size", 472_300, "472 KB"),
        ("size", 22_100_000, "22.1 MB"),
        ("percent", 0.9764, "97.6%"),
        ("percent", 1, "100%"),
        ("points", 0.0031, "0.3 points"),
        ("points", -0.012, "−1.2 points"),
        ("points", -0.0001, "0.0 points"),
        ("ratio", 2.314, "2.31×"),
        ("ratio", 12.41, "12.4×"),
        ("duration", 0.0123, "0.01 s"),
        ("duration", 59.99, "1 min 00 s"),
        ("duration", 3661, "1 h 01 min"),
        ("count", 3.5, "3.50"),
        ("count", None, "–"),
    ],
)
def test_numbers_are_short_and_carry_their_unit(form: str, value: float | None, expected: str) -> None:
    assert getattr(numbers, form)(value).replace("\u202f", " ") == expected


def test_energy_stands_in_the_ledger_where_a_host_told_it(tmp_path: Path) -> None:
    for told in (False, True):
        bench = Bench(tmp_path / str(told))
        for arm, joules in (("main", 40_000.0), ("dense", None)):
            fields = {"energy_cpu_j": joules, "energy_gpu_j": 2_500.0} if told else {}
            bench.add(arm, "train", {}, ledger={"images": 100, "train_macs": 5e9}, **fields)
        page, markdown = written(bench.record(), bench.shelf)
        assert ("Energy" in page.text) == ("Energy |" in markdown) == told
        if told:
            assert "42.5\u202fkJ" in markdown and "2.50\u202fkJ" in markdown
            table = markdown.split("### Training ledger")[1].strip().splitlines()
            assert len({line.count("|") for line in table[:4]}) == 1


def test_the_ledger_says_how_many_processes_shared_the_work_where_it_was_not_one(tmp_path: Path) -> None:
    for several in (False, True):
        bench = Bench(tmp_path / str(several))
        for arm, counts in (("main", (1, 4 if several else 1)), ("dense", (1, 1))):
            for stage, count in zip(("train", "finetune"), counts, strict=True):
                fields = {"ledger": {"images": 100, "train_macs": 5e9}, "processes": {"count": count}}
                bench.add(arm, stage, {}, **fields)
        bench.add("old", "train", {}, ledger={"images": 100})  # a manifest that does not say
        page, markdown = written(bench.record(), bench.shelf)
        assert ("Processes" in page.text) == ("Processes |" in markdown) == several
        table = [line.split("|") for line in markdown.split("### Training ledger")[1].strip().splitlines()]
        assert len({len(line) for line in table[:4]}) == 1
        if several:
            column = [cell.strip() for cell in table[0]].index("Processes")
            told = {line[1].strip(): line[column].strip() for line in table[2:] if len(line) == len(table[0])}
            assert (told["main"], told["dense"]) == ("4", "1")
            assert told["old"] not in ("1", "4")


def test_a_cut_is_told_in_the_unit_of_its_target_with_what_was_tried_on_the_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    metrics = prune_metrics() | {
        "importance": "taylor",
        "asked": {"speedup": 2.0},
        "reached": {"macs": 0.481, "params": 0.467, "speedup": 2.04},
        "allocation": "latency",
        "multiples": {"round_to": 32, "head_round_to": 4},
        "feasible": [
            {"axis": "mlp", "macs": 0.55, "params": 0.5, "time": 0.625},
            {"axis": "embed (off)", "macs": 0.25, "params": 0.2, "time": None},
        ],
        "candidates": [{"asked": 0.5, "measured": 0.53, "estimated": 0.4875}],
        "rounds": [{"round": 1, "macs": 0.7, "top1_calibration_cut": 0.61, "top1_calibration": 0.88}],
    }
    bench.add("main", "prune", metrics)
    page, _ = written(bench.record(), bench.shelf)
    said = " ".join(page.text.split())
    for part in (
        "Asked for 2.00 times the speed; reached 48.1% of MACs, 46.7% of parameters, 2.04 times the speed.",
        "Cut by taylor, allocation latency; widths are multiples of 32, in heads of 4.",
        "mlp 55.0% of MACs, 50.0% of parameters, 1.60 times the speed by estimate; embed (off) 25.0% of MACs",
        "Candidates as files, of 0.500 asked: 0.530 (estimated 0.487).",
        "70.0% of MACs, 61.0% cut and 88.0% recovered.",
    ):
        assert part in said, part


def test_of_many_points_all_are_drawn_and_told_but_only_final_files_of_the_first_seed_are_named(tmp_path: Path) -> None:
    rows = [
        row(f"{arm}{seed}", entry, variant, p50, 0.97, 2.0, final=entry == "quantize")
        for seed in ("", "@seed1", "@seed2")
        for arm in ("main", "random")
        for entry, variant, p50 in (("quantize", "int8", 1.0), ("export", "fp32", 1.2))
    ]
    html = report.render_html(collect(*measured(tmp_path, rows)))
    (drawn,) = re.findall(r'<svg class="plot".*?</svg>', html, re.DOTALL)
    assert drawn.count('class="point') == len(rows) == drawn.count("<title>")
    assert re.findall(r'class="label"[^>]*>([^<]*)<', drawn) == ["random INT8", "main INT8"]
    assert "Only the final files of the first seed have their names beside them." in html
