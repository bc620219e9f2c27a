"""Penalties against loops and derivatives by hand; what they do to attention; where they cannot act."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import trained
from tiny_vision import data, image_folder, network, swin
from tiny_vision import images as pictures
from torch import Tensor

from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Preflight
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.regularisers import attention_entropy, attention_log, head_norms, hoyer_square, unit_norms
from sievit.stages.train import STAGE, TrainConfig
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.loss_settings import Penalty as Settings
from sievit.stages.vision.penalty import create
from sievit.stages.vision.recipe import Recipe

METHODS = ("group_lasso", "hoyer", "movement", "l1", "l2", "attention_log", "attention_entropy")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def entropy(logits: Tensor) -> float:
    rows = logits.softmax(-1)
    return float(-(rows * rows.clamp_min(1e-30).log()).sum(-1).mean())


def descended(penalty: Any, steps: int = 200) -> tuple[float, float]:
    """Entropy of the rows of attention before and after descending the penalty alone, on logits of 17 tokens."""
    logits = (2 * torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.05)
    before = entropy(logits.detach())
    for _ in range(steps):
        optimizer.zero_grad()
        penalty(logits).backward()
        optimizer.step()
    return before, entropy(logits.detach())


def test_the_published_penalty_flattens_attention_and_entropy_makes_it_peaked() -> None:
    before, after = descended(attention_log)
    assert after > before + 0.3
    assert after > 0.98 * math.log(17)
    before, after = descended(attention_entropy)
    assert after < 0.5 * before


def test_the_published_penalty_is_the_mean_of_log_1_plus_a_squared_and_uniform_rows_are_its_minimum() -> None:
    logits = torch.randn(2, 3, 5, 5)
    rows = logits.softmax(-1)
    by_hand = sum(math.log1p(float(a) ** 2) for a in rows.flatten()) / rows.numel()
    assert float(attention_log(logits)) == pytest.approx(by_hand, rel=1e-5)
    assert float(attention_log(torch.zeros(1, 1, 5, 5))) == pytest.approx(math.log1p(0.04), rel=1e-5)
    assert float(attention_log(logits)) > math.log1p(0.04)
    # Every row on one key is the maximum: with the published weight at most 0.01 log(2) / T.
    assert float(attention_log(1e4 * torch.eye(65).view(1, 1, 65, 65))) == pytest.approx(math.log(2) / 65, rel=1e-5)


def test_entropy_is_that_of_a_loop_and_stays_differentiable_where_attention_rounds_to_zero() -> None:
    logits = torch.randn(2, 3, 5, 5)
    assert float(attention_entropy(logits)) == pytest.approx(entropy(logits), rel=1e-5)
    far = torch.tensor([[0.0, 500.0], [500.0, 0.0]]).view(1, 1, 2, 2).requires_grad_()
    attention_entropy(far).backward()
    assert far.grad is not None and bool(far.grad.isfinite().all())


def test_hoyer_square_counts_groups_and_does_not_shrink_the_largest() -> None:
    assert float(hoyer_square(torch.full((7,), 0.3))) == pytest.approx(7)
    assert float(hoyer_square(torch.tensor([0.0, 2.0, 0.0]))) == pytest.approx(1)
    norms = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    value = hoyer_square(norms)
    value.backward()
    assert float(value.detach()) == pytest.approx(81 / 41)
    s, q = 9.0, 41.0
    assert norms.grad is not None
    assert norms.grad.tolist() == pytest.approx([2 * s / q - 2 * n * s**2 / q**2 for n in (1.0, 2.0, 6.0)], rel=1e-5)
    assert norms.grad[0] > 0 > norms.grad[2]


def matrices(net: Any) -> list[torch.nn.Parameter]:
    return [w for b in net.blocks for w in (b.attn.qkv.weight, b.attn.proj.weight, b.mlp.fc1.weight, b.mlp.fc2.weight)]


@pytest.mark.parametrize("make", [network, swin])
@pytest.mark.parametrize("method", ["l1", "l2"])
def test_l1_and_l2_act_on_the_matrices_of_the_blocks_and_on_nothing_else(make: Any, method: str) -> None:
    net = make()
    create(method, 0.3)(net).backward()
    wanted = {id(w): 0.3 * w.sign() if method == "l1" else 0.6 * w for w in matrices(net)}
    for weight in net.parameters():
        if id(weight) in wanted:
            assert torch.allclose(weight.grad, wanted[id(weight)])
        else:
            assert weight.grad is None


def test_hoyer_on_a_network_is_that_of_its_heads_and_units() -> None:
    net = network().requires_grad_(False)
    expected = 0.0
    for b in net.blocks:
        a = b.attn
        for norms in (
            head_norms(a.qkv.weight, a.proj.weight, a.heads, a.qk, a.v),
            unit_norms(b.mlp.fc1.weight, b.mlp.fc2.weight),
        ):
            expected += sum(norms.tolist()) ** 2 / sum(n * n for n in norms.tolist())
    assert float(create("hoyer", 0.5)(net)) == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("ticketed", [False, True])
@pytest.mark.parametrize("method", ["attention_log", "attention_entropy"])
def test_attention_is_penalised_as_it_is_computed_and_nothing_is_left_on_the_network(
    method: str, ticketed: bool
) -> None:
    """Against the plain path's own softmax, caught between its products."""
    net, x = network("distilled").requires_grad_(False), pictures(2)
    kept = torch.arange(9).expand(2, -1) if ticketed else None
    penalty = create(method, 0.7)
    with penalty.watch(net):
        wanted = net(x, kept)
    value = float(penalty(net))
    set_fused(net, False)
    caught: list[Tensor] = []
    plain = torch.Tensor.softmax

    def softmax(self: Tensor, *args: Any) -> Tensor:
        caught.append(plain(self, *args))
        return caught[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", softmax)
        again = net(x, kept)
    assert torch.allclose(wanted, again, atol=1e-5)
    assert len(caught) == 3
    if method == "attention_log":
        expected = float((1 + caught[-1] ** 2).log().mean())
    else:
        expected = sum(float(-(a * a.log()).sum(-1).mean()) for a in caught) / 3
    assert value == pytest.approx(0.7 * expected, rel=1e-4)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("method", METHODS)
def test_every_penalty_reaches_the_weights(images: Images, method: str) -> None:
    """What is penalised ends lower than without, by training of few steps; attention_log's own 1e-5 is weighed up."""
    recipe = Recipe(steps=4, batch_size=8, lr=3e-3, weight_decay=0.0)
    strength = {"attention_log": 1e3, "attention_entropy": 1.0, "hoyer": 0.1}.get(method, 1e-2)

    def measured(net: Any) -> float:
        with torch.no_grad():
            penalty = create(method, 1.0)
            with penalty.watch(net):
                net(pictures(4))
            return float(penalty(net))

    assert measured(trained(images, recipe, penalty=create(method, strength)).network) < measured(
        trained(images, recipe).network
    )


def asked(method: Any, model: str, **args: Any) -> Preflight:
    return Preflight(
        config=TrainConfig(epochs=1, weights=Settings(method=method)),
        data=DataConfig(source="builtin:digits", image_size=32),
        model=ModelConfig(name=model, args=args), seed=0, arm="main", entry="train", base=Path(),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["attention_log", "attention_entropy"])
def test_a_penalty_on_attention_that_a_swin_has_not_is_refused_before_anything_runs(method: str) -> None:
    swin_args = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    with pytest.raises(InvalidInput, match=f"{method} needs attention among all tokens") as caught:
        STAGE.preflight(asked(method, "swin_tiny_patch4_window7_224", **swin_args))
    assert caught.value.field == "stages.train.weights.method"
    STAGE.preflight(asked("hoyer", "swin_tiny_patch4_window7_224", **swin_args))
    STAGE.preflight(asked(method, "deit_tiny_patch16_224", patch_size=8))
