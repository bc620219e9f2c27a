"""Budgets: equal epochs, equal iterations, or equal MACs with the price of the ticket inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sievit.stages.methods import InvalidInput
from sievit.stages.vision.budget import Arm, Spent, allowance, load, passes, steps_for
from sievit.stages.vision.recipe import Recipe

SIZES = st.integers(1, 400)


def with_finish(kept: int, examples: int, ticketed: int, whole: int, finish: float, scoring: int | None) -> Arm:
    """An arm on tickets, then on all patches for a share of the steps."""
    return Arm(kept, examples, ((1 - finish, ticketed), (1.0, whole)), whole, scoring)


def recipe(epochs: float = 5, batch: int = 32) -> Recipe:
    return Recipe(epochs=epochs, batch_size=batch)


@given(SIZES, st.integers(1, 64), st.integers(0, 60))
def test_passes_are_those_of_a_loop_over_epochs_whose_last_batch_is_short(
    examples: int, batch: int, steps: int
) -> None:
    batches = [min(batch, examples - start) for start in range(0, examples, batch)]
    assert passes(steps, examples, batch) == sum(batches[step % len(batches)] for step in range(steps))


@given(SIZES, st.integers(1, 64), st.integers(1, 20), st.floats(0, 0.9))
def test_all_budgets_are_one_for_the_dense_network(examples: int, batch: int, epochs: int, finish: float) -> None:
    dense = with_finish(examples, examples, 700, 700, finish, 0)
    steps = recipe(epochs, batch).total_steps(examples)
    assert {steps_for(recipe(epochs, batch), by, dense) for by in ("epochs", "steps", "macs")} == {steps}


@given(
    kept=st.integers(1, 300),
    more=st.integers(0, 300),
    ticketed=st.integers(1, 1000),
    dearer=st.integers(0, 1000),
    finish=st.floats(0, 0.9),
    scoring=st.integers(0, 10**6),
)
def test_a_budget_of_macs_is_spent_as_far_as_whole_steps_allow_and_never_exceeded(
    kept: int, more: int, ticketed: int, dearer: int, finish: float, scoring: int
) -> None:
    arm = with_finish(kept, kept + more, ticketed, ticketed + dearer, finish, scoring)
    allowed = allowance(recipe(), arm)
    assert allowed == arm.dense * 5 * arm.examples
    if scoring + arm.training_macs(1, 32) > allowed:
        with pytest.raises(InvalidInput, match=f"took {scoring:,} MACs.* budget is {allowed:,}"):
            steps_for(recipe(), "macs", arm)
        return
    steps = steps_for(recipe(), "macs", arm)
    assert scoring + arm.training_macs(steps, 32) <= allowed < scoring + arm.training_macs(steps + 1, 32)


def test_a_cheaper_arm_takes_more_steps_and_one_that_paid_for_its_ticket_fewer() -> None:
    def steps(ticketed: int, scoring: int) -> int:
        return steps_for(recipe(), "macs", with_finish(640, 640, ticketed, 1000, 0.0, scoring))

    assert steps(500, 0) == 2 * steps(1000, 0)
    a_fifth = 1000 * 640  # one of five epochs of the dense network
    assert steps(500, a_fifth) == 2 * steps(1000, a_fifth) == 2 * 4 * 20


def test_equal_steps_are_those_of_all_examples_whatever_is_kept() -> None:
    assert steps_for(recipe(), "steps", with_finish(64, 640, 1, 1, 0.0, None)) == 5 * 20
    assert steps_for(recipe(), "epochs", with_finish(64, 640, 1, 1, 0.0, None)) == 5 * 2


def test_tickets_that_do_not_say_what_they_cost_cannot_be_compared_by_macs() -> None:
    with pytest.raises(InvalidInput, match="does not say"):
        steps_for(recipe(), "macs", with_finish(64, 640, 1, 1, 0.0, None))


def test_what_was_spent_is_read_back_and_sums_training_and_choosing(tmp_path: Path) -> None:
    spent = Spent("macs", 10, 64, 640, 320, macs=900, scoring_macs=80, allowed=1000)
    spent.save(tmp_path)
    assert load(tmp_path) == spent
    assert spent.total == 980
    assert load(tmp_path / "elsewhere") is None
    (tmp_path / "training.json").write_text('{"steps": 3}')
    with pytest.raises(InvalidInput, match="not a readable record"):
        load(tmp_path)
