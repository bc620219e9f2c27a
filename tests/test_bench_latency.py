"""bench/latency.py: what its bars are, and that worker and bare loop take turns on the same file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_onnx

from sievit.stages.deploy.bundle import open_bundle
from sievit.stages.deploy.latency import Plan
from sievit.stages.deploy.variants import Variant

SCRIPT = Path(__file__).parents[1] / "bench" / "latency.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_latency", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(p50: float, *, reach: float = 0.01, floor: float = 1.0) -> dict[str, Any]:
    row = {"p50_ms": p50, "p50_low": p50 / (1 + reach), "p50_high": p50 * (1 + reach)}
    return {"rows": [row], "noise_floor": {"percent": floor}}


@pytest.mark.parametrize(
    ("ratio", "runs", "seconds", "torch", "says"),
    [
        (1.02, [run(10), run(10.2)], 9.0, False, []),
        (1.04, [run(10), run(10)], 9.0, False, ["1.040 times that of a bare loop"]),
        (0.96, [run(10), run(10)], 9.0, False, ["0.960 times that of a bare loop"]),
        (1.0, [run(10), run(11)], 9.0, False, ["two runs differ by 9.1%, and say that they are 1.0% uncertain"]),
        (1.0, [run(10), run(11, floor=12.0)], 9.0, False, []),  # the noise floor said it
        (1.0, [run(10, reach=0.2), run(11)], 9.0, False, []),  # the interval said it
        (1.0, [run(10), run(10)], 11.0, True, ["first row came after 11.0 s", "torch was imported"]),
    ],
)
def test_a_bar_is_missed_where_it_says(
    bench: ModuleType, ratio: float, runs: list[dict[str, Any]], seconds: float, torch: bool, says: list[str]
) -> None:
    found = bench.missed(ratio, runs, seconds, torch)
    assert len(found) == len(says)
    assert all(part in line for part, line in zip(says, found, strict=True))


def test_worker_and_bare_loop_take_a_slot_each_in_every_round(bench: ModuleType, tmp_path: Path) -> None:
    path = tiny_onnx.linear(tmp_path / "a.onnx")
    subject = Variant("", "a", False, open_bundle(path, sidecar_required=False)).subject(1)
    ours, bare = bench.against_bare(subject, 1, Plan(seconds=0.2, sessions=2, warm_up_s=0.1))
    assert [(s.session, s.round) for s in ours] == [(s.session, s.round) for s in bare]
    assert {(s.session, s.round) for s in ours} == {(session, number) for session in (0, 1) for number in range(20)}
    assert all(len(a.wall_ms) == len(b.wall_ms) > 0 for a, b in zip(ours, bare, strict=True))
