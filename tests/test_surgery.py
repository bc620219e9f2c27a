"""Theorem 1: a pruned network equals the masked network it was cut from. The mask is applied here, by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_vision import FAMILIES, images, network
from torch import Tensor, nn

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Kept, KeptBlock, Pressure, allocate
from sievit.stages.vision.attention import Attention, set_fused
from sievit.stages.vision.network import Network, rebuild
from sievit.stages.vision.surgery import cut, kept_architecture, score
from sievit.stages.vision.vit import drops_for
from sievit.stages.vision.weights import load_network, save_network

AXES = {
    "heads": Pressure(1, 0, 0, 0),
    "head width": Pressure(0, 1, 0, 0),
    "mlp": Pressure(0, 0, 1, 0),
    "embed": Pressure(0, 0, 0, 1),
    "all": Pressure(1, 0.5, 1, 0.5),
}


class MaskedNorm(nn.Module):
    """The oracle for a cut embedding: statistics over the kept channels only, the others stay 0."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        part = torch.nn.functional.layer_norm(
            x[..., self.kept], (len(self.kept),), self.norm.weight[self.kept], self.norm.bias[self.kept], self.norm.eps
        )
        return torch.zeros_like(x).index_copy(-1, self.kept, part)


def masked(net: Network, kept: Kept) -> Network:
    """Zero everything that was not kept; no shape changes."""
    oracle = copy.deepcopy(net)
    gone = torch.ones(net.architecture.embed, dtype=torch.bool)
    gone[kept.embed] = False
    body: Any = oracle.body
    with torch.no_grad():
        for block, keep in zip(body.blocks, kept.blocks, strict=True):
            hidden = torch.ones(block.mlp.fc1.out_features, dtype=torch.bool)
            hidden[keep.mlp] = False
            block.mlp.fc2.weight[:, hidden] = 0
            _mask_attention(block.attn, keep)
            block.attn.proj.weight[gone], block.attn.proj.bias[gone] = 0, 0
            block.mlp.fc2.weight[gone], block.mlp.fc2.bias[gone] = 0, 0
        body.patch_embed.proj.weight[gone], body.patch_embed.proj.bias[gone] = 0, 0
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            if getattr(body, name, None) is not None:
                getattr(body, name)[..., gone] = 0
        for block in body.blocks:
            block.norm1, block.norm2 = MaskedNorm(block.norm1, kept.embed), MaskedNorm(block.norm2, kept.embed)
        for name in ("norm", "fc_norm"):
            if isinstance(getattr(body, name), nn.LayerNorm):
                setattr(body, name, MaskedNorm(getattr(body, name), kept.embed))
    return oracle


def _mask_attention(attention: Attention, keep: KeptBlock) -> None:
    heads, qk, v = attention.heads, attention.qk, attention.v
    query_gone, value_gone = torch.ones(heads, qk, dtype=torch.bool), torch.ones(heads, v, dtype=torch.bool)
    for row, head in enumerate(keep.heads.tolist()):
        query_gone[head, keep.qk[row]] = False
        value_gone[head, keep.v[row]] = False
    q = attention.qkv.weight[: heads * qk].view(heads, qk, -1)
    q[query_gone] = 0  # a zero query dimension adds nothing to any score, whatever the key holds
    if attention.qkv.bias is not None:
        attention.qkv.bias[: heads * qk].view(heads, qk)[query_gone] = 0
    attention.proj.weight[:, value_gone.flatten()] = 0


def kept_of(net: Network, axes: Pressure, share: float = 0.6) -> Kept:
    scores = score(net, "random", seed=1)
    target = share * net.architecture.macs()
    kept = allocate(scores, lambda k: kept_architecture(net.architecture, k).macs(), target, axes, head_round_to=4)
    assert kept is not None
    return kept


@pytest.mark.parametrize("axes", list(AXES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_pruned_model_equals_the_masked_model_it_was_cut_from(family: str, axes: str) -> None:
    net = network(family)
    kept = kept_of(net, AXES[axes], 0.8 if axes in ("heads", "head width") else 0.6)
    smaller = cut(net, kept)
    assert smaller.parameter_count() < net.parameter_count()
    x, oracle = images(4), masked(net, kept)
    for fused in (True, False):
        set_fused(smaller, fused)
        assert torch.allclose(smaller(x), oracle(x), atol=1e-5)


@pytest.mark.parametrize("family", ["deit", "registers, average pool"])
def test_channels_stay_in_their_order_however_few_are_kept(family: str) -> None:
    """A set of few numbers out of many does not list them in ascending order: 1, 2, 33, 5."""
    net = network(family)
    blocks = tuple(
        KeptBlock(torch.arange(3), torch.arange(16).expand(3, -1), torch.arange(16).expand(3, -1), torch.arange(192))
        for _ in range(3)
    )
    kept = Kept(blocks, torch.tensor([1, 2, 5, 7, 16, 33, 44, 45]))
    x = images(4)
    assert torch.allclose(cut(net, kept)(x), masked(net, kept)(x), atol=1e-5)


def test_the_oracle_sees_a_wrong_cut() -> None:
    net = network()
    kept = kept_of(net, AXES["heads"], 0.8)
    blocks = list(kept.blocks)
    number, old = next((i, b) for i, b in enumerate(blocks) if len(b.heads) < 3)
    others = [head for head in range(3) if head not in old.heads.tolist()][: len(old.heads)]
    blocks[number] = KeptBlock(torch.tensor(others), old.qk[: len(others)], old.v[: len(others)], old.mlp)
    x = images(4)
    assert not torch.allclose(cut(net, Kept(tuple(blocks), kept.embed))(x), masked(net, kept)(x), atol=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_pruned_model_survives_saving_rebuilding_and_training(family: str, tmp_path: Any) -> None:
    net = cut(network(family), kept_of(network(family), AXES["all"]))
    save_network(net, tmp_path)
    again = load_network(tmp_path)
    x = images(3)
    assert torch.equal(net.eval()(x), again(x))
    assert again.architecture == net.architecture
    again.train()(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert again.body.embed_dim == again.architecture.embed == again.body.num_features


def test_the_network_it_was_cut_from_is_left_as_it_was() -> None:
    net = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    cut(net, kept_of(net, AXES["all"]))
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_taylor_finds_planted_dead_parts() -> None:
    """Half of the MLP units and one head of each block are cut off from the output: the first to go."""
    net = network()
    with torch.no_grad():
        for block in net.body.blocks:
            block.mlp.fc2.weight[:, ::2] = 0
            block.attn.proj.weight[:, 16:32] = 0
    x, y = images(16), torch.arange(16) % 5
    torch.nn.functional.cross_entropy(net(x), y).backward()
    scores = score(net, "taylor", seed=0)
    for heads, mlp in zip(scores.heads, scores.mlp, strict=True):
        assert int(heads.argmin()) == 1
        assert float(mlp[::2].max()) < float(mlp[1::2].min())
    dead = Kept(
        tuple(
            KeptBlock(
                torch.tensor([0, 2]),
                torch.arange(16).expand(2, -1),
                torch.arange(16).expand(2, -1),
                torch.arange(1, 192, 2),
            )
            for _ in range(3)
        ),
        torch.arange(48),
    )
    assert torch.allclose(cut(net, dead)(x), net(x), atol=1e-5)


@pytest.mark.parametrize("method", ["taylor", "l1", "random"])
def test_the_target_is_met_from_below_and_widths_are_multiples(method: Any) -> None:
    net = network()
    torch.nn.functional.cross_entropy(net(images(8)), torch.arange(8) % 5).backward()
    full = net.architecture.macs()
    cost = lambda k: kept_architecture(net.architecture, k).macs()  # noqa: E731
    for share in (0.9, 0.5, 0.3):
        kept = allocate(score(net, method, 0), cost, share * full, AXES["all"], head_round_to=4)
        assert kept is not None
        smaller = cut(net, kept).architecture
        assert smaller.macs() <= share * full
        assert smaller.macs() > (share - 0.06) * full
        assert smaller.embed % 8 == 0
        assert all(b.mlp % 8 == 0 and b.qk % 4 == 0 and b.v % 4 == 0 for b in smaller.blocks)


def test_a_target_beyond_the_axes_is_recognised() -> None:
    net = network()
    cost = lambda k: kept_architecture(net.architecture, k).macs()  # noqa: E731
    assert allocate(score(net, "random", 0), cost, 0.2 * net.architecture.macs(), AXES["heads"]) is None


def test_an_axis_without_pressure_is_left_alone_whatever_the_rounding() -> None:
    net = network(embed_dim=60)  # heads of 20, width 60: no multiples of 8
    cost = lambda k: kept_architecture(net.architecture, k).macs()  # noqa: E731
    kept = allocate(score(net, "random", 0), cost, 0.7 * net.architecture.macs(), AXES["mlp"])
    assert kept is not None
    after = kept_architecture(net.architecture, kept)
    assert after.embed == 60
    assert all((b.heads, b.qk, b.v) == (3, 20, 20) for b in after.blocks)


def test_parameters_can_be_counted_without_building_the_network() -> None:
    net = network()
    smaller = cut(net, kept_of(net, AXES["all"]))
    assert rebuild(smaller.architecture, device="meta").parameter_count() == smaller.parameter_count()


def test_normalised_queries_refuse_to_lose_width() -> None:
    net = network(qk_norm=True)
    kept = kept_of(net, AXES["head width"], 0.9)
    with pytest.raises(InvalidInput, match="head_width"):
        cut(net, kept)


def test_token_reduction_goes_through_the_cut() -> None:
    net = network()
    dropping = net.with_tokens(drops_for(net.architecture, (1,), 0.5)).eval()
    smaller = cut(dropping, kept_of(dropping, AXES["mlp"]))
    assert smaller.architecture.tokens == dropping.architecture.tokens
    assert len(smaller.select(images(1))[1]) == 1
