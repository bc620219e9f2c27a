"""What is kept, given scores: against loops, and by what a selection promises whatever the scores are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.example_selection import (
    balanced_prefix,
    check_classes,
    kept_count,
    quotas,
    select_examples,
    spread,
)


def test_the_highest_scores_stay_and_equals_go_by_index() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.5, 0.9])
    labels = np.zeros(6, dtype=np.int64)
    assert select_examples(scores, labels, 0.5, balanced=False).tolist() == [0, 1, 5]
    assert select_examples(scores, labels, 0.5, balanced=False, skip_hardest=1 / 3).tolist() == [0, 2, 4]
    ranked = np.arange(100.0)
    for percent in range(1, 60):  # 0.29 * 100 is a little less than 29
        kept = select_examples(ranked, np.zeros(100, np.int64), 0.4, balanced=False, skip_hardest=percent / 100)
        assert kept.max() == 99 - percent


def test_a_balanced_selection_keeps_every_class_in_proportion_and_the_exact_total() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 101, p=[0.7, 0.2, 0.1])
    scores = labels + rng.random(101)  # unbalanced selection would keep the last classes only
    kept = select_examples(scores, labels, 0.4, balanced=True)
    assert len(kept) == kept_count(101, 0.4) == 41
    assert len(set(kept.tolist())) == 41
    for label in range(3):
        members = np.flatnonzero(labels == label)
        mine = kept[labels[kept] == label]
        assert abs(len(mine) - 0.4 * len(members)) < 1
        assert set(mine) == set(members[np.argsort(-scores[members])][: len(mine)])


def ccs_by_the_paper(scores: list[float], count: int, beta: float, strata: int) -> list[int]:
    """Zheng et al., algorithm 1, line by line: how many of each stratum, from the easiest stratum on."""
    left = sorted(scores, reverse=True)[int(beta * len(scores)) :]
    low, width = min(left), (max(left) - min(left)) / strata
    bins: list[list[float]] = [[] for _ in range(strata)]
    for score in left:
        bins[min(strata - 1, int((score - low) / width))].append(score)
    taken = [0] * strata
    waiting = set(range(strata))
    while waiting:
        smallest = min(waiting, key=lambda b: (len(bins[b]), b))
        taken[smallest] = min(len(bins[smallest]), count // len(waiting))
        count -= taken[smallest]
        waiting.remove(smallest)
    return taken


@pytest.mark.parametrize(("keep", "beta"), [(0.1, 0.0), (0.3, 0.2), (0.7, 0.3)])
def test_ccs_takes_of_each_stratum_what_the_papers_algorithm_takes(keep: float, beta: float) -> None:
    scores = np.random.default_rng(1).gamma(2, 1, 400)
    kept = select_examples(scores, np.zeros(400, np.int64), keep, balanced=False, skip_hardest=beta, strata=8)
    left = np.sort(scores)[::-1][int(beta * 400) :]
    cells = np.minimum(7, ((scores[kept] - left.min()) / ((left.max() - left.min()) / 8)).astype(int))
    assert np.bincount(cells, minlength=8).tolist() == ccs_by_the_paper(scores.tolist(), len(kept), beta, 8)


def test_ccs_chooses_within_a_stratum_by_the_seed_and_nothing_else() -> None:
    scores, labels = np.random.default_rng(1).random(300), np.arange(300) % 3
    chosen = [select_examples(scores, labels, 0.2, balanced=True, strata=5, seed=seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    keep=st.floats(0.01, 1),
    skip=st.floats(0, 1),
    balanced=st.booleans(),
    strata=st.sampled_from([None, 2, 7]),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 5),
)
def test_any_selection_has_the_asked_number_of_different_examples_in_order(
    labels: list[int], keep: float, skip: float, balanced: bool, strata: int | None, levels: int, seed: int
) -> None:
    of = np.array(labels)
    scores = np.random.default_rng(seed).integers(0, levels, len(of)).astype(np.float32)
    skip = min(skip, 0.999 * (1 - kept_count(len(of), keep) / len(of)))
    kept = select_examples(scores, of, keep, balanced=balanced, skip_hardest=skip, strata=strata, seed=seed)
    assert len(kept) == kept_count(len(of), keep)
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0 and kept.max() < len(of)
    passed_over = np.argsort(-scores, kind="stable")[: int(skip * len(of))] if keep < 1 else []
    assert not set(kept) & set(passed_over)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), share=st.floats(0, 1))
def test_a_budget_is_spent_to_the_last_and_no_stratum_gives_less_than_a_larger_one_could_take(
    sizes: list[int], share: float
) -> None:
    budget = int(share * sum(sizes))
    taken = spread(np.array(sizes), budget)
    assert taken.sum() == budget
    assert (taken <= sizes).all()
    cut = [int(t) for t, size in zip(taken, sizes, strict=True) if t < size]
    if cut:  # those that are cut short get the same, to within the indivisible one, and nobody gets more
        assert max(cut) - min(cut) <= 1
        assert taken.max() <= max(cut) + 1


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), share=st.floats(0, 1))
def test_quotas_add_up_and_are_within_one_of_the_proportion(sizes: list[int], share: float) -> None:
    wanted = int(share * sum(sizes))
    quota = quotas(np.array(sizes), wanted)
    assert quota.sum() == wanted
    for got, size in zip(quota, sizes, strict=True):
        assert got <= size
        assert abs(got - size * wanted / max(1, sum(sizes))) < 1


def test_a_balanced_prefix_is_the_first_of_every_class() -> None:
    labels = np.array([random.Random(i).randrange(4) for i in range(50)])
    chosen = balanced_prefix(labels, 20)
    assert len(chosen) == 20
    for label in range(4):
        mine = sorted(i for i in chosen.tolist() if labels[i] == label)
        assert mine == np.flatnonzero(labels == label)[: len(mine)].tolist()


def test_a_selection_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(InvalidInput, match="skip_hardest"):
        select_examples(np.arange(10.0), np.zeros(10, np.int64), 0.8, balanced=False, skip_hardest=0.5)


def test_scores_that_are_no_numbers_are_refused_with_their_count() -> None:
    with pytest.raises(InvalidInput, match="2 of 4 scores"):
        select_examples(np.array([1.0, np.nan, np.inf, 0]), np.zeros(4, np.int64), 0.5, balanced=False)


def test_where_everything_is_kept_nothing_is_passed_over() -> None:
    assert len(select_examples(np.arange(10.0), np.zeros(10, np.int64), 1.0, balanced=True, skip_hardest=0.5)) == 10


def test_a_class_left_without_an_image_is_named_with_its_count() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 2)
    check_classes(np.array([0, 10, 13]), labels, ["ant", "bee", "cow"], "keep 0.2", "raise keep")
    with pytest.raises(InvalidInput, match=r"keep 0\.2 keeps 2 of 15 images and none of the 3 of class 'bee'$"):
        check_classes(np.array([0, 13]), labels, ["ant", "bee", "cow"], "keep 0.2", "raise keep")
    with pytest.raises(InvalidInput, match="none of the 2 of class 'cow', and of 1 more of 3 classes"):
        check_classes(np.array([0]), labels, ["ant", "bee", "cow"], "keep 0.05", "raise keep")


@pytest.mark.parametrize(("total", "keep", "count"), [(100, 0.55, 55), (100, 0.07, 7), (25, 0.56, 14), (3, 0.01, 1)])
def test_counts_do_not_suffer_from_binary_fractions(total: int, keep: float, count: int) -> None:
    assert kept_count(total, keep) == count
