"""Connections between patch tokens: against loops, against the worked example of what the released formula does, and
off outside of training.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_vision import images, network, swin

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.attention_connections import Connections, connect, narrow, published, weigh
from sievit.stages.methods.token_reduction import keep_count
from sievit.stages.vision import token_schedule
from sievit.stages.vision.token_settings import Connected, Tokens
from sievit.stages.vision.vit import ViT, drops_for


def random_map(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
@pytest.mark.parametrize(("prefix", "keep"), [(1, 0.3), (2, 0.55), (5, 0.01)])
def test_connections_are_those_of_a_loop_over_rows(mode: Any, prefix: int, keep: float) -> None:
    weights = random_map(prefix + 7)
    allowed = connect(weights, prefix, keep, mode, None)
    count = keep_count(7, keep)
    for image in range(2):
        for row in range(prefix + 7):
            strongest = sorted(range(prefix, prefix + 7), key=lambda key: -float(weights[image, row, key]))[:count]
            for key in range(prefix + 7):
                wanted = row < prefix or key < prefix or key in strongest or (mode == "corrected" and key == row)
                assert bool(allowed[image, 0, row, key]) == wanted


def test_equal_connections_are_all_kept() -> None:
    assert connect(torch.ones(1, 5, 5), 1, 0.25, "paper", None).all()


def test_in_corrected_mode_a_connection_that_is_gone_stays_gone() -> None:
    """A covered map has zeros that rank equal: without the old cover a row with few connections would regain all."""
    before = connect(random_map(9), 1, 0.25, "corrected", None)
    covered = weigh(torch.randn(2, 1, 9, 9), before, "corrected").mean(1)
    after = connect(covered, 1, 0.5, "corrected", before)
    assert not (after & ~before).any()


def test_rows_and_columns_follow_the_tokens_that_are_kept() -> None:
    square, kept = torch.randn(2, 6, 6), torch.tensor([[0, 2, 4], [1, 2, 3]])
    for image in range(2):
        tokens = [0, *(1 + kept[image]).tolist()]
        expected = torch.stack([square[image, row, tokens] for row in tokens])
        assert torch.equal(narrow(square, kept, 1)[image], expected)
        assert torch.equal(narrow(square.unsqueeze(1), kept, 1)[image, 0], expected)


def worked_example() -> tuple[torch.Tensor, torch.Tensor]:
    """A row of 197 keys of which the class token and 20 patches are allowed. The best of them has three quarters of
    their weight; one covered key has a logit 20.8 above it.
    """
    logits = torch.full((1, 1, 1, 197), -6.0)
    allowed = torch.zeros(1, 1, 1, 197, dtype=torch.bool)
    allowed[..., :21] = True
    logits[..., :21] = math.log(0.25 / 20)
    logits[..., 5] = math.log(0.75)
    logits[..., 100] = math.log(0.75) + 20.8
    return logits, allowed


def test_the_released_formula_puts_nearly_all_weight_on_covered_keys() -> None:
    logits, allowed = worked_example()
    weights = published(logits, allowed)
    assert float(weights[~allowed].sum()) == pytest.approx(0.89, abs=0.005)
    assert float(weights[allowed].max()) == pytest.approx(0.006, abs=0.0005)
    corrected = weigh(logits, allowed, "corrected")
    assert float(corrected[~allowed].sum()) == 0
    assert float(corrected[allowed].max()) == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_half_precision_gives_numbers_even_for_extreme_logits(mode: Any) -> None:
    logits = torch.tensor([[6e4, -6e4, 3.0], [0.0, 6e4, -6e4], [1.0, 2.0, -6e4]], dtype=torch.float16).view(1, 1, 3, 3)
    weights = weigh(logits, torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3), mode)
    assert torch.isfinite(weights).all()
    if mode == "corrected":
        assert torch.equal(weights[0, 0], torch.eye(3, dtype=torch.float16))


@pytest.mark.parametrize("fused", [True, False])
def test_covered_keys_have_no_say(fused: bool) -> None:
    net = network()
    assert isinstance(net, ViT)
    attention = net.attentions[0]
    attention.fused = fused
    allowed = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    allowed[..., 1, 4] = False
    x = torch.randn(1, 6, 48)
    other = x.clone()
    other[:, 4] += 1
    one, two = attention.attend(x, allowed=allowed)[0], attention.attend(other, allowed=allowed)[0]
    assert torch.equal(one[0, 1], two[0, 1]) and not torch.allclose(one[0, 2], two[0, 2])
    assert torch.allclose(attention.attend(x, allowed=torch.ones_like(allowed))[0], attention(x), atol=1e-6)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_blocks_after_a_choice_attend_along_it_and_outside_of_training_all_do(mode: Any) -> None:
    net = network()
    assert isinstance(net, ViT)
    dense = net(images(2)).detach()
    net = net.with_tokens(drops_for(net.architecture, (1,), 0.5))
    reduced = net.eval()(images(2)).detach()
    net.connections = Connections(0.2, mode, (0, 1))
    assert torch.equal(net(images(2)), reduced) and not torch.allclose(reduced, dense)
    seen: list[tuple[int, ...] | None] = []
    for attention in net.attentions:
        attend = attention.attend

        def spied(x: Any, attend: Any = attend, **how: Any) -> Any:
            seen.append(None if how["allowed"] is None else tuple(how["allowed"].shape))
            return attend(x, **how)

        attention.attend = spied  # type: ignore[method-assign]
    out = net.train()(images(2))
    assert seen == [None, (2, 1, 17, 17), (2, 1, 9, 9)]
    assert torch.isfinite(out).all() and not torch.allclose(out, reduced)


def test_connections_end_where_the_finish_begins() -> None:
    net = network()
    schedule = token_schedule.create(net.architecture, None, Connected(keep=0.5, blocks=(0,)), finish=0.25)
    assert schedule is not None and isinstance(net, ViT)
    on = []
    for step in range(20):
        schedule.apply(net, step, 20)
        on.append(net.connections is not None)
    assert on == [True] * 15 + [False] * 5


def test_networks_without_prefix_tokens_or_with_windows_are_refused() -> None:
    pooled = network("vit", class_token=False, global_pool="avg").architecture
    with pytest.raises(InvalidInput, match="no prefix token"):
        token_schedule.create(pooled, None, Connected(keep=0.5, blocks=(0,)))
    with pytest.raises(InvalidInput, match="windows"):
        token_schedule.create(swin().architecture, None, Connected(keep=0.5, blocks=(0,)))
    with pytest.raises(InvalidInput, match="windows"):
        token_schedule.create(swin().architecture, Tokens(blocks=(0,), keep=0.5))
    with pytest.raises(InvalidInput, match="network of 3 blocks"):
        token_schedule.create(network().architecture, None, Connected(keep=0.5, blocks=(3,)))
