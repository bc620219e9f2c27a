"""Theorem 1: a pruned network equals the masked network it was cut from. The mask is applied here, by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny_vision import FAMILIES, SWINS, images, network, swin
from torch import Tensor, nn

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Axis, Kept, KeptBlock, Pressure, allocate, at_dial, compose
from sievit.stages.vision.architecture import Architecture, SwinArchitecture
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.network import Network, rebuild
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.surgery import cut, kept_architecture, score
from sievit.stages.vision.swin import Swin, TicketUse
from sievit.stages.vision.vit import drops_for
from sievit.stages.vision.weights import load_network, save_network
from sievit.stages.vision.window_attention import CosineWindowAttention

FULL, HALF = Axis(1.0), Axis(0.5)
AXES = {
    "heads": Pressure(heads=FULL),
    "qk": Pressure(qk=FULL),
    "v": Pressure(v=FULL),
    "mlp": Pressure(mlp=FULL),
    "embed": Pressure(embed=FULL),
    "depth": Pressure(depth=FULL),
    "all": Pressure(heads=FULL, qk=HALF, v=HALF, mlp=FULL, embed=HALF),
    "all and depth": Pressure(heads=FULL, qk=HALF, v=HALF, mlp=FULL, embed=HALF, depth=FULL),
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
    body: Any = oracle.body
    architecture = net.architecture
    with torch.no_grad():
        for block, keep, stage in zip(oracle.blocks, kept.blocks, architecture.stage_of, strict=True):
            if keep is None:
                _silence(block, architecture)
                continue
            block.mlp.fc2.weight[:, gone(keep.mlp, block.mlp.fc1.out_features)] = 0
            _mask_attention(block.attn, keep)
            channels = gone(kept.embed[stage], architecture.streams[stage])
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[channels], layer.bias[channels] = 0, 0
            block.norm1 = MaskedNorm(block.norm1, kept.embed[stage])
            block.norm2 = MaskedNorm(block.norm2, kept.embed[stage])
        first = gone(kept.embed[0], architecture.streams[0])
        body.patch_embed.proj.weight[first], body.patch_embed.proj.bias[first] = 0, 0
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            if getattr(body, name, None) is not None:
                getattr(body, name)[..., first] = 0
        for owner, name in ((body.patch_embed, "norm"), (body, "norm"), (body, "fc_norm")):
            if isinstance(getattr(owner, name, None), nn.LayerNorm):
                setattr(owner, name, MaskedNorm(getattr(owner, name), kept.embed[0 if owner is not body else -1]))
        if isinstance(architecture, SwinArchitecture):
            _mask_merging(body, architecture, kept)
    return oracle


def gone(kept: Tensor, size: int) -> Tensor:
    return ~torch.isin(torch.arange(size), kept)


def _silence(block: Any, architecture: Architecture | SwinArchitecture) -> None:
    """A block that adds nothing: of what each branch ends with, 0 is left. A Swin V2 normalises last."""
    second = isinstance(architecture, SwinArchitecture) and architecture.generation == 2
    for layer in (block.norm1, block.norm2) if second else (block.attn.proj, block.mlp.fc2):
        layer.weight.zero_()
        layer.bias.zero_()


def _mask_merging(body: Any, architecture: SwinArchitecture, kept: Kept) -> None:
    """V1 normalises 2 x 2 tokens side by side before their channels are made fewer, V2 after it."""
    for number in range(1, len(architecture.stages)):
        merging, before = body.layers[number].downsample, architecture.streams[number - 1]
        merging.reduction.weight[gone(kept.embed[number], architecture.streams[number])] = 0
        if architecture.generation == 1:
            four = torch.cat([kept.embed[number - 1] + token * before for token in range(4)])
            merging.norm = MaskedNorm(merging.norm, four)
        else:
            merging.norm = MaskedNorm(merging.norm, kept.embed[number])


def _mask_attention(attention: Any, keep: KeptBlock) -> None:
    heads, qk, v = attention.heads, attention.qk, attention.v
    query_gone, value_gone = torch.ones(heads, qk, dtype=torch.bool), torch.ones(heads, v, dtype=torch.bool)
    for row, head in enumerate(keep.heads.tolist()):
        query_gone[head, keep.qk[row]] = False
        value_gone[head, keep.v[row]] = False
    # A zero query dimension adds nothing to any score, whatever the key holds; cosines need both to be 0.
    cosine = isinstance(attention, CosineWindowAttention)
    for part in range(2 if cosine else 1):
        attention.qkv.weight[part * heads * qk : (part + 1) * heads * qk][query_gone.flatten()] = 0
    biases = attention.q_bias if cosine else attention.qkv.bias
    if biases is not None:
        biases[: heads * qk][query_gone.flatten()] = 0
    attention.proj.weight[:, value_gone.flatten()] = 0


def kept_of(net: Network, axes: Pressure, dial: float = 0.5, seed: int = 1) -> Kept:
    return at_dial(score(net, "random", seed), dial, axes, round_to=8, head_round_to=4)


def of_family(family: str, **more: Any) -> Network:
    return swin(family, **more) if family in SWINS else network(family, **more)


@pytest.mark.parametrize("axes", list(AXES))
@pytest.mark.parametrize("family", [*FAMILIES, *SWINS])
def test_a_pruned_model_equals_the_masked_model_it_was_cut_from(family: str, axes: str) -> None:
    net = of_family(family)
    kept = kept_of(net, AXES[axes])
    smaller = cut(net, kept)
    assert smaller.parameter_count() < net.parameter_count()
    assert smaller.architecture.macs() < net.architecture.macs()
    x = images(4)
    expected = masked(net, kept)(x)
    assert not torch.allclose(net(x), expected, atol=1e-3), "what was cut had a say"
    for fused in (True, False):
        set_fused(smaller, fused)
        assert torch.allclose(smaller(x), expected, atol=1e-5 if family in FAMILIES else 1e-4)


@pytest.mark.parametrize("family", ["deit", "registers, average pool"])
def test_channels_stay_in_their_order_however_few_are_kept(family: str) -> None:
    """A set of few numbers out of many does not list them in ascending order: 1, 2, 33, 5."""
    net = network(family)
    blocks = tuple(
        KeptBlock(torch.arange(3), torch.arange(16).expand(3, -1), torch.arange(16).expand(3, -1), torch.arange(192))
        for _ in range(3)
    )
    kept = Kept(blocks, (torch.tensor([1, 2, 5, 7, 16, 33, 44, 45]),))
    x = images(4)
    assert torch.allclose(cut(net, kept)(x), masked(net, kept)(x), atol=1e-5)


def test_the_oracle_sees_a_wrong_cut() -> None:
    net = network()
    kept = kept_of(net, AXES["heads"], 0.4)
    blocks = list(kept.blocks)
    number, old = next((i, b) for i, b in enumerate(blocks) if b is not None and len(b.heads) < 3)
    others = [head for head in range(3) if head not in old.heads.tolist()][: len(old.heads)]
    blocks[number] = KeptBlock(torch.tensor(others), old.qk[: len(others)], old.v[: len(others)], old.mlp)
    x = images(4)
    assert not torch.allclose(cut(net, Kept(tuple(blocks), kept.embed))(x), masked(net, kept)(x), atol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *SWINS])
def test_a_pruned_model_survives_saving_rebuilding_and_training(family: str, tmp_path: Any) -> None:
    net = of_family(family)
    net = cut(net, kept_of(net, AXES["all and depth"]))
    save_network(net, tmp_path)
    again = load_network(tmp_path)
    x = images(3)
    assert torch.equal(net.eval()(x), again(x))
    assert again.architecture == net.architecture
    again.train()(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, *SWINS])
def test_what_timm_says_of_a_network_is_true_after_the_cut(family: str) -> None:
    net = of_family(family)
    net = cut(net, kept_of(net, AXES["all and depth"]))
    body: Any = net.body
    streams = net.architecture.streams
    assert (body.embed_dim, body.num_features, body.head_hidden_size) == (streams[0], streams[-1], streams[-1])
    assert {level["num_chs"] for level in body.feature_info} == set(streams)
    for block, record in zip(net.blocks, net.architecture.blocks, strict=True):
        assert block.attn.num_heads == record.heads
        assert block.attn.head_dim == record.v
        assert block.attn.attn_dim == block.attn.proj.in_features == record.heads * record.v
        assert block.mlp.fc1.out_features == record.mlp


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
        (torch.arange(48),),
    )
    assert torch.allclose(cut(net, dead)(x), net(x), atol=1e-5)


@pytest.mark.parametrize("method", ["taylor", "hessian", "l1", "random"])
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


@pytest.mark.parametrize("family", ["deit", *SWINS])
def test_lists_of_blocks_are_kept_to(family: str) -> None:
    net = of_family(family)
    some = frozenset({1})
    pressed = {name: Axis(1.0, some) for name in ("heads", "qk", "v", "mlp")}
    kept = at_dial(score(net, "random", 0), 0.5, Pressure(**pressed), round_to=8, head_round_to=4)
    after = kept_architecture(net.architecture, kept).blocks
    for number, (before, now) in enumerate(zip(net.architecture.blocks, after, strict=True)):
        if number in some:
            assert now.heads <= before.heads and now.qk < before.qk and now.v < before.v and now.mlp < before.mlp
        else:
            assert now == before
    gone = at_dial(score(net, "random", 0), 1.0, Pressure(depth=Axis(1.0, some)), round_to=8, head_round_to=4)
    assert gone.left == [number for number in range(len(net.blocks)) if number != 1]


def test_the_blocks_of_lowest_score_go_first_and_one_of_every_stage_stays() -> None:
    scores = score(swin(depths=[3, 3]), "random", 0)
    scores = replace(scores, depth=torch.tensor([0.1, 0.2, 0.3, 5.0, 4.0, 6.0]))
    at = lambda dial: at_dial(scores, dial, AXES["depth"], round_to=8, head_round_to=4).left  # noqa: E731
    assert at(0.0) == [0, 1, 2, 3, 4, 5]
    assert at(1 / 3) == [2, 3, 4, 5]
    assert at(0.5) == [2, 3, 5]
    assert at(1.0) == [2, 5]


@pytest.mark.parametrize("family", list(SWINS))
def test_a_block_that_is_left_stays_shifted_or_not_as_it_was(family: str) -> None:
    net, x = swin(family), images(2)
    kept = kept_of(net, Pressure())
    left = Kept((None, kept.blocks[1], None, kept.blocks[3]), kept.embed)
    smaller = cut(net, left)
    assert [block.place for block in smaller.architecture.blocks] == [1, 1]
    assert torch.allclose(smaller(x), masked(net, left)(x), atol=1e-4)
    assert smaller.architecture.macs() < net.architecture.macs()


@pytest.mark.parametrize("family", list(SWINS))
@pytest.mark.parametrize("mode", ["zero", "mosaic"])
def test_tickets_of_a_cut_swin_are_those_of_the_masked_one(mode: Any, family: str) -> None:
    net, x = swin(family), images(3)
    kept = kept_of(net, AXES["all and depth"])
    use = TicketUse(mode, (4, 4), 4)
    ticket = torch.stack([torch.randperm(16)[:4].sort().values for _ in range(3)])
    smaller, oracle = cut(net, kept), masked(net, kept)
    assert isinstance(smaller, Swin) and isinstance(oracle, Swin)
    assert torch.allclose(smaller.with_tickets(use)(x, ticket), oracle.with_tickets(use)(x, ticket), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["distilled", "lv-vit", *SWINS])
def test_the_exported_file_of_a_cut_network_answers_as_the_network(family: str, tmp_path: Any) -> None:
    net = of_family(family)
    smaller = cut(net, kept_of(net, AXES["all and depth"])).eval()
    export(smaller, tmp_path / "m.onnx", 20)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = images(batch, seed=batch)
        with torch.no_grad():
            expected = smaller(x)
        assert np.abs(session.run(None, {"input": x.numpy()})[0] - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize("family", ["deit", *SWINS])
def test_a_second_cut_counts_from_the_blocks_that_the_first_has_left(family: str) -> None:
    net, x = of_family(family), images(2)
    first = cut(net, kept_of(net, AXES["all and depth"], 0.4))
    again = kept_of(first, AXES["all"], 0.4, seed=3)
    assert torch.allclose(cut(first, again)(x), masked(first, again)(x), atol=1e-4)
    assert [b.place for b in cut(first, again).architecture.blocks] == [b.place for b in first.architecture.blocks]


@pytest.mark.parametrize("family", ["deit", "lv-vit", *SWINS])
def test_two_cuts_are_one_by_what_both_have_left(family: str) -> None:
    net = of_family(family, depth=4) if family in FAMILIES else of_family(family)
    first = kept_of(net, AXES["all and depth"], 0.3, seed=1)
    half = cut(net, first)
    second = kept_of(half, AXES["all and depth"], 0.5, seed=2)
    both = compose(first, second)
    assert both.left == [first.left[number] for number in second.left]
    twice, once = cut(half, second), cut(net, both)
    assert once.architecture == twice.architecture != half.architecture != net.architecture
    theirs = twice.body.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in once.body.state_dict().items())


def test_stochastic_depth_rises_over_the_blocks_that_are_left() -> None:
    net = network(depth=5)
    kept = kept_of(net, Pressure())
    smaller = cut(net, Kept((*kept.blocks[:2], None, kept.blocks[3], None), kept.embed))
    rebuilt: Any = rebuild(smaller.architecture, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in rebuilt.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert isinstance(rebuilt.blocks[0].drop_path2, nn.Identity)


def test_a_block_that_drops_tokens_stays_and_drops_them_under_its_new_number() -> None:
    net = network(depth=5)
    dropping = net.with_tokens(drops_for(net.architecture, (3,), 0.5)).eval()
    scores = score(dropping, "random", 0)
    kept = at_dial(scores, 1.0, AXES["depth"], round_to=8, head_round_to=4)
    assert kept.left == [3]
    kept = Kept((None, *kept_of(dropping, Pressure()).blocks[1:]), kept.embed)
    smaller = cut(dropping, kept)
    assert [drop.block for drop in smaller.architecture.tokens] == [2]
    assert torch.allclose(smaller(images(2)), masked(dropping, kept)(images(2)), atol=1e-5)


def test_a_record_without_places_has_all_blocks_of_timm(tmp_path: Any) -> None:
    net = network()
    save_network(net, tmp_path)
    path = tmp_path / "architecture.json"
    record = json.loads(path.read_text())
    for block in record["blocks"]:
        del block["place"]
    path.write_text(json.dumps(record))
    assert load_network(tmp_path).architecture == net.architecture


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
    kept = kept_of(net, AXES["qk"])
    with pytest.raises(InvalidInput, match=r"prune\.axes\.qk"):
        cut(net, kept)


def test_token_reduction_goes_through_the_cut() -> None:
    net = network()
    dropping = net.with_tokens(drops_for(net.architecture, (1,), 0.5)).eval()
    smaller = cut(dropping, kept_of(dropping, AXES["mlp"]))
    assert smaller.architecture.tokens == dropping.architecture.tokens
    assert len(smaller.select(images(1))[1]) == 1
