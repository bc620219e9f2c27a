"""Scores of examples against loops that read like the papers, and against torch's own gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sievit.stages.methods.example_scores import (
    class_distances,
    el2n,
    entropy,
    forgetting,
    grand,
    margin,
    moderate,
    random_scores,
)


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (9, 4) of which one row is certain, and labels."""
    generator = torch.Generator().manual_seed(1)
    probabilities = (3 * torch.randn(9, 4, generator=generator)).softmax(-1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0])
    return probabilities, torch.randint(0, 4, (9,), generator=generator)


def test_el2n_is_the_length_of_the_error(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    probabilities, labels = answers
    expected = []
    for p, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        expected.append(sum((q - (1.0 if k == label else 0.0)) ** 2 for k, q in enumerate(p)) ** 0.5)
    assert el2n(probabilities, labels).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_grand_is_the_norm_that_autograd_finds_for_the_last_layer(heads: int) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 4) for _ in range(heads)]
    inputs, labels = torch.randn(6, heads, 5), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = []
    for x, label in zip(inputs, labels, strict=True):
        logits = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)]).mean(0)
        loss = torch.nn.functional.cross_entropy(logits[None], label[None])
        gradients = torch.autograd.grad(loss, [p for layer in layers for p in layer.parameters()])
        expected.append(float(sum(g.square().sum() for g in gradients) ** 0.5))
    with torch.no_grad():
        logits = torch.stack([layer(inputs[:, i]) for i, layer in enumerate(layers)]).mean(0)
    assert grand(logits.softmax(-1), labels, inputs).tolist() == pytest.approx(expected, rel=1e-5)


def test_margin_and_entropy_are_highest_where_nothing_is_decided(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    probabilities, _ = answers
    margins, entropies = [], []
    for p in probabilities.tolist():
        first, second = sorted(p, reverse=True)[:2]
        margins.append(1 - (first - second))
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    assert margin(probabilities).tolist() == pytest.approx(margins, abs=1e-6)
    assert entropy(probabilities).tolist() == pytest.approx(entropies, abs=1e-6)
    even = torch.full((1, 4), 0.25)
    assert float(margin(even)) == 1
    assert float(entropy(even)) == pytest.approx(math.log(4))


def test_forgetting_counts_right_to_wrong_and_never_learned_is_above_all() -> None:
    correct = [[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]]
    # example 0: right, wrong, right, wrong; 1: learned once and lost; 2: never learned; 3: never forgotten
    assert forgetting(np.array(correct, bool)).tolist() == [2, 1, 4, 0]


def test_forgetting_reads_its_epochs_once_and_one_by_one() -> None:
    rows = np.random.default_rng(0).random((7, 50)) < 0.5
    assert forgetting(row.copy() for row in rows).tolist() == forgetting(rows).tolist()


def test_class_distances_are_to_the_mean_of_the_class() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    expected = []
    for x, label in zip(features, labels, strict=True):
        centre = np.mean([f for f, other in zip(features, labels, strict=True) if other == label], axis=0)
        expected.append(math.dist(x.tolist(), centre.tolist()))
    assert class_distances(features, labels, 4).tolist() == pytest.approx(expected, rel=1e-5)


def test_class_distances_do_not_depend_on_the_blocks_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)
    whole = class_distances(features, labels, 3)
    monkeypatch.setattr("sievit.stages.methods.example_scores.ROWS", 7)
    assert class_distances(features, labels, 3) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_the_best_moderate_scores_are_the_window_around_the_median(count: int) -> None:
    distances = np.random.default_rng(0).random(9).astype(np.float32)
    by_distance = sorted(range(9), key=lambda i: distances[i])
    low = (9 - count) // 2  # the authors' code: from 0.5 - rate / 2 to 0.5 + rate / 2 of the sorted distances
    best = np.argsort(-moderate(distances, np.zeros(9, np.int64)), kind="stable")[:count]
    assert sorted(best.tolist()) == sorted(by_distance[low : low + count])


def test_moderate_scores_are_within_the_group() -> None:
    distances, groups = np.array([1.0, 50, 2, 60, 3, 70]), np.array([0, 1, 0, 1, 0, 1])
    assert moderate(distances, groups).tolist() == [-2, -2, 0, 0, -2, -2]


def test_random_scores_follow_the_seed_alone() -> None:
    assert random_scores(20, 3).tolist() == random_scores(20, 3).tolist()
    assert random_scores(20, 3).tolist() != random_scores(20, 4).tolist()
