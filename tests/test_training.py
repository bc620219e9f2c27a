"""The loop: resuming, tickets in it, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_vision import data, image_folder, network
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.distillation import hard_loss, soft_loss
from sievit.stages.methods.regularisers import head_norms, unit_norms
from sievit.stages.vision.augment import Augmenter, Mixer
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.evaluate import top1
from sievit.stages.vision.mask_settings import Magnitude, Pattern, RigL
from sievit.stages.vision.network import Network
from sievit.stages.vision.patches import Cached
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.recipe import Augmentation, Optimizer, Recipe
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
    [("cubic", 8), ("cubic", 13), ("random", 8), ("one shot", 13), ("rigl", 8), ("rigl", 13), ("2:4", 8)],
)
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
    with pytest.raises(InvalidInput, match=r"nan at step 1"):
        trained(images, FULL, objective=lambda net, batch: net(batch.images).sum() * float("nan"))


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
