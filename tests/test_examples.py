"""Policies in the training loop: resuming, schedules, what is observed, and one pool for all processes."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_vision import data, image_folder, network
from torch import Tensor

from sievit.pipeline.plan import make_plan
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Store
from sievit.stages.__main__ import STAGES
from sievit.stages.methods import InvalidInput
from sievit.stages.vision import examples, processes
from sievit.stages.vision.batches import Batch, Pool
from sievit.stages.vision.clock import Clock
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.example_settings import InfoBatch, Subset, Swap
from sievit.stages.vision.examples import Pass, Seen, Watch
from sievit.stages.vision.network import Network
from sievit.stages.vision.objective import each_supervised, supervised
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.training import Fitted, fit

CPU = torch.device("cpu")
NORMALISE = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
EPOCHS, SEED = 6, 3
MIXED = Recipe(epochs=EPOCHS, batch_size=6, ema=0.9, mixup=0.4, drop_path=0.2, warmup=0.2)
PLAIN = Recipe(epochs=EPOCHS, batch_size=6, lr=2e-3, augment=Augmentation(flip=False))
PAPER = Swap(policy="swap", mode="paper", removed=0.3, swap=0.1, every=1, until=4)
CORRECTED = PAPER.model_copy(update={"mode": "corrected", "every": 2})
INFOBATCH = InfoBatch(policy="infobatch", prune=0.8, anneal=0.3)
RANDOM = Subset(policy="random", keep=0.6)
ALL = {"paper": PAPER, "corrected": CORRECTED, "infobatch": INFOBATCH, "random": RANDOM}


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def trained(images: Images, settings: Any, recipe: Recipe = MIXED, **more: Any) -> tuple[Fitted, examples.Policy]:
    torch.manual_seed(5)
    members = np.arange(1, len(images))
    policy = more.pop("policy", None) or examples.create(settings, members, recipe.epochs, SEED)
    fitted = fit(
        network(classes=2, drop_path_rate=recipe.drop_path), Pool(images, members), recipe, seed=SEED, device=CPU,
        normalise=NORMALISE, policy=policy, objective=more.pop("objective", each_supervised), **more,
    )  # fmt: skip
    return fitted, policy


def state(net: Network) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.body.state_dict().items()}


@pytest.mark.parametrize("name", ALL)
def test_a_run_with_a_policy_that_is_killed_again_and_again_ends_with_the_same_bits(
    images: Images, tmp_path: Path, name: str
) -> None:
    expected, policy = trained(images, ALL[name])
    file, left = tmp_path / "c.safetensors", 0

    def tick(number: int, values: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    for left in (1, 2, 3, 4, 5, 4):  # noqa: B007  # within passes and at their ends
        with pytest.raises(Killed):
            trained(images, ALL[name], checkpoint=file, checkpoint_seconds=0, tick=tick)
    again, resumed = trained(images, ALL[name], checkpoint=file, checkpoint_seconds=0)
    assert (again.steps, again.images, again.passes) == (expected.steps, expected.images, EPOCHS)
    assert again.curve == expected.curve
    assert resumed.history() == policy.history()
    wanted = state(expected.network)
    assert all(torch.equal(wanted[key], t) for key, t in state(again.network).items())


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_is_a_pass_of_the_policy_and_schedules_end_with_the_last_step(images: Images, name: str) -> None:
    ticks: list[int] = []
    rates: list[float] = []
    fitted, policy = trained(
        images,
        ALL[name],
        PLAIN,
        tick=lambda number, values: ticks.append(number),
        after_epoch=lambda epoch, net: rates.append(epoch / EPOCHS),
    )
    assert sum(ticks) == PLAIN.total_steps(policy.size), "the bar ends full"
    assert len(ticks) == fitted.steps
    assert len(fitted.curve) == EPOCHS
    for row, gone in zip(fitted.curve, rates, strict=True):
        cosine = PLAIN.min_lr + (PLAIN.lr - PLAIN.min_lr) * (1 + math.cos(math.pi * gone)) / 2
        assert row["lr"] == pytest.approx(cosine, rel=1e-6)
    passes = [images_of(policy, epoch) for epoch in range(EPOCHS)]
    assert fitted.images == sum(passes)
    assert fitted.steps == sum(math.ceil(n / PLAIN.batch_size) for n in passes)


def images_of(policy: Any, epoch: int) -> int:
    """Examples of a pass, worked out from the history."""
    kept = {entry["epoch"] - 1: entry["kept"] for entry in policy.history() if "kept" in entry}
    return int(kept.get(epoch, policy.size))


def test_infobatch_drops_in_the_middle_and_sees_all_at_the_end(images: Images) -> None:
    fitted, policy = trained(images, INFOBATCH, PLAIN)
    assert [entry["epoch"] for entry in policy.history()] == [2, 3, 4]
    assert all(entry["dropped"] == math.floor(0.8 * entry["below"]) > 0 for entry in policy.history())
    assert fitted.images < EPOCHS * policy.size
    assert fitted.steps < PLAIN.total_steps(policy.size)


def test_every_pass_of_a_swap_has_one_size_and_its_history_tells_every_pool(images: Images) -> None:
    pools: list[set[int]] = []

    def spy(net: Network, batch: Batch) -> Tensor:
        pools[-1].update(batch.ids.tolist())
        return each_supervised(net, batch)

    pools.append(set())
    _, policy = trained(
        images, CORRECTED, PLAIN, objective=spy, after_epoch=lambda epoch, net: pools.append(set())
    )  # fmt: skip
    members = set(range(1, len(images)))
    first, *swaps = policy.history()
    active = members - set(first["removed"])
    assert [swap["epoch"] for swap in swaps] == [2, 4]
    for epoch in range(EPOCHS):
        for swap in swaps:
            if swap["epoch"] == epoch:
                assert set(swap["removed"]) <= active
                assert not set(swap["restored"]) & active
                assert len(swap["removed"]) == len(swap["restored"]) == math.floor(0.1 * len(members))
                active = active - set(swap["removed"]) | set(swap["restored"])
        assert pools[epoch] == active
        assert len(active) == policy.size == len(members) - math.floor(0.3 * len(members))


class Recorded:
    """A policy that writes down what it is shown; each epoch sees the even or the odd examples, weighted."""

    watches = attention = True

    def __init__(self, members: np.ndarray, weight: float | None) -> None:
        self.members, self.weight, self.size = members, weight, len(members)
        self.seen: list[Seen] = []
        self.ended: list[int] = []

    def begin(self, epoch: int) -> Pass:
        weights = None if self.weight is None else np.full(len(self.members), self.weight, np.float32)
        return Pass(self.members, weights)

    def observe(self, seen: Seen) -> None:
        self.seen.append(seen)

    def end(self, epoch: int) -> None:
        self.ended.append(epoch)

    def state(self) -> Any:
        return {}, {}

    def restore(self, tensors: Any, facts: Any) -> None: ...

    def history(self) -> Any:
        return []


def test_what_is_observed_is_the_training_forward_before_the_update(images: Images) -> None:
    """Logits, losses and attention of a second forward with the same weights, dropout off."""
    members = np.arange(1, len(images))
    policy = Recorded(members, None)
    expected: list[tuple[Any, ...]] = []

    def objective(net: Network, batch: Batch) -> Tensor:
        losses = each_supervised(net, batch)
        with torch.no_grad():
            copy = network(classes=2)
            copy.body.load_state_dict(net.network.body.state_dict())
            inputs: list[Tensor] = []
            last = copy.body.blocks[-1]
            hook = last.norm1.register_forward_hook(lambda m, i, out: inputs.append(out))
            answers = copy(batch.images)
            hook.remove()
            a = last.attn
            heads = a.qkv(inputs[0]).view(len(batch.ids), -1, 3, a.heads, a.qk).permute(2, 0, 3, 1, 4)
            paid = (heads[0] @ heads[1].transpose(-2, -1) * a.scale).softmax(-1).mean(1)[:, 0, 1:]
            variance = ((paid - paid.mean(1, keepdim=True)) ** 2).mean(1)
            expected.append((answers.argmax(1) == batch.clean, losses.detach(), variance, batch.ids, batch.share))
        return losses

    trained(images, None, MIXED.model_copy(update={"drop_path": 0.0}), policy=policy, objective=objective)
    assert policy.ended == list(range(EPOCHS))
    assert len(policy.seen) == len(expected)
    for seen, (correct, losses, variance, ids, share) in zip(policy.seen, expected, strict=True):
        assert seen.correct.tolist() == correct.tolist()
        assert seen.losses.tolist() == losses.tolist()
        assert seen.variance.tolist() == pytest.approx(variance.tolist(), rel=1e-4)
        assert (seen.ids.tolist(), seen.share) == (ids.tolist(), share)
    assert {s.share < 1 for s in policy.seen} == {True}


def test_a_weight_multiplies_its_loss_and_watching_changes_no_bit(images: Images) -> None:
    members = np.arange(1, len(images))
    recipe = PLAIN.model_copy(update={"clip": None, "optimizer": "sgd"})
    doubled, policy = trained(images, None, recipe, policy=Recorded(members, 2.0))
    by_hand, _ = trained(images, None, recipe, objective=lambda net, batch: 2 * each_supervised(net, batch))
    plain, _ = trained(images, None, recipe)
    assert all(torch.equal(t, state(by_hand.network)[n]) for n, t in state(doubled.network).items())
    assert not torch.equal(plain.network.body.head.weight, doubled.network.body.head.weight)
    watched, _ = trained(images, None, recipe, policy=Recorded(members, None))
    assert all(torch.equal(t, state(plain.network)[n]) for n, t in state(watched.network).items())
    assert isinstance(policy, Recorded)
    assert policy.seen[0].losses.mean() == pytest.approx(plain_loss(images, recipe), rel=1e-5), "shown unweighted"


def plain_loss(images: Images, recipe: Recipe) -> float:
    first: list[float] = []

    def objective(net: Network, batch: Batch) -> Tensor:
        loss = supervised(net, batch)
        first.append(float(loss.detach()))
        return loss

    trained(images, None, recipe, objective=objective)
    return first[0]


def test_corrected_passes_over_views_that_are_mostly_another_image() -> None:
    members = np.arange(20)
    for share, judged in ((1.0, 5), (0.51, 5), (0.5, 0), (0.2, 0)):
        seen = Seen(np.arange(5), np.ones(5, bool), np.ones(5, np.float32), np.zeros(5, np.float32), share)
        for settings, expected in ((CORRECTED, judged), (PAPER, 5)):
            policy = examples.create(settings, members, EPOCHS, SEED)
            policy.observe(seen)
            assert int(policy.state()[0]["window.seen"].sum()) == expected


def test_a_random_subset_is_fresh_in_every_pass_and_of_one_size() -> None:
    policy = examples.create(RANDOM, np.arange(5, 45), EPOCHS, SEED)
    passes = [policy.begin(epoch).ids.tolist() for epoch in range(EPOCHS)]
    assert {len(ids) for ids in passes} == {24}
    assert len({tuple(ids) for ids in passes}) == EPOCHS
    assert all(set(ids) <= set(range(5, 45)) and ids == sorted(set(ids)) for ids in passes)


def test_what_a_pool_or_a_network_cannot_do_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"0\.1 of 9 examples is less than one"):
        examples.create(CORRECTED, np.arange(9), EPOCHS, SEED)
    average = network("registers, average pool")
    assert average.architecture.prefix > 0
    with pytest.raises(InvalidInput, match="class token"):
        Watch(network(global_pool="avg", class_token=False), attention=True)


@pytest.mark.parametrize("lengths", [[7, 3, 1, 7], [7, 7, 7, 7]])
@pytest.mark.parametrize("total", [28, 25, 22])
def test_a_clock_runs_evenly_over_passes_and_ends_at_its_total(lengths: list[int], total: int) -> None:
    clock = Clock(7, total)
    for epoch, steps in enumerate(lengths):
        clock.begin(steps * 10 - 5, 10)
        before = clock.now
        assert before == epoch * 7
        while clock.within:
            clock.position += 1
        share = min(7, total - epoch * 7)
        assert clock.now == before + share
        assert clock.steps == max(1, round(share / 7 * steps))
        assert not clock.done
        clock.end_epoch()
    assert clock.done
    assert clock.now == total


def test_the_stage_keeps_every_decision_and_its_ledger_counts_what_was_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        """
data: {source: "builtin:digits", image_size: 32, max_train: 100, max_test: 50}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
stages: {train: {epochs: 4, batch_size: 16, mixup: 0.2, examples: {policy: infobatch}}}
arms: {longer: {train: {epochs: 5}}}
"""
    )
    store = Store(tmp_path / "artifacts")
    run(make_plan(load_pipeline(file, STAGES), STAGES), store, Manner(Silent(), (InvalidInput,)))
    for epochs, ref in ((4, "train@1"), (5, "train@2")):
        artifact = store.resolve(ref)
        pool = json.loads((artifact.root / "pool.json").read_text())
        kept = {one["epoch"]: one["kept"] for one in pool["decisions"]}
        assert sorted(kept) == list(range(2, epochs))
        images = sum(kept.get(epoch, 100) // 2 * 2 for epoch in range(1, epochs + 1))  # mixing pairs them
        assert artifact.ledger["images"] == artifact.metrics["examples"]["images"] == images


COUNT, BATCH = 40, 6


def story(settings: Any, seed: int, log: list[list[int]]) -> list[dict[str, Any]]:
    """A policy's whole life, fed with statistics that depend on example and epoch only; `log` gets this process's ids,
    step by step.
    """
    policy = examples.create(settings, np.arange(COUNT) * 2, EPOCHS, seed)
    for epoch in range(EPOCHS):
        ids = policy.begin(epoch).ids
        order = np.random.default_rng(epoch).permutation(ids)
        order = order[: len(order) // 2 * 2]
        for start in range(0, len(order), BATCH):
            whole = order[start : start + BATCH]
            rows = processes.share(len(whole))
            batch = whole[rows.rows[: rows.own]]
            log.append(batch.tolist())
            facts = np.array([np.random.default_rng([i, epoch]).random(3) for i in batch.tolist()]).reshape(-1, 3)
            correct, losses, variance = facts.astype(np.float32).T
            policy.observe(Seen(batch, correct > 0.4, losses, variance, 1.0))
        policy.end(epoch)
    return policy.history()


def in_a_process(number: int, folder: str, rank: int = 1) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        result: dict[str, Any] = {}
        for name in ("paper", "corrected", "infobatch"):
            log: list[list[int]] = []
            # The second process would draw otherwise: they agree only if the first one's decisions are all that counts.
            result[name] = {"history": story(ALL[name], SEED + rank, log), "log": log}
        with pytest.raises(InvalidInput, match="5 cannot be divided by 2"):
            processes.check_batch(5)
        Path(folder, f"{rank}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


def test_two_processes_decide_as_one_and_share_every_batch(tmp_path: Path) -> None:
    other = torch.multiprocessing.spawn(in_a_process, args=(str(tmp_path),), nprocs=1, join=False)
    in_a_process(0, str(tmp_path), rank=0)
    while not other.join():
        pass
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    decisions = ("epoch", "removed", "restored", "kept", "dropped", "counts", "judged", "below")
    for name in ("paper", "corrected", "infobatch"):
        log: list[list[int]] = []
        alone = json.loads(json.dumps(story(ALL[name], SEED, log)))
        assert len(alone) > 2
        for entry, one, two in zip(alone, first[name]["history"], second[name]["history"], strict=True):
            assert {k: entry.get(k) for k in decisions} == {k: one.get(k) for k in decisions}
            assert {k: one.get(k) for k in decisions} == {k: two.get(k) for k in decisions}
        shares = [sorted(a + b) for a, b in zip(first[name]["log"], second[name]["log"], strict=True)]
        assert shares == [sorted(batch) for batch in log]
        assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(first[name]["log"], second[name]["log"], strict=True))
