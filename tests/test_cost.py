"""The cost model against EViT's published table and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from tiny_vision import images, network, swin
from torch.utils.flop_counter import FlopCounterMode

from sievit.stages.methods.cost import BlockWidths, ticket_cost, vit_macs
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.vision.architecture import TokenDrop
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.network import Network, create


@pytest.mark.parametrize(
    ("keep", "published"), [(1.0, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_deit_small_costs_what_evit_published(keep: float, published: float) -> None:
    reduction, left = {}, 196
    if keep < 1:
        for block in (3, 6, 9):
            left = keep_count(left, keep)
            reduction[block] = left
    macs = vit_macs(
        384, [BlockWidths(6, 64, 64, 1536)] * 12,
        patches=196, prefix=1, patch_values=768, classes=1000, reduction=reduction,
    )  # fmt: skip
    assert macs / 1e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(
    ("name", "millions", "published"), [("lvvit_t", 8.5, 2.9), ("lvvit_s", 26.2, 6.6), ("lvvit_m", 55.8, 12.7)]
)
def test_lvvit_has_the_published_size_and_cost(name: str, millions: float, published: float) -> None:
    """Jiang et al. 2021, table 1 (T), and Rao et al., DynamicViT (NeurIPS 2021), table 3 (S and M)."""
    with torch.device("meta"):
        net = create(name, classes=1000, image_size=224, args={})
    assert net.parameter_count() / 1e6 == pytest.approx(millions, abs=0.06)
    assert net.architecture.macs() / 1e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize("family", ["deit", "distilled", "lv-vit"])
@pytest.mark.parametrize("patches", [None, 5])
def test_macs_equal_torchs_counter(family: str, patches: int | None) -> None:
    net = network(family)
    set_fused(net, False)
    ticket = None if patches is None else torch.arange(patches).unsqueeze(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32), ticket)
    assert net.architecture.macs(start_patches=patches) == counter.get_total_flops() // 2


@pytest.mark.parametrize("drops", [(TokenDrop(0, 3),), (TokenDrop(0, 9), TokenDrop(2, 5))])
def test_macs_of_a_selector_equal_torchs_counter(drops: tuple[TokenDrop, ...]) -> None:
    net = network("distilled").with_tokens(drops).eval()
    set_fused(net, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.select(torch.zeros(1, 3, 32, 32))
    # Reading the scores repeats the rows of the prefix tokens, T x P x C a drop: below what the cost model counts.
    read = sum((n + 2) * 2 * 48 for n in (16, *(drop.keep for drop in drops[:-1])))
    assert net.architecture.selector_macs() == counter.get_total_flops() // 2 - read


def deit(width: int, heads: int, ticket: int | None = None, drops: tuple[int, ...] = ()) -> int:
    """MACs of one forward, on 196 patches or a ticket of them, or of a selector that drops at blocks 3, 6 and 9."""
    return vit_macs(
        width, [BlockWidths(heads, 64, 64, 4 * width)] * 12,
        patches=196, prefix=1, patch_values=768, classes=1000, start_patches=ticket,
        reduction=dict(zip((3, 6, 9), drops, strict=False)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "heads", "total"), [(0.9, 6, 13.98), (0.8, 6, 10.4), (0.7, 6, 7.7), (0.9, 3, 11.07)], ids=str
)
def test_an_online_ticket_costs_what_the_papers_tables_say(keep: float, heads: int, total: float) -> None:
    """The whole selector every step, as the authors' code runs it; they embed all patches before they drop some."""
    kept = [keep_count(196, keep)]
    kept += [keep_count(kept[-1], keep)]
    kept += [keep_count(kept[-1], keep)]
    embedding = (196 - kept[-1]) * 768 * 384
    cost = ticket_cost(deit(384, 6), deit(384, 6, kept[-1]) + embedding, deit(64 * heads, heads, drops=tuple(kept)))
    assert cost.online / 1e9 == pytest.approx(total, abs=0.06)
    assert cost.dense / 1e9 == pytest.approx(13.8, abs=0.02)
    assert (cost.online > cost.dense) == (total == 13.98)
    assert cost.break_even is not None
    assert cost.break_even * (cost.dense - cost.cached) == pytest.approx(cost.selector)


def test_a_ticket_that_saves_nothing_never_pays() -> None:
    assert ticket_cost(100, 100, 10).break_even is None


@pytest.mark.parametrize("kind", ["vit", "lv-vit", "ticket", "token drop", "swin", "swin v2"])
def test_a_training_step_costs_three_forwards_but_for_the_gradient_of_the_image(kind: str) -> None:
    """What the ledger charges, against torch's count of a forward and its backward. No gradient of the image is asked
    for, which is the one product that the first layer leaves out. On top come scores that are read without a gradient
    and, once a step whatever the batch, Swin V2's networks of the position bias.
    """
    kept = None
    if kind.startswith("swin"):
        net: Network = swin(kind)
    else:
        net = network(kind if kind == "lv-vit" else "deit")
    set_fused(net, False)
    first = net.body.patch_embed.conv1 if kind == "lv-vit" else net.body.patch_embed.proj
    if kind == "token drop":
        net = net.with_tokens((TokenDrop(1, 8, "attention", False),))
    if kind == "ticket":
        kept = torch.stack([torch.randperm(16)[:9] for _ in range(2)])
    net.train()
    with FlopCounterMode(display=False) as counter:
        net(images(2), kept).sum().backward()
    macs = net.ticket_cost(None if kept is None else kept.shape[1])[1]
    places = {"lv-vit": 16 * 16, "ticket": 9, "swin": 256, "swin v2": 256}.get(kind, 16)
    left_out = places * first.weight.numel()
    beside = 0
    if kind == "token drop":
        beside = 2 * 17 * 48
    elif kind == "swin v2":  # 49 offsets -> 512 -> heads, and no gradient of the offsets
        beside = sum(2 * 49 * 2 * 512 + 3 * 49 * 512 * heads for heads in (2, 2, 4, 4))
    assert counter.get_total_flops() == 2 * (2 * (3 * macs - left_out) + beside)
