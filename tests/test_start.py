"""Training that begins with another stage's network, and fine-tuning that keeps its zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_preflight import Project
from tiny_vision import image_folder

from sievit.stages.methods.weight_masks import weights_kept
from sievit.stages.vision.masks import pool
from sievit.stages.vision.weights import load_network

PIPELINE = """\
data:  {source: i, image_size: 32}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
stages:
  pretrain: {uses: train, epochs: 2, batch_size: 8, tokens: {keep: 0.5, blocks: [1]}}
  train: {start: pretrain, steps: 1, batch_size: 8, lr: 1.0e-30, min_lr: 0, weight_decay: 0}
"""


def project(folder: Path, text: str = PIPELINE) -> Project:
    image_folder(folder / "i", per_class=16)
    return Project(folder, text)


def root(made: Project, stage: str) -> Path:
    return made.store.resolve(stage).root


def test_a_training_begins_with_the_network_of_the_stage_that_it_names_and_without_its_tokens(tmp_path: Path) -> None:
    made = project(tmp_path)
    made.run()
    first, second = load_network(root(made, "train@1")), load_network(root(made, "train@2"))
    assert first.architecture.tokens and not second.architecture.tokens
    begun, kept = first.body.state_dict(), second.body.state_dict()
    assert all(torch.equal(begun[name], t) for name, t in kept.items()), "a step of no length moves nothing"


def test_what_begins_with_a_stage_counts_as_pretrained(tmp_path: Path) -> None:
    made = project(tmp_path)
    made.plan("train.masks={method: soup, keep: 0.5, steps: 1}")
    made.plan("train.masks={method: hold}")
    assert "begins at random" in made.unplanned("train.start=null", "train.masks={method: hold}")


def test_a_start_of_another_network_or_other_classes_is_refused(tmp_path: Path) -> None:
    made = project(tmp_path)
    made.run("train=null")
    narrow = made.refused("train.start=train@1", "pretrain=null", "model.args.embed_dim=24")
    assert "start train@1 is deit_tiny_patch16_224 with" in narrow and "--set train.start=train@1" in narrow
    image_folder(tmp_path / "others", classes=("cat", "dog"))
    others = made.refused("train.start=train@1", "pretrain=null", "data.source=others")
    assert "start train@1 answers other classes than this data has" in others
    assert "names a stage or an artifact" in made.unplanned("train.start=timm:deit_tiny_patch16_224")


SPARSE = """\
data:  {source: i, image_size: 32}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
stages:
  train: {epochs: 1, batch_size: 8, masks: {method: magnitude, keep: 0.4, schedule: one_shot, begin: 1.0}}
  prune: {importance: l1, target: {macs: 0.6}}
  finetune: {steps: 3, batch_size: 8, ema: 0.5, masks: {method: hold}}
"""


def test_zeros_stay_through_a_structured_cut_and_fine_tuning(tmp_path: Path) -> None:
    made = project(tmp_path, SPARSE)
    made.run()
    trained = pool(load_network(root(made, "train")))
    total = sum(weight.numel() for weight in trained.values())
    assert sum(int(weight.count_nonzero()) for weight in trained.values()) == weights_kept(0.4, total)
    cut, tuned = pool(load_network(root(made, "prune"))), pool(load_network(root(made, "finetune")))
    assert any(cut[name].shape != trained[name].shape for name in cut)
    assert all(torch.equal(cut[name] == 0, weight == 0) for name, weight in tuned.items())
    assert any(not torch.equal(cut[name], weight) for name, weight in tuned.items())
    record = made.store.resolve("finetune").manifest["metrics"]["masks"]
    assert record["before"] == record["density"]
    assert record["before"]["nonzero"] == sum(int(weight.count_nonzero()) for weight in cut.values())


@pytest.mark.parametrize("between", ["", "  prune: {importance: l1, target: {macs: 0.6}}\n"])
def test_holding_where_nothing_made_a_zero_is_refused_before_anything_runs(tmp_path: Path, between: str) -> None:
    text = SPARSE.replace(", masks: {method: magnitude, keep: 0.4, schedule: one_shot, begin: 1.0}", "")
    text = text.replace("  prune: {importance: l1, target: {macs: 0.6}}\n", between)
    said = project(tmp_path, text).unplanned()
    assert "stages.finetune.masks: hold keeps zeros, and train trains all weights" in said
    assert f"pipeline.yaml:{5 + bool(between)}:49" in said
