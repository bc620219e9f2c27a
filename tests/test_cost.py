"""The cost model against EViT's published table and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from tiny_vision import network
from torch.utils.flop_counter import FlopCounterMode

from sievit.stages.methods.cost import BlockWidths, vit_macs
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.network import create


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
