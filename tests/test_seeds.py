"""Several seeds: every arm under each, what does not depend on a seed made once, what stands once reads all."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fakes import PIPELINE, STAGES
from report_run import Bench, measurement
from rich.console import Console

from sievit.pipeline import views
from sievit.pipeline.errors import SpecError
from sievit.pipeline.plan import Plan, make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.records import RunRecord
from sievit.pipeline.report.facts import collect
from sievit.pipeline.report.page import render_html, render_markdown
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store

SEEDED = PIPELINE.replace("seed: 0", "seeds: [3, 5]")


def plan(tmp_path: Path, text: str, *overrides: str) -> Plan:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return make_plan(load_pipeline(path, STAGES, overrides), STAGES)


def made(tmp_path: Path, planned: Plan) -> RunRecord:
    return run(planned, Store(tmp_path / "artifacts"), Manner(Silent()))


def keys(record: RunRecord) -> dict[str, str | None]:
    return {f"{node.arm}/{node.entry}": node.key for node in record.nodes}


def test_every_arm_is_planned_once_a_seed_and_reads_its_own_seed_only(tmp_path: Path) -> None:
    planned = plan(tmp_path, SEEDED)
    one = plan(tmp_path, PIPELINE)
    inner = [(n.arm, n.entry.name) for n in one.nodes if not n.stage.across_arms]
    assert [(n.arm, n.entry.name, n.seed) for n in planned.nodes if not n.stage.across_arms] == [
        (f"{arm}{at}", entry, seed) for at, seed in (("", 3), ("@seed5", 5)) for arm, entry in inner
    ]
    for node in planned.nodes:
        if not node.stage.across_arms:
            assert {edge.source[0] for edge in node.inputs if edge.source} <= {node.arm}


def test_what_stands_once_for_the_pipeline_stands_once_and_reads_every_seed(tmp_path: Path) -> None:
    planned = plan(tmp_path, SEEDED)
    across = [node for node in planned.nodes if node.stage.across_arms]
    assert [(node.arm, node.entry.name, node.seed) for node in across] == [("main", "benchmark", 3)]
    arms = dict.fromkeys(edge.source[0] for edge in across[0].inputs if edge.source)
    assert list(arms) == ["main", "dense", "random", "main@seed5", "dense@seed5", "random@seed5"]


def test_a_seed_among_several_makes_the_very_artifacts_that_it_makes_alone(tmp_path: Path) -> None:
    alone = {seed: keys(made(tmp_path, plan(tmp_path, PIPELINE, f"seed={seed}"))) for seed in (3, 5)}
    record = made(tmp_path, plan(tmp_path, SEEDED))
    together = keys(record)
    for place, key in alone[3].items():
        if place != "main/benchmark":
            assert together[place] == key
            arm, _, entry = place.partition("/")
            assert together[f"{arm}@seed5/{entry}"] == alone[5][place]
    assert {node.entry for node in record.nodes if node.state == "done"} == {"benchmark"}, "all else was there"


def test_what_does_not_depend_on_the_seed_is_made_once(tmp_path: Path) -> None:
    """The fake export uses no seed; on one model artifact, whatever the seed, it is one artifact."""
    without = [stage if stage.name != "train" else _seedless(stage) for stage in STAGES]
    path = tmp_path / "pipeline.yaml"
    path.write_text("seeds: [0, 1, 2]\nstages: {train: {epochs: 1}, export: {}}\n")
    planned = make_plan(load_pipeline(path, without), without)
    record = made(tmp_path, planned)
    states = [(node.arm, node.entry, node.state) for node in record.nodes]
    assert [s for s in states if s[2] == "done"] == [("main", "train", "done"), ("main", "export", "done")]
    assert len(states) == 6 and len(set(keys(record).values())) == 2


def _seedless(stage):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    def write(ctx) -> None:  # type: ignore[no-untyped-def]
        (ctx.out / "payload.txt").write_text("the same under every seed\n")

    return replace(stage, run=write, uses=frozenset({"data", "model", "device"}))


def test_the_benchmark_is_told_the_seed_and_the_family_of_what_it_reads(tmp_path: Path) -> None:
    record = made(tmp_path, plan(tmp_path, SEEDED))
    node = record.node("main", "benchmark")
    artifact = Store(tmp_path / "artifacts").find("benchmark", str(node.key))
    assert artifact is not None
    read = {(each["arm"], each["seed"]) for each in artifact.manifest["inputs"]["onnx"]}
    assert read == {
        ("main", 3), ("dense", 3), ("random", 3), ("main@seed5", 5), ("dense@seed5", 5), ("random@seed5", 5)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "overrides", "seeds"),
    [
        (SEEDED, ["seed=9"], (9,)),
        (PIPELINE, ["seeds=[1, 2]"], (1, 2)),
        (SEEDED, ["seeds=[7]"], (7,)),
        (PIPELINE.replace("seed: 0\n", ""), [], (0,)),
    ],
)
def test_an_option_for_the_one_takes_the_place_of_the_other_in_the_file(
    tmp_path: Path, text: str, overrides: list[str], seeds: tuple[int, ...]
) -> None:
    spec = plan(tmp_path, text, *overrides).spec
    assert spec.seeds == seeds
    assert spec.arms["main"].seed == seeds[0]
    assert len(spec.arms) == 3 * len(seeds)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (PIPELINE.replace("seed: 0", "seed: 0\nseeds: [1]"), [], "seeds: contradicts 'seed'"),
        (PIPELINE, ["seed=1", "seeds=[2]"], "seeds: contradicts 'seed'"),
        (PIPELINE, ["seeds=[1, 1]"], "seeds: names a seed twice"),
        (PIPELINE, ["seeds=[]"], "seeds must be a list of whole numbers"),
        (PIPELINE, ["seeds=[-1]"], "seeds[0] must be a whole number from 0 to 4294967295"),
        (SEEDED, ["arms.random.seed=3"], "arms.random.seed: the pipeline has 'seeds'"),
    ],
)
def test_seeds_that_contradict_are_refused(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(tmp_path, text, *overrides)
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == 3


def test_a_mistake_in_an_arm_is_told_once_and_not_once_a_seed(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        plan(tmp_path, "seeds: [0, 1, 2]\nstages: {export: {}}\narms: {other: {export: {opset: 18}}}\n")
    assert [error.message.partition(" ")[0] for error in caught.value.also] == ["arms.other.export"]
    assert caught.value.message == "stages.export reads model, and no earlier stage writes it"


# ---- What is said about them


def seeded_run(root: Path) -> tuple[dict[str, Any], Any]:
    """A complete run of which the benchmark has two seeds."""
    bench = Bench(root)
    line = {"provider": "cpu", "batch": 1, "threads": 1, "io": "host", "seeds": [3, 5], "variant": ["int8", "fp32"]}
    main = {"arm": "main", "top1": [0.97, 0.95], "top1_mean": 0.96, "top1_low": 0.833, "top1_high": 1.0}
    speed = {"speedup": [2.0, 3.0], "speedup_mean": 2.45, "bytes": [1, 1]}
    metrics = measurement() | {"over_seeds": [{**line, **main, **speed}]}
    bench.add("main", "benchmark", metrics, config={"providers": ["cpu"], "batch_sizes": [1, 8], "threads": [1]})
    return bench.record(spec={"seeds": [3, 5]}), bench.shelf


def test_the_report_names_the_seeds_and_shows_mean_interval_and_each_of_them(tmp_path: Path) -> None:
    facts = collect(*seeded_run(tmp_path))
    for page in (render_html(facts), render_markdown(facts)):
        for said in ("3, 5", "96.0%", "97.0%, 95.0%", "2.45×", "2.00×, 3.00×", "INT8, FP32", "first seed", "2 seeds"):
            assert said in page, said
    assert 'href="#seeds"' in render_html(facts) and 'id="seeds"' in render_html(facts)


def test_the_terminal_shows_the_summary_over_seeds_within_80_columns(tmp_path: Path) -> None:
    record, shelf = seeded_run(tmp_path)
    manifest = shelf.find("benchmark", record["nodes"][0]["key"]).manifest
    shown = StringIO()
    Console(file=shown, width=80).print(views.measurement(manifest["metrics"]))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    title = lines.index("over seeds 3, 5: cpu, batch 1, 1 thread")
    assert [line.split() for line in lines[title + 2 : title + 4]] == [
        ["main", "96.0%", "97.0%", "95.0%", "2.45×", "2.00×", "3.00×"],
        ["83.3–100%"],
    ]
