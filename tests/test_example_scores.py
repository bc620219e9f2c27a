"""Scores of examples against loops that read like the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.example_scores import el2n, forgetting, kept_count, select_examples


def test_el2n_is_the_mean_error_norm_over_runs() -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(3, 7, 4, generator=generator).softmax(-1)
    labels = torch.randint(0, 4, (7,), generator=generator)
    expected = []
    for i in range(7):
        norms = []
        for run in range(3):
            error = [float(probabilities[run, i, k]) - (1.0 if k == int(labels[i]) else 0.0) for k in range(4)]
            norms.append(sum(e * e for e in error) ** 0.5)
        expected.append(sum(norms) / 3)
    assert el2n(probabilities, labels).tolist() == pytest.approx(expected, abs=1e-6)


def test_forgetting_counts_right_to_wrong_and_never_learned_is_above_all() -> None:
    correct = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]]], dtype=torch.bool)
    # example 0: right, wrong, right, wrong; 1: learned once and lost; 2: never learned; 3: never forgotten
    assert forgetting(correct).tolist() == [2, 1, 4, 0]


def test_the_highest_scores_stay_and_equals_go_by_index() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.5, 0.9])
    labels = np.zeros(6, dtype=np.int64)
    assert select_examples(scores, labels, 0.5, balanced=False).tolist() == [0, 1, 5]
    assert select_examples(scores, labels, 0.5, balanced=False, skip_hardest=1 / 3).tolist() == [0, 2, 4]


def test_a_balanced_selection_keeps_every_class_in_proportion_and_the_exact_total() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 101, p=[0.7, 0.2, 0.1])
    scores = labels + rng.random(101)  # unbalanced selection would keep the last classes only
    kept = select_examples(scores, labels, 0.4, balanced=True)
    assert len(kept) == kept_count(101, 0.4) == 41
    assert len(set(kept.tolist())) == 41
    for label in range(3):
        assert abs(int((labels[kept] == label).sum()) - 0.4 * int((labels == label).sum())) < 1


def test_a_selection_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(InvalidInput, match="skip_hardest"):
        select_examples(np.arange(10.0), np.zeros(10), 0.8, balanced=False, skip_hardest=0.5)


def test_where_everything_is_kept_nothing_is_passed_over() -> None:
    assert len(select_examples(np.arange(10.0), np.zeros(10), 1.0, balanced=True, skip_hardest=0.5)) == 10


@pytest.mark.parametrize(("total", "keep", "count"), [(100, 0.55, 55), (100, 0.07, 7), (25, 0.56, 14), (3, 0.01, 1)])
def test_counts_do_not_suffer_from_binary_fractions(total: int, keep: float, count: int) -> None:
    assert kept_count(total, keep) == count


def test_a_class_that_would_vanish_is_refused_by_name() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    scores = np.array([0.0] * 8 + [1.0] * 2)
    assert 1 not in labels[select_examples(scores, labels, 0.5, balanced=False, skip_hardest=0.2)]
    with pytest.raises(InvalidInput) as caught:
        select_examples(scores, labels, 0.5, balanced=True, skip_hardest=0.2, names=("ant", "bee"))
    assert str(caught.value) == "keep 0.5 and skip_hardest 0.2 leave none of the 2 examples of class 'bee'"
    assert caught.value.hint == "pass over fewer, keep more, or set examples.balanced: false"
    with pytest.raises(InvalidInput, match=r"keep 0.1 leave none of the 2 examples of class 1"):
        select_examples(scores, labels, 0.1, balanced=True)
