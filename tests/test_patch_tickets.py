"""Tickets and token reduction: composition against a loop, prefix tokens, ties, geometry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vision import FAMILIES, images, network

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.patch_tickets import (
    center_ranks,
    compose_ranks,
    inverse_ranks,
    kept_patches,
    map_ranks,
    random_ranks,
    ranks_from_scores,
    saliency,
)
from sievit.stages.methods.token_reduction import (
    column_attention,
    gather_tokens,
    keep_count,
    prefix_attention,
    top_tokens,
)
from sievit.stages.vision.selector import arrange, ticket_size
from sievit.stages.vision.vit import drops_for


def composed_by_loop(stages: list[tuple[list[float], list[int]]], patches: int) -> list[int]:
    """The authors' idx = idx[stage_topk], then ranks: survivors of more stages first, then the last score, then the
    index.
    """
    index = list(range(patches))
    survived = dict.fromkeys(range(patches), 0)
    last = dict.fromkeys(range(patches), 0.0)
    for scores, kept in stages:
        for position, patch in enumerate(index):
            last[patch] = scores[position]
        index = [index[k] for k in kept]
        for patch in index:
            survived[patch] += 1
    order = sorted(range(patches), key=lambda p: (-survived[p], -last[p], p))
    return [order.index(p) for p in range(patches)]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 30), st.floats(0.3, 1.0), st.integers(0, 10_000))
def test_composed_ranks_equal_the_loop(patches: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, scores, kept = patches, [], []
    for _ in range(3):
        score = torch.rand(2, left, generator=generator)
        left = keep_count(left, keep)
        scores.append(score)
        kept.append(top_tokens(score, left))
    ranks = compose_ranks(scores, kept, patches)
    for row in range(2):
        stages = [(s[row].tolist(), k[row].tolist()) for s, k in zip(scores, kept, strict=True)]
        assert ranks[row].tolist() == composed_by_loop(stages, patches)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.floats(0.02, 1.0), st.integers(0, 10_000))
def test_a_ticket_holds_unique_in_range_patches_of_the_asked_number(patches: int, keep: float, seed: int) -> None:
    ranks = random_ranks(torch.arange(4), patches, seed)
    count = keep_count(patches, keep)
    ticket = kept_patches(ranks, count)
    assert ticket.shape == (4, count)
    for row in ticket.tolist():
        assert len(set(row)) == count
        assert row == sorted(row)
        assert row[0] >= 0 and row[-1] < patches


@pytest.mark.parametrize("family", list(FAMILIES))
def test_prefix_tokens_are_never_dropped(family: str) -> None:
    net = network(family)
    prefix = net.architecture.prefix
    marked = torch.randn(3, prefix + 16, 48)
    shortened = gather_tokens(marked, torch.tensor([[0, 15], [3, 4], [7, 9]]), prefix)
    assert torch.equal(shortened[:, :prefix], marked[:, :prefix])
    dropping = net.with_tokens(drops_for(net.architecture, (0, 1, 2), 0.5)).eval()
    assert dropping(images(3)).shape == (3, 5)
    scores, kept = dropping.select(images(3))
    assert [k.shape[1] for k in kept] == [8, 4, 2]
    assert [s.shape[1] for s in scores] == [16, 8, 4]


def test_prefix_attention_is_the_prefix_rows_of_the_full_map() -> None:
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    full = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    assert torch.allclose(prefix_attention(q, k, 2, 0.5), full[:, :, :2, 2:].mean((1, 2)), atol=1e-6)


def test_equal_scores_keep_the_lower_index() -> None:
    assert top_tokens(torch.zeros(1, 50), 3).tolist() == [[0, 1, 2]]
    assert ranks_from_scores(torch.tensor([[1.0, 2.0, 2.0, 0.0]])).tolist() == [[2, 0, 1, 3]]


@pytest.mark.parametrize("family", ["deit", "distilled", "lv-vit"])
def test_a_ticket_of_all_patches_changes_nothing(family: str) -> None:
    net, x = network(family), images(2)
    every = torch.arange(16).expand(2, -1)
    assert torch.allclose(net(x), net(x, every), atol=1e-6)


def test_patches_outside_the_ticket_do_not_matter() -> None:
    net, x = network(), images(1)
    ticket = torch.tensor([[0, 5, 10]])
    changed = x.clone()
    changed[:, :, 24:, 24:] += 3.0  # patch 15
    assert torch.equal(net(x, ticket), net(changed, ticket))
    assert not torch.equal(net(x), net(changed))


def test_ranks_follow_a_flip_and_a_shift_of_whole_patches() -> None:
    ranks = torch.arange(16).unsqueeze(0)
    grid = (4, 4)
    flip = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    assert torch.equal(map_ranks(ranks, flip, grid).view(4, 4), ranks.view(4, 4).flip(1))
    # The view lies one patch to the right of the image: its last column shows padding, the least important.
    right = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    mapped = map_ranks(ranks, right, grid).view(4, 4)
    assert torch.equal(mapped[:, :3], ranks.view(4, 4)[:, 1:])
    assert (mapped[:, 3] == 16).all()


def test_mapped_ranks_name_the_patch_that_grid_sample_shows() -> None:
    """Oracle: an image whose every pixel is its patch's number, moved by torch's own grid_sample."""
    numbers = torch.arange(16.0).view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    theta = torch.tensor([[[-0.8, 0, 0.11], [0, 0.8, -0.07]]])
    centres = torch.nn.functional.affine_grid(theta, [1, 1, 4, 4], align_corners=False)
    shown = torch.nn.functional.grid_sample(numbers, centres, mode="nearest", align_corners=False)
    assert torch.equal(map_ranks(torch.arange(16).unsqueeze(0), theta, (4, 4)).view(4, 4).float(), shown[0, 0])


def test_saliency_ranks_the_textured_patch_first() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 16:24] = torch.from_numpy(np.random.default_rng(0).random((8, 8), dtype=np.float32))
    scores = saliency(image, (4, 4))
    assert int(scores.argmax()) == 4 * 1 + 2
    assert float(scores[0, 12]) == 0.0


@pytest.mark.parametrize("blocks", [None, (1,), (0, 1, 2)])
@pytest.mark.parametrize("patches", range(1, 16))
def test_a_selector_leaves_exactly_the_tickets_patches(patches: int, blocks: tuple[int, ...] | None) -> None:
    net = network("distilled")
    drops = arrange(net.architecture, net.architecture, blocks, patches)
    assert drops[-1].keep == patches
    selector = net.with_tokens(drops).eval()
    scores, kept = selector.select(images(2))
    ranks = compose_ranks(scores, kept, 16)
    assert torch.equal(ranks.sort(1).values, torch.arange(16).expand(2, -1))
    inside = (ranks[0] < patches).nonzero().flatten().tolist()
    position = list(range(16))
    for stage in kept:
        position = [position[i] for i in stage[0].tolist()]
    assert inside == position


@pytest.mark.parametrize("blocks", [(3,), (1, 1), (-1, 2)])
def test_a_selector_refuses_blocks_that_it_does_not_have(blocks: tuple[int, ...]) -> None:
    net = network()
    with pytest.raises(InvalidInput, match="blocks"):
        arrange(net.architecture, net.architecture, blocks, 8)


def test_a_selector_refuses_another_grid() -> None:
    net = network()
    other = network(patch_size=16).architecture
    with pytest.raises(InvalidInput, match=r"2 x 2 patches.* 4 x 4"):
        arrange(other, net.architecture, None, 8)


def test_without_prefix_tokens_patches_rank_by_the_column_mean_of_the_full_map() -> None:
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    for prefix in (0, 2):
        full = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, prefix:, prefix:].mean((1, 2))
        for rows in (1, 3, 10):
            assert torch.allclose(column_attention(q, k, prefix, 0.5, rows), full, atol=1e-6)


def test_a_network_without_prefix_tokens_keeps_the_columns_that_its_attention_map_says() -> None:
    net = network("vit", class_token=False, global_pool="avg")
    assert net.architecture.prefix == 0
    dropping = net.with_tokens(drops_for(net.architecture, (0,), 0.5)).eval()
    x = images(3)
    attention = net.body.blocks[0].attn
    tokens = net.body.blocks[0].norm1(net.body._pos_embed(net.body.patch_embed(x)))
    q, k, _ = attention.qkv(tokens).view(3, 16, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1).mean((1, 2)).topk(8).indices.sort().values
    _, (kept,) = dropping.select(x)
    assert torch.equal(kept, expected)


def test_a_distilled_model_ranks_by_the_mean_of_both_special_rows_and_keeps_both_tokens() -> None:
    net = network("distilled")
    dropping = net.with_tokens(drops_for(net.architecture, (0,), 0.5)).eval()
    x = images(3)
    attention = net.body.blocks[0].attn
    tokens = net.body.blocks[0].norm1(net.body._pos_embed(net.body.patch_embed(x)))
    q, k, _ = attention.qkv(tokens).view(3, 18, 3, 3, 16).permute(2, 0, 3, 1, 4)
    rows = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)[:, :, :2, 2:].mean(1)
    (scores,), (kept,) = dropping.select(x)
    assert torch.allclose(scores, (rows[:, 0] + rows[:, 1]) / 2, atol=1e-6)
    assert torch.equal(kept, ((rows[:, 0] + rows[:, 1]) / 2).topk(8).indices.sort().values)


def test_center_ranks_equal_a_slow_loop_and_ties_go_to_the_lower_index() -> None:
    for height, width in ((4, 4), (3, 3), (2, 5), (14, 14)):

        def distance(p: int, height: int = height, width: int = width) -> float:
            return (p // width - (height - 1) / 2) ** 2 + (p % width - (width - 1) / 2) ** 2

        order = sorted(range(height * width), key=lambda p: (distance(p), p))
        ranks = center_ranks((height, width)).tolist()
        assert [order.index(p) for p in range(height * width)] == ranks
    assert center_ranks((4, 4)).view(4, 4)[1:3, 1:3].flatten().tolist() == [0, 1, 2, 3]


def test_inverse_keeps_what_the_ticket_leaves_out() -> None:
    ranks = random_ranks(torch.arange(5), 16, seed=0)
    ticket, opposite = kept_patches(ranks, 6), kept_patches(inverse_ranks(ranks), 10)
    for row in range(5):
        assert sorted(ticket[row].tolist() + opposite[row].tolist()) == list(range(16))


def test_random_patches_depend_on_seed_epoch_and_image_and_on_nothing_else() -> None:
    ids = torch.tensor([5, 9, 2, 700_000])
    together = random_ranks(ids, 64, seed=3, epoch=4)
    for row, image in enumerate(ids):
        assert torch.equal(together[row], random_ranks(image[None], 64, seed=3, epoch=4)[0])
    assert torch.equal(together.sort(1).values, torch.arange(64).expand(4, -1))
    for other in (random_ranks(ids, 64, seed=3, epoch=5), random_ranks(ids, 64, seed=4, epoch=4)):
        assert not any(torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_random_patches_are_uniform() -> None:
    """Every patch gets every rank equally often, over images and over epochs: chi-squared with 255 - 30 degrees."""
    for ranks in (
        random_ranks(torch.arange(16_000), 16, seed=1),
        torch.cat([random_ranks(torch.arange(8), 16, seed=1, epoch=e) for e in range(2000)]),
    ):
        counts = torch.stack([(ranks == r).sum(0) for r in range(16)]).double()
        assert float(((counts - 1000).square() / 1000).sum()) < 225 + 5 * (2 * 225) ** 0.5


@pytest.mark.parametrize(("depth", "kept"), [(12, (177, 160, 144)), (3, (177, 160, 144))])
def test_a_keep_of_each_stage_is_composed_as_in_the_paper(depth: int, kept: tuple[int, ...]) -> None:
    """196 patches at 0.9 a stage leave 144, with a ceiling at every stage."""
    shape = network().architecture
    shape = replace(shape, grid=(14, 14), image_size=112, blocks=shape.blocks[:1] * depth)
    assert ticket_size(shape, shape, 1.0, 0.9, (0, 1, 2)) == kept[-1]
    drops = arrange(shape, shape, (0, 1, 2), kept[-1], 0.9)
    assert tuple(drop.keep for drop in drops) == kept


@pytest.mark.parametrize(
    ("keep", "of_stage", "numbers"), [(0.05, None, "0.05 of 16.* 0.8"), (1.0, 0.1, "0.1 of 2.*0.2")]
)
def test_a_keep_of_less_than_one_patch_is_refused_with_its_numbers(
    keep: float, of_stage: float | None, numbers: str
) -> None:
    shape = network().architecture
    with pytest.raises(InvalidInput, match=numbers):
        ticket_size(shape, shape, keep, of_stage, (0, 1, 2))
