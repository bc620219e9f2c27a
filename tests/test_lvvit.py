"""LV-ViT against its formulas, written out here, and what a ticket leaves of its answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vision import ARGS, images, network
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.vision.network import create


def tokens_by_formula(body: Any, x: Tensor) -> Tensor:
    """Normalised tokens as in the authors' release: four convolutions, branches divided by 2, no bias on q, k and v."""
    stem = body.patch_embed
    for conv, norm in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
        x = norm(conv(x)).clamp(min=0)
    x = stem.proj(x)
    assert x.shape[2:] == (4, 4)
    x = torch.cat([body.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + body.pos_embed
    for block in body.blocks:
        q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T).view(len(x), 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1)
        x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2)) / 2
        x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))) / 2
    normalised: Tensor = body.norm(x)
    return normalised


def test_lvvit_computes_the_papers_formulas() -> None:
    net, x = network("lv-vit"), images(3)
    net.train()(images(8))  # running statistics that are not 0 and 1
    body: Any = net.eval().body
    tokens = tokens_by_formula(body, x)
    dense = body.aux_head(tokens[:, 1:])
    expected = body.head(tokens[:, 0]) + 0.5 * dense.max(1).values
    assert torch.allclose(net(x), expected, atol=1e-5)
    net.set_token_training(True)
    assert torch.allclose(net(x), expected, atol=1e-5), "the separate answers are for training only"


def test_the_best_patch_is_sought_among_the_kept_ones_only() -> None:
    net, x = network("lv-vit"), images(4)
    ticket = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(4)])
    net.set_token_training(True)
    net.train().body.patch_embed.eval()  # batch statistics would differ from the running ones
    by_class, by_patch = net(x, ticket)
    assert by_patch.shape == (4, 5, 5)
    for row in range(4):
        best = torch.stack([max(by_patch[row, patch, c] for patch in range(5)) for c in range(5)])
        assert torch.allclose(net.eval()(x, ticket)[row], by_class[row] + 0.5 * best, atol=1e-5)


def test_a_patch_that_was_left_out_is_still_seen_by_its_neighbours() -> None:
    """The stem's convolutions overlap: gathering before it would be another network."""
    net, x = network("lv-vit"), images(1)
    changed = x.clone()
    changed[:, :, :8, 8:16] += 3.0  # patch 1, the neighbour of patch 0
    assert not torch.allclose(net(x, torch.tensor([[0]])), net(changed, torch.tensor([[0]])), atol=1e-4)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_stem_makes_one_token_of_each_even_patch(patch: int) -> None:
    net = create("lvvit_t", classes=3, image_size=32, args={**ARGS, "stem_dim": 4, "patch_size": patch})
    assert net.architecture.grid == (32 // patch, 32 // patch)
    assert net(images(2)).shape == (2, 3)


def test_an_odd_patch_size_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidInput, match="patch_size 5 is odd"):
        create("lvvit_t", classes=3, image_size=40, args={**ARGS, "patch_size": 5})


def test_only_a_network_with_a_head_for_patches_trains_on_them() -> None:
    with pytest.raises(InvalidInput, match="no head"):
        network("deit").set_token_training(True)
