"""bench/train_rate.py: what its figures stand for, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_vision import data

from sievit.stages.vision.dataset import load_split

SCRIPT = Path(__file__).parents[1] / "bench" / "train_rate.py"

# Stands in for timm's train.py: as many steps as the folder has batches, each with the rate of 0.1 s.
TRAIN = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", type=pathlib.Path)
parser.add_argument("--batch-size", type=int)
options, _ = parser.parse_known_args()
assert list((options.data_dir / "validation").rglob("*.png"))
steps = len(list((options.data_dir / "train").rglob("*.png"))) // options.batch_size
for step in range(steps):
    rate = options.batch_size / 0.1
    print(f"Train: 0 [{step}/{steps}]  Loss: 2.3 (2.3)  Time: 0.100s, {rate:>7.2f}/s  (0.100s, {rate:>7.2f}/s)")
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_rate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def work(bench: ModuleType, tmp_path: Path) -> object:
    images = load_split(data(), tmp_path, "train")
    return bench.Work(
        images, batch=8, steps=2, warm=1, patch=4, depth=1, ema=None, keep=0.5, device=torch.device("cpu")
    )  # fmt: skip


def test_a_pass_over_a_ticket_counts_as_one_over_all_examples(bench: ModuleType, work: object) -> None:
    taken = [
        {"timm": bench.Seconds(4.0, 3.0), "whole": bench.Seconds(2.0, 3.0), "ticket": bench.Seconds(1.0, 2.0)}
    ] * 2  # fmt: skip
    for clock, ratios, rate in (("wall", [1, 2, 4, 8], 16), ("processor", [1, 1, 1.5, 3], 8)):
        rows = bench.rates(taken, work, clock)
        assert [row["ratio"]["median"] for row in rows] == ratios
        assert rows[-1]["images_per_s"] == rate  # 8 images a step, half of the examples


@pytest.mark.parametrize(
    ("loader", "whole", "ticket", "device", "told"),
    [
        (0.049, 1.0, 1.5, "cpu", []),
        (0.05, 1.0, 1.5, "cpu", ["the loader takes 5.0%"]),
        (0.01, 0.99, 1.5, "cpu", ["Sievit: 0.99x"]),
        (0.01, 1.0, 1.49, "cpu", ["ticket, a pass: 1.49x"]),
        (0.5, 3.0, 0.5, "cuda", []),
        (0.5, 2.9, 5.0, "cuda", ["Sievit: 2.90x"]),
    ],
)
def test_a_bar_that_is_missed_is_told(
    bench: ModuleType, loader: float, whole: float, ticket: float, device: str, told: list[str]
) -> None:
    shares = [{"images": "whole", "batch": 8, "wall": {"median": loader}}]
    rows = [
        {"run": run, "clock": "wall", "ratio": {"median": ratio}}
        for run, ratio in (("Sievit", whole), ("ticket, a pass", ticket))
    ]
    short = bench.missed(shares, rows, "wall", device)
    assert [said.startswith(start) for said, start in zip(short, told, strict=True)] == [True] * len(told)


def test_the_loader_and_the_rest_make_up_every_counted_step(bench: ModuleType, work: object) -> None:
    for ticketed in (False, True):
        steps = bench.of_fit(work, ticketed=ticketed)
        assert len(steps) == 2  # the first of three is not counted
        assert all(half.wall > 0 for step in steps for half in (step.loader, step.rest))


def test_timm_s_script_is_read_by_the_rates_that_it_prints(bench: ModuleType, work: object, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    folder = bench.written(work, tmp_path / "images")
    assert bench.of_timm_script(work, script, folder, workers=0).wall == pytest.approx(0.1)


def test_a_script_that_fails_ends_the_bench_with_its_last_words(
    bench: ModuleType, work: object, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise RuntimeError('no such option')")
    with pytest.raises(SystemExit, match=r"after 0 steps(.|\n)*no such option"):
        bench.of_timm_script(work, script, tmp_path, workers=0)


@pytest.mark.slow
def test_the_loop_is_measured_beside_timm_s_parts() -> None:
    smallest = ["--depth", "1", "--batches", "8", "--steps", "1", "--rounds", "1", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *smallest], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )  # fmt: skip
    assert done.returncode in (0, 1) and "its parts in this process" in done.stdout
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["loader"]) == 2 and len(facts["rates"]) == 8
    assert all(row["images_per_s"] > 0 for row in facts["rates"])
