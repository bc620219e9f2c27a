"""Joules of a stage: counters of a made-up machine, what happens at their end, what is said without them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sievit.pipeline import energy
from sievit.pipeline.energy import Meter

RANGE_UJ = 262_143_328_850


def zone(folder: Path, name: str, called: str, microjoules: int) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "name").write_text(f"{called}\n")
    (made / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made / "energy_uj"


def test_processors_and_memory_are_counted_once_and_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    first, second = (
        zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
    )
    memory = zone(tmp_path, "intel-rapl:0:2", "dram", RANGE_UJ - 1_000_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 7),
        zone(tmp_path, "intel-rapl:2", "psys", 7),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7),
    ]
    with Meter("cpu", tmp_path) as meter:
        first.write_text("8000000")  # 3 J
        second.write_text("500000")  # 0.5 J
        memory.write_text("2000000")  # 1 J to its end, and 2 J after it
        for other in others:
            other.write_text("9000000000")
        assert meter.joules() == {"cpu": pytest.approx(6.5), "gpu": None}
        memory.write_text("1000000")  # all the way round
        assert meter.joules() == {"cpu": pytest.approx(6.5 + RANGE_UJ / 1e6 - 1), "gpu": None}


def test_a_long_stage_is_looked_at_before_a_counter_comes_round_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "EVERY_S", 0.005)
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with Meter("cpu", tmp_path) as meter:
        for share in (0.6, 0.2, 0.8, 0.4):  # the counter is filled twice
            (tmp_path / "next").write_text(str(round(share * RANGE_UJ)))
            (tmp_path / "next").replace(file)  # a kernel's file is never half written
            time.sleep(0.1)
        total = meter.joules()
    assert total is not None and total["cpu"] == pytest.approx(2.4 * RANGE_UJ / 1e6)
    assert not meter._thread.is_alive()


def test_without_counters_or_without_the_right_to_read_them_nothing_is_said(tmp_path: Path) -> None:
    assert Meter("cpu", tmp_path / "none").joules() is None
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 0).unlink()  # as if only root could read it
    with Meter("cpu", tmp_path) as meter:
        assert meter.joules() is None


def test_a_counter_that_stops_answering_makes_no_sum_that_looks_whole(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    with Meter("cpu", tmp_path) as meter:
        file.unlink()
        assert meter.joules() == {"cpu": None, "gpu": None}


def test_gpus_are_counted_where_a_stage_computes_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = {0: 1000.0, 1: 50.0}
    nvml: Any = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Meter("cpu", tmp_path).joules() is None
    with Meter("cuda", tmp_path) as meter:
        millijoules.update({0: 4000.0, 1: 2050.0})
        assert meter.joules() == {"cpu": None, "gpu": pytest.approx(5.0)}
