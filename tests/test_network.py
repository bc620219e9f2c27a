"""Our network against timm's own forward, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_vision import ARGS, FAMILIES, images, network

from sievit.stages.methods import InvalidInput
from sievit.stages.vision import families
from sievit.stages.vision.architecture import load_architecture
from sievit.stages.vision.network import create, outline
from sievit.stages.vision.vit import adopt
from sievit.stages.vision.weights import load_network, save_network


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("deit_tinny", "deit_tiny_patch16_224"),
        ("DeiT-S", "deit_small_patch16_224"),
        ("vit_small", "vit_small_patch16_224"),
        ("vit-base-patch16-224", "vit_base_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("lvvit_small", "lvvit_s"),
    ],
)
def test_a_name_without_its_sizes_is_answered_with_models_that_go_through(written: str, meant: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        outline(written, image_size=224, args={})
    named = caught.value.hint.removeprefix("did you mean ").rstrip("?").split(", ")
    assert meant in named
    for name in named:
        families.check_module(name, timm.model_entrypoint(name).__module__)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_without_tickets_and_reduction_it_computes_what_timm_computes(family: str) -> None:
    ours = network(family)
    name, args = FAMILIES[family]
    theirs = timm.create_model(name, num_classes=5, img_size=32, **args).eval()
    theirs.load_state_dict(ours.body.state_dict())
    assert torch.allclose(ours(images(3)), theirs(images(3)), atol=1e-5)


def test_local_weights_of_a_timm_model_load(tmp_path: Path) -> None:
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=32, **ARGS).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = create(
        "deit_tiny_patch16_224", classes=5, image_size=32, args=ARGS, weights=tmp_path / "w.safetensors"
    ).eval()
    assert torch.allclose(ours(images(2)), theirs(images(2)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("deit_tinny_patch16_224", {}, "did you mean"),
        ("resnet18", {}, "vit_*, deit_*"),
        ("vit_base_patch16_siglip_224", {}, "attention pooling"),
        ("vit_base_patch16_plus_clip_240", {"block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
        ("swin_tiny_patch4_window7_224", {}, "window_size to one of 2, 4, 8"),
        ("deit_tiny_patch16_224", {"depht": 3}, "depht"),
        ("deit_tiny_patch16_224", {"embed_dim": 50, "num_heads": 3}, "embed_dim"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(name: str, args: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        create(name, classes=5, image_size=32, args=args)
    assert part in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("module", list(families.REASONS))
def test_a_family_that_is_asked_for_in_vain_is_told_why_and_what_works(module: str) -> None:
    name = timm.list_models(module=module)[0]
    with pytest.raises(InvalidInput) as caught:
        create(name, classes=5, image_size=224, args={})
    assert str(caught.value) == f"{name} cannot be used: {families.REASONS[module]}"
    assert caught.value.hint == families.WORKING


def test_patches_from_another_network_are_refused_whatever_the_model_is_called() -> None:
    with pytest.raises(InvalidInput, match="HybridEmbed"):
        adopt(timm.create_model("vit_tiny_r_s16_p8_224"))


def test_weights_that_timm_has_not_are_not_looked_for_under_another_name() -> None:
    with pytest.raises(InvalidInput, match="no pretrained weights of lvvit_s") as caught:
        create("lvvit_s", classes=5, image_size=32, args={}, pretrained=True)
    assert caught.value.field == "model.pretrained"


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(InvalidInput, match="safetensors"):
        create("deit_tiny_patch16_224", classes=5, image_size=32, args=ARGS, weights=tmp_path / "w.pth")


def _damage(folder: Path, change: str) -> None:
    weights, record = folder / "model.safetensors", folder / "architecture.json"
    raw = json.loads(record.read_text())
    if change == "half a file":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif change == "no file":
        weights.unlink()
    elif change == "NaN":
        net = load_network(folder)
        with torch.no_grad():
            net.body.norm.weight[0] = float("nan")
        save_network(net, folder)
        return
    elif change == "a width of 0":
        raw["blocks"][0]["mlp"] = 0
    elif change == "another width":
        raw["blocks"][1]["mlp"] += 8
    elif change == "a missing field":
        del raw["embed"]
    elif change == "another schema":
        raw["schema"] = 99
    elif change == "too many tokens":
        raw["tokens"] = [{"block": 1, "keep": 99}]
    record.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "change",
    [
        "half a file",
        "no file",
        "NaN",
        "a width of 0",
        "another width",
        "a missing field",
        "another schema",
        "too many tokens",
    ],
)
def test_a_damaged_model_is_refused_and_the_file_named(change: str, tmp_path: Path) -> None:
    save_network(network(), tmp_path)
    assert load_architecture(tmp_path / "architecture.json") == network().architecture
    _damage(tmp_path, change)
    with pytest.raises(InvalidInput, match=str(tmp_path)):
        load_network(tmp_path)
