"""Equal runs give equal weights, with as many threads as the machine has: threads that add in the order they come in
would give other last digits each time, and a resumed or repeated run another network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_vision import image_folder

from sievit.pipeline.plan import make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.device import open_device

# Large enough for torch to share the work among threads: a table of 256 positions, read by 32 images at a time.
PIPELINE = """
data:  {source: ../images, image_size: 32, test_fraction: 0.25, calibration: 0.2}
model: {name: deit_tiny_patch16_224, args: {patch_size: 2, embed_dim: 48, depth: 1, num_heads: 3}}
stages:
  ticket:   {patches: {method: attention, keep: 0.5}, proxy: {epochs: 1, batch_size: 32}}
  train:    {epochs: 2, batch_size: 32}
  prune:    {target: {macs: 0.6}}
  finetune: {epochs: 1, batch_size: 32}
arms:
  tokens: {ticket: null, train: {finish: 0.5, tokens: {method: attention, keep: 0.7, blocks: [0]}}}
"""


@pytest.fixture
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads")
def test_trainings_on_several_threads_repeat_to_the_bit(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", per_class=64)
    first, second = (_digests(tmp_path / name) for name in ("first", "second"))
    assert len(first) == 8
    assert first == second


@pytest.mark.usefixtures("several_threads")
def test_the_gradient_of_an_indexed_table_is_added_up_in_one_order() -> None:
    open_device("cpu")
    table = torch.randn(16, 192, requires_grad=True)
    rows = torch.stack([torch.randperm(16)[:12] for _ in range(64)])
    upstream = torch.randn(64, 12, 192)
    seen = {torch.autograd.grad(table[rows], table, upstream)[0].numpy().tobytes() for _ in range(50)}
    assert len(seen) == 1


def _digests(folder: Path) -> dict[tuple[str, str], str]:
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(PIPELINE)
    plan = make_plan(load_pipeline(folder / "pipeline.yaml", STAGES), STAGES)
    run(plan, Store(folder / "artifacts"), Manner(Silent(), (InvalidInput,)))
    manifests = [json.loads(path.read_text()) for path in folder.glob("artifacts/*/*/manifest.json")]
    return {(made["arm"], made["stage"]): made["digest"] for made in manifests}
