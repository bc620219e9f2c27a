"""What the ledger books is what networks computed: every forward pass counted by torch, as it happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_proxy import trained
from test_soup import SOUP
from test_teaching import STILL, cut
from test_teaching import stage as finetune_stage
from test_weight_masks import stage as train_stage
from tiny_vision import data, image_folder, network
from torch.utils.flop_counter import FlopCounterMode

from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.dataset import load_splits
from sievit.stages.vision.mask_settings import Soup
from sievit.stages.vision.proxy import macs
from sievit.stages.vision.teaching import Teacher
from sievit.stages.vision.teaching_settings import Distill
from sievit.stages.vision.vit import ViT


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Multiply-accumulates of all forward passes so far: of networks that train, of teachers, of looks at images."""
    total: Counter[str] = Counter()
    asked: list[str] = []
    forward, answer = ViT.forward, Teacher.answer

    def counting(self: ViT, *args: Any) -> Any:
        set_fused(self, False)  # torch does not count the fused kernel
        with FlopCounterMode(display=False) as counter:
            found = forward(self, *args)
        who = asked[-1] if asked else "training" if self.training and torch.is_grad_enabled() else "looking"
        total[who] += counter.get_total_flops() // 2
        return found

    def asking(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        asked.append("teacher")
        try:
            return answer(self, images)
        finally:
            asked.pop()

    monkeypatch.setattr(ViT, "forward", counting)
    monkeypatch.setattr(Teacher, "answer", asking)
    return total


@pytest.mark.parametrize("remembered", [False, True])
def test_fine_tuning_books_student_and_teacher_apart_and_to_the_last_product(
    tmp_path: Path, counted: Counter[str], remembered: bool
) -> None:
    still: dict[str, Any] = {"augment": STILL} if remembered else {}
    ctx, _ = finetune_stage(tmp_path, cut(network("distilled", classes=2)), epochs=2, distill=Distill(), **still)
    assert ctx.metrics["distill"]["remembered"] == remembered
    assert ctx.ledger["train_macs"] == 3 * counted["training"]
    assert ctx.ledger["teacher_macs"] == counted["teacher"] > 0
    assert "scoring_macs" not in ctx.ledger, "nothing is chosen here"


def test_trial_trainings_are_booked_as_scoring_and_the_training_after_them_as_training(
    tmp_path: Path, counted: Counter[str]
) -> None:
    save_file(network(classes=2).body.state_dict(), tmp_path / "w.safetensors")
    ctx = train_stage(tmp_path, Soup(**SOUP), weights="w.safetensors", epochs=1, lr=3e-3)
    assert ctx.ledger["train_macs"] + ctx.ledger["scoring_macs"] == 3 * counted["training"]
    assert ctx.ledger["train_macs"] == 3 * ctx.ledger["images"] * network(classes=2).architecture.macs()
    assert ctx.ledger["teacher_macs"] == 0
    assert ctx.ledger["scoring_seconds"] > 0 < ctx.ledger["seconds"]


def test_a_proxy_run_is_booked_with_its_looks_at_all_images(tmp_path: Path, counted: Counter[str]) -> None:
    images = load_splits(data(str(image_folder(tmp_path / "images"))), Path()).train
    fitted = trained(images, tmp_path / "proxy")
    assert counted["looking"] > 0
    assert macs(fitted.network, fitted, len(images)) == 3 * counted["training"] + counted["looking"]
