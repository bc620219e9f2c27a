"""What the parts of the report promise: contributions, flips, curves, layers, several runs, the library in the page."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_run import (
    RUN,
    Bench,
    Shelf,
    benchmark_payload,
    jpeg,
    measurement,
    prune_metrics,
    row,
    svg,
    train_metrics,
    whole_run,
)

from sievit.pipeline.errors import InputError
from sievit.pipeline.report import page as report
from sievit.pipeline.report.contributions import contributions
from sievit.pipeline.report.curves import as_script_data, curves
from sievit.pipeline.report.facts import Facts, collect
from sievit.pipeline.report.flips import flips
from sievit.pipeline.report.layers import density, eight_bit_cost
from sievit.pipeline.report.payload import MOST_PHOTOGRAPH
from sievit.pipeline.report.several import beside
from sievit.pipeline.report.stages import by_scope
from sievit.pipeline.report.templating import TEMPLATES

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return collect(*whole_run(tmp_path))


# ---- from dense to shipped -----------------------------------------------------------------------------------------


def test_changes_from_dense_to_shipped_add_up_and_only_files_have_a_latency(facts: Facts) -> None:
    found = contributions(facts)
    names = ["dense FP32", "ticket", "train", "prune", "finetune", "export", "quantize", "main INT8"]
    assert [one.name for one in found] == names
    assert [one.name for one in found if one.p50.value is not None] == ["dense FP32", "export", "quantize", "main INT8"]
    for column in ("p50", "top1"):
        readings = [getattr(one, column) for one in found]
        way = sum(reading.change or 0 for reading in readings)
        assert readings[0].value + way == pytest.approx(readings[-1].value)
    by_name = {one.name: one for one in found}
    assert by_name["prune"].top1.value == prune_metrics()["top1_before_recovery"]
    assert by_name["prune"].note == "just cut, before recovery"
    assert by_name["train"].top1.of == "network, test split"
    assert by_name["ticket"].top1.unsaid == "makes no network"
    assert by_name["export"].p50.change == pytest.approx(1.12 - 2.066)


def test_bars_float_from_the_value_before_to_this_one_and_tell_better_from_worse(facts: Facts) -> None:
    found = {one.name: one for one in contributions(facts)}
    largest = 2.066
    export = found["export"].p50.bar
    assert export is not None and (export.kind, export.start) == ("better", pytest.approx(100 * 1.12 / largest))
    assert export.start + export.width == pytest.approx(100)  # where the bar of dense ends
    dropped, recovered = found["prune"].top1.bar, found["finetune"].top1.bar
    assert dropped is not None and recovered is not None
    assert (dropped.kind, recovered.kind) == ("worse", "better")
    ends = found["dense FP32"].p50.bar, found["main INT8"].p50.bar
    assert [bar and (bar.kind, bar.start) for bar in ends] == [("whole", 0.0)] * 2


def test_without_dense_there_is_no_way_to_show(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "benchmark", {"rows": [row("main", "export", "fp32", 1.0, 0.9, final=True)]})
    assert contributions(collect(bench.record(), bench.shelf)) == ()


def test_a_float_file_that_quantize_kept_stands_at_its_export(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "export", {})
    bench.add("main", "quantize", {})
    rows = [row("main", "quantize", "fp32", 1.0, 0.9, 2.0, final=True), row("dense", "export", "fp32", 2.0, 0.9, 1.0)]
    bench.add("main", "benchmark", {**measurement(), "rows": rows})
    found = {one.name: one for one in contributions(collect(bench.record(), bench.shelf))}
    assert found["export"].p50.value == found["quantize"].p50.value == 1.0
    assert found["export"].note == "the very file that quantize ships"


def test_a_stage_whose_artifact_is_gone_says_so_in_its_line(tmp_path: Path) -> None:
    record, shelf = whole_run(tmp_path)
    prune = next(node for node in record["nodes"] if node["stage"] == "prune")
    (shelf.root / "prune" / prune["key"] / "manifest.json").unlink()
    found = {one.name: one for one in contributions(collect(record, shelf))}
    assert found["prune"].top1.value is None
    assert found["prune"].top1.unsaid == "prune@1 is no longer in the store"


# ---- flips ---------------------------------------------------------------------------------------------------------


def test_flips_say_what_mcnemars_test_allows_and_no_more(facts: Facts) -> None:
    found = flips(facts.measurement)
    assert found is not None
    first, second = found.pairings
    assert first.sentence == (
        "Of 450 test images, main INT8 loses 3 that dense FP32 gets right, and wins 2 that it gets wrong "
        "(McNemar's p = 1.0; these may be chance)."
    )
    assert second.sentence.endswith("(McNemar's p = 0.013; more than chance: it is the worse one).")
    assert "the better one" in replace(second, lost=2.0, won=12.0).sentence
    assert replace(first, lost=0.0, won=0.0).sentence.endswith("get the very same test images right.")
    assert (len(found.lost), len(found.won)) == (3, 2)
    page, markdown = report.render_html(facts), report.render_markdown(facts)
    assert page.count("data:image/jpeg;base64,") == 5
    assert "| 8 | 3 | 3 | 2 | 1 |" in markdown


def test_pictures_that_are_no_small_jpeg_within_the_artifact_are_not_embedded(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    payload = benchmark_payload()
    names = ["../../../secret.jpg", "flips/7.jpg", "flips/large.jpg", "flips/\x00.jpg"]
    payload["flips/7.jpg"] = b"<svg onload=alert(1)>"
    payload["flips/large.jpg"] = jpeg(0) + bytes(MOST_PHOTOGRAPH)
    shown = [{"file": name, "flip": "lost", "truth": "1", "dense": "1", "final": "2", "name": name} for name in names]
    payload["flips.json"] = json.dumps({"files": [], "shown": shown}).encode()
    bench = Bench(tmp_path / "store")
    bench.add("main", "benchmark", measurement(), payload=payload)
    found = flips(collect(bench.record(), bench.shelf).measurement)
    assert found is not None and [one.uri for one in found.photographs] == [""] * 4


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"files": 3, "shown": [1, {}], "pairs": null}', b"\xff\xfe"])
def test_damaged_payload_leaves_the_rest_of_the_page_standing(tmp_path: Path, content: bytes) -> None:
    bench = Bench(tmp_path)
    payload = {"flips.json": content, "spread.json": content}
    bench.add("main", "benchmark", measurement(), payload=payload)
    page = report.render_html(collect(bench.record(), bench.shelf))
    assert 'id="deployment"' in page and "loses 3 that" in page
    assert 'data-plot="latency"' not in page


# ---- curves and layers ---------------------------------------------------------------------------------------------


def test_curves_hold_the_numbers_of_the_manifests_and_arms_that_share_a_training_are_one_line(facts: Facts) -> None:
    plots = {plot.title: plot for plot in curves(facts)}
    assert set(plots) == {
        "train: loss", "train: top-1 while training", "finetune: loss", "finetune: top-1 while training",
        "Latency by percentile",
    }  # fmt: skip
    loss = plots["train: loss"]
    assert [line.label for line in loss.lines] == ["main, float", "dense", "random"]
    told = train_metrics(0.9)["curve"]
    assert loss.x == tuple(point["epoch"] for point in told)
    assert loss.lines[0].values == tuple(point["loss"] for point in told)
    latency = plots["Latency by percentile"]
    assert latency.x == tuple(range(100))
    assert len({line.hue for line in (loss.lines[1], latency.lines[0])}) == 1  # dense has one colour everywhere
    assert latency.lines[1].values[0] == 0.85


def test_a_training_without_points_or_with_numbers_that_are_none_draws_what_there_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    broken = [{"epoch": 0, "loss": float("nan")}, {"epoch": 1, "loss": 2.0}, {"epoch": 2}, "x", {"loss": 1.0}]
    bench.add("main", "train", {"curve": broken})
    bench.add("other", "train", {"curve": [{"epoch": 1, "loss": 1.0}]})  # one point is no curve
    (plot,) = curves(collect(bench.record(), bench.shelf))
    assert [line.values for line in plot.lines] == [(None, 2.0, None)]
    assert [shown for _, shown in plot.rows()] == ["–", "2.00", "–"]


def test_data_in_a_script_element_cannot_end_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add(HOSTILE, "train", train_metrics(0.9), entry=f"{HOSTILE}<!--")
    plots = curves(collect(bench.record(), bench.shelf))
    written = as_script_data(plots)
    assert not re.search(r"[<>&\u2028\u2029]", written)
    assert json.loads(written)[0]["lines"][0]["label"] == HOSTILE


def test_density_by_layer_has_a_column_an_arm_and_bars_of_the_same_shares(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for arm, first in (("main", 0.25), ("other", 0.5)):
        layers = {"blocks.10.mlp": 1.0, "blocks.2.mlp": first}
        bench.add(arm, "train", {"masks": {"density": {"tensors": layers, "global": 0.5, "weights": 8}}})
    section = density(collect(bench.record(), bench.shelf).steps)
    assert section is not None
    assert section.heads == ("Layer", "train, main", "train, other")
    assert section.rows == (("blocks.2.mlp", "25.0%", "50.0%"), ("blocks.10.mlp", "100%", "100%"))
    assert section.shares == ((0.25, 0.5), (1.0, 1.0))
    assert 'id="density"' in report.render_html(collect(bench.record(), bench.shelf))


def test_the_cost_of_8_bits_is_drawn_as_shares_of_the_costliest_block(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "quantize", {"sensitivity": {"static": {"blocks.0.mlp": 0.08, "blocks.0.attn": 0.02}}})
    section = eight_bit_cost(collect(bench.record(), bench.shelf).steps)
    assert section is not None
    assert section.rows == (("blocks.0.attn", "0.02"), ("blocks.0.mlp", "0.08"))
    assert section.shares == ((0.25,), (1.0,))
    assert eight_bit_cost(()) is None and density(()) is None


# ---- several runs --------------------------------------------------------------------------------------------------


def two_runs(root: Path) -> tuple[list[dict[str, Any]], Shelf]:
    """The same run twice, with other settings of one stage, an arm more and a gate missed in the second."""
    record, shelf = whole_run(root)

    def node(arm: str, entry: str, **config: Any) -> dict[str, Any]:
        data = [{"source": "builtin:digits", "image_size": 32}]
        return {"arm": arm, "entry": entry, "stage": entry, "code_version": 3, "config": config, "data": data}

    arms = ("main", "dense")
    record["spec"]["nodes"] = [node(arm, "train", epochs=20.0, masks=None, lr={"peak": 0.001}) for arm in arms]
    other = json.loads(json.dumps(record)) | {"id": "5e1fa0000000"}
    for one in other["spec"]["nodes"]:
        one["config"] |= {"epochs": 30.0, "lr": {"peak": 0.002}} if one["arm"] == "main" else {"epochs": 30.0}
        one["config"]["names"] = ["<b>", "|"]
    other["spec"]["nodes"].append(node("random", "train", epochs=30.0))
    other["gates"]["speedup"] = {"measured": 1.4, "bound": 2.0, "passed": False}
    return [record, other], shelf


def test_what_8_bits_cost_is_summed_by_scope() -> None:
    costs = {"blocks.0.attn": 0.5, "blocks.10.attn": 0.25, "blocks.0.mlp": 0.125, "head": 2.0, "encoder.attention": 1.0}
    assert by_scope(costs) == {"attention": 1.75, "MLPs": 0.125, "other layers": 2.0}


def test_runs_side_by_side_tell_exactly_the_fields_that_differ(tmp_path: Path) -> None:
    records, shelf = two_runs(tmp_path)
    found = beside([(record, collect(record, shelf)) for record in records])
    assert [column.name for column in found.columns] == ["5e1f0", "5e1fa"]
    assert [(one.field, one.arms, one.values) for one in found.differences] == [
        ("train.epochs", "main, dense", ("20.0", "30.0")),
        ("train.lr.peak", "main", ("0.001", "0.002")),
        ("train.names", "main, dense", ("–", '["<b>", "|"]')),
        ("train", "random", ("–", "in the run")),
    ]


def test_runs_side_by_side_stand_with_their_files_gates_and_costs_on_page_and_in_markdown(tmp_path: Path) -> None:
    records, shelf = two_runs(tmp_path)
    html, markdown = report.write_beside(records, shelf)
    assert html == tmp_path / "runs" / RUN / "beside-5e1fa0000000.html"
    page, twin = html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")
    assert page.count('<circle cx="') == 4  # shipped and baseline of each
    assert "<b>&#34;" not in page and "[&#34;&lt;b&gt;&#34;, &#34;|&#34;]" in page
    assert "- Gate missed in `5e1fa`: Speed-up of p50 against dense: at least 2.00×; measured 1.40×" in twin
    assert twin.count("**shipped**") == twin.count("*baseline*") == 4  # two settings of each run
    for table in re.findall(r"(?:^\|.*\n)+", twin, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_runs_that_cannot_be_laid_side_by_side_are_refused_with_a_remedy(tmp_path: Path) -> None:
    records, shelf = two_runs(tmp_path)
    with pytest.raises(InputError, match="is named twice"):
        report.write_beside([records[0], records[0]], shelf)
    with pytest.raises(InputError, match="1 runs cannot be laid side by side"):
        report.write_beside(records[:1], shelf)
    many = [{**records[0], "id": f"run{number}"} for number in range(9)]
    with pytest.raises(InputError, match="9 runs"):
        report.write_beside(many, shelf)
    with pytest.raises(InputError, match="no usable id"):
        report.write_beside([records[0], {**records[1], "id": "../x"}], shelf)


# ---- what the page carries -----------------------------------------------------------------------------------------


def test_the_library_in_the_page_is_the_released_one() -> None:
    """uPlot 1.6.32 of the npm registry, with its licence."""
    expected = {
        "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (TEMPLATES / "vendor").iterdir()}
    assert found == expected
    assert "(v1.6.32)" in (TEMPLATES / "vendor" / "uPlot.iife.min.js").read_text()[:80]


def test_a_page_without_curves_carries_no_library(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add("main", "ticket", {})
    page = report.render_html(collect(bench.record(), bench.shelf))
    assert "uPlot" not in page
    assert len(page) < 40_000


def test_a_whole_page_with_flips_curves_and_fifty_pictures_stays_below_3_mb(tmp_path: Path) -> None:
    record, shelf = whole_run(tmp_path)
    bench = Bench(tmp_path)
    bench.nodes = record["nodes"]
    large = svg("x" * 50_000)
    bench.add("main", "ticket", {}, entry="more", pictures=[(f"p{i}.svg", f"P{i}", "", large) for i in range(50)])
    flipped = next(shelf.root.glob("benchmark/*/flips"))
    for photograph in flipped.iterdir():
        photograph.write_bytes(jpeg(0) + bytes(MOST_PHOTOGRAPH - 2_000))
    html, _ = report.write(record, shelf)
    assert html.stat().st_size < 3_000_000
    assert html.read_text(encoding="utf-8").count("data:image/svg+xml") >= 30


def test_the_report_of_a_large_run_takes_at_most_5_seconds_of_a_processor(tmp_path: Path) -> None:
    record, shelf = whole_run(tmp_path)
    bench = Bench(tmp_path)
    bench.nodes = record["nodes"]
    for arm in (f"main@seed{seed}" for seed in range(1, 5)):  # more trainings than five arms have
        for entry in ("train", "finetune"):
            bench.add(arm, entry, train_metrics(0.9, epochs=300), pictures=[("w.svg", "Widths", "", svg("x" * 20_000))])
    began = time.process_time()
    html, _ = report.write(bench.record(), shelf)
    assert time.process_time() - began < 5
    page = html.read_text(encoding="utf-8")
    assert page.count("<details>") == page.count("</details>")
    assert "<summary>Pictures of 4 more</summary>" in page  # those of three arms stand open


def test_markdown_names_every_artifact_with_its_key_and_the_command_that_made_it(facts: Facts) -> None:
    lineage = report.render_markdown(facts).partition("<summary>Lineage</summary>")[2].partition("</details>")[0]
    for step in facts.steps:
        line = next(line for line in lineage.splitlines() if f"`{step.key}`" in line)
        assert f"`{step.ref}`" in line and "`sievit run pipeline.yaml --store artifacts`" in line
