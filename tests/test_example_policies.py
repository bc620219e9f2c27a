"""Swaps and soft pruning against loops that read like the papers, and the settings that contradict each other."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sievit.pipeline.errors import SpecError
from sievit.pipeline.spec import load_pipeline
from sievit.stages.__main__ import STAGES
from sievit.stages.methods.example_policies import (
    empty_window,
    first_pool,
    forgetting_counts,
    mean_variance,
    present,
    prune_softly,
    share_count,
    swap,
)
from sievit.stages.vision.example_settings import pruned_epochs

EXAMPLES, LENGTH = 40, 6


def presentations(seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches (ids, correct, variance); easy and hard examples, some presented more than LENGTH times, some never."""
    rng = np.random.default_rng(seed)
    ease = rng.random(EXAMPLES)
    batches = []
    for _ in range(LENGTH + 3):
        for ids in np.array_split(rng.permutation(EXAMPLES - 2), 4):
            ids = ids[rng.random(len(ids)) < 0.9]
            batches.append((ids, rng.random(len(ids)) < ease[ids], rng.random(len(ids))))
    return batches


def by_lists(batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[list[int], list[float]]:
    """Counts and mean variances as the paper's code makes them: one list an example, judged at the swap."""
    answers: list[list[bool]] = [[] for _ in range(EXAMPLES)]
    spread: list[list[float]] = [[] for _ in range(EXAMPLES)]
    for ids, correct, variance in batches:
        for i, right, v in zip(ids, correct, variance, strict=True):
            answers[i].append(bool(right))
            spread[i].append(float(v))
    counts, means = [], []
    for mine, values in zip(answers, spread, strict=True):
        mine, values = mine[:LENGTH], values[:LENGTH]
        lost = sum(1 for a, b in itertools.pairwise(mine) if a and not b)
        counts.append(lost if any(mine) else LENGTH)
        means.append(sum(values) / len(values) if values else 0.0)
    return counts, means


@pytest.mark.parametrize("seed", range(3))
def test_a_swap_takes_out_what_lists_sorted_by_count_and_attention_take_out(seed: int) -> None:
    batches = presentations(seed)
    window = empty_window(EXAMPLES)
    for ids, correct, variance in batches:
        present(window, ids, correct, variance, LENGTH)
    counts, means = by_lists(batches)
    assert forgetting_counts(window, LENGTH).tolist() == counts
    assert mean_variance(window).tolist() == pytest.approx(means)

    rng = np.random.default_rng(seed)
    active = first_pool(EXAMPLES, 10, rng)
    after, removed, restored = swap(active, np.array(counts), np.array(means), 7, rng)
    inside = [i for i in range(EXAMPLES) if active[i]]
    expected = sorted(inside, key=lambda i: (counts[i], means[i], i))[:7]
    assert removed.tolist() == sorted(expected)
    assert len(restored) == 7
    assert not active[restored].any()
    assert set(np.flatnonzero(after)) == (set(inside) - set(expected)) | set(restored.tolist())


def test_equal_counts_and_ties_leave_by_index() -> None:
    same = np.zeros(6)
    _, removed, _ = swap(np.array([1, 1, 0, 1, 1, 0], bool), same, same, 2, np.random.default_rng(0))
    assert removed.tolist() == [0, 1]


def test_every_removed_example_comes_back_equally_often() -> None:
    active = np.arange(12) < 6
    counts = np.arange(12)
    times = np.zeros(12)
    for seed in range(3000):
        times[swap(active, counts, counts, 2, np.random.default_rng(seed))[2]] += 1
    assert times[:6].tolist() == [0] * 6
    # 3000 draws of 2 from 6: mean 1000, s.d. sqrt(3000 / 3 * 2 / 3) = 26
    assert np.abs(times[6:] - 1000).max() < 4.5 * 26


def test_shares_are_the_papers_counts_on_imagenet() -> None:
    assert (share_count(1_281_167, 0.2), share_count(1_281_167, 0.05)) == (256_233, 64_058)
    assert share_count(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996


class Given:
    """A generator whose permutation is told."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self.order = order

    def permutation(self, values: np.ndarray) -> np.ndarray:
        return values[list(self.order)]


@pytest.mark.parametrize("prune", [0.25, 0.5, 0.9])
def test_over_all_draws_the_gradient_of_a_softly_pruned_pass_is_the_full_one(prune: float) -> None:
    """InfoBatch's theorem, by enumeration: also where prune * below is no whole number."""
    losses = np.array([0.1, 3.0, 0.2, np.nan, 0.3, 2.5, 0.4, 0.05], np.float32)  # five below the mean of 0.94
    gradients = np.random.default_rng(0).normal(size=(8, 3))
    orders = list(itertools.permutations(range(5)))
    total = np.zeros(3)
    for order in orders:
        pruned = prune_softly(losses, prune, Given(order))  # type: ignore[arg-type]
        assert (pruned.below, pruned.dropped) == (5, math.floor(5 * prune))
        assert np.count_nonzero(pruned.weights == 0) == pruned.dropped
        assert pruned.weights[[1, 3, 5]].tolist() == [1, 1, 1], "hard and unseen examples stay as they are"
        total += pruned.weights.astype(np.float64) @ gradients
    assert total / len(orders) == pytest.approx(gradients.sum(0), rel=1e-6)


def test_drawn_at_random_every_easy_example_weighs_one_on_average() -> None:
    losses = np.concatenate([np.full(30, 0.1), np.full(10, 5.0)]).astype(np.float32)
    draws = [prune_softly(losses, 0.5, np.random.default_rng(seed)).weights for seed in range(2000)]
    mean = np.mean(draws, axis=0)
    assert set(np.unique(draws)) == {0.0, 1.0, 2.0}  # 1 / (1 - r) where r * below is whole
    assert np.abs(mean[:30] - 1).max() < 4.5 / math.sqrt(2000)  # a weight of 0 or 2 has standard deviation 1
    assert mean[30:].tolist() == [1.0] * 10


def test_without_a_loss_or_below_one_mean_nothing_is_dropped() -> None:
    rng = np.random.default_rng(0)
    assert prune_softly(np.full(4, np.nan, np.float32), 0.5, rng).weights.tolist() == [1] * 4
    assert prune_softly(np.full(4, 2.0, np.float32), 0.5, rng).weights.tolist() == [1] * 4, "strictly below the mean"
    assert prune_softly(np.array([1.0, 2.0], np.float32), 0.99, rng).weights.tolist() == [1, 1], "one must stay"


def test_infobatch_is_off_in_the_first_pass_and_in_every_pass_that_reaches_into_the_last_share() -> None:
    for epochs, anneal in itertools.product(range(1, 40), (0.0, 0.1, 0.125, 0.5, 0.9)):
        slow = sum(1 for e in range(1, epochs) if e + 1 <= (1 - anneal) * epochs + 1e-9)
        assert pruned_epochs(anneal, epochs) == slow


@pytest.mark.parametrize(
    ("train", "examples", "message"),
    [
        (
            "epochs: 10",
            "{policy: swap, every: 2, until: 10}",
            r"examples\.until: swaps until epoch 10, but .* 10; .* 9",
        ),
        ("epochs: 4", "{policy: swap, every: 4, until: 5}", r"examples\.every: a swap every 4 epochs never comes in 4"),
        ("epochs: 9", "{policy: swap, every: 6, until: 4}", r"examples\.every: the first .* epoch 6, swaps end at 4"),
        ("epochs: 9", "{policy: swap, every: 1, until: 4, removed: 0.1, swap: 0.2}", r"0\.2 .* only 0\.1 are out"),
        ("epochs: 9", "{policy: swap, every: 1, until: 4, removed: 0.7, swap: 0.3}", r"0\.7 out and 0\.3 to go"),
        ("epochs: 9", "{policy: infobatch, mode: paper}", r"unknown key 'mode' in stages\.train\.examples"),
        ("epochs: 9", "{policy: random}", r"'keep' is missing in stages\.train\.examples"),
        ("epochs: 9", "{policy: random, keep: 1.0}", r"keep must be a number above 0 and below 1, got 1\.0"),
        ("steps: 90", "{policy: infobatch}", r"infobatch acts between passes; give epochs .* instead of steps"),
        ("epochs: 3.5", "{policy: random, keep: 0.5}", r"give epochs as a whole number, not 3\.5"),
        ("epochs: 2", "{policy: infobatch}", r"infobatch would drop nothing: of 2 epochs"),
        ("epochs: 9, budget: steps", "{policy: infobatch}", r"budget: steps cannot be kept with infobatch"),
        (
            "epochs: 9",
            "{policy: swapp}",
            r"examples\.policy must be one of swap, infobatch, random, got the text 'swapp'",
        ),
        ("epochs: 9", "{every: 2}", r"'policy' is missing in stages\.train\.examples"),
    ],
)
def test_a_policy_that_contradicts_itself_or_the_run_is_refused_with_its_line(
    train: str, examples: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"data: {{source: 'builtin:digits'}}\nstages:\n  train: {{{train},\n    examples: {examples}}}\n")
    with pytest.raises(SpecError) as caught:
        load_pipeline(file, STAGES)
    assert re.search(message, f"{caught.value}; {caught.value.hint}")
    assert f"{file}:{3 if 'budget' in train else 4}:" in caught.value.where
    assert not caught.value.also


@pytest.mark.parametrize(
    "examples",
    [{"policy": "swap", "every": 30, "until": 150}, {"policy": "infobatch"}, {"policy": "random", "keep": 0.5}],
    ids=lambda settings: settings["policy"],
)
def test_the_papers_settings_are_taken(examples: dict[str, Any]) -> None:
    train = next(stage.config for stage in STAGES if stage.name == "train")
    config: Any = train.model_validate({"epochs": 300, "examples": examples})
    assert config.examples.policy == examples["policy"]
