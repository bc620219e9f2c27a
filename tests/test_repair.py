"""Closed-form repair of what a cut takes away, against numpy's least squares on the same activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision import SWINS, images, network, swin
from torch import Tensor

from sievit.stages.methods.allocation import Axis, Pressure, at_dial
from sievit.stages.methods.repair import Moments, ridge
from sievit.stages.vision import repair
from sievit.stages.vision.network import Network
from sievit.stages.vision.surgery import cut, score

WIDTHS = Pressure(heads=Axis(1.0), v=Axis(0.5), mlp=Axis(1.0))


def moments_of(x: Tensor) -> Moments:
    moments = Moments(x.shape[1])
    for part in x.split(17):  # any batches
        moments.add(part)
    return moments


def activations(rows: int = 200, inputs: int = 12) -> Tensor:
    """Correlated and far from zero mean, as after a GELU."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.nn.functional.gelu(mixed) + 0.3


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_weak_ridge_is_least_squares(with_bias: bool) -> None:
    x, kept = activations(), torch.tensor([0, 2, 3, 7, 8, 11])
    removed = torch.tensor([1, 4, 5, 6, 9, 10])
    weight, bias = torch.randn(5, 12), torch.randn(5) if with_bias else None
    made = ridge(weight, bias, moments_of(x), kept, 1e-9)
    lost = (x[:, removed] @ weight[:, removed].T).double().numpy()
    design = x[:, kept].double().numpy()
    if with_bias:
        design = np.column_stack([design, np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(design, lost, rcond=None)
    expected = weight[:, kept].numpy() + solution[:6].T
    assert np.allclose(made.weight.numpy(), expected, atol=1e-3)
    if bias is None:
        assert made.bias is None
    else:
        assert made.bias is not None and np.allclose(made.bias.numpy(), bias.numpy() + solution[6], atol=1e-3)
    residual = lost - design @ solution
    assert made.left == pytest.approx(float((residual**2).mean()), rel=1e-3)
    assert made.without == pytest.approx(float((lost**2).mean()), rel=1e-3)


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 0.1, 1.0])
def test_the_error_that_is_left_is_never_above_the_error_without_and_rises_with_the_ridge(strength: float) -> None:
    x, kept = activations(), torch.tensor([0, 5, 6])
    weight, bias = torch.randn(4, 12), torch.randn(4)
    made = ridge(weight, bias, moments_of(x), kept, strength)
    assert made.left <= made.without
    assert made.bias is not None
    error = float(((x[:, kept] @ made.weight.T + made.bias - x @ weight.T - bias) ** 2).mean())
    assert made.left == pytest.approx(error, rel=1e-2)
    assert made.left >= ridge(weight, bias, moments_of(x), kept, strength / 10).left


def test_nothing_is_lost_when_removed_units_are_combinations_of_kept_ones() -> None:
    x, kept = activations(), torch.arange(6)
    x[:, 6:] = x[:, :6] @ torch.randn(6, 6) + torch.randn(6)
    weight, bias = torch.randn(4, 12), torch.randn(4)
    made = ridge(weight, bias, moments_of(x), kept, 1e-9)
    assert made.bias is not None
    assert torch.allclose(x[:, kept] @ made.weight.T + made.bias, x @ weight.T + bias, atol=1e-2)
    assert made.left < 1e-6 * made.without


def of_family(family: str) -> Network:
    return swin(family) if family in SWINS else network(family)


@pytest.mark.parametrize("family", ["deit", "lv-vit", "layer scale", *SWINS])
def test_a_repaired_cut_answers_more_like_the_whole_network(family: str) -> None:
    net, x = of_family(family), images(24)
    kept = at_dial(score(net, "random", 1), 0.4, WIDTHS, round_to=8, head_round_to=4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    mended, rows = repair.ridge(net, kept, x.split(7), 1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert {(row["block"], row["layer"]) for row in rows} <= {
        (i, p) for i in range(len(net.blocks)) for p in ("proj", "fc2")
    }
    assert rows and all(row["left"] <= row["without"] for row in rows)
    with torch.no_grad():
        plain, better = (float((cut(one, kept)(x) - net(x)).square().mean()) for one in (net, mended))
    assert better < plain


def test_dead_and_doubled_units_go_without_a_trace() -> None:
    """Half of the units of every MLP say what the other half says: repaired, the cut network is the whole one."""
    net: Any = network("deit")
    with torch.no_grad():
        for block in net.body.blocks:
            block.mlp.fc1.weight[1::2] = block.mlp.fc1.weight[::2]
            block.mlp.fc1.bias[1::2] = block.mlp.fc1.bias[::2]
    x = images(32)
    kept = at_dial(score(net, "random", 1), 0.0, Pressure(), round_to=8, head_round_to=4)
    halves = [type(b)(b.heads, b.qk, b.v, torch.arange(0, 192, 2)) for b in kept.blocks if b is not None]
    kept = type(kept)(tuple(halves), kept.embed)
    mended, _ = repair.ridge(net, kept, [x], 1e-9)
    fresh = images(8, seed=9)
    assert not torch.allclose(cut(net, kept)(fresh), net(fresh), atol=1e-2)
    assert torch.allclose(cut(mended, kept)(fresh), net(fresh), atol=1e-3)
