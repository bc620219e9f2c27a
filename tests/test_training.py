"""The loop: resuming, tickets in it, what it refuses."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_vision import SWINS, data, image_folder, network, swin
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.distillation import hard_loss, soft_loss
from sievit.stages.methods.regularisers import head_norms, unit_norms
from sievit.stages.proxy import Proxy
from sievit.stages.vision import forward, schedule
from sievit.stages.vision.augment import Augmenter, Mixer
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.evaluate import top1
from sievit.stages.vision.examples import Everything, Pass
from sievit.stages.vision.mask_settings import Magnitude, NncfGates, NncfMagnitude, Pattern, RigL
from sievit.stages.vision.network import Network
from sievit.stages.vision.objective import each_supervised, supervised
from sievit.stages.vision.patches import Cached
from sievit.stages.vision.penalty import create as create_penalty
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.recipe import Augmentation, Optimizer, Recipe, Schedule, StopEarly
from sievit.stages.vision.step import Step
from sievit.stages.vision.training import Fitted, fit

CPU = torch.device("cpu")
NORMALISE = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
FULL = Recipe(
    epochs=3.5, batch_size=6, lr=1e-3, ema=0.9, mixup=0.4, drop_path=0.2, warmup=0.2,
    augment=Augmentation(shift=0.1, zoom=0.7, flip=True, erase=0.5, rand="rand-m5-mstd0.5"),
)  # fmt: skip


MASKS = {
    "cubic": Magnitude(method="magnitude", keep=0.4, begin=0.2, end=0.8, every=2, mode="paper"),
    "random": Magnitude(method="random", keep=0.4, begin=0.2, end=0.8, every=2),
    "one shot": Magnitude(method="magnitude", keep=0.4, begin=0.5, schedule="one_shot", scope="layer"),
    "rigl": RigL(method="rigl", keep=0.4, every=2, exchange=0.5, end=0.9),
    "2:4": Pattern(method="sr_ste", decay=0.1),
    "nncf magnitude": NncfMagnitude(method="nncf_magnitude", keep=0.4, begin=0.2, end=0.8, every=2),
    "nncf gates": NncfGates(method="nncf_rb", keep=0.4, lr=1.0, end=0.5),
}


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def pool(images: Images, ticketed: bool) -> Pool:
    ranks = np.stack([np.random.default_rng(i).permutation(16) for i in range(len(images))])
    members = np.arange(0, len(images) - 1)
    return Pool(images, members, Cached(ranks.astype(np.uint8), 9, (4, 4)) if ticketed else None)


def trained(images: Images, recipe: Recipe, *, ticketed: bool = False, **more: Any) -> Fitted:
    torch.manual_seed(5)
    return fit(
        network(classes=2, drop_path_rate=recipe.drop_path),
        pool(images, ticketed), recipe, seed=3, device=CPU, normalise=NORMALISE, **more,
    )  # fmt: skip


def state(net: Network) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.body.state_dict().items()}


def ends_with_the_same_bits(images: Images, file: Path, after: int, **more: Any) -> None:
    """A run that is killed after that many steps and run again, against one that is not."""
    how = {"finish": 0.3, "judge": lambda net: float(net.body.norm.weight.detach()[0]), "keep_epochs": (1,), **more}
    expected = trained(images, FULL, **how)
    steps = 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == after:
            raise Killed

    with pytest.raises(Killed):
        trained(images, FULL, **how, checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = trained(images, FULL, **how, checkpoint=file, checkpoint_seconds=0)
    assert again.curve == expected.curve
    assert (again.steps, again.images, again.ticketed) == (expected.steps, expected.images, expected.ticketed)
    wanted = state(expected.network)
    assert all(torch.equal(wanted[name], t) for name, t in state(again.network).items())
    assert all(torch.equal(expected.early[1][name], t) for name, t in again.early[1].items())


@pytest.mark.parametrize("ticketed", [False, True])
@pytest.mark.parametrize("after", [1, 4, 5, 9, 13])
def test_a_killed_run_ends_with_the_same_bits_as_an_undisturbed_one(
    images: Images, tmp_path: Path, after: int, ticketed: bool
) -> None:
    ends_with_the_same_bits(images, tmp_path / "c.safetensors", after, ticketed=ticketed)


@pytest.mark.parametrize(
    ("masks", "after"),
    [
        ("cubic", 8), ("cubic", 13), ("random", 8), ("one shot", 13), ("rigl", 8), ("rigl", 13), ("2:4", 8),
        ("nncf magnitude", 8), ("nncf gates", 8),
    ],
)  # fmt: skip
def test_masks_survive_a_kill(images: Images, tmp_path: Path, masks: str, after: int) -> None:
    """Killed in the middle of a pass, right after a cut or an exchange, and between two of them."""
    judge = lambda net: float(net.body.blocks[0].mlp.fc1.weight.detach().abs().sum())  # noqa: E731
    ends_with_the_same_bits(images, tmp_path / "c.safetensors", after, judge=judge, masks=MASKS[masks])


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_resumes_bit_for_bit(images: Images, tmp_path: Path, optimizer: Any) -> None:
    recipe = Recipe(steps=6, batch_size=8, optimizer=optimizer, lr=1e-3)
    expected = trained(images, recipe)
    file, steps = tmp_path / "c.safetensors", 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(images, recipe, checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = trained(images, recipe, checkpoint=file)
    assert all(torch.equal(state(expected.network)[name], t) for name, t in state(again.network).items())


def test_adamw_is_the_papers_update_in_one_kernel(images: Images) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, by a slow loop; the kernel by what torch was asked for."""
    net = network(classes=2)
    recipe = Recipe(steps=10, batch_size=16, lr=1e-2, weight_decay=0.3)
    members = np.arange(len(images))
    step = Step(net, recipe, 10, seed=0, policy=Everything(members), objective=supervised)
    assert type(step.optimizer) is torch.optim.AdamW and step.optimizer.defaults["fused"]
    weight = net.body.head.weight
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for t in range(1, 5):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(t))
        weight.grad = gradient.clone()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = expected - step.lr * (unbiased + 0.3 * expected)
        step.optimizer.step()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_training_learns_and_tickets_are_used(images: Images) -> None:
    recipe = Recipe(epochs=12, batch_size=8, lr=2e-3, smoothing=0.0, augment=Augmentation(flip=False))
    seen: list[int] = []

    def objective(net: Network, batch: Any) -> Tensor:
        seen.append(0 if batch.kept is None else batch.kept.shape[1])
        return torch.nn.functional.cross_entropy(net(batch.images, batch.kept), batch.targets)

    assert top1(trained(images, recipe).network, images, NORMALISE, CPU) > 0.9
    fitted = trained(images, recipe, ticketed=True, objective=objective)
    assert set(seen) == {9}
    assert fitted.ticketed == fitted.images
    seen.clear()
    fitted = trained(images, recipe, ticketed=True, objective=objective, finish=0.25)
    assert seen == [9] * round(0.75 * fitted.steps) + [0] * (fitted.steps - round(0.75 * fitted.steps))
    assert 0 < fitted.ticketed < fitted.images


def test_a_run_depends_on_its_seed_and_on_no_other_generator(images: Images) -> None:
    def weights(seed: int) -> Tensor:
        net = network(classes=2, drop_path_rate=FULL.drop_path)
        torch.manual_seed(int(torch.randint(1000, (1,))) + seed)  # the global generators stand anywhere
        np.random.seed(None)
        fitted = fit(net, pool(images, False), FULL, seed=seed, device=CPU, normalise=NORMALISE)
        return fitted.network.body.blocks[0].mlp.fc1.weight.detach().clone()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_loss_that_is_not_finite_is_named_with_its_step(images: Images) -> None:
    with pytest.raises(InvalidInput, match=r"nan at step 1: the outputs of all layers are finite"):
        trained(images, FULL, objective=lambda net, batch: net(batch.images).sum() * float("nan"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_layer_where_a_number_ceased_to_be_one_is_named_before_the_weights_move(
    images: Images, precision: Any, accumulate: int
) -> None:
    net = network(classes=2, drop_path_rate=0.2)
    poisoned, calls = net.body.blocks[1].mlp.fc1, 0

    def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
        """The second image is infinite in the second step, whenever its forward is run."""
        nonlocal calls
        calls += 1
        return output * float("inf") if calls > accumulate else output

    poisoned.register_forward_hook(poison, prepend=True)
    before: dict[str, Tensor] = {}

    def tick(number: int, values: Any) -> None:
        before.update(state(net))

    recipe = Recipe(steps=4, batch_size=6, precision=precision, accumulate=accumulate, drop_path=0.2)
    with pytest.raises(InvalidInput, match=r"at step 2: blocks\.1\.mlp\.fc1 is the first layer"):
        fit(net, pool(images, False), recipe, seed=3, device=CPU, normalise=NORMALISE, tick=tick)
    assert all(torch.equal(before[name], t) for name, t in state(net).items())


def test_a_gradient_that_is_not_finite_is_named_by_the_parameter_that_the_backward_met_first(images: Images) -> None:
    net = network(classes=2)
    net.body.blocks[1].mlp.register_full_backward_hook(lambda module, into, out: (into[0] * float("nan"),))
    before = state(net)
    with pytest.raises(InvalidInput, match=r"at step 1: the gradient of blocks\.1\.norm2\.bias is not finite"):
        fit(net, pool(images, False), Recipe(steps=2), seed=3, device=CPU, normalise=NORMALISE)
    assert all(torch.equal(before[name], t) for name, t in state(net).items())


def overflowing(steps: tuple[int, ...]) -> Any:
    """An objective whose gradients overflow in these of its calls, from 1, and whose loss does not."""
    calls = 0

    def objective(net: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = supervised(net, batch)
        if calls in steps:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    return objective


@pytest.mark.parametrize("masks", [None, "2:4", "rigl"])
def test_fp16_leaves_out_a_step_whose_gradients_overflow_and_says_so(images: Images, masks: str | None) -> None:
    seen: list[dict[str, Tensor]] = []
    net = network(classes=2)
    fitted = fit(
        net, pool(images, False), Recipe(steps=4, batch_size=8, precision="fp16"), seed=3, device=CPU,
        normalise=NORMALISE, objective=overflowing((2,)), masks=None if masks is None else MASKS[masks],
        tick=lambda number, values: seen.append(state(net)),
    )  # fmt: skip
    assert (fitted.skipped, fitted.steps) == (1, 4)
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(seen)]
    assert moved == [False, True, True]
    assert all(bool(t.isfinite().all()) for t in state(fitted.network).values())


def test_fp16_that_leaves_out_every_step_is_refused_with_the_parameter(images: Images) -> None:
    recipe = Recipe(steps=40, batch_size=8, precision="fp16")
    with pytest.raises(InvalidInput, match=r"the last 24 steps, to step 25; of \S+ it is not finite"):
        trained(images, recipe, objective=overflowing(tuple(range(2, 100))))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["deit", "distilled", "registers, average pool", "lv-vit", "swin", "swin v2"])
def test_lower_precision_computes_the_gradients_of_full_precision_but_for_rounding(
    images: Images, family: str, precision: Any
) -> None:
    """And leaves weights, loss and moments in float32."""

    def first(precision: Any) -> tuple[Fitted, Tensor]:
        net = swin(family, classes=2) if family in SWINS else network(family, classes=2)
        before = torch.cat([p.detach().clone().flatten() for p in net.body.parameters()])
        recipe = Recipe(steps=1, batch_size=16, optimizer="sgd", lr=1e-2, min_lr=1e-2, clip=None, precision=precision)
        seen: list[Tensor] = []

        def objective(net: Any, batch: Any) -> Tensor:
            answers = net(batch.images, batch.kept)
            seen.append(answers)
            return torch.nn.functional.cross_entropy(answers, batch.targets)

        fitted = fit(net, pool(images, False), recipe, seed=3, device=CPU, normalise=NORMALISE, objective=objective)
        assert seen[0].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in net.body.parameters())
        return fitted, torch.cat([p.detach().flatten() for p in net.body.parameters()]) - before

    (exact, full), (low, rough) = first("fp32"), first(precision)
    assert not torch.equal(full, rough)
    assert low.curve[0]["loss"] == pytest.approx(exact.curve[0]["loss"], rel=0.02)
    assert float(torch.nn.functional.cosine_similarity(full, rough, dim=0)) > 0.98


@pytest.mark.parametrize("how", ["fp16", "bf16", "accumulate", "layer decay", "multistep"])
def test_every_way_of_stepping_resumes_bit_for_bit(images: Images, tmp_path: Path, how: str) -> None:
    fields: dict[str, Any] = {
        "fp16": {"precision": "fp16"},
        "bf16": {"precision": "bf16"},
        "accumulate": {"accumulate": 4},
        "layer decay": {"layer_decay": 0.7},
        "multistep": {"schedule": Schedule(shape="multistep", at=(0.4, 0.8))},
    }[how]
    recipe = FULL.model_copy(update=fields)
    objective = overflowing((2,)) if how == "fp16" else supervised  # killed after it: the scale is not the first one
    more: dict[str, Any] = {"objective": objective} if how == "fp16" else {}
    file, steps = tmp_path / "c.safetensors", 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == 8:
            raise Killed

    expected = trained(images, recipe, **more)
    with pytest.raises(Killed):
        again = {"objective": overflowing((2,))} if how == "fp16" else {}
        trained(images, recipe, **again, checkpoint=file, checkpoint_seconds=0, tick=tick)
    resumed = trained(images, recipe, checkpoint=file)
    assert resumed.skipped == expected.skipped and bool(resumed.skipped) == (how == "fp16")
    assert resumed.curve == expected.curve
    assert all(torch.equal(state(expected.network)[name], t) for name, t in state(resumed.network).items())


def gradients(images: Images, accumulate: int, *, family: str = "deit", ticketed: bool = True, **more: Any) -> Tensor:
    """The step of one batch, with plain SGD the gradient times a known rate."""
    recipe = Recipe(
        steps=1, batch_size=14, optimizer="sgd", lr=0.1, min_lr=0.1, weight_decay=0, clip=None, mixup=0.8,
        accumulate=accumulate,
    )  # fmt: skip
    net = swin(family, classes=2) if family in SWINS else network(family, classes=2)
    before = torch.cat([p.detach().clone().flatten() for p in net.body.parameters()])
    fit(net, pool(images, ticketed), recipe, seed=3, device=CPU, normalise=NORMALISE, **more)
    return torch.cat([p.detach().flatten() for p in net.body.parameters()]) - before


class Weighed:
    """A policy that weighs examples and watches them."""

    watches, attention = True, True

    def __init__(self, members: np.ndarray) -> None:
        self.members, self.size, self.seen = members, len(members), []

    def begin(self, epoch: int) -> Pass:
        return Pass(self.members, np.linspace(0.2, 3, len(self.members)).astype(np.float32))

    def observe(self, seen: Any) -> None:
        self.seen.append(seen)

    def end(self, epoch: int) -> None:
        return

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Any, facts: Any) -> None:
        return


@pytest.mark.parametrize("method", [None, "group_lasso", "l2", "attention_log", "attention_entropy"])
@pytest.mark.parametrize("accumulate", [2, 4, 14])
def test_a_step_in_parts_has_the_gradient_of_the_whole(images: Images, accumulate: int, method: str | None) -> None:
    """With mixed pairs, tickets, weighed examples and a penalty, which counts once."""

    def run(parts: int) -> tuple[Tensor, Weighed]:
        policy = Weighed(np.arange(14))
        penalty = None if method is None else create_penalty(method, 0.5)
        moved = gradients(images, parts, policy=policy, objective=each_supervised, penalty=penalty)
        return moved, policy

    (whole, once), (parted, often) = run(1), run(accumulate)
    assert torch.allclose(whole, parted, atol=2e-6 * float(whole.abs().max() / 1e-1 + 1))
    for name in ("ids", "correct", "losses", "variance"):
        joined = np.concatenate([getattr(one, name) for one in often.seen])
        assert np.allclose(joined, getattr(once.seen[0], name), atol=1e-4)


def test_masks_act_once_on_a_step_in_parts(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rigl", "2:4", "cubic"):
        runs = [
            trained(images, Recipe(steps=12, batch_size=8, accumulate=parts, lr=1e-3), masks=MASKS[name]).network
            for parts in (1, 4)
        ]
        whole, parted = (net.body.blocks[0].mlp.fc1.weight.detach() for net in runs)
        assert whole.count_nonzero() == parted.count_nonzero() < whole.numel()


def test_more_parts_than_images_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"accumulate: 4 images a step make no 5 parts"):
        Recipe(steps=1, batch_size=4, accumulate=5)


SHAPES: dict[str, tuple[Schedule, Any]] = {
    # The rate at a share of the steps, by the definition of each, without warm-up: from 1 down to 0.1.
    "cosine": (Schedule(), lambda s: 0.1 + 0.45 * (1 + math.cos(math.pi * s))),
    "linear": (Schedule(shape="linear"), lambda s: 1 - 0.9 * s),
    "poly": (Schedule(shape="poly", power=3.0), lambda s: 0.1 + 0.9 * (1 - s) ** 3),
    "tanh": (Schedule(shape="tanh"), lambda s: 0.1 + 0.45 * (1 - math.tanh(-7 * (1 - s) + 3 * s))),
    "step": (Schedule(shape="step", every=0.3, factor=0.5), lambda s: 0.5 ** math.floor(s / 0.3 + 1e-9)),
    "multistep": (
        Schedule(shape="multistep", at=(0.25, 0.8), factor=0.5), lambda s: 0.5 ** ((s >= 0.25) + (s >= 0.8)),
    ),
    "constant": (Schedule(shape="constant"), lambda s: 1.0),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_the_learning_rate_is_that_of_its_shape(shape: str) -> None:
    settings, expected = SHAPES[shape]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for warmup in (0.0, 0.2):
        recipe = Recipe(steps=100, lr=1.0, min_lr=0.1, warmup=warmup, schedule=settings)
        made = schedule.create(recipe, optimizer, 100)
        for step in range(100):
            made.step_update(step)
            rate = optimizer.param_groups[0]["lr"]
            if step < 100 * warmup:
                assert 0.1 - 1e-9 <= rate <= 1
            else:
                assert rate == pytest.approx(expected(step / 100), rel=1e-6), step


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": "poly", "at": (0.5,)}, "at: poly has none; it belongs to multistep"),
        ({"shape": "cosine", "power": 2.0}, "power: cosine has none; it belongs to poly"),
        ({"shape": "poly"}, "power: poly needs it"),
        ({"shape": "step"}, "every: step needs it"),
        ({"shape": "multistep"}, "at: multistep needs"),
        ({"shape": "multistep", "at": (0.7, 0.3)}, "ascending"),
    ],
)
def test_settings_of_another_shape_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Schedule(**fields)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_that_is_written_out_is_the_recipe_again(shape: str) -> None:
    """Proxy runs are handed theirs so."""
    recipe = Recipe(steps=10, schedule=SHAPES[shape][0])
    assert Recipe(**recipe.model_dump()) == recipe
    config = Proxy(schedule=SHAPES[shape][0]).run(0)
    assert config.recipe.schedule == recipe.schedule


@pytest.mark.parametrize("family", ["deit", "lv-vit", "swin", "swin v2"])
def test_layer_decay_gives_each_block_a_share_of_the_next_ones_rate(images: Images, family: str) -> None:
    """By what a step of signs moves: rates alone."""
    net = swin(family, classes=2) if family in SWINS else network(family, classes=2)
    before = state(net)
    recipe = Recipe(
        steps=1, batch_size=16, optimizer="lion", lr=1e-3, min_lr=1e-3, weight_decay=0, layer_decay=0.5, clip=None
    )
    fitted = fit(net, pool(images, False), recipe, seed=3, device=CPU, normalise=NORMALISE)
    assert fitted.curve[0]["lr"] == pytest.approx(1e-3)

    def moved(name: str) -> float:
        return float((state(net)[name] - before[name]).abs().max())

    blocks = [block.mlp.fc1.weight for block in net.blocks]
    names = [name for weight in blocks for name, p in net.body.named_parameters() if p is weight]
    for depth, name in enumerate(reversed(names)):
        assert moved(name) == pytest.approx(1e-3 * 0.5 ** (depth + 1), rel=0.02)
    head = "head.fc.weight" if family in SWINS else "head.weight"
    assert moved(head) == pytest.approx(1e-3, rel=0.02)
    assert moved("patch_embed.proj.bias") == pytest.approx(1e-3 * 0.5 ** (len(names) + 1), rel=0.02)


def judged(*answers: float) -> Any:
    """A judge that gives these answers, one after the other, and keeps what it was shown."""

    def judge(net: Network) -> float:
        judge.shown.append(state(net))  # type: ignore[attr-defined]
        return answers[len(judge.shown) - 1]  # type: ignore[attr-defined]

    judge.shown = []  # type: ignore[attr-defined]
    return judge


STOP = Recipe(epochs=6, batch_size=8, ema=0.9)


@pytest.mark.parametrize(
    ("gain", "answers", "best", "last"),
    [
        (0.0, (0.2, 0.5, 0.4, 0.5, 0.9, 0.9), 2, 4),  # an equal one is no gain
        (0.0, (0.5, 0.4, 0.6, 0.5, 0.7, 0.1), 5, 6),
        (0.2, (0.5, 0.6, 0.65, 0.9, 0.9, 0.9), 1, 3),
    ],
)
def test_training_stops_without_a_gain_and_keeps_the_best_epoch(
    images: Images, gain: float, answers: tuple[float, ...], best: int, last: int
) -> None:
    judge = judged(*answers)
    fitted = trained(images, STOP, judge=judge, stop=StopEarly(patience=2, gain=gain))
    assert fitted.best is not None
    assert (fitted.best.epoch, fitted.best.last, fitted.best.stopped) == (best, last, last < 6)
    assert fitted.best.top1 == answers[best - 1]
    assert len(fitted.curve) == last
    assert fitted.passes == last
    wanted = judge.shown[best - 1]
    assert all(torch.equal(wanted[name], t) for name, t in state(fitted.network).items())


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({"masks": MASKS["cubic"]}, 5),  # the last cut comes after 0.8 of the steps
        ({"masks": MASKS["rigl"]}, 1),
        ({"ticketed": True, "finish": 0.5}, 4),  # the third ends where whole images begin, and has seen none
        ({"ticketed": False, "finish": 0.5}, 1),
        ({"ticketed": True}, 1),
    ],
)
def test_an_epoch_counts_once_it_is_like_the_last(images: Images, more: dict[str, Any], first: int) -> None:
    judge = judged(0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    fitted = trained(images, STOP, judge=judge, stop=StopEarly(patience=5), **more)
    assert fitted.best is not None
    assert fitted.best.epoch == first


@pytest.mark.parametrize("masks", [None, *(MASKS[name] for name in ("2:4", "nncf gates"))])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for_whatever_masks_do_to_them(
    images: Images, masks: Any
) -> None:
    """Masks of nncf's gates put other gradients in the place of those that the loss left."""
    norms: list[float] = []
    net = network(classes=2)

    def look(optimizer: Any, *_: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p is net.body.norm.weight for p in weights):  # nncf's gates have an optimiser of their own
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])))

    hook = register_optimizer_step_pre_hook(look)
    try:
        recipe = Recipe(steps=4, batch_size=8, clip=1e-3)
        fit(net, pool(images, False), recipe, seed=3, device=CPU, normalise=NORMALISE, masks=masks)
    finally:
        hook.remove()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_images_that_are_mixed_in_pairs_are_asked_for_in_pairs(mixing: str) -> None:
    with pytest.raises(ValidationError, match="batch_size: mixup and cutmix mix images in pairs, and 5 is odd; take 6"):
        Recipe(epochs=1, batch_size=5, **{mixing: 0.2})


@pytest.mark.parametrize("colour_only", [False, True])
@pytest.mark.parametrize("text", ["rand-m10-inc1", "rand-m1", "rand-m9-mstd0.5-inc1"])
def test_randaugment_asks_pillow_for_nothing_that_it_refuses(text: str, colour_only: bool) -> None:
    """timm's posterising leaves 0 bits of a pixel at its strongest."""
    augmenter = Augmenter(Augmentation(rand=text, shift=0, flip=False), 16, colour_only=colour_only)
    image = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    for seed in range(300):
        assert augmenter._rand(image, seed).shape == (16, 16, 3)


def test_accuracy_is_told_after_each_epoch_and_loss_after_each_step(images: Images) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    judge = judged(0.25, 0.5, 0.75, 1.0)
    fitted = trained(images, FULL, judge=judge, tick=lambda steps, values: told.append((steps, dict(values))))
    assert [values["top1"] for _, values in told if "top1" in values] == [
        row["top1_calibration"] for row in fitted.curve
    ]
    assert sum(steps for steps, _ in told) == fitted.steps
    assert all(steps == 0 for steps, values in told if "top1" in values), "no step is counted twice"
    assert sum("loss" in values for _, values in told) == fitted.steps


def test_a_resumed_run_tells_the_steps_that_were_done_before(images: Images, tmp_path: Path) -> None:
    told: list[int] = []

    def tick(steps: int, values: Any) -> None:
        told.append(steps)
        if sum(told) == 7 and len(told) == 7:
            raise Killed

    file = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        trained(images, FULL, checkpoint=file, checkpoint_seconds=0, tick=tick)
    told.clear()
    fitted = trained(images, FULL, checkpoint=file, checkpoint_seconds=0, tick=tick)
    assert told[0] > 1 and sum(told) == fitted.steps


@pytest.mark.parametrize("after", [2, 7, 11])
def test_early_stopping_survives_a_kill(images: Images, tmp_path: Path, after: int) -> None:
    """In the first pass, after the best one, and in the last before it stops."""
    answers = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5}
    file, epochs, steps = tmp_path / "c.safetensors", 0, 0

    def run(**more: Any) -> Fitted:
        def judge(net: Network) -> float:
            nonlocal epochs
            epochs += 1
            return answers[epochs]

        return trained(images, STOP, judge=judge, stop=StopEarly(patience=2), **more)

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == after:
            raise Killed

    expected = run()
    epochs = 0
    with pytest.raises(Killed):
        run(checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = run(checkpoint=file)
    done = run(checkpoint=file)  # killed after it had stopped: it does not go on
    for one in (again, done):
        assert one.curve == expected.curve and one.best == expected.best
        assert all(torch.equal(state(expected.network)[name], t) for name, t in state(one.network).items())


@pytest.mark.slow
def test_a_compiled_forward_trains_as_the_plain_one_and_leaves_clean_names(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through dynamo and autograd's graphs, without the compiler, whose own times are in docs/LOG.md."""
    monkeypatch.setattr(forward.torch, "compile", partial(torch.compile, backend="aot_eager"))
    recipe = Recipe(steps=6, batch_size=8, lr=1e-3)
    plain = trained(images, recipe, ticketed=True, finish=0.5)
    fast = trained(images, recipe.model_copy(update={"compile": True}), ticketed=True, finish=0.5)
    assert list(state(fast.network)) == list(state(plain.network))
    assert [row["loss"] for row in fast.curve] == pytest.approx([row["loss"] for row in plain.curve], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_missing_compiler_is_told_with_the_remedy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc
    from torch.utils import _triton

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(InvalidInput, match="compile: ") as caught:
        forward.check_compiler(device, "stages.train.compile")
    assert "set compile: false" in caught.value.hint
    assert caught.value.field == "stages.train.compile"


def test_a_checkpoint_of_another_run_is_refused(images: Images, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    trained(images, Recipe(steps=2), checkpoint=file)
    with pytest.raises(InvalidInput, match="2 steps"):
        trained(images, Recipe(steps=3), checkpoint=file)


def test_views_without_augmentation_are_the_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    still = Augmenter(Augmentation(shift=0, flip=False), 32, colour_only=False)
    views, theta = still(pixels, torch.Generator(), CPU)
    assert torch.equal(views, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(theta, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, -1, -1))


def test_a_shift_moves_whole_pixels_and_says_by_how_many() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    views, theta = Augmenter(Augmentation(shift=0.2, flip=False), 32, colour_only=False)(pixels, torch.Generator(), CPU)
    original = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for image, view, matrix in zip(original, views, theta, strict=True):
        x, y = (int(v) for v in (matrix[:, 2] * 16).round())
        expected = torch.zeros_like(image)
        inside = image[:, max(0, y) : 32 + min(0, y), max(0, x) : 32 + min(0, x)]
        top, left = max(0, -y), max(0, -x)
        expected[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
        assert torch.allclose(view, expected, atol=1e-5)


def test_with_tickets_randaugment_moves_nothing() -> None:
    marked = np.zeros((8, 32, 32, 3), dtype=np.uint8)
    marked[:, 10, 20] = 255
    augmenter = Augmenter(Augmentation(shift=0, flip=False, rand="rand-m9-n4"), 32, colour_only=True)
    for seed in range(5):
        views, _ = augmenter(marked, torch.Generator().manual_seed(seed), CPU)
        for view in views:
            grey = view.mean(0)
            background = grey.flatten().mode().values
            assert int((grey - background).abs().argmax()) == 10 * 32 + 20 or bool((grey == background).all())


@pytest.mark.parametrize("text", ["rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.5-mmax20-mstd101-t3aw", "rand-tweights"])
def test_a_randaugment_text_that_is_accepted_is_one_of_timm(text: str) -> None:
    settings = Augmentation(rand=text)
    for colour_only in (False, True):
        Augmenter(settings, 32, colour_only=colour_only)


@pytest.mark.parametrize(
    "text", ["augment-me", "rand-m9.5", "rand-q4", "rand-p.5", "rand-mstd", "rand-foo", "rand-n0", "rand-", ""]
)
def test_a_randaugment_text_that_timm_refuses_or_passes_over_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="timm"):
        Augmentation(rand=text)


def test_mixed_targets_are_the_mixture_of_both_labels() -> None:
    x = torch.rand(4, 3, 8, 8)
    mixed = Mixer(0.5, 0.0, 0.0, 3)(x.clone(), torch.tensor([0, 1, 2, 0]), torch.Generator().manual_seed(2))
    images, targets, share = mixed.images, mixed.targets, mixed.share
    assert 0 < share < 1
    assert torch.allclose(images, share * x + (1 - share) * x.flip(0), atol=1e-6)
    onehot = torch.eye(3)[[0, 1, 2, 0]]
    assert torch.allclose(targets, share * onehot + (1 - share) * onehot.flip(0), atol=1e-6)


def test_group_norms_equal_loops_over_heads_and_units() -> None:
    heads, qk, v, width = 3, 4, 5, 7
    qkv, proj = torch.randn(heads * (2 * qk + v), width), torch.randn(width, heads * v)
    for head, norm in enumerate(head_norms(qkv, proj, heads, qk, v).tolist()):
        rows = [head * qk + i for i in range(qk)] + [heads * qk + head * qk + i for i in range(qk)]
        rows += [2 * heads * qk + head * v + i for i in range(v)]
        total = sum(float(qkv[r].square().sum()) for r in rows)
        total += sum(float(proj[:, head * v + i].square().sum()) for i in range(v))
        assert norm == pytest.approx(total**0.5, rel=1e-5)
    fc1, fc2 = torch.randn(6, width), torch.randn(width, 6)
    expected = [float((fc1[u].square().sum() + fc2[:, u].square().sum()).sqrt()) for u in range(6)]
    assert unit_norms(fc1, fc2).tolist() == pytest.approx(expected, rel=1e-5)


def test_distillation_is_zero_for_the_teachers_own_answer_and_hard_is_cross_entropy() -> None:
    teacher, student = torch.randn(6, 4), torch.randn(6, 4)
    assert float(soft_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)
    by_hand = sum(
        float(p * (p.log() - q.log()))
        for row in range(6)
        for p, q in zip((teacher[row] / 2).softmax(0), (student[row] / 2).softmax(0), strict=True)
    )
    assert float(soft_loss(student, teacher, 2.0)) == pytest.approx(4 * by_hand / 6, rel=1e-4)
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(1))
    assert torch.equal(hard_loss(student, teacher), expected)
