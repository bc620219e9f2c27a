"""Patch tickets through the two stages that make and use them: every kind of ticket as an arm of one small pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_vision import image_folder

from sievit.pipeline.plan import make_plan
from sievit.pipeline.preflight import check_settings
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.architecture import Architecture, load_architecture

PIPELINE = """
seed: 3
data:  {source: images, image_size: 32, test_fraction: 0.25, calibration: 0.2}
model: {name: deit_tiny_distilled_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  ticket:
    patches: {method: attention}
    selector: {keep_per_stage: 0.8}
    proxy: {epochs: 1, batch_size: 8, model: {name: vit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 24,
      depth: 4, num_heads: 2, class_token: false, global_pool: avg}}}
  train:  {epochs: 2, batch_size: 8, finish: 0.25}
arms:
  online:   {ticket: {patches: {view: online}}, train: {cutmix: 1.0}}
  inverse:  {ticket: {patches: {method: inverse}}}
  random:   {ticket: {patches: {method: random}}}
  saliency: {ticket: {patches: {method: saliency, view: online}}}
  whole:    {ticket: {patches: {keep: 1.0}}}
"""
ASKING = ("main", "online", "inverse")  # a network ranks
CONTROLS = ("random", "saliency")


class Finished:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests = [json.loads(p.read_text()) for p in folder.glob("artifacts/*/*/manifest.json")]

    def of(self, arm: str, stage: str) -> dict[str, Any]:
        (found,) = [m for m in self.manifests if (m["arm"], m["stage"]) == (arm, stage)]
        return dict(found)

    def path(self, arm: str, file: str) -> Path:
        return self.folder / "artifacts" / "ticket" / self.of(arm, "ticket")["key"] / file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("arms")
    image_folder(folder / "images", per_class=16)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    plan = make_plan(load_pipeline(folder / "pipeline.yaml", STAGES), STAGES)
    check_settings(plan, (InvalidInput,))
    run(plan, Store(folder / "artifacts"), Manner(Silent(), (InvalidInput,)))
    return Finished(folder)


def test_every_kind_keeps_as_many_patches_and_trains_as_many_steps(finished: Finished) -> None:
    left = 16
    for _ in range(3):
        left = -(-left * 8 // 10)
    for arm in (*ASKING, *CONTROLS):
        ticket, train = finished.of(arm, "ticket")["metrics"]["patches"], finished.of(arm, "train")
        assert (ticket["kept_per_image"], ticket["of"]) == (left, 16)
        assert train["ledger"]["steps"] == finished.of("whole", "train")["ledger"]["steps"]
        assert set(train["metrics"]["top1"]) == {"all", "tickets", "random"}
    assert finished.of("whole", "train")["ledger"]["tokens_per_image"] == 16


def test_the_selector_is_in_the_artifact_of_tickets_that_a_network_ranked(finished: Finished) -> None:
    for arm in (*ASKING, *CONTROLS):
        assert finished.path(arm, "selector/model.safetensors").exists() == (arm in ASKING)
        assert finished.path(arm, "selector/preprocessing.json").exists() == (arm in ASKING)
    selector = load_architecture(finished.path("online", "selector/architecture.json"))
    assert isinstance(selector, Architecture)
    assert (selector.embed, selector.prefix, [drop.keep for drop in selector.tokens]) == (24, 0, [13, 11, 9])


def test_online_and_cached_tickets_rank_the_plain_test_images_alike(finished: Finished) -> None:
    cached, online = (np.load(finished.path(arm, "ranks_test.npy")) for arm in ("main", "online"))
    assert np.array_equal(cached, online)
    assert np.array_equal(np.load(finished.path("inverse", "ranks_test.npy")), 15 - cached)
    assert not finished.path("online", "ranks.npy").exists()


def test_the_ledger_has_the_selector_inside(finished: Finished) -> None:
    selector = load_architecture(finished.path("online", "selector/architecture.json"))
    assert isinstance(selector, Architecture)
    look = selector.selector_macs()
    train = finished.of("online", "train")["ledger"]
    whole = finished.of("whole", "train")["ledger"]
    on_tickets = (16 * train["images"] - train["tokens_per_image"] * train["images"]) / (16 - 9)
    assert train["scoring_macs"] == pytest.approx(look * on_tickets, rel=0.01)
    for arm in ("main", *CONTROLS):
        assert finished.of(arm, "train")["ledger"]["scoring_macs"] == 0
        assert finished.of(arm, "train")["ledger"]["train_macs"] < whole["train_macs"]
    cost = finished.of("main", "ticket")["metrics"]["patches"]["cost"]
    assert cost["selector"] == cost["online"] - cost["cached"] == look
    assert cost["break_even"] == pytest.approx(look / (cost["dense"] - cost["cached"]))
    assert finished.of("saliency", "ticket")["ledger"]["scoring_macs"] == 0
    # Cached tickets rank the training split once; online ones only its picture's sample.
    images = finished.of("main", "ticket")["metrics"]["examples"]["of"]
    cached, online = (finished.of(arm, "ticket")["ledger"]["scoring_macs"] for arm in ("main", "online"))
    assert cached - online == look * (images - 2)


def test_the_ticket_picture_shows_image_heat_and_ticket_of_every_class(finished: Finished) -> None:
    for arm in ("main", "online", "random"):
        (figure,) = finished.of(arm, "ticket")["figures"]
        svg = (finished.path(arm, figure["file"])).read_text()
        assert svg.count("<image ") == 3 * 2
        assert ">ant<" in svg and ">bee<" in svg
        assert ("another one in each epoch" in figure["caption"]) == (arm == "random")
