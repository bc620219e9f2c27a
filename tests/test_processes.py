"""Theorem 7: two processes train, score and evaluate to the numbers of one with the same batch.

One pair of gloo processes goes through all cases; the first has done each alone before. SGD, since Adam makes steps of
full size out of what is rounding in one and zero in the other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_vision import data, network, swin
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.vision import examples, penalty, processes, proxy, ranking, token_schedule
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.evaluate import logits
from sievit.stages.vision.example_settings import InfoBatch, Swap
from sievit.stages.vision.mask_settings import Magnitude, Pattern, RigL
from sievit.stages.vision.network import Network
from sievit.stages.vision.objective import each_supervised, supervised
from sievit.stages.vision.patches import Cached, Drawn
from sievit.stages.vision.preprocessing import Normaliser, Preprocessing
from sievit.stages.vision.processes import Share, share
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.teaching import Teacher, Teaching
from sievit.stages.vision.teaching_settings import Distill, Features
from sievit.stages.vision.token_settings import Ramp, Tokens
from sievit.stages.vision.training import Fitted, fit

CPU = torch.device("cpu")
NORMALISE = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
EVERYTHING = Augmentation(shift=0.1, zoom=0.8, flip=True, erase=0.5, rand="rand-m9-mstd0.5-inc1")
STILL = Augmentation(shift=0, flip=False)


@dataclass(frozen=True)
class Case:
    """One training. The pool has `images` images; with batches of 6 most have an uneven last one."""

    images: int = 27
    family: str = "vit"
    recipe: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    patches: str | None = None
    policy: Any = None
    tokens: Tokens | None = None
    distill: Distill | None = None
    tolerance: float = 2e-5


ADAM = "weights in parts, adam"  # how moments in parts are stored
CASES = {
    # Of 27 images that are mixed, the last batch has one pair: the other process computes a row for nothing.
    "all augmentation, mixing, average": Case(recipe={"augment": EVERYTHING, "mixup": 0.4, "cutmix": 0.6, "ema": 0.8}),
    "cached tickets, soft pruning, penalty, in parts": Case(
        images=13,
        patches="cached",
        policy=InfoBatch(policy="infobatch", prune=0.5, anneal=0.2),
        recipe={"augment": Augmentation(shift=0.1, rand="rand-m9"), "mixup": 0.4, "accumulate": 2},
        more={"penalty": penalty.create("group_lasso", 0.01), "finish": 0.3},
    ),
    "random tickets, swaps, drop and grow": Case(
        images=25,
        patches="drawn",
        policy=Swap(policy="swap", mode="paper", removed=0.2, swap=0.2, every=1, until=2),
        more={"masks": RigL(method="rigl", keep=0.5, every=3)},
    ),
    "tokens on a ramp, attention penalty, masks in steps": Case(
        tokens=Tokens(keep=0.5, blocks=(1,), ramp=Ramp(warmup=0.2, length=0.5, levels=4)),
        more={
            "penalty": penalty.create("attention_entropy", 0.01),
            "masks": Magnitude(method="magnitude", keep=0.5, schedule="cubic", begin=0.1, end=0.8, every=2),
        },
    ),
    "batch norms": Case(family="lv-vit", recipe={"mixup": 0.4}, tolerance=1e-4),
    "windows, two of four": Case(images=25, family="swin", more={"masks": Pattern(method="sr_ste")}),
    "hidden states of a teacher, in parts": Case(
        distill=Distill(features=Features()), recipe={"accumulate": 2, "mixup": 0.4, "ema": 0.8}
    ),
    "weights in parts": Case(more={"sharding": "fsdp2"}, recipe={"mixup": 0.4}),
    ADAM: Case(more={"sharding": "fsdp2"}, recipe={"optimizer": "adamw", "lr": 1e-3}),
}


def digits() -> Images:
    return load_splits(data(max_train=60), Path()).train


def taught_by(images: Images) -> Teacher:
    """A wider network than any of those that train."""
    net = network("vit", classes=10, seed=9, embed_dim=60)
    student = Preprocessing(images.size, (0.5,) * 3, (0.5,) * 3, images.classes)
    return Teacher(net, (0.5,) * 3, (0.5,) * 3, net.architecture.macs(), student, CPU)


def train(case: Case, images: Images, checkpoint: Path | None = None, **more: Any) -> Fitted:
    """Three epochs of a case."""
    recipe = {"optimizer": "sgd", "lr": 0.05, "smoothing": 0.0, "augment": STILL, **case.recipe}
    started: Network = swin(classes=10) if case.family == "swin" else network(case.family, classes=10)
    members = np.arange(case.images)
    patches: Any = None
    if case.patches == "cached":
        patches = Cached(ranking.by_chance(len(images), 16, 3), 10, (4, 4))
    elif case.patches == "drawn":
        patches = Drawn(16, 10, 3)
    policy = None if case.policy is None else examples.create(case.policy, members, 3, 1)
    tokens = None if case.tokens is None else token_schedule.create(started.architecture, case.tokens)
    if case.distill is not None:
        torch.manual_seed(7)
        teaching = Teaching(case.distill, started, taught_by(images))
        more |= {"objective": teaching, "beside": teaching.projections}
    return fit(
        copy.deepcopy(started),
        Pool(images, members, patches),
        Recipe(epochs=3, batch_size=6, **recipe),
        seed=1,
        device=CPU,
        normalise=NORMALISE,
        policy=policy,
        tokens=tokens,
        checkpoint=checkpoint,
        **{"objective": supervised if policy is None else each_supervised, **case.more, **more},
    )


def outcome(fitted: Fitted) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in fitted.network.body.state_dict().items()},
        "losses": torch.tensor([row["loss"] for row in fitted.curve]),
        "counts": (fitted.images, fitted.ticketed, fitted.steps, fitted.macs, round(fitted.tokens, 6)),
    }


def looked_at(folder: Path, images: Images) -> dict[str, Tensor]:
    """What is shared besides steps: answers, ranks, and the statistics that a proxy gives after an epoch."""
    net = network("vit", classes=10)
    ranks = ranking.by_chance(len(images), 16, 5)
    found = {
        "answers": logits(net, images, NORMALISE, CPU, batch=7),
        "answers on tickets": logits(net, images, NORMALISE, CPU, ranks=ranks, patches=9, batch=7),
        "answers in one turn": logits(net, images, NORMALISE, CPU, batch=256),
    }
    teaching = Teaching(Distill(), net, taught_by(images))
    teaching.remember(Pool(images, np.arange(3, len(images))), 6, NORMALISE)
    assert teaching.remembered is not None
    found["answers of a teacher"] = teaching.remembered
    saliency = ranking.BySaliency((4, 4))
    found["ranks"] = torch.from_numpy(
        ranking.table(saliency, images, CPU, np.arange(len(images))[::-1].copy(), batch=7)
    )
    rows = {name: np.zeros(len(images), kind) for name, kind in proxy.KINDS.items()}
    first = processes.rank() == 0
    spool = folder / "features.npy"
    proxy._look(net, images, NORMALISE, CPU, rows if first else {}, spool, batch=7)
    if first:
        found |= {name: torch.from_numpy(row.astype(np.float32)) for name, row in rows.items()}
        found["features"] = torch.from_numpy(np.load(spool))
    return found


class Killed(BaseException):
    """Stands for a kill."""


def stopped(folder: Path, images: Images, name: str) -> dict[str, Any]:
    """A case that is stopped after seven steps in both processes and goes on from its checkpoint."""
    left = iter(range(7))

    def tick(steps: int, values: Any) -> None:
        if next(left, None) is None:
            raise Killed

    file = folder / f"{name}.safetensors"
    with pytest.raises(Killed):
        train(CASES[name], images, file, checkpoint_seconds=0.0, tick=tick)
    dist.barrier()
    return outcome(train(CASES[name], images, file))


RESUMED = (
    "all augmentation, mixing, average",
    "random tickets, swaps, drop and grow",
    "hidden states of a teacher, in parts",
    ADAM,
)


def work(number: int, folder: str, rank: int = 1) -> None:
    """What both processes do; each leaves what it saw."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    try:
        images = digits()
        result: dict[str, Any] = {name: outcome(train(case, images)) for name, case in CASES.items()}
        result["looks"] = looked_at(Path(folder), images)
        result["resumed"] = {name: stopped(Path(folder), images, name) for name in RESUMED}
        with pytest.raises(InvalidInput, match="the processes see steps 3, 4"):
            processes.check_alike(3 + rank, "steps")
        torch.save(result, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Both:
    """What one process alone, and each of two, came to."""

    alone: dict[str, Any]
    two: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    images = digits()
    alone: dict[str, Any] = {name: outcome(train(case, images)) for name, case in CASES.items()}
    alone["looks"] = looked_at(folder, images)
    other = torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=1, join=False)
    work(0, str(folder), rank=0)
    while not other.join():
        pass
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return Both(alone, (first, second))


@pytest.mark.parametrize("name", [name for name in CASES if name != ADAM])
def test_two_processes_train_to_the_numbers_of_one(name: str, both: Both) -> None:
    alone, (one, two) = both.alone[name], (each[name] for each in both.two)
    assert alone["counts"] == one["counts"] == two["counts"]
    assert torch.allclose(alone["losses"].double(), one["losses"].double(), rtol=CASES[name].tolerance)
    for weight, tensor in alone["state"].items():
        assert torch.equal(one["state"][weight], two["state"][weight]), f"{weight} differs between the processes"
        assert torch.allclose(tensor, one["state"][weight], rtol=0, atol=CASES[name].tolerance), weight
    started = (swin(classes=10) if CASES[name].family == "swin" else network(CASES[name].family, classes=10)).body
    moved = [float((alone["state"][weight] - tensor).abs().max()) for weight, tensor in started.state_dict().items()]
    assert max(moved) > 50 * CASES[name].tolerance, "the training was long enough to tell"


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_that_were_stopped_end_with_the_bits_of_two_that_were_not(name: str, both: Both) -> None:
    for undisturbed, each in zip(both.two, (two["resumed"] for two in both.two), strict=True):
        assert each[name]["counts"] == undisturbed[name]["counts"]
        for weight, tensor in undisturbed[name]["state"].items():
            assert torch.equal(tensor, each[name]["state"][weight]), weight


def test_two_processes_see_of_a_split_what_one_sees_bit_for_bit(both: Both) -> None:
    alone, (first, second) = both.alone["looks"], (each["looks"] for each in both.two)
    assert {"answers", "ranks", "grand", "features"} <= set(alone)
    for name, tensor in alone.items():
        assert torch.equal(tensor, first[name]), name
    assert torch.equal(alone["answers"], second["answers"]) and torch.equal(alone["ranks"], second["ranks"])


@pytest.mark.parametrize("pairs", [False, True])
def test_the_shares_of_a_batch_are_all_of_it_and_pairs_stay_together(
    pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in (1, 2, 3, 4):
        for batch in range(1, 14):
            monkeypatch.setattr(processes, "count", lambda of=of: of)
            shares: list[Share] = []
            for rank in range(of):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                shares.append(share(batch, pairs=pairs))
            counting = [each.rows[: each.own] for each in shares]
            assert sorted(np.concatenate(counting).tolist()) == list(range(batch))
            assert sum(each.scale for each in shares) == pytest.approx(of)
            assert all(len(each.rows) for each in shares), "every process has a row to compute"
            for rows in counting if pairs else ():
                assert (rows + rows[::-1] == batch - 1).all()


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(InvalidInput, match="batch_size 6 cannot be divided by 4 processes"):
        train(CASES["all augmentation, mixing, average"], digits())
