"""Instant soup pruning: what weak masks are joined to, how many weights stay in the end, and when magnitudes win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmark import Listening
from test_training import CPU, NORMALISE, pool
from test_weight_masks import globally_pruned, sparse, stage
from tiny_vision import data, image_folder, network
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.weight_masks import weights_kept
from sievit.stages.vision import soup
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.mask_settings import Soup
from sievit.stages.vision.masks import densities
from sievit.stages.vision.masks import pool as weights_of
from sievit.stages.vision.objective import supervised
from sievit.stages.vision.recipe import Recipe
from sievit.stages.vision.tensors import write_tensors
from sievit.stages.vision.trials import Trials
from sievit.stages.vision.weights import load_network

# Rates so high that trainings of two steps disagree.
RECIPE = Recipe(steps=4, batch_size=8, lr=3e-3, warmup=0.0)
SOUP: dict[str, Any] = {"method": "soup", "keep": 0.7, "masks": 3, "data": 0.5, "cut": 0.2, "steps": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def cooked(images: Images, *answers: float, net: Any = None, **fields: Any) -> soup.Cooked:
    """answers: of the judge, the soup's first."""
    judged = iter(answers)
    trials = Trials(
        pool(images, False), RECIPE, seed=1, device=CPU, normalise=NORMALISE, objective=supervised, annotate=None,
        judge=lambda net: next(judged), progress=Listening(),
    )  # fmt: skip
    return soup.cook(net or network(classes=2), Soup(**{**SOUP, **fields}), trials)


class Joined:
    """What every round joined, and to what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[list[Tensor], Tensor]] = []
        real = soup.joined

        def joined(masks: list[Tensor], *rest: Any) -> Tensor:
            self.rounds.append((masks, real(masks, *rest)))
            return self.rounds[-1][1]

        monkeypatch.setattr(soup, "joined", joined)


def test_trials_see_whole_images_although_the_training_after_them_has_tickets(images: Images) -> None:
    """They are judged on whole images, on which a network that has seen tickets alone answers badly at any sparsity."""
    found = []
    for ticketed in (False, True):
        trials = Trials(
            pool(images, ticketed), RECIPE, seed=1, device=CPU, normalise=NORMALISE, objective=supervised,
            annotate=None, judge=lambda net: 0.0, progress=Listening(),
        )  # fmt: skip
        fitted = trials.fit(network(classes=2), 3, seed=1, masks=None)
        assert fitted.ticketed == 0
        found.append(fitted.network.body.state_dict())
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_exactly_the_asked_number_of_weights_stays(images: Images, mode: Any) -> None:
    made = cooked(images, 1.0, 0.5, mode=mode)
    found = densities(made.network)
    assert found["nonzero"] == weights_kept(0.7, found["weights"])
    assert made.chosen == "soup"
    assert found["global"] <= made.rounds[-1]["kept"]


def test_in_paper_mode_a_weight_stays_that_any_weak_mask_keeps_and_it_gets_denser(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Joined(monkeypatch)
    made = cooked(images, mode="paper")
    assert made.top1 == {}
    for (weak, kept), row in zip(seen.rounds, made.rounds, strict=True):
        assert torch.equal(kept, torch.stack(weak).any(0))
        assert row["kept"] == pytest.approx(float(kept.float().mean()), abs=1e-6)
        assert row["kept"] > max(row["weak"])
        assert 0 < row["overlap"] < 1
    first = seen.rounds[0][0]
    assert {int(one.sum()) for one in first} == {weights_kept(0.8, first[0].numel())}, "each leaves out a fifth"
    assert all(not torch.equal(first[0], one) for one in first[1:]), "they saw different images"


def test_rounds_go_on_from_what_the_last_one_left(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Joined(monkeypatch)
    made = cooked(images, 1.0, 0.0, keep=0.5, cut=0.15)
    assert len(made.rounds) > 1
    for (_, before), (weak, after) in zip(seen.rounds, seen.rounds[1:], strict=False):
        assert all(bool((one <= before).all()) for one in (*weak, after))
    level = made.rounds[-2]["kept"] * 0.85
    assert made.rounds[-1]["weak"] == pytest.approx([max(0.5, level)] * 3, abs=1e-4)


def test_magnitudes_are_taken_where_they_answer_better(images: Images) -> None:
    """They are those of the network after as much training, cut at once."""
    made = cooked(images, 0.5, 0.6)
    assert (made.chosen, made.top1) == ("magnitude", {"soup": 0.5, "magnitude": 0.6})
    found = densities(made.network)
    assert found["nonzero"] == weights_kept(0.7, found["weights"])
    assert cooked(images, 0.5, 0.5).chosen == "soup"
    alike = weights_of(cooked(images, 0.6, 0.5).network)
    assert any(not torch.equal(w == 0, alike[name] == 0) for name, w in weights_of(made.network).items())


def test_a_soup_that_is_cooked_again_is_the_same_and_leaves_the_network_alone(images: Images) -> None:
    net = network(classes=2)
    before = {name: t.clone() for name, t in net.body.state_dict().items()}
    one, two = cooked(images, 1.0, 0.5, net=net), cooked(images, 1.0, 0.5, net=net)
    assert all(torch.equal(before[name], t) for name, t in net.body.state_dict().items())
    assert (one.rounds, one.images) == (two.rounds, two.images)
    pairs = zip(one.network.body.state_dict().values(), two.network.body.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weak_masks_that_take_all_back_are_refused(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soup, "joined", lambda masks, *rest: torch.ones_like(masks[0]))
    monkeypatch.setattr(soup, "MOST_ROUNDS", 2)
    with pytest.raises(InvalidInput, match="2 rounds of soup leave 100% of the weights"):
        cooked(images, mode="paper")


def test_a_network_that_is_sparser_already_is_refused(images: Images) -> None:
    with pytest.raises(InvalidInput, match=r"70% of the weights are to be kept, and 40\.0% are not zero"):
        cooked(images, net=sparse(0.4))


def test_the_stage_trains_with_the_soup_held_and_books_its_cost(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", network(classes=2).body.state_dict())
    ctx = stage(tmp_path, Soup(**SOUP), weights="w.safetensors", epochs=1, lr=3e-3)
    record = ctx.metrics["masks"]
    total = record["density"]["weights"]
    assert record["density"]["nonzero"] == weights_kept(0.7, total)
    assert densities(load_network(ctx.out)) == record["density"]
    assert record["chosen"] in record["tried"]
    # Before every round and after the last the network and its rival train, then both once more: 2 steps of 8 images.
    # Each weak training sees half of the 22 images, 8 and 3.
    rounds = len(record["rounds"])
    seen = 16 * (2 * (rounds + 1) + 2) + 11 * 3 * rounds
    assert ctx.ledger["scoring_macs"] == seen * 3 * network(classes=2).architecture.macs()
    assert [figure.name for figure in ctx.figures] == ["soup"]


def test_the_stage_counts_zeros_where_the_soup_made_them_in_paper_mode_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", network(classes=2).body.state_dict())
    ctx = stage(tmp_path, Soup(**{**SOUP, "mode": "paper"}), weights="w.safetensors", epochs=1, lr=3e-3)
    density = ctx.metrics["masks"]["density"]
    assert density["nonzero"] == weights_kept(0.7, density["weights"])
    assert density == densities(load_network(ctx.out))


def test_magnitudes_alone_are_torchs_global_pruning(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    dense: list[Any] = []
    real = soup._to

    def spied(net: Any, *rest: Any) -> Any:
        dense.append(net)
        return real(net, *rest)

    monkeypatch.setattr(soup, "_to", spied)
    made = cooked(images, 0.5, 0.6)
    assert densities(dense[1])["global"] == 1
    expected = globally_pruned(dense[1], "corrected", 0.7)
    assert all(torch.equal(expected[name], t) for name, t in made.network.body.state_dict().items())
