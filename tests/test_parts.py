"""Parts of a stage's work that artifacts share: made once, kept when the stage fails, charged and found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import STAGES, TICKET, TRAIN, BadInput

from sievit.pipeline.collect import collect
from sievit.pipeline.errors import InputError, IntegrityError
from sievit.pipeline.plan import make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.records import RunRecord
from sievit.pipeline.runner import Manner, run, run_stage
from sievit.pipeline.settings import ModelConfig
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.stage import Config, Context, Stage
from sievit.pipeline.store import Store

PIPELINE = """
stages:
  ticket: {examples: {keep: 0.8}}
  train: {epochs: 1}
arms:
  other: {ticket: {examples: {keep: 0.5}}}
  third: {ticket: {examples: {keep: 0.4}}, seed: 7}
"""


class Probe(Config):
    number: int = 0


class Bench:
    """A pipeline whose ticket asks for a part; `calls` counts how often the part was made."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipeline.yaml"
        self.path.write_text(PIPELINE)
        self.store = Store(folder / "artifacts")
        self.calls: list[Mapping[str, Any]] = []
        self.fail = False
        self.stages = tuple(replace(s, run=self.ticket) if s.name == "ticket" else s for s in STAGES)
        self.probe = Stage(
            "probe", 1, Probe, self.make, (), "model", "", uses=frozenset({"data", "model", "seed"})
        )  # fmt: skip

    def make(self, ctx: Context) -> None:
        self.calls.append({"seed": ctx.seed, "model": ctx.model.name})
        (ctx.out / "payload.txt").write_text(f"{ctx.seed} {ctx.model.name} {ctx.config.number}")
        ctx.ledger["images"] = 5

    def ticket(self, ctx: Context) -> None:
        parts = [
            ctx.part(self.probe, Probe(), role="first"),
            ctx.part(self.probe, Probe(), role="second", model=ModelConfig(name="smaller")),
        ]
        if self.fail:
            raise BadInput("the images are not images")
        ctx.ledger["images"] = sum(part.artifact.ledger["images"] for part in parts)
        ctx.metrics["made"] = [part.made for part in parts]
        TICKET.run(ctx)

    def run(self, force: bool = False, **options: Any) -> RunRecord:
        plan = make_plan(load_pipeline(self.path, self.stages), self.stages)
        return run(plan, self.store, Manner(Silent(), (BadInput,), force, command=("sievit",)), **options)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_arms_share_a_part_that_depends_on_nothing_they_differ_in(bench: Bench) -> None:
    record = bench.run()
    assert bench.calls == [
        {"seed": 0, "model": ModelConfig().name},
        {"seed": 0, "model": "smaller"},
        {"seed": 7, "model": ModelConfig().name},
        {"seed": 7, "model": "smaller"},
    ]
    tickets = [bench.store.resolve(record.node(arm, "ticket").ref or "") for arm in ("main", "other", "third")]
    assert [t.metrics["made"] for t in tickets] == [[True, True], [False, False], [True, True]]
    keys = [[t.manifest["inputs"][role]["key"] for role in ("first", "second")] for t in tickets]
    assert keys[0] == keys[1] != keys[2]
    assert bench.run().did_nothing and len(bench.calls) == 4


def test_a_part_reads_the_inputs_that_it_is_given_and_depends_on_what_they_hold(bench: Bench) -> None:
    seen: list[dict[str, str]] = []

    def make(ctx: Context) -> None:
        seen.append({role: artifact.ref for role, artifact in ctx.inputs.items()})
        (ctx.out / "payload.txt").write_text("the same whatever it reads")

    probe = replace(bench.probe, run=make)

    def train(ctx: Context) -> None:
        ctx.part(probe, Probe(), role="first", reads=("tickets", "model"))
        TRAIN.run(ctx)

    bench.stages = tuple(replace(s, run=train) if s.name == "train" else s for s in bench.stages)
    record = bench.run(arms=["main", "other"])
    tickets = [record.node(arm, "ticket").ref for arm in ("main", "other")]
    assert seen == [{"tickets": ref} for ref in tickets]
    parts = [
        bench.store.resolve(record.node(arm, "train").ref or "").manifest["inputs"]["first"]["key"]
        for arm in ("main", "other")
    ]
    assert parts[0] != parts[1]
    assert bench.run(arms=["main", "other"]).did_nothing


def test_a_part_outlives_the_failure_of_the_stage_that_asked(bench: Bench) -> None:
    bench.fail = True
    with pytest.raises(InputError, match="not images"):
        bench.run(arms=["main"])
    bench.fail = False
    record = bench.run(arms=["main"])
    assert len(bench.calls) == 2
    assert bench.store.resolve(record.node("main", "ticket").ref or "").metrics["made"] == [False, False]


def test_what_is_forced_makes_its_parts_again_once(bench: Bench) -> None:
    bench.run(arms=["main", "other"])
    bench.run(arms=["main", "other"], force=True)
    assert len(bench.calls) == 4


def test_a_part_is_never_taken_for_the_artifact_of_its_entry(bench: Bench) -> None:
    """A stage run by itself looks for the newest artifact of the entry before it, also where no run is recorded."""
    bench.run(arms=["main"])
    for record in bench.store.runs.glob("*/run.json"):
        record.unlink()
    plan = make_plan(load_pipeline(bench.path, bench.stages), bench.stages)
    node = plan.node("main", "train")
    assert node is not None
    made = run_stage(plan, node, bench.store, Manner(Silent(), force=True)).node("main", "train")
    assert bench.store.resolve(made.ref or "").manifest["inputs"]["tickets"]["stage"] == "ticket"


def test_gc_keeps_the_parts_of_what_it_keeps(bench: Bench) -> None:
    bench.run()
    bench.path.write_text(PIPELINE.replace("0.8", "0.7").replace("seed: 7", "seed: 9"))
    bench.run()
    removed = {removal.path.name for removal in collect(bench.store, keep_last=1)}
    kept = bench.store.artifacts("probe")
    assert sorted({a.manifest["seed"] for a in kept}) == [0, 9]
    assert len(removed & {a.key for a in kept}) == 0 and len(removed) > 2


def test_parts_are_verified_before_they_are_relied_on(bench: Bench) -> None:
    bench.run(arms=["main"])
    payload = next(bench.store.folder("probe", bench.store.artifacts("probe")[0].key).glob("payload.txt"))
    payload.chmod(0o644)
    payload.write_text("changed")
    with pytest.raises(IntegrityError, match=r"payload\.txt"):
        bench.run(arms=["other"])
