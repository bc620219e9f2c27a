"""Milliseconds of blocks, and what is cut for them: rates from synthetic hosts, the way against a slow loop, operators
of a real file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_benchmark import Folder
from test_targets import context
from tiny_vision import network, swin

from sievit.pipeline.stage import Part
from sievit.stages import latencies, proposals, prune
from sievit.stages.methods.allocation import Axis, Pressure, Scores
from sievit.stages.methods.block_latency import (
    BlockLatency,
    BlockShape,
    Surroundings,
    TimedBlock,
    TimedSurroundings,
    fit,
    rewarded_multiple,
    sweep_widths,
)
from sievit.stages.methods.cost import BlockWidths
from sievit.stages.methods.greedy_allocation import Cost, ImportanceWorth, Stop, kept_of, way
from sievit.stages.prune import Axes, PruneConfig
from sievit.stages.targets import Target
from sievit.stages.vision import block_shapes
from sievit.stages.vision.architecture import TokenDrop
from sievit.stages.vision.block_shapes import probes, shapes, surroundings
from sievit.stages.vision.surgery import kept_architecture, score
from sievit.stages.vision.weights import load_network

RATES = BlockLatency(
    np.array([1e-5, 2e-6, 1e-6, 3e-8, 5e-8, 1e-6, 3e-8]),
    np.array([2e-5, 1e-6, 2e-6, 2e-8]),
    np.array([5e-5, 1e-6, 4e-8]),
    {},
    0.0,
)


def timed(shape: BlockShape, pace: float = 1.0) -> TimedBlock:
    return TimedBlock(shape, pace * RATES.attention_ms(shape), RATES.mlp_ms(shape))


# ---- the table


def test_rates_of_a_host_are_found_from_the_probes_and_tell_what_other_widths_take() -> None:
    dense = network(embed_dim=192, depth=6).architecture
    networks = probes(dense)
    rates = fit(
        [timed(shape) for one in networks for shape in shapes(one)],
        [TimedSurroundings(surroundings(one), RATES.outside_ms(surroundings(one))) for one in networks],
    )
    unseen = replace(shapes(dense)[0], embed=88, heads=1, qk=24, v=40, mlp=200)
    assert rates.attention_ms(unseen) == pytest.approx(RATES.attention_ms(unseen), rel=0.02)
    assert rates.mlp_ms(unseen) == pytest.approx(RATES.mlp_ms(unseen), rel=0.02)
    outside = surroundings(dense.cut(dense.blocks, [128]))
    assert rates.outside_ms(outside) == pytest.approx(RATES.outside_ms(outside), rel=0.05)
    assert rates.error < 1e-3


def test_each_kind_of_block_has_a_pace_of_its_own() -> None:
    networks = probes(swin(embed_dim=32, depths=[4, 4]).architecture)
    every = [shape for one in networks for shape in shapes(one)]
    slow = max(shape.kind for shape in every)
    rates = fit(
        [timed(shape, 3.0 if shape.kind == slow else 1.0) for shape in every],
        [TimedSurroundings(Surroundings(1, 1), 1.0)],
    )
    for shape in every[:8]:
        truth = RATES.attention_ms(shape) * (3.0 if shape.kind == slow else 1.0)
        assert rates.attention_ms(shape) == pytest.approx(truth, rel=0.25)


@pytest.mark.parametrize(("full", "multiple"), [(64, 16), (64, 8), (32, 8), (96, 16), (128, 32)])
def test_the_multiple_of_a_host_that_computes_in_packs_is_found(full: int, multiple: int) -> None:
    ms = {width: 1.0 + -(-width // multiple) * multiple for width in sweep_widths(full)}
    assert rewarded_multiple(ms, 4) == multiple


def test_a_host_that_rewards_no_multiple_leaves_the_least_one() -> None:
    assert rewarded_multiple({width: 3.0 + 0.1 * width for width in sweep_widths(768)}, 8) == 8
    assert rewarded_multiple({}, 4) == 4
    assert sweep_widths(6) == []


@pytest.mark.parametrize("family", ["deit", "distilled", "lv-vit", "swin"])
def test_what_is_outside_of_the_blocks_does_not_change_with_them(family: str) -> None:
    dense = (swin() if family == "swin" else network(family)).architecture
    narrow = dense.cut([replace(block, mlp=8, heads=1) for block in dense.blocks], dense.streams)
    assert surroundings(dense) == surroundings(narrow)
    assert 0 < surroundings(dense).macs < dense.macs()


def test_blocks_after_a_token_reduction_are_another_kind() -> None:
    made = network().architecture.with_tokens((TokenDrop(1, 5, fuse=True),))
    assert [(s.tokens, s.left) for s in shapes(made)] == [(17, 17), (17, 7), (7, 7)]


def test_probes_hold_every_width_of_the_sweeps_and_can_be_built() -> None:
    dense = network(embed_dim=192, depth=4).architecture
    found = probes(dense)
    mlp = {block.mlp for one in found for block in one.blocks}
    heads = {block.qk for one in found for block in one.blocks}
    assert mlp >= set(sweep_widths(768))
    assert heads >= set(sweep_widths(64))
    assert len({one.streams for one in found}) == 3


def test_operators_are_booked_to_their_block_and_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real file: one block with a wide MLP and one narrow head, one with a narrow MLP and many wide ones."""
    dense = network(embed_dim=96, depth=2, num_heads=8).architecture
    wide, narrow = dense.blocks
    odd = dense.cut([replace(wide, mlp=1536, heads=1, qk=8, v=8), replace(narrow, mlp=8, qk=96, v=96)], dense.streams)
    monkeypatch.setattr(block_shapes, "probes", lambda architecture: [odd])
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    record = json.loads(json.dumps(dense.as_json()))
    config = latencies.TableConfig(architecture=record, batch=1, threads=1)
    progress = context(tmp_path, PruneConfig(target=Target(macs=0.5))).progress
    ctx: Any = SimpleNamespace(
        config=config, out=tmp_path / "out", work=tmp_path / "work", progress=progress, metrics={}, seed=0
    )
    latencies.run(ctx)
    first, second = json.loads((tmp_path / "out" / "table.json").read_text())["blocks"]
    assert first["mlp_ms"] > 3 * second["mlp_ms"]
    assert second["attention_ms"] > 2 * first["attention_ms"]
    assert first["shape"]["mlp"] == 1536


# ---- the way


def scores(*, depth: int = 3, heads: int = 3, width: int = 8, units: int = 32, channels: int = 24) -> Scores:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> list[torch.Tensor]:
        return [torch.rand(shape, generator=draw) for _ in range(depth)]

    qk, v = some(heads, width), some(heads, width)
    of_heads = [q.sum(1) + o.sum(1) for q, o in zip(qk, v, strict=True)]
    return Scores(of_heads, qk, v, some(units), some(channels)[:1], torch.rand(depth, generator=draw), (0,) * depth)


MS = Cost(
    lambda number, w, channels: 0.3 + 0.1 * w.heads + 0.001 * channels * (w.heads * (w.qk + w.v) + w.mlp),
    lambda streams: 0.02 * sum(streams),
)
ALL = Pressure(Axis(1.0), Axis(0.5), Axis(1.0), Axis(1.0), Axis(1.0), Axis(1.0))
ROUNDING = {"round_to": 4, "head_round_to": 2}


def total(stop: Stop) -> float:
    blocks = [MS.block(i, w, stop.streams[0]) for i, w in enumerate(stop.blocks) if w is not None]
    return sum(blocks) + MS.outside(stop.streams)


def kept_importance(stop: Stop, given: Scores) -> dict[str, float]:
    """By axis, added up over the kept indices one by one."""
    kept, sums = kept_of(stop, given), {"qk": 0.0, "v": 0.0, "mlp": 0.0, "embed": 0.0}
    for number, block in enumerate(kept.blocks):
        if block is not None:
            for row, head in enumerate(block.heads.tolist()):
                sums["qk"] += sum(float(given.qk[number][head, at]) for at in block.qk[row].tolist())
                sums["v"] += sum(float(given.v[number][head, at]) for at in block.v[row].tolist())
            sums["mlp"] += sum(float(given.mlp[number][at]) for at in block.mlp.tolist())
    sums["embed"] = sum(float(given.embed[0][at]) for at in kept.embed[0].tolist())
    return sums


def neighbours(stop: Stop) -> list[tuple[Stop, float]]:
    """Every network that is one step narrower on one axis, with the pressure on it; slowly, and with no memory."""
    found: list[tuple[Stop, float]] = []
    for i, w in enumerate(stop.blocks):
        if w is None:
            continue
        options: list[tuple[BlockWidths | None, float]] = [
            (replace(w, heads=w.heads - 1), ALL.heads.press) if w.heads > 1 else (w, 0),
            (replace(w, qk=w.qk - 2), ALL.qk.press) if w.qk > 2 else (w, 0),
            (replace(w, v=w.v - 2), ALL.v.press) if w.v > 2 else (w, 0),
            (replace(w, mlp=w.mlp - 4), ALL.mlp.press) if w.mlp > 4 else (w, 0),
            (None, ALL.depth.press) if sum(b is not None for b in stop.blocks) > 1 else (w, 0),
        ]
        found += [
            (Stop((*stop.blocks[:i], after, *stop.blocks[i + 1 :]), stop.streams), press)
            for after, press in options
            if press
        ]
    if stop.streams[0] > 4:
        found.append((Stop(stop.blocks, (stop.streams[0] - 4,)), ALL.embed.press))
    return found


def test_every_step_loses_least_importance_for_its_milliseconds() -> None:
    given = scores()
    stops = way(given, ImportanceWorth(given), MS, ALL, **ROUNDING)
    assert len(stops) > 20
    for before, after in pairwise(stops):
        have = sum(kept_importance(before, given).values())

        def price(option: tuple[Stop, float], have: float = have, before: Stop = before) -> float:
            lost = have - sum(kept_importance(option[0], given).values())
            return lost / option[1] / (total(before) - total(option[0]))

        options = neighbours(before)
        chosen = next(option for option in options if option[0] == after)
        assert price(chosen) <= min(price(option) for option in options) * (1 + 1e-5)
        assert total(after) < total(before)
    assert neighbours(stops[-1]) == []


def test_what_saves_no_time_is_not_cut() -> None:
    given = scores()
    only_mlp = Cost(lambda number, w, channels: 0.01 * w.mlp, lambda streams: 1.0)
    last = way(given, ImportanceWorth(given), only_mlp, replace(ALL, depth=Axis()), **ROUNDING)[-1]
    assert {(w.heads, w.qk, w.v, w.mlp) for w in last.blocks if w is not None} == {(3, 8, 8, 4)}
    assert last.streams == (24,)
    by_block = Cost(lambda number, w, channels: 1.0, lambda streams: 1.0)
    stops = way(given, ImportanceWorth(given), by_block, ALL, **ROUNDING)
    assert [sum(w is None for w in stop.blocks) for stop in stops] == [0, 1, 2]


def test_axes_that_are_off_blocks_that_are_spared_and_those_that_are_fixed_stay_whole() -> None:
    given = replace(scores(), fixed=frozenset({2}))
    pressure = Pressure(mlp=Axis(1.0, frozenset({0})), depth=Axis(1.0, frozenset({1, 2})))
    last = way(given, ImportanceWorth(given), MS, pressure, **ROUNDING)[-1]
    whole = BlockWidths(3, 8, 8, 32)
    assert last.blocks == (replace(whole, mlp=4), None, whole)
    assert last.streams == (24,)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.45])
def test_a_step_of_a_whole_block_does_not_leave_a_proposal_far_below_its_limit(share: float) -> None:
    """Blocks that are worth little go first; what one of them goes too far is made up in units of others."""
    net = network(depth=4)
    before = net.architecture
    given = score(net, "l1", 0)
    rule = proposals.Rule(len(before.blocks), None, **ROUNDING)
    of_blocks = Pressure(mlp=Axis(0.001), heads=Axis(0.001), depth=Axis(1.0))
    propose = proposals._by_price(given, ImportanceWorth(given), rule, of_blocks, before)
    limit = share * before.macs()
    kept = propose(lambda record: float(record.macs()), limit)
    assert kept is not None
    unit = before.macs() - before.cut([replace(before.blocks[0], mlp=before.blocks[0].mlp - 4), *before.blocks[1:]],
                                      before.streams).macs()  # fmt: skip
    reached = kept_architecture(before, kept).macs()
    assert limit - unit < reached <= limit
    assert len(kept.left) == -(-int(1000 * share) // 250), "all blocks went that the limit has room for, and no more"


# ---- the stage


def test_the_stage_cuts_by_milliseconds_and_shows_the_budget(tmp_path: Path) -> None:
    """On a host where attention takes nearly all of the time, heads go although MACs say MLP."""
    dense = network(classes=2).architecture
    rows = []
    for one in probes(dense):
        rows += [
            {"shape": {f: getattr(s, f) for f in BlockShape.__slots__}, "attention_ms": 0.01 + 0.5 * s.heads,
             "mlp_ms": 0.001 + 1e-6 * s.mlp}
            for s in shapes(one)
        ]  # fmt: skip
    table = {
        "blocks": rows,
        "outside": [{"work": {"activations": 1, "macs": 1}, "ms": 0.1}],
        "sweeps": {"mlp": {}, "heads": {}},
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    asked: list[Any] = []

    def part(stage: Any, config: Any, *, role: str, model: Any = None) -> Part:
        asked.append((stage.name, config.batch, config.threads, role))
        return Part(Folder(tmp_path), made=True)  # type: ignore[arg-type]

    axes = Axes(qk=0.0, v=0.0, embed=0.0, depth=0.0)
    ctx = context(tmp_path, PruneConfig(importance="l1", target=Target(macs=0.9), allocation="latency", axes=axes))
    ctx.part = part
    prune.run(ctx)
    after = load_network(ctx.out).architecture
    assert asked == [("latencies", 1, 1, "latencies")]
    assert sum(b.heads for b in after.blocks) < 9
    assert [figure.name for figure in ctx.figures] == ["widths", "budget"]
    budget = ctx.metrics["budget"]
    assert len(budget["before"]) == 3 and budget["estimate_ms"][1] < 0.9 * budget["estimate_ms"][0]
    assert all(row["time"] is not None for row in ctx.metrics["feasible"])


def test_operators_are_weighed_on_the_cpu_alone() -> None:
    with pytest.raises(ValueError, match=r"only the provider cpu times, and target\.on names cuda"):
        PruneConfig(target=Target(macs=0.5, on={"provider": "cuda"}), allocation="latency")  # type: ignore[arg-type]
    assert PruneConfig(target=Target(macs=0.5), allocation="latency").pressed()["depth"].press == 1
    assert PruneConfig(target=Target(macs=0.5)).pressed()["depth"].press == 0
