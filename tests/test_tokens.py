"""Token reduction while training and deployed: ramps, fusion, merging, the random control, and what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_vision import data, image_folder, images, network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.token_merging import match, merge, pool_weights, proportional
from sievit.stages.methods.token_reduction import column_attention, fused_token, keep_count, prefix_attention, ramp
from sievit.stages.train import TrainConfig
from sievit.stages.vision import token_schedule
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.budget import Arm
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.onnx_export import export
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.recipe import Recipe
from sievit.stages.vision.token_settings import Connected, Ramp, Tokens
from sievit.stages.vision.training import Fitted, fit
from sievit.stages.vision.vit import ViT, drops_for

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3.5, batch_size=6, lr=1e-3, ema=0.9, drop_path=0.2)
DOWN = Tokens(blocks=(0, 1), keep=0.5, ramp=Ramp(warmup=0.2, length=0.5, levels=4))


def vit(family: str = "deit", **more: Any) -> ViT:
    made = network(family, **more)
    assert isinstance(made, ViT)
    return made


# ---- the ramp


@pytest.mark.parametrize(("warmup", "length", "levels"), [(1 / 30, 1 / 3, 8), (0.0, 1.0, 3), (0.25, 0.5, 1)])
def test_a_ramp_follows_the_published_cosine_to_half_a_level(warmup: float, length: float, levels: int) -> None:
    keep, total = 0.7, 3000
    parts = ramp(1.0, keep, warmup, length, levels)
    seen = set()
    for step in range(total):
        at = step / total
        if at < warmup:
            published = 1.0
        elif at < warmup + length:
            published = keep + (1 - keep) * (1 + math.cos(math.pi * (at - warmup) / length)) / 2
        else:
            published = keep
        ours = next(kept for end, kept in parts if at < end)
        assert abs(ours - published) <= (1 - keep) / levels / 2 + 1e-9
        seen.add(ours)
    assert len(seen) == levels + 1 and min(seen) == keep and max(seen) == 1.0


def test_a_schedule_goes_down_to_the_static_counts_and_states_all_of_them() -> None:
    architecture = vit().architecture
    schedule = token_schedule.create(architecture, DOWN)
    assert schedule is not None
    static = drops_for(architecture, DOWN.blocks, DOWN.keep)
    counts = [tuple(drop.keep for drop in schedule.at(step, 200)) for step in range(201)]
    assert counts[0] == () and counts[-1] == (8, 4) and schedule.final == static
    left = [sum(c) if c else 32 for c in counts]
    assert left == sorted(left, reverse=True)
    assert len(set(counts)) <= 5
    assert {tuple(row["keep"]) for row in schedule.record()} == set(counts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def trained(pictures: Images, tokens: Tokens | None, attention: Connected | None = None, **more: Any) -> Fitted:
    torch.manual_seed(5)
    net = vit(classes=2, drop_path_rate=0.2)
    return fit(
        net, Pool(pictures, np.arange(len(pictures) - 1)), RECIPE, seed=3, device=CPU,
        normalise=Normaliser((0.5,) * 3, (0.5,) * 3, CPU),
        tokens=token_schedule.create(net.architecture, tokens, attention, finish=0.2), **more,
    )  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.mark.parametrize("method", ["attention", "random", "tome"])
def test_a_run_killed_on_the_ramp_ends_with_the_same_bits(pictures: Images, tmp_path: Path, method: Any) -> None:
    tokens = DOWN.model_copy(update={"method": method})
    attention = None if method == "tome" else Connected(keep=0.5, blocks=(0,))
    judge = lambda net: float(net(torch.ones(1, 3, 32, 32)).detach().sum())  # noqa: E731
    expected = trained(pictures, tokens, attention, judge=judge)
    steps, file = 0, tmp_path / "c.safetensors"

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == 7:
            raise Killed

    with pytest.raises(Killed):
        trained(pictures, tokens, attention, judge=judge, checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = trained(pictures, tokens, attention, judge=judge, checkpoint=file)
    assert again.curve == expected.curve
    assert (again.tokens, again.macs) == (expected.tokens, expected.macs)
    wanted = expected.network.body.state_dict()
    assert all(torch.equal(wanted[name], t) for name, t in again.network.body.state_dict().items())
    assert expected.network.architecture.tokens == drops_for(vit().architecture, (0, 1), 0.5, method)


def test_the_curve_says_both_the_current_and_the_final_ratio(pictures: Images) -> None:
    fitted = trained(pictures, DOWN, judge=lambda net: float(sum(drop.keep for drop in net.architecture.tokens)))
    assert fitted.curve[0]["top1_calibration"] > fitted.curve[-1]["top1_calibration"] == 8 + 4
    assert [row["top1_final_tokens"] for row in fitted.curve] == [8 + 4] * len(fitted.curve)
    assert "top1_final_tokens" not in trained(pictures, None, judge=lambda net: 0.0).curve[0]


def test_the_ledger_counts_what_every_step_really_had(pictures: Images) -> None:
    tokens, macs = 0.0, 0

    def objective(net: Any, batch: Any) -> Tensor:
        nonlocal tokens, macs
        widths: list[int] = []
        hooks = []
        for block in net.network.body.blocks:
            for part in (block.attn.qkv, block.mlp.fc1):
                hooks.append(part.register_forward_hook(lambda m, i, o: widths.append(o.shape[1] - 1)))
        with FlopCounterMode(display=False) as counter:
            answers = net(batch.images, batch.kept)
        macs += counter.get_total_flops() // 2
        tokens += len(batch.images) * sum(widths) / len(widths)
        for hook in hooks:
            hook.remove()
        return torch.nn.functional.cross_entropy(answers, batch.targets)

    fitted = trained(pictures, DOWN, objective=objective)
    assert fitted.tokens == pytest.approx(tokens)
    assert fitted.tokens < 16 * fitted.images
    # Reading the scores is below what the cost model counts: a few thousandths here.
    assert fitted.macs == pytest.approx(macs, rel=0.02)


def test_an_arm_with_a_ramp_is_priced_step_by_step() -> None:
    net, steps = vit(), 50
    schedule = token_schedule.create(net.architecture, DOWN)
    assert schedule is not None
    parts = token_schedule.phases(net, schedule, 9, 0.3)
    arm = Arm(64, 64, tuple((end, macs) for end, _, macs in parts), net.architecture.macs(), 0)
    expected = 0
    for step in range(steps):
        reduced = net.architecture.with_tokens(schedule.at(step, steps))
        expected += 32 * reduced.macs(start_patches=9 if step < round(0.7 * steps) else None)
    assert arm.training_macs(steps, 32) == expected


# ---- fusion


def test_a_fused_token_is_the_weighted_sum_over_what_was_dropped() -> None:
    x, scores, kept = torch.randn(3, 7, 5), torch.rand(3, 7), torch.tensor([[0, 3], [5, 6], [1, 2]])
    for image in range(3):
        total = torch.zeros(5)
        for token in range(7):
            if token not in kept[image]:
                total += scores[image, token] * x[image, token]
        assert torch.allclose(fused_token(x, scores, kept)[image, 0], total, atol=1e-6)


def test_a_fused_token_goes_on_beside_the_kept_and_is_ranked_like_them() -> None:
    net = vit()
    fusing = vit().with_tokens(drops_for(net.architecture, (0, 1), 0.5, fuse=True)).eval()
    assert [drop.keep for drop in fusing.architecture.tokens] == [8, keep_count(9, 0.5)]
    scores, positions = fusing.select(images(2))
    assert [s.shape[1] for s in scores] == [16, 9] and [p.shape[1] for p in positions] == [8, 5]
    assert 8 in torch.cat([fusing.select(images(40, seed))[1][1] for seed in range(3)]).flatten().tolist()


def test_weights_that_sum_the_dropped_tokens_are_learned_through() -> None:
    """With the fused token alone left to carry it, the gradient reaches the queries through the weights of the sum."""
    net = vit(depth=1).train()
    fusing = net.with_tokens(drops_for(net.architecture, (0,), 0.1, fuse=True)).train()
    x = torch.randn(2, 16, 48)
    _, q, k = fusing.attentions[0].attend(torch.cat([torch.zeros(2, 1, 48), x], 1))
    scores = fusing.attentions[0].scores(q, k, 1)
    fused_token(x, scores, torch.zeros(2, 1, dtype=torch.int64)).sum().backward()
    grad = fusing.attentions[0].qkv.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0


# ---- merging


def merged_by_loops(x: np.ndarray, sizes: np.ndarray, keys: np.ndarray, count: int) -> list[tuple[float, np.ndarray]]:
    """ToMe's matching (Bolya et al., section 3) token by token, one image."""
    norm = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for a in first:
        similar = [float(norm[a] @ norm[b]) for b in second]
        best = max(similar)
        edges.append((best, a, second[similar.index(best)]))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    groups = {token: [token] for token in range(len(x))}
    for _, a, b in edges[: len(x) - count]:
        groups[b] += groups.pop(a)
    result = []
    for members in groups.values():
        size = sizes[members].sum()
        result.append((float(size), (x[members] * sizes[members, None]).sum(0) / size))
    return sorted(result, key=lambda pair: tuple(pair[1]))


@pytest.mark.parametrize(("tokens", "count"), [(16, 10), (15, 8), (9, 8), (2, 1)])
def test_merging_equals_the_papers_matching_by_loops(tokens: int, count: int) -> None:
    torch.manual_seed(tokens)
    x, keys, sizes = torch.randn(3, tokens, 6), torch.randn(3, tokens, 4), torch.randint(1, 5, (3, tokens)).float()
    merged, left = merge(x, sizes, match(keys, count))
    assert merged.shape == (3, count, 6)
    assert torch.equal(left.sum(1), sizes.sum(1))
    for image in range(3):
        expected = merged_by_loops(x[image].numpy(), sizes[image].numpy(), keys[image].numpy(), count)
        pairs = zip(left[image].tolist(), merged[image].numpy(), strict=True)
        ours = sorted(pairs, key=lambda pair: tuple(pair[1]))
        for (size, token), (wanted_size, wanted) in zip(ours, expected, strict=True):
            assert size == wanted_size and np.allclose(token, wanted, atol=1e-5)


def test_under_half_precision_tokens_and_connections_are_chosen_in_single() -> None:
    """What autocast leaves to a product of half precision would be another choice than that of the exported file."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 3, 65, 16).bfloat16()
    tokens, sizes = torch.randn(8, 65, 16), torch.randint(1, 300, (8, 65)).float()
    attention: Any = network().blocks[0].attn

    def chosen() -> list[Tensor]:
        matching = match(k.float().mean(1), 40)
        scores = [prefix_attention(q, k, 1, 0.25), column_attention(q, k, 1, 0.25)]
        return [*scores, *matching, *merge(tokens, sizes, matching), attention.weights(q, k, None, "corrected")]

    single = chosen()
    with torch.autocast("cpu", torch.bfloat16):
        half = chosen()
    for one, other in zip(single, half, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_of_equal_tokens_the_first_are_merged_into_the_first() -> None:
    x = torch.arange(8.0).view(1, 8, 1)
    merged, sizes = merge(x, torch.ones(1, 8), match(torch.ones(1, 8, 3), 6))
    assert merged.flatten().tolist() == [4, 6, (1 + 0 + 2) / 3, 3, 5, 7]
    assert sizes.flatten().tolist() == [1, 1, 3, 1, 1, 1]


def test_more_than_half_cannot_be_merged_away() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        match(torch.ones(1, 8, 3), 3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_merged_token_counts_as_often_as_it_has_patches(fused: bool) -> None:
    """Proportional attention equals attention on tokens that are repeated; so does the pooled mean."""
    attention, sizes = vit().attentions[0], torch.tensor([[1.0, 3.0, 2.0]])
    attention.fused = fused
    x = torch.randn(1, 4, 48)
    out, _, _ = attention.attend(x, bias=proportional(sizes, 1))
    repeated = x.repeat_interleave(torch.tensor([1, 1, 3, 2]), dim=1)
    assert torch.allclose(out[0], attention.attend(repeated)[0][0, [0, 1, 2, 5]], atol=1e-5)
    assert torch.allclose((x[:, 1:] * pool_weights(sizes, 0)).mean(1), repeated[:, 1:].mean(1), atol=1e-6)
    assert torch.allclose((x * pool_weights(sizes, 1)).mean(1), repeated.mean(1), atol=1e-6)


@pytest.mark.parametrize("family", ["deit", "distilled", "registers, average pool"])
def test_macs_of_merging_equal_torchs_counter(family: str) -> None:
    net = vit(family)
    merging = net.with_tokens(drops_for(net.architecture, (0, 2), 0.6, "tome")).eval()
    set_fused(merging, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merging(torch.zeros(1, 3, 32, 32))
    assert merging.architecture.macs() == counter.get_total_flops() // 2
    assert net.architecture.macs() > merging.architecture.macs()


def test_a_ticket_that_leaves_fewer_tokens_is_not_merged_and_prefix_tokens_never_are() -> None:
    net = vit("distilled")
    merging = net.with_tokens(drops_for(net.architecture, (0,), 0.5, "tome")).eval()
    ticket = torch.arange(8).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(merging(images(2), ticket), net(images(2), ticket))
        assert merging._through(images(2), None).x.shape[1] == 2 + 8


# ---- the random control


def test_lots_change_with_every_step_of_training_and_stay_when_measured() -> None:
    net = vit()
    drawing = net.with_tokens(drops_for(net.architecture, (0,), 0.5, "random")).eval()
    x = images(4)
    first, again = drawing.select(x)[1][0], drawing.select(x)[1][0]
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) > 1
    drawing.train()
    torch.manual_seed(1)
    one, two = drawing.select(x)[1][0], drawing.select(x)[1][0]
    torch.manual_seed(1)
    assert torch.equal(drawing.select(x)[1][0], one) and not torch.equal(one, two)


def test_lots_are_not_exported(tmp_path: Path) -> None:
    net = vit()
    drawing = net.with_tokens(drops_for(net.architecture, (0,), 0.5, "random"))
    with pytest.raises(InvalidInput, match="control"):
        export(drawing, tmp_path / "m.onnx", 20)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": {"blocks": [1], "keep": 0.7, "ramp": {"start": 0.6}}}, "does not go down"),
        ({"tokens": {"blocks": [1], "keep": 0.7, "ramp": {"warmup": 0.7, "length": 0.5}}}, "ends too late"),
        ({"tokens": {"blocks": [1], "keep": 0.4, "method": "tome"}}, "at least half"),
        ({"tokens": {"blocks": [1], "keep": 0.7, "method": "tome", "fuse": True}}, "weighted by attention"),
        ({"tokens": {"blocks": [1], "keep": 0.7, "method": "random", "fuse": True}}, "weighted by attention"),
        ({"attention": {"keep": 0.5}}, "name some"),
        ({"attention": {"keep": 0.5}, "tokens": {"blocks": [1], "keep": 0.7, "method": "tome"}}, "no attention map"),
        ({"attention": {"keep": 0.5}, "tokens": {"blocks": [1], "keep": 0.7, "fuse": True}}, "no attention map"),
        ({"token_labels": {"source": "train"}, "tokens": {"blocks": [1], "keep": 0.7}}, "every patch"),
        ({"attention": {"keep": 0.5, "blocks": [0]}, "weights": {"method": "attention_log"}}, "leave one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig.model_validate_json(json.dumps({"epochs": 1, **settings}))


def test_a_share_that_keeps_all_tokens_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no fewer"):
        token_schedule.create(vit().architecture, Tokens(blocks=(0,), keep=0.95))


def test_connections_that_no_block_would_use_are_refused() -> None:
    architecture = vit().architecture
    last = len(architecture.blocks) - 1
    for tokens, blocks in ((None, (last,)), (Tokens(blocks=(last,), keep=0.5), None)):
        with pytest.raises(InvalidInput, match="those that follow"):
            token_schedule.create(architecture, tokens, Connected(keep=0.5, blocks=blocks))
    token_schedule.create(architecture, None, Connected(keep=0.5, blocks=(0, last)))
