"""The prune stage as it is written in pipeline.yaml: what it takes, what it refuses, and what it hands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_vision import image_folder, network

from sievit.pipeline.errors import SievitError
from sievit.pipeline.plan import make_plan
from sievit.pipeline.preflight import check_settings
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.weights import load_network

PIPELINE = """\
name: cut
seed: 1
data:  {source: images, image_size: 32, test_fraction: 0.3, calibration: 0.2}
model: {name: deit_tiny_patch16_224, weights: given.safetensors,
        args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  prune: {target: {macs: 0.6}, round_to: 8, images: 8, repair: ridge}
"""


def pipeline(folder: Path, text: str, classes: int = 2) -> tuple[Any, Store]:
    if not (folder / "images").exists():
        image_folder(folder / "images", per_class=8)
        save_file(network(classes=classes).body.state_dict(), folder / "given.safetensors")
    (folder / "pipeline.yaml").write_text(text)
    return make_plan(load_pipeline(folder / "pipeline.yaml", STAGES), STAGES), Store(folder / "artifacts")


def cut(folder: Path, text: str) -> tuple[Path, dict[str, Any]]:
    plan, store = pipeline(folder, text)
    run(plan, store, Manner(Silent(), (InvalidInput,)))
    newest = max(folder.glob("artifacts/prune/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    return newest.parent, json.loads(newest.read_text())["metrics"]


def refusal(folder: Path, text: str, classes: int = 2) -> str:
    with pytest.raises(SievitError) as caught:
        plan, store = pipeline(folder, text, classes)
        check_settings(plan, (InvalidInput,))
        run(plan, store, Manner(Silent(), (InvalidInput,)))
    assert caught.value.exit_code == 3
    assert not list(folder.glob("artifacts/prune/*/manifest.json"))
    return caught.value.text()


def test_a_pretrained_network_is_cut_and_repaired_without_training(tmp_path: Path) -> None:
    folder, metrics = cut(tmp_path, PIPELINE)
    smaller = load_network(folder)
    assert smaller.architecture.macs() == metrics["after"]["macs"] <= 0.6 * metrics["before"]["macs"]
    assert metrics["repair"] and all(row["left"] <= row["without"] for row in metrics["repair"])
    assert 0 <= metrics["top1_before_cut"] <= 1
    plain, _ = cut(tmp_path, PIPELINE.replace(", repair: ridge", ""))
    plans = [(path / "plan.json").read_text() for path in (folder, plain)]
    assert plans[0] == plans[1], "repair does not choose"
    x = torch.rand(4, 3, 32, 32)
    assert not torch.equal(smaller(x), load_network(plain)(x))


def test_the_plan_says_what_stayed_and_names_a_block_that_is_gone(tmp_path: Path) -> None:
    axes = "axes: {heads: 0, qk: 0, v: 0, mlp: 0, embed: 0, depth: {press: 1.0, spare: [0, 2]}}"
    folder, metrics = cut(tmp_path, PIPELINE.replace("macs: 0.6", "macs: 0.8").replace("images: 8", axes))
    plan = json.loads((folder / "plan.json").read_text())
    assert [block is None for block in plan["blocks"]] == [False, True, False]
    assert plan["blocks"][0]["mlp"] == list(range(192)) and plan["embed"] == [list(range(48))]
    assert [row["block"] for row in metrics["widths"]["after"]] == [0, 2]
    assert metrics["widths"]["embed"] == [[48], [48]]


def test_squared_gradients_are_those_of_single_images(tmp_path: Path) -> None:
    """However many images a pass: and another choice than the gradients of all of them together."""
    text = PIPELINE.replace("macs: 0.6}", "macs: 0.6}, importance: hessian")
    plans = []
    for batch in (1, 8):
        folder, _ = cut(tmp_path, text.replace("images: 8", f"images: 8, batch_size: {batch}"))
        plans.append((folder / "plan.json").read_text())
    assert plans[0] == plans[1]
    folder, _ = cut(tmp_path, PIPELINE)
    assert (folder / "plan.json").read_text() != plans[0]


@pytest.mark.parametrize(
    ("written", "instead", "part", "help"),
    [
        (", weights: given.safetensors", "", "the one of the model block is untrained", "model.weights"),
        ("images: 8", "axes: {mlp: {press: 1, blocks: [0, 3]}}", "[0, 3] for a network of 3 blocks", "from 0 to 2"),
        ("images: 8", "axes: {depth: {press: 1, spare: [7]}}", "[7] for a network of 3 blocks", "from 0 to 2"),
        ("images: 8", "axes: {v: {press: 1, spare: [0], blocks: [1]}}", "axes.v.spare: contradicts blocks", "one of"),
        ("images: 8", "axes: {v: {press: 1, blocks: []}}", "axes.v.blocks must be a list", "that is not empty"),
        ("images: 8", "axes: {v: {pres: 1}}", "unknown key 'pres' in stages.prune.axes.v", "did you mean 'press'?"),
        ("images: 8", "axes: {v: 2}", "axes.v must be a number from 0 to 1 or a mapping", "press, blocks, spare"),
        ("images: 8", "axes: {heads: 0, qk: 0, v: 0, mlp: 0, embed: 0}", "every axis is 0", ""),
        ("images: 8", "axes: {head_width: 0.5}", "unknown key 'head_width'", ""),
        ("images: 8", "importance: trained", "no stage before it trains", "put a train before it"),
        ("repair: ridge", "ridge: 0.1", "repair is null", ""),
        ("images: 8, repair: ridge", "images: 8, importance: l1", "looks at no images", ""),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    written: str, instead: str, part: str, help: str, tmp_path: Path
) -> None:
    assert written in PIPELINE
    text = refusal(tmp_path, PIPELINE.replace(written, instead))
    assert part in text and help in text
    assert "pipeline.yaml:" in text


def test_weights_of_other_classes_are_not_cut_untrained(tmp_path: Path) -> None:
    assert "answers 5 classes, this data has 2" in refusal(tmp_path, PIPELINE, classes=5)


@pytest.mark.parametrize("calibration", ["ticket", "split"])
def test_calibration_images_are_of_the_ticket_or_of_the_split_and_of_every_class(
    calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sievit.stages.vision import calibration as images_of_calibration

    seen: list[tuple[np.ndarray, np.ndarray]] = []
    chosen = images_of_calibration.at_most

    def watched(labels: Any, members: Any, most: Any, draw: Any) -> Any:
        made = chosen(labels, members, most, draw)
        seen.append((np.asarray(members), labels[made]))
        return made

    monkeypatch.setattr(images_of_calibration, "at_most", watched)
    ticket = "  ticket: {examples: {method: random, keep: 0.6}}\n  prune: {calibration: " + calibration + ", "
    cut(tmp_path, PIPELINE.replace("  prune: {", ticket).replace("images: 8", "images: 4"))
    members, labels = seen[-1]
    split = 2 * 8 - 5 - 2  # test and calibration parts are taken first
    assert (len(members) < split) == (calibration == "ticket")
    assert sorted(np.bincount(labels)) == [2, 2]
