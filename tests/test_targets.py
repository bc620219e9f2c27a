"""A target is met by what is measured: the search by theorem, the stage on files with a clock of the tests' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_benchmark import Folder, Listening
from tiny_vision import ARGS, image_folder, network, swin

from sievit.pipeline import keys
from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import candidates, proposals, prune, ranges
from sievit.stages.__main__ import STAGES
from sievit.stages.candidates import Serving
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Axis, Pressure, at_dial
from sievit.stages.methods.target_search import best, meet
from sievit.stages.prune import Axes, PruneConfig
from sievit.stages.targets import Target, reach
from sievit.stages.vision.network import rebuild
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.preprocessing import choose
from sievit.stages.vision.surgery import kept_architecture, score
from sievit.stages.vision.weights import load_network, save_network

# ---- the search


@pytest.mark.parametrize("truth", [lambda x: x, lambda x: 0.4 + 0.9 * x, lambda x: 0.3 * x**1.7, lambda x: 2 * x**0.6])
@pytest.mark.parametrize("asked", [0.55, 0.8, 1.1])
def test_a_target_is_met_within_five_percent_whatever_estimate_and_truth_have_in_common(
    truth: Any, asked: float
) -> None:
    """As long as both rise together."""
    trials = meet(asked, lambda limit: limit, truth)
    found = best(trials, asked)
    assert found is not None
    assert 0.95 * asked <= found.cost == truth(found.candidate) <= asked
    assert len(trials) <= 6


def test_between_two_neighbours_the_one_below_is_taken_and_none_is_measured_twice() -> None:
    measured: list[int] = []

    def propose(limit: float) -> int | None:
        return math.floor(limit) if limit >= 1 else None

    def measure(candidate: int) -> float:
        measured.append(candidate)
        return 1.5 * candidate

    found = best(meet(10.0, propose, measure), 10.0)
    assert found is not None
    assert found.candidate == 6  # 9.0; the next one up is 10.5
    assert len(set(measured)) == len(measured)


def test_a_target_that_no_candidate_meets_leaves_no_best_one() -> None:
    assert meet(1.0, lambda limit: None, float) == []
    trials = meet(1.0, lambda limit: limit, lambda candidate: 2.0)
    assert best(trials, 1.0) is None


# ---- settings


@pytest.mark.parametrize(
    "fields", [{}, {"macs": 0.5, "speedup": 2.0}, {"size_mb": 1.0, "latency_ms": 2.0}, {"on": Serving()}]
)
def test_a_target_is_exactly_one(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of macs, params, size_mb, latency_ms and speedup"):
        Target(**fields)


@pytest.mark.parametrize(("target", "timed"), [({"macs": 0.5}, False), ({"size_mb": 1.0}, False),
                                               ({"speedup": 2.0}, True), ({"latency_ms": 2.0}, True)])  # fmt: skip
def test_the_host_is_in_the_key_exactly_where_the_result_hangs_on_it(target: dict[str, float], timed: bool) -> None:
    found = keys.material(
        prune.STAGE, PruneConfig(target=Target(**target)), inputs={}, many={}, references={},
        files={}, data=DataConfig(source="builtin:digits"), data_fingerprint="",
        model=ModelConfig(name="deit_tiny_patch16_224"), weights_digest=None,
        seed=0, device="cpu", host_fingerprint="abc",
    )  # fmt: skip
    assert found.get("host") == ("abc" if timed else None)


def test_how_long_is_waited_for_a_process_is_in_no_key() -> None:
    """A user who gives a quantizer more time wants what was made before the clock ran out."""
    found = [stage for stage in (*STAGES, ranges.STAGE) if "timeout" in stage.config.model_fields]
    assert {stage.name for stage in found} == {"adopt", "quantize", "benchmark", "ranges"}
    for stage in found:
        fields = {"file": "a.onnx", "images": 1, "alpha": None, "bits": 8, "symmetric": False}
        given = {name: value for name, value in fields.items() if name in stage.config.model_fields}
        first, second = (
            keys.material(
                stage, stage.config(**given, timeout=seconds), inputs={}, many={}, references={}, files={},
                data=DataConfig(source="images"), data_fingerprint="", model=ModelConfig(name="x"),
                weights_digest=None, seed=0, device="cpu", host_fingerprint="",
            )
            for seconds in (60.0, 90.0)
        )  # fmt: skip
        assert first == second and len(first["config"]) == len(stage.config.model_fields) - 1


# ---- how far it can reach


@pytest.mark.parametrize("family", ["deit", "swin"])
def test_reach_is_what_is_counted_on_the_networks_themselves(family: str) -> None:
    made = swin() if family == "swin" else network(family)
    before = made.architecture
    scores = score(made, "l1", 0)
    axes = Pressure(heads=Axis(1.0), mlp=Axis(0.5, frozenset({0})))
    rounding = {"round_to": 8, "head_round_to": 4}
    rows = {row.axis: row for row in reach(scores, axes, before, lambda a: float(len(a.blocks)), rounding)}
    assert list(rows) == ["heads", "qk (off)", "v (off)", "mlp", "embed (off)", "depth (off)", "all that are on"]
    alone = kept_architecture(before, at_dial(scores, 1.0, Pressure(mlp=Axis(1.0, frozenset({0}))), **rounding))
    assert rows["mlp"].params == pytest.approx(rebuild(alone).parameter_count() / made.parameter_count())
    assert rows["mlp"].macs == pytest.approx(alone.macs() / before.macs())
    less = {row.axis: row for row in reach(scores, axes, before, None, rounding, deepest=0.5)}
    alone = kept_architecture(before, at_dial(scores, 0.5, Pressure(mlp=Axis(1.0, frozenset({0}))), **rounding))
    assert less["mlp"].macs == pytest.approx(alone.macs() / before.macs()) and less["mlp"].macs > rows["mlp"].macs
    assert less["depth (off)"].macs == rows["depth (off)"].macs
    assert rows["heads"].time == 1.0 > (rows["depth (off)"].time or 1.0)
    assert rows["all that are on"].macs < min(rows["heads"].macs, 1.0)


# ---- the stage


def context(tmp_path: Path, config: PruneConfig, **args: int) -> Context:
    data = DataConfig(source=str(tmp_path / "i"), image_size=32)
    if not (tmp_path / "m").is_dir():
        image_folder(tmp_path / "i", per_class=8)
        (tmp_path / "m").mkdir()
        made = network(classes=2, **args)
        save_network(made, tmp_path / "m")
        choose(made, data, ("ant", "bee"), pretrained=False).save(tmp_path / "m")
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir(exist_ok=True)
    return Context(
        config=config, data=data, model=ModelConfig(name="deit_tiny_patch16_224", args=ARGS), seed=0, device="cpu",
        arm="main", entry="prune", base=tmp_path, out=tmp_path / "out", work=tmp_path / "work",
        inputs={"model": Folder(tmp_path / "m")}, many=(), references={}, progress=Listening(),  # type: ignore[dict-item,arg-type]
    )  # fmt: skip


@pytest.mark.slow
def test_a_size_is_that_of_the_file_which_is_exported(tmp_path: Path) -> None:
    ctx = context(tmp_path, PruneConfig(importance="l1", target=Target(size_mb=0.15)), depth=1)
    prune.run(ctx)
    export(load_network(ctx.out), tmp_path / "served.onnx", candidates.OPSET)
    served = (tmp_path / "served.onnx").stat().st_size / 1e6
    assert ctx.metrics["reached"]["size_mb"] == pytest.approx(served, rel=1e-3)
    assert 0.95 * 0.15 <= served <= 0.15


def clock(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    """A host on which attention costs nothing, MLPs all: what MACs do not know."""

    def time(self: Any, architecture: Any) -> dict[str, float]:
        asked.append(architecture)
        ms, dense = (1 + sum(b.mlp for b in a.blocks) / 100 for a in (architecture, network().architecture))
        return {"p50_ms": ms, "dense_p50_ms": dense, "speedup": dense / ms}

    monkeypatch.setattr(candidates.Files, "_time", time)
    monkeypatch.setattr(proposals, "_table", lambda ctx, before: None)


@pytest.mark.parametrize("target", [{"speedup": 2.0}, {"latency_ms": 3.5}])
def test_a_timed_target_is_met_by_the_clock_and_not_by_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: dict[str, float]
) -> None:
    asked: list[Any] = []
    clock(monkeypatch, asked)
    ctx = context(tmp_path, PruneConfig(importance="l1", target=Target(**target), axes=Axes()))
    prune.run(ctx)
    after = load_network(ctx.out).architecture
    ms, dense = (1 + sum(b.mlp for b in a.blocks) / 100 for a in (after, network().architecture))
    ((kind, wanted),) = target.items()
    if kind == "speedup":
        assert wanted <= dense / ms <= wanted / 0.9
        assert ctx.metrics["reached"]["speedup"] == pytest.approx(dense / ms)
    else:
        assert 0.9 * wanted <= ms <= wanted
        assert ctx.metrics["reached"]["latency_ms"] == pytest.approx(ms)
    (note,) = [text for text in ctx.progress.notes if "asked for" in text]  # type: ignore[attr-defined]
    assert "measured" in note
    assert "cpu, batch 1, 1 thread" in note


def test_a_search_that_was_killed_goes_on_with_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Any] = []
    clock(monkeypatch, first)
    config = PruneConfig(importance="l1", target=Target(speedup=2.0))
    prune.run(context(tmp_path, config))
    assert len(first) > 1
    known = json.loads((tmp_path / "work" / "candidates.json").read_text())
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del known[list(known)[-1]]
    (tmp_path / "work" / "candidates.json").write_text(json.dumps(known))
    again: list[Any] = []
    clock(monkeypatch, again)
    prune.run(context(tmp_path, config))
    assert again == first[-1:]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


def test_a_target_beyond_all_axes_is_refused_with_what_each_can_give(tmp_path: Path) -> None:
    config = PruneConfig(importance="l1", target=Target(macs=0.01), axes=Axes(embed=0.0))
    with pytest.raises(InvalidInput, match="out of reach") as refusal:
        prune.run(context(tmp_path, config))
    for line in ("heads ", "embed (off) ", "depth (off) ", "all that are on "):
        assert f"\n  {line}" in str(refusal.value)
    assert "prune.axes" in refusal.value.hint


def test_a_target_that_the_clock_never_meets_is_refused_with_how_near_it_came_and_what_each_axis_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this host every network takes as long as the dense one, whatever the estimate says."""
    same = {"p50_ms": 1.0, "dense_p50_ms": 1.0, "speedup": 1.0}
    monkeypatch.setattr(candidates.Files, "_time", lambda self, architecture: same)
    monkeypatch.setattr(proposals, "_table", lambda ctx, before: None)
    with pytest.raises(InvalidInput, match=r"speedup: 2 is out of reach \(the nearest .* needs 2\.00 times") as refusal:
        prune.run(context(tmp_path, PruneConfig(importance="l1", target=Target(speedup=2.0))))
    assert "\n  mlp " in str(refusal.value)
    assert "quieter host" in refusal.value.hint
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_candidates_are_timed_as_files_beside_the_dense_one(tmp_path: Path) -> None:
    """A whole network against a few units of it: the one comparison whose outcome no busy host turns round."""
    dense = network(embed_dim=96, depth=6).architecture
    least = kept_architecture(
        dense, at_dial(score(network(embed_dim=96, depth=6), "l1", 0), 1.0, Pressure(depth=Axis(1.0)), round_to=8,
                       head_round_to=4)
    )  # fmt: skip
    ctx = context(tmp_path, PruneConfig(target=Target(speedup=2.0)))
    files = candidates.Files(ctx, dense, Serving(seconds=0.15))
    found = files.timing(least)
    assert found["speedup"] > 1.5
    assert found["p50_ms"] < found["dense_p50_ms"]
    assert found["noise"] >= 1
    assert candidates.Files(ctx, dense, Serving()).timing(least) == found
