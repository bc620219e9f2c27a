"""bench/prune.py: both sides are counted alike, and a bar that is missed is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sievit.stages.vision.network import create

SCRIPT = Path(__file__).parents[1] / "bench" / "prune.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_prune", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """DeiT-T with two blocks at 32 px in the place of timm's."""

    def made(name: str, **more: Any) -> nn.Module:
        return timm.create_model(name, img_size=32, depth=2, **more)

    monkeypatch.setattr(bench, "timm", SimpleNamespace(create_model=made, layers=timm.layers))
    monkeypatch.setattr(bench, "SIDE", 32)
    return "deit_tiny_patch16_224"


def test_a_network_of_torch_pruning_is_counted_as_one_of_ours(bench: ModuleType, small: str) -> None:
    dense = create(small, classes=10, image_size=32, args={"depth": 2}).architecture
    whole = bench.timm.create_model(small, num_classes=10)
    assert bench.counted(whole, dense) == dense.macs()
    half = bench.uniform(small, 0.5)
    assert [block.mlp.fc1.out_features for block in half.blocks] == [384, 384]
    assert half.head.in_features == 96
    assert [block.attn.qkv.out_features for block in half.blocks] == [3 * 3 * 32] * 2
    assert half(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    ours = dense.cut([b.__class__(3, 32, 32, b.scale, 384, b.place) for b in dense.blocks], [96])
    assert bench.counted(half, dense) == ours.macs()


def test_the_rival_has_nearly_as_many_multiply_accumulates(bench: ModuleType, small: str) -> None:
    dense = create(small, classes=10, image_size=32, args={"depth": 2}).architecture
    wanted = round(0.6 * dense.macs())
    assert bench.counted(bench.nearest(small, dense, wanted), dense) == pytest.approx(wanted, rel=0.03)


def test_a_bar_that_is_missed_is_told_and_one_that_holds_is_not(bench: ModuleType) -> None:
    rows = [
        {"model": "m", "cut": "uniform", "kind": "macs", "asked": 0.5, "reached": 0.491, "speedup": 1.8},
        {"model": "m", "cut": "by latency", "kind": "macs", "asked": 0.5, "reached": 0.48, "speedup": 2.2},
        {"model": "m", "cut": "to a speed-up", "kind": "speedup", "asked": 2.0, "reached": 2.1, "speedup": 1.7},
        {"model": "m", "cut": "Torch-Pruning", "kind": "macs", "asked": None, "reached": None, "speedup": 1.8},
        {"model": "n", "cut": "to a speed-up", "kind": "speedup", "asked": 2.0, "reached": 2.11, "speedup": 1.7},
        {"model": "n", "cut": "uniform", "kind": "macs", "asked": 0.5, "reached": 0.5, "speedup": 1.1},
    ]
    assert bench.missed(rows) == [
        "m, uniform: 1.80x, Torch-Pruning 1.80x",
        "m, by latency: 0.480 where 0.5 was asked",
        "n, to a speed-up: 2.110 where 2.0 was asked",
    ]
