"""Masks on weights: exact numbers against sorted loops, torch's own pruning as oracle, and what holds at every step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from pydantic import ValidationError
from test_benchmark import Listening
from test_training import CPU, MASKS, NORMALISE, Killed, pool, trained
from tiny_vision import ARGS, data, image_folder, network, swin
from tiny_vision import images as pictures
from torch import Tensor
from torch.nn.utils import prune

from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import train
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.weight_masks import (
    bend,
    cosine_fraction,
    cubic_keep,
    drop_and_grow,
    erk_counts,
    first_of,
    highest,
    joined,
    knee,
    largest,
    n_of_m,
    weights_kept,
)
from sievit.stages.train import TrainConfig
from sievit.stages.vision import masks
from sievit.stages.vision import step as stepping
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.evaluate import top1
from sievit.stages.vision.mask_settings import (
    Essential,
    Hold,
    Magnitude,
    NncfMagnitude,
    Pattern,
    RigL,
    check_masks,
    check_room,
    mask_steps,
)
from sievit.stages.vision.masks import Held, Projected, check_groups, densities
from sievit.stages.vision.masks import pool as weights_of
from sievit.stages.vision.recipe import Recipe
from sievit.stages.vision.tensors import write_tensors
from sievit.stages.vision.training import fit
from sievit.stages.vision.weights import load_network

DENSE = Recipe(steps=6, batch_size=8, lr=3e-3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def by_loop(scores: list[float], count: int) -> list[bool]:
    chosen = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [i in chosen for i in range(len(scores))]


# ---- the methods


def test_the_number_is_exact_and_among_equals_the_lower_index_stays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(-1, 4, rng.integers(1, 12)).astype(float).tolist()
        for count in range(len(scores) + 1):
            assert largest(torch.tensor(scores), count).tolist() == by_loop(scores, count)


def test_ranking_all_together_or_each_alone_is_that_of_a_loop() -> None:
    parts = [torch.randint(0, 5, shape).float() for shape in ((3, 4), (2, 5), (7,))]
    joined = [x for part in parts for x in part.flatten().tolist()]
    got = highest(parts, 0.37, scope="global")
    assert [x for m in got for x in m.flatten().tolist()] == by_loop(joined, weights_kept(0.37, 29))
    assert [m.shape for m in got] == [p.shape for p in parts]
    for mask, part in zip(highest(parts, 0.37, scope="layer"), parts, strict=True):
        assert mask.flatten().tolist() == by_loop(part.flatten().tolist(), weights_kept(0.37, part.numel()))


def test_a_fraction_is_the_nearest_number_of_weights() -> None:
    assert [weights_kept(k, 10) for k in (0.01, 0.24, 0.25, 0.55, 1.0)] == [1, 2, 3, 6, 10]
    with pytest.raises(ValueError, match="keep"):
        weights_kept(0.0, 10)


def test_the_cubic_schedule_goes_from_everything_to_keep_and_slows_down() -> None:
    assert (cubic_keep(0, 0.2), cubic_keep(1, 0.2), cubic_keep(0.5, 0.2)) == (1, 0.2, pytest.approx(0.3))
    cuts = -np.diff([cubic_keep(p / 10, 0.2) for p in range(11)])
    assert (np.diff(cuts) < 0).all() and (cuts > 0).all()


def test_the_exchanged_share_falls_as_half_a_cosine() -> None:
    assert (cosine_fraction(0, 0.3), cosine_fraction(0.5, 0.3), cosine_fraction(1, 0.3)) == pytest.approx(
        (0.3, 0.15, 0)
    )


def test_densities_of_erdos_renyi_sum_exactly_and_follow_the_sides() -> None:
    shapes = [(576, 192), (192, 192), (768, 192), (192, 768)]
    for keep in (0.1, 0.33, 0.5, 0.9):
        count = weights_kept(keep, sum(a * b for a, b in shapes))
        counts = erk_counts(shapes, count)
        assert sum(counts) == count
        open_ones = [i for i, (a, b) in enumerate(shapes) if counts[i] < a * b]
        ratios = [counts[i] / (sum(shapes[i])) for i in open_ones]
        assert max(ratios) - min(ratios) < 0.01
        whole = [i for i in range(4) if i not in open_ones]
        assert all(ratios[0] * sum(shapes[i]) >= math.prod(shapes[i]) for i in whole)
    assert erk_counts([(2, 2), (100, 100)], 500)[0] == 4
    assert erk_counts([(2, 3), (4, 5)], 26) == [6, 20]
    with pytest.raises(ValueError, match="cannot be kept"):
        erk_counts([(2, 3)], 7)


def test_drop_and_grow_is_that_of_a_loop_and_never_changes_the_number() -> None:
    """Integers, so that ties abound: a strict threshold, as SViTE's, would drop too many."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        size = int(rng.integers(2, 14))
        mask = rng.random(size) < 0.6
        weight = np.where(mask, rng.integers(-3, 4, size), 0)
        gradient = rng.integers(-3, 4, size)
        count = int(rng.integers(0, min(mask.sum(), (~mask).sum()) + 1))
        kept = [i for i in range(size) if mask[i]]
        staying = sorted(kept, key=lambda i: (-abs(weight[i]), i))[: len(kept) - count]
        others = [i for i in range(size) if i not in staying]
        coming = sorted(others, key=lambda i: (-abs(gradient[i]), i))[:count]
        got = drop_and_grow(torch.tensor(weight).float(), torch.tensor(gradient).float(), torch.tensor(mask), count)
        assert sorted(got.nonzero().flatten().tolist()) == sorted(staying + coming)
    with pytest.raises(ValueError, match="exchanged"):
        drop_and_grow(torch.ones(3), torch.ones(3), torch.tensor([True, True, False]), 2)


def test_two_of_every_four_inputs_stay_the_lower_ones_of_equals() -> None:
    weight = torch.randint(-2, 3, (6, 12)).float()
    mask = n_of_m(weight, 2, 4)
    for row in range(6):
        for start in range(0, 12, 4):
            group = weight[row, start : start + 4].abs().tolist()
            assert mask[row, start : start + 4].tolist() == by_loop(group, 2)


def test_masks_of_one_order_are_nested() -> None:
    order = torch.randperm(20)
    small, large = first_of(order, 7, torch.Size((4, 5))), first_of(order, 12, torch.Size((4, 5)))
    assert int(small.sum()) == 7 and bool((small & large).eq(small).all())


def test_joining_is_a_loop_over_votes_and_the_larger_weights_fill_up() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        size, number, votes = int(rng.integers(2, 10)), int(rng.integers(2, 6)), float(rng.uniform(0, 1))
        weak = rng.random((number, size)) < 0.5
        magnitudes = rng.integers(0, 4, size).astype(float)
        least = int(rng.integers(1, size + 1))
        enough = [i for i in range(size) if weak[:, i].sum() >= max(1, votes * number)]
        order = sorted(range(size), key=lambda i: (-int(weak[:, i].sum()), -magnitudes[i], i))
        expected = sorted(order[: max(len(enough), least)])
        got = joined([torch.tensor(one) for one in weak], votes, torch.tensor(magnitudes).float(), least)
        assert sorted(got.nonzero().flatten().tolist()) == expected


def test_a_union_of_nested_masks_is_the_densest_of_them() -> None:
    order, values = torch.randperm(20), torch.rand(20)
    nested = [first_of(order, count, torch.Size((20,))) for count in (5, 9, 14)]
    assert torch.equal(joined(nested, 0.0, values, 1), nested[-1])
    assert torch.equal(joined(nested, 0.6, values, 1), nested[1])


# ---- on a network


def test_the_pool_is_the_matrices_of_the_blocks_and_in_paper_mode_what_the_authors_list() -> None:
    ours = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    for make, blocks in ((network, ["blocks.0", "blocks.1", "blocks.2"]), (swin, None)):
        names = set(weights_of(make()))
        blocks = blocks or [f"layers.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]
        assert names == {f"{block}.{part}.weight" for block in blocks for part in ours}
        more = {f"{block}.{part}.weight" for block in blocks for part in ("norm1", "norm2")}
        head = "head" if make is network else "head.fc"
        assert set(weights_of(make(), "paper")) - names == more | {"patch_embed.proj.weight", f"{head}.weight"}


@pytest.mark.parametrize(("mode", "keep"), [("paper", 0.5), ("corrected", 0.7)])
def test_one_shot_after_training_is_torchs_own_global_pruning_of_the_dense_run(
    images: Images,
    mode: Any,
    keep: float,
) -> None:
    settings = Magnitude(method="magnitude", keep=keep, schedule="one_shot", begin=1.0, mode=mode)
    masked, dense = trained(images, DENSE, masks=settings).network, trained(images, DENSE).network
    expected = globally_pruned(dense, mode, keep)
    assert all(torch.equal(expected[name], t) for name, t in masked.body.state_dict().items())


def globally_pruned(net: Any, mode: str, keep: float) -> dict[str, Tensor]:
    """The state after torch's own global pruning."""
    modules = dict(net.body.named_modules())
    listed = [(modules[name.removesuffix(".weight")], "weight") for name in weights_of(net, mode)]
    total = sum(module.weight.numel() for module, _ in listed)
    prune.global_unstructured(listed, prune.L1Unstructured, amount=total - weights_kept(keep, total))
    for module, name in listed:
        prune.remove(module, name)
    state: dict[str, Tensor] = net.body.state_dict()
    return state


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_a_cut_for_good_is_torchs_own_global_pruning(mode: Any) -> None:
    settings = Magnitude(method="magnitude", keep=0.3, schedule="one_shot", begin=1.0, mode=mode)
    net, twin = network(), network()
    masks.cut(net, settings, 0.3, seed=0)
    expected = globally_pruned(twin, mode, 0.3)
    assert all(torch.equal(expected[name], t) for name, t in net.body.state_dict().items())


def test_the_random_control_keeps_as_many_of_every_tensor(images: Images) -> None:
    how = {"keep": 0.3, "schedule": "one_shot", "begin": 0.5}
    ours = trained(images, DENSE, masks=Magnitude(method="magnitude", **how)).network
    control = trained(images, DENSE, masks=Magnitude(method="random", **how)).network
    assert densities(ours) == densities(control)
    assert len(set(densities(ours)["tensors"].values())) > 1
    pairs = zip(weights_of(ours).values(), weights_of(control).values(), strict=True)
    assert all(not torch.equal(a != 0, b != 0) for a, b in pairs)


class Spied:
    """fit, with a look at masks, moments and average after every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.average: Any = None

        def apply(settings: Any, net: Any, optimizer: Any, average: Any, total: int, seed: int) -> Any:
            self.made.append(masks.apply(settings, net, optimizer, average, total, seed))
            self.average = average
            return self.made[-1]

        monkeypatch.setattr(stepping, "apply_masks", apply)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("cubic", "adamw"), ("random", "sgd"), ("one shot", "muon"), ("rigl", "adamw"), ("rigl", "adafactor")],
)
def test_what_is_left_out_is_zero_at_every_step_in_weights_moments_and_average(
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    optimizer: Any,
) -> None:
    recipe = Recipe(steps=10, batch_size=8, lr=3e-3, ema=0.8, optimizer=optimizer)
    spy, counts = Spied(monkeypatch), []

    def tick(number: int, values: Any) -> None:
        held = spy.made[0]
        assert isinstance(held, Held)
        for weight_name, weight in held.weights.items():
            out = ~held.kept[weight_name]
            state = held.optimizer.state[weight]
            moments = [m for m in state.values() if isinstance(m, Tensor) and m.shape == weight.shape]
            assert moments or optimizer == "adafactor"
            for values_of in (weight, *moments, weights_of(spy.average.module, "paper")[weight_name]):
                assert not bool(values_of[out].any())
        counts.append(sum(int(kept.sum()) for kept in held.kept.values()))

    fitted = trained(images, recipe, masks=MASKS[name], tick=tick)
    total = sum(weight.numel() for weight in spy.made[0].weights.values())
    if name == "rigl":
        assert counts == [weights_kept(0.4, total)] * 10
    else:
        assert counts[0] == total and sorted(counts, reverse=True) == counts
    if name in ("cubic", "rigl"):
        assert counts[-1] == weights_kept(0.4, total)
    mode = "paper" if name == "cubic" else "corrected"
    assert densities(fitted.network, mode)["nonzero"] == counts[-1], "the average, as it is handed on"


def sparse(keep: float = 0.4) -> Any:
    """A network of which only this fraction of the weights is not zero."""
    net = network(classes=2)
    masks.cut(net, Magnitude(method="magnitude", keep=keep, schedule="one_shot", begin=0.0), keep, seed=0)
    return net


def holding(images: Images, **more: Any) -> Any:
    recipe = Recipe(steps=8, batch_size=8, lr=3e-3, ema=0.8)
    how: dict[str, Any] = {"seed": 3, "device": CPU, "normalise": NORMALISE, "masks": Hold(method="hold")}
    return fit(sparse(), pool(images, False), recipe, **how, **more)


def test_zeros_are_held_in_weights_moments_and_average_and_all_others_train(
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy, begun = Spied(monkeypatch), weights_of(sparse())

    def tick(number: int, values: Any) -> None:
        for name, weight in spy.made[0].weights.items():
            moments = [m for m in spy.made[0].optimizer.state[weight].values() if m.shape == weight.shape]
            assert len(moments) == 2
            for held in (weight, *moments, weights_of(spy.average.module)[name]):
                assert not bool(held[begun[name] == 0].any())

    fitted = holding(images, tick=tick)
    for name, weight in weights_of(fitted.network).items():
        assert torch.equal(weight != 0, begun[name] != 0)
        assert bool((weight != begun[name])[begun[name] != 0].all())


def test_held_zeros_survive_a_kill_bit_for_bit(images: Images, tmp_path: Path) -> None:
    file, expected = tmp_path / "c.safetensors", holding(images).network.body.state_dict()
    steps = 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise Killed

    with pytest.raises(Killed):
        holding(images, checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = holding(images, checkpoint=file).network.body.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in again.items())


def test_there_must_be_zeros_to_hold(images: Images) -> None:
    with pytest.raises(InvalidInput, match="none of the weights is zero"):
        trained(images, DENSE, masks=Hold(method="hold"))


def test_gradual_cuts_are_nested_and_fall_on_their_steps(
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy, seen = Spied(monkeypatch), []
    settings = Magnitude(method="magnitude", keep=0.2, begin=0.25, end=0.75, every=3)
    tick = lambda number, values: seen.append(torch.cat([k.flatten() for k in spy.made[0].kept.values()]))  # noqa: E731
    trained(images, Recipe(steps=20, batch_size=8), masks=settings, tick=tick)
    assert mask_steps(settings, 20) == (8, 11, 14, 15)
    for step, mask in enumerate(seen, 1):
        last = max((at for at in (8, 11, 14, 15) if at <= step), default=5)
        assert int(mask.sum()) == weights_kept(cubic_keep((last - 5) / 10, 0.2), mask.numel())
    assert all(bool((b <= a).all()) for a, b in itertools.pairwise(seen))


def test_rigl_exchanges_at_its_steps_by_dense_gradients_and_new_weights_begin_at_zero(
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy, seen = Spied(monkeypatch), []
    shown: list[tuple[Tensor, Tensor, Tensor, int]] = []
    real = masks.drop_and_grow

    def watched(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> Tensor:
        new = real(weight, gradient, mask, count)
        shown.append((gradient[~mask].clone(), weight[new & ~mask].clone(), new, count))
        return new

    monkeypatch.setattr(masks, "drop_and_grow", watched)
    settings = RigL(method="rigl", keep=0.4, every=2, exchange=0.5, end=0.75)
    tick = lambda number, values: seen.append(torch.cat([k.flatten() for k in spy.made[0].kept.values()]))  # noqa: E731
    trained(images, Recipe(steps=10, batch_size=8), masks=settings, tick=tick)
    changed = [step for step in range(1, 10) if not torch.equal(seen[step], seen[step - 1])]
    assert changed == [2, 4, 6], "the third, fifth and seventh step, after 2, 4 and 6"
    assert all(bool(outside.any()) for outside, _, _, _ in shown)
    assert all(not bool(came.any()) for _, came, _, _ in shown)
    kept = {name: int(k.sum()) for name, k in spy.made[0].kept.items()}
    first = [count for *_, count in shown[: len(kept)]]
    sizes = [w.numel() for w in spy.made[0].weights.values()]
    share = 0.25 * (1 + math.cos(math.pi * 2 / 8))
    assert first == [min(math.floor(share * k), n - k) for k, n in zip(kept.values(), sizes, strict=True)]


@pytest.mark.parametrize("densities_by", ["erk", "uniform"])
def test_rigl_begins_with_its_densities(images: Images, densities_by: Any) -> None:
    settings = RigL(method="rigl", keep=0.25, every=2, densities=densities_by)
    found = densities(trained(images, DENSE, masks=settings).network)
    weights = weights_of(network())
    if densities_by == "uniform":
        assert set(found["tensors"].values()) == {0.25}
    else:
        counts = erk_counts([tuple(w.shape) for w in weights.values()], found["nonzero"])
        assert [round(c / w.numel(), 6) for c, w in zip(counts, weights.values(), strict=True)] == list(
            found["tensors"].values()
        )
    assert found["global"] == 0.25


def test_straight_through_gradients_are_those_at_the_projection_plus_the_pull() -> None:
    net, twin, x = network(), network(), pictures(3)
    with torch.no_grad():
        kept = {name: n_of_m(weight, 2, 4) for name, weight in weights_of(twin).items()}
        for name, weight in weights_of(twin).items():
            weight.mul_(kept[name])
    twin(x).square().sum().backward()
    before = {name: weight.detach().clone() for name, weight in weights_of(net).items()}
    projected = Projected(Pattern(method="sr_ste", decay=0.3), net)
    projected.project()
    net(x).square().sum().backward()
    projected.on_gradients(0)
    for (name, weight), there in zip(weights_of(net).items(), weights_of(twin).values(), strict=True):
        assert torch.equal(weight, before[name])
        assert torch.allclose(weight.grad, there.grad + 0.3 * before[name] * ~kept[name], atol=1e-6)
    assert torch.equal(net.body.head.weight.grad, twin.body.head.weight.grad)


@pytest.mark.parametrize("ema", [None, 0.8])
def test_two_of_four_is_what_is_judged_and_handed_on_while_training_stays_dense(
    images: Images,
    ema: float | None,
) -> None:
    judged: list[int] = []

    def most(net: Any) -> float:
        judged.append(max(int(w.detach().reshape(-1, 4).count_nonzero(1).max()) for w in weights_of(net).values()))
        return 0.0

    fitted = trained(
        images, Recipe(epochs=2, batch_size=8, ema=ema), masks=Pattern(method="sr_ste"), judge=most, keep_epochs=(1,)
    )
    assert judged == [2, 2]
    assert densities(fitted.network)["global"] == 0.5
    most(fitted.network)
    assert judged[-1] == 2
    assert bool((fitted.early[1]["blocks.0.mlp.fc1.weight"] != 0).all()), "to rewind to are the dense weights"


def test_without_masks_nothing_changes(images: Images) -> None:
    late = Magnitude(method="magnitude", keep=0.5, schedule="one_shot", begin=1.0)
    seen: dict[str, list[float]] = {"dense": [], "late": []}
    for name, settings in (("dense", None), ("late", late)):
        trained(images, DENSE, masks=settings, tick=lambda n, values, name=name: seen[name].append(values["loss"]))
    assert seen["dense"] == seen["late"]


def test_a_mask_depends_on_the_seed_of_the_run_alone(images: Images) -> None:
    def zeros(seed: int) -> Tensor:
        torch.manual_seed(int(np.random.default_rng().integers(1000)))
        net = network(classes=2)
        fit(
            net, pool(images, False), Recipe(steps=1, batch_size=4), seed=seed, device=CPU, normalise=NORMALISE,
            masks=RigL(method="rigl", keep=0.4, every=1),
        )  # fmt: skip
        return next(iter(weights_of(net).values())) == 0

    assert torch.equal(zeros(3), zeros(3))
    assert not torch.equal(zeros(3), zeros(4))


# ---- refusals


def test_rows_that_are_no_groups_of_four_are_refused() -> None:
    net = network(embed_dim=42)
    with pytest.raises(InvalidInput, match=r"blocks\.0\.attn\.qkv\.weight has rows of 42"):
        check_groups(net)
    check_groups(network())
    check_groups(swin())


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        (Magnitude(method="magnitude", keep=0.5, every=20), 30, "between step 6 and step 21 of 30 is a single one"),
        (RigL(method="rigl", keep=0.5, every=100), 120, "end at step 90 of 120: there would be none; every can be"),
    ],
)
def test_masks_that_would_not_change_are_refused(settings: Any, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_masks(settings, steps)
    with pytest.raises(ValidationError, match=message):
        TrainConfig(steps=steps, masks=settings)
    check_masks(settings, 10 * steps)


@pytest.mark.parametrize("budget", ["epochs", "steps"])
def test_masks_that_would_not_change_are_refused_when_the_steps_are_given_under_either_budget(budget: Any) -> None:
    late = RigL(method="rigl", keep=0.5, every=100)
    with pytest.raises(ValidationError, match="end at step 90 of 120"):
        TrainConfig(steps=120, masks=late, budget=budget)
    TrainConfig(steps=120, masks=late, budget="macs")  # which takes as many steps as it can pay for


KINDS = st.sampled_from(["cubic", "rigl", "nncf"])
SHARES = st.tuples(st.integers(0, 19), st.integers(1, 20)).filter(lambda pair: pair[0] < pair[1])


@effort(deadline=None)
@given(
    shares=SHARES, every=st.integers(1, 30), most=st.integers(1, 120), kind=st.sampled_from(["cubic", "rigl", "nncf"])
)
def test_a_plan_refuses_exactly_the_masks_that_no_run_of_at_most_so_many_steps_has_room_for(
    shares: tuple[int, int], every: int, most: int, kind: str
) -> None:
    begin, end = shares[0] / 20, shares[1] / 20
    made: Any = {
        "cubic": lambda: Magnitude(method="magnitude", keep=0.5, begin=begin, end=end, every=every),
        "rigl": lambda: RigL(method="rigl", keep=0.5, end=end, every=every),
        "nncf": lambda: NncfMagnitude(method="nncf_magnitude", keep=0.5, begin=begin, end=end, every=every),
    }[kind]()

    def goes(total: int) -> bool:
        try:
            check_masks(made, total)
        except ValueError:
            return False
        return True

    if any(goes(total) for total in range(1, most + 1)):
        check_room(made, most, "why", "stages.train.masks")
    else:
        with pytest.raises(InvalidInput, match=r"stages\.train\.masks\.every: .* \(why\)") as caught:
            check_room(made, most, "why", "stages.train.masks")
        assert caught.value.field == "stages.train.masks.every"


def stage(folder: Path, masks_: Any, *, weights: str | None = None, **fields: Any) -> Context:
    """The train stage, run on two classes of 16 images."""
    image_folder(folder / "i", per_class=16)
    for name in ("out", "work"):
        (folder / name).mkdir()
    ctx = Context(
        config=TrainConfig(**{"epochs": 2, "batch_size": 8, "masks": masks_, **fields}),
        data=DataConfig(source=str(folder / "i"), image_size=32),
        model=ModelConfig(name="deit_tiny_patch16_224", args=ARGS, weights=weights), seed=0, device="cpu", arm="main",
        entry="train", base=folder, out=folder / "out", work=folder / "work", inputs={}, many=(), references={},
        progress=Listening(),  # type: ignore[arg-type]
    )  # fmt: skip
    train.run(ctx)
    return ctx


def test_the_stage_saves_zeros_and_records_the_density_of_every_tensor(tmp_path: Path) -> None:
    ctx = stage(tmp_path, Magnitude(method="magnitude", keep=0.3, begin=0.2, end=0.8, every=1), ema=0.5)
    saved = weights_of(load_network(tmp_path / "out"))
    record = ctx.metrics["masks"]
    total = sum(weight.numel() for weight in saved.values())
    assert record["density"]["nonzero"] == sum(int((w != 0).sum()) for w in saved.values()) == weights_kept(0.3, total)
    assert record["density"]["tensors"].keys() == saved.keys()
    for name, weight in saved.items():
        assert record["density"]["tensors"][name] == pytest.approx(float((weight != 0).float().mean()), abs=1e-5)
    assert (record["method"], record["keep"]) == ("magnitude", 0.3)
    assert record["density"]["global"] == pytest.approx(0.3, abs=1e-5)


# ---- essential sparsity


def test_the_knee_is_the_last_level_before_accuracy_falls() -> None:
    keeps = (1.0, 0.8, 0.6, 0.4)
    assert knee(keeps, (0.9, 0.9, 0.895, 0.5), 0.01) == 0.6
    assert knee(keeps, (0.9, 0.85, 0.9, 0.9), 0.01) == 1.0, "what comes back further on is noise"
    assert knee(keeps, (0.9, 0.95, 0.9, 0.9), 0.0) == 0.4
    for images in (100, 200, 1000):  # a loss of just the tolerance is no more than it, whatever fractions round to
        for correct in range(images // 100, images + 1):
            assert knee((1.0, 0.5), (correct / images, (correct - images // 100) / images), 0.01) == 0.5


def test_a_curve_bends_where_it_is_farthest_from_its_chord() -> None:
    """Against the distance of each point from the line through the ends, by the formula for a point and a line."""
    keeps, top1 = (1.0, 0.9, 0.7, 0.5, 0.4), (0.92, 0.93, 0.90, 0.60, 0.30)
    x = np.array([(1.0 - keep) / 0.6 for keep in keeps])
    y = np.array([(one - 0.30) / 0.62 for one in top1])
    distance = np.abs((y[-1] - y[0]) * x - (x[-1] - x[0]) * y + x[-1] * y[0] - y[-1] * x[0])
    assert bend(keeps, top1) == keeps[int(distance.argmax())] == 0.7
    assert bend((1.0, 0.5), (0.9, 0.1)) is None, "two points are a straight line"
    assert bend(keeps, (0.9,) * 5) is None
    assert bend(keeps, (0.9, 0.3, 0.3, 0.3, 0.2)) is None, "a curve that falls at once has no bend to keep to"
    assert bend(keeps, (0.5, 0.6, 0.7, 0.8, 0.9)) is None


def test_a_sweep_takes_the_knee_of_what_it_records_and_books_its_cost(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", network(classes=2).body.state_dict())
    settings = Essential(method="essential", levels=(0.9, 0.5, 0.001), steps=2, tolerance=0.05)
    ctx = stage(tmp_path, settings, weights="w.safetensors", epochs=1)
    record = ctx.metrics["masks"]
    tried = record["tried"]
    assert [row["keep"] for row in tried] == [1.0, 0.9, 0.5, 0.001]
    assert record["bend"] == bend([row["keep"] for row in tried], [row["top1"] for row in tried])
    assert record["chosen"] == knee([row["keep"] for row in tried], [row["top1"] for row in tried], 0.05)
    assert record["density"]["global"] == pytest.approx(record["chosen"], abs=1e-5)
    assert ctx.ledger["scoring_macs"] == 4 * 2 * 8 * 3 * network(classes=2).architecture.macs()
    assert [figure.name for figure in ctx.figures] == ["essential"]


def test_levels_can_be_written_in_a_pipeline() -> None:
    written = '{"epochs": 1, "masks": {"method": "essential", "steps": 1, "levels": [0.9, 0.5]}}'
    assert getattr(TrainConfig.model_validate_json(written).masks, "levels", None) == (0.9, 0.5)
    with pytest.raises(ValidationError, match="levels"):
        TrainConfig.model_validate_json(written.replace("0.5", '"half"'))


def test_levels_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ValidationError, match="do not fall"):
        Essential(method="essential", levels=(0.5, 0.6), steps=1)


# ---- several fractions of one training


def test_further_fractions_are_measured_on_the_one_trained_network_and_one_is_saved(tmp_path: Path) -> None:
    settings = Magnitude(
        method="magnitude", keep=0.5, schedule="one_shot", begin=1.0, also=(0.9, 0.02, 0.5), mode="paper"
    )
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole").mkdir()
    ctx, dense = stage(tmp_path / "cut", settings), stage(tmp_path / "whole", None)
    test = load_splits(ctx.data.model_dump(), ctx.base).test
    expected = [{"keep": 1.0, "top1": top1(load_network(dense.out), test, NORMALISE, CPU)}]
    for keep in (0.9, 0.5, 0.02):
        net = load_network(dense.out)
        net.body.load_state_dict(globally_pruned(net, "paper", keep))
        expected.append({"keep": keep, "top1": top1(net, test, NORMALISE, CPU)})
    assert ctx.metrics["masks"]["rates"] == expected
    assert ctx.metrics["top1"]["all"] == expected[2]["top1"]
    assert densities(load_network(ctx.out), "paper")["global"] == 0.5
    assert "rates" in [figure.name for figure in ctx.figures]
