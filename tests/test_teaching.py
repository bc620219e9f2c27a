"""Learning from a teacher: its hidden states against slow loops and plain torch, its answers asked for once, what is
refused, and what is left of it when training is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_benchmark import Folder, Listening
from test_preflight import VIT, Project
from test_training import CPU, NORMALISE, Killed, state
from tiny_vision import FAMILIES, SWINS, data, image_folder, images, network, swin
from torch import Tensor, nn

from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import finetune
from sievit.stages.finetune import FinetuneConfig
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.distillation import feature_loss
from sievit.stages.vision.architecture import Architecture, TokenDrop
from sievit.stages.vision.batches import Pool
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.network import Network, rebuild
from sievit.stages.vision.objective import supervised
from sievit.stages.vision.preprocessing import Preprocessing
from sievit.stages.vision.recipe import Augmentation, Recipe
from sievit.stages.vision.teaching import Teacher, Teaching, compared, from_artifact
from sievit.stages.vision.teaching_settings import Distill, Features
from sievit.stages.vision.training import Fitted, fit
from sievit.stages.vision.weights import load_network, save_network

STILL = Augmentation(shift=0, flip=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return load_splits(data(str(image_folder(tmp_path_factory.mktemp("data") / "i", per_class=12))), Path()).train


def cut(teacher: Network, *, seed: int = 3) -> Network:
    """Of three blocks the middle one is gone, of the others a head each; 40 of 48 channels are left."""
    record = teacher.architecture
    assert isinstance(record, Architecture)
    first, _, last = record.blocks
    torch.manual_seed(seed)
    made = rebuild(record.cut([replace(first, heads=2), None, replace(last, heads=2, mlp=64)], (40,)), drop_path=0.2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def taught_by(network: Network, classes: tuple[str, ...] = ("ant", "bee")) -> Teacher:
    student = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, classes)
    return Teacher(network, (0.4,) * 3, (0.3,) * 3, network.architecture.macs(), student, CPU)


# ---- the loss


def test_the_loss_of_states_is_that_of_a_loop_over_standardised_tokens() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8) * 5 + 1, torch.randn(2, 3, 8)
    squares = []
    for image in range(2):
        for token in range(3):
            s, t = student[image, token].tolist(), teacher[image, token].tolist()
            tokens = []
            for values in (s, t):
                mean = sum(values) / 8
                deviation = (sum((v - mean) ** 2 for v in values) / 8 + 1e-6) ** 0.5
                tokens.append([(v - mean) / deviation for v in values])
            squares += [(a - b) ** 2 for a, b in zip(*tokens, strict=True)]
    assert float(feature_loss(student, teacher)) == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    by_token = [float(np.corrcoef(student[i, n], teacher[i, n])[0, 1]) for i in range(2) for n in range(3)]
    assert float(feature_loss(student, teacher)) == pytest.approx(2 - 2 * np.mean(by_token), rel=1e-4)


def test_the_loss_of_states_has_the_gradient_of_finite_differences_and_no_scale() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 2, 6).double()
    assert torch.autograd.gradcheck(lambda s: feature_loss(s, teacher), (student,))
    assert float(feature_loss(teacher * 7 + 3, teacher)) == pytest.approx(0, abs=1e-6)


# ---- the states


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vit_hands_out_what_the_next_block_and_the_last_norm_read(family: str) -> None:
    net, x = network(family), images(2)
    read: list[Tensor] = []
    layers = [net.body.blocks[1].norm1, net.body.blocks[2].norm1, net.body.norm]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for layer in layers]
    with torch.no_grad():
        logits, states = net(x, None, (0, 1, 2))
        for hook in hooks:
            hook.remove()
        assert torch.equal(logits, net(x))
        assert len(net(x, None, (1,))[1]) == 1 and torch.equal(net(x, None, (1,))[1][0], states[1])
    assert len(states) == 3 and all(torch.equal(own, other) for own, other in zip(states, read, strict=True))


@pytest.mark.parametrize("family", SWINS)
def test_a_swin_hands_out_the_tokens_of_each_stage_at_its_own_width(family: str) -> None:
    net, x = swin(family), images(2)
    with torch.no_grad():
        logits, states = net(x, None, (0, 1, 2, 3))
        assert [tuple(one.shape) for one in states] == [(2, 256, 16)] * 2 + [(2, 64, 32)] * 2
        assert torch.equal(logits, net(x))
        assert torch.equal(net.body.head(net.body.norm(states[3].unflatten(1, (8, 8)))), logits)
        # What a stage begins with comes of what the one before ended with.
        merged = net._merge(net.body.layers[1].downsample, states[1].unflatten(1, (16, 16)))
        again = net._block(net.body.layers[1].blocks[0], merged, net.whole[1], shifted=False)
        assert torch.equal(again.flatten(1, 2), states[2])


# ---- the objective


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("family", ["deit", "distilled"])
def test_a_student_of_other_width_heads_and_blocks_minimises_what_plain_torch_says(family: str, kind: Any) -> None:
    teacher, x = network(family, classes=2), images(4)
    student = cut(network(family, classes=2))
    settings = Distill(kind=kind, weight=0.3, temperature=3.0, features=Features(weight=0.7))
    teaching = Teaching(settings, student, taught_by(teacher))
    assert teaching.pairs == [(0, 0), (1, 2)]
    assert [tuple(p.shape) for p in teaching.projections.parameters()] == [(48, 40)] * 2
    targets = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.5, 0.5], [0.0, 1.0]])
    batch: Any = type("Batch", (), {"images": x, "kept": None, "targets": targets, "ids": np.arange(4)})

    read: list[Tensor] = []
    for net, layers in (
        (student, [student.body.blocks[1].norm1, student.body.norm]),
        (teacher, [teacher.body.blocks[1].norm1, teacher.body.norm]),
    ):
        assert len(net.blocks) in (2, 3)
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    student.train()
    torch.manual_seed(0)
    loss = teaching(student, batch)
    own, others = read[:2], read[2:]
    weights = [weight.detach() for weight in teaching.projections.parameters()]
    of_states = 0.0
    for state_, weight, wanted in zip(own, weights, others, strict=True):
        a, b = state_ @ weight.T, wanted
        norm = [
            (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() for t in (a, b)
        ]
        of_states += float(((norm[0] - norm[1]) ** 2).mean()) / 2
    with torch.no_grad():
        torch.manual_seed(0)
        answers = student(x)
        heard = teacher((x * 0.5 + 0.5 - 0.4) / 0.3)
    to_labels, to_teacher = answers if family == "distilled" else (answers, answers)
    labels = -(targets * to_labels.log_softmax(-1)).sum(-1).mean()
    if kind == "hard":
        told = -to_teacher.log_softmax(-1)[torch.arange(4), heard.argmax(-1)].mean()
    else:
        p, q = (heard / 3).softmax(-1), (to_teacher / 3).softmax(-1)
        told = 9 * (p * (p / q).log()).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(0.7 * float(labels) + 0.3 * float(told) + 0.7 * of_states, rel=1e-4)


def test_the_teacher_of_a_distilled_deit_answers_with_the_mean_of_its_heads() -> None:
    teacher, x = network("distilled"), images(2)
    answer = taught_by(teacher).answer(x)
    features = teacher.body.norm(teacher._through((x * 0.5 + 0.5 - 0.4) / 0.3, None).x)
    both = (teacher.body.head(features[:, 0]) + teacher.body.head_dist(features[:, 1])) / 2
    assert torch.allclose(answer, both, atol=1e-6) and not answer.requires_grad


def test_blocks_of_the_same_width_are_compared_as_they_are() -> None:
    student, teacher = network("deit", classes=2), network("deit", classes=2)
    teaching = Teaching(Distill(features=Features(blocks=(2, 0))), student, taught_by(teacher))
    assert teaching.pairs == [(0, 0), (2, 2)] and not list(teaching.projections.parameters())
    settings = Distill(weight=1.0, features=Features())
    same = Teacher(teacher, (0.5,) * 3, (0.5,) * 3, 0, Preprocessing(32, (0.5,) * 3, (0.5,) * 3, ("ant", "bee")), CPU)
    batch: Any = type("Batch", (), {"images": images(2), "kept": None, "targets": torch.eye(2)})
    assert float(Teaching(settings, student, same)(student, batch).detach()) == pytest.approx(0, abs=1e-6)


def test_a_swin_that_lost_a_block_and_channels_is_taught_stage_by_stage() -> None:
    teacher = swin("swin", classes=2)
    record = teacher.architecture
    student = rebuild(record.cut([record.blocks[0], None, *record.blocks[2:]], (16, 24)))
    teaching = Teaching(Distill(features=Features()), student, taught_by(teacher))
    assert teaching.pairs == [(0, 0), (1, 2), (2, 3)]
    assert [tuple(p.shape) for p in teaching.projections.parameters()] == [(32, 24)] * 2
    batch: Any = type("Batch", (), {"images": images(2), "kept": None, "targets": torch.eye(2)})
    teaching(student, batch).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in teaching.projections.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in teaching.projections.parameters())


# ---- training with it


def learn(pictures: Images, recipe: Recipe, features: Features | None, **more: Any) -> tuple[Fitted, Teaching]:
    torch.manual_seed(5)
    teacher = network("deit", classes=2, seed=7)
    student = cut(teacher)
    teaching = Teaching(Distill(features=features), student, taught_by(teacher))
    pool = Pool(pictures, np.arange(len(pictures)))
    fitted = fit(
        student, pool, recipe, seed=3, device=CPU, normalise=NORMALISE, objective=teaching,
        beside=teaching.projections, **more,
    )  # fmt: skip
    return fitted, teaching


@pytest.mark.parametrize("how", ["average, layer decay, parts", "bf16", "fp16", "muon"])
def test_a_killed_run_with_features_ends_with_the_same_bits(pictures: Images, tmp_path: Path, how: str) -> None:
    fields: dict[str, Any] = {
        "average, layer decay, parts": {"ema": 0.8, "layer_decay": 0.7, "accumulate": 2, "mixup": 0.3},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
        "muon": {"optimizer": "muon"},
    }[how]
    recipe = Recipe(epochs=2, batch_size=6, drop_path=0.2, augment=Augmentation(flip=True), **fields)
    expected, wanted = learn(pictures, recipe, Features())
    steps = 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += number
        if steps == 3:
            raise Killed

    kept: dict[str, Any] = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        learn(pictures, recipe, Features(), tick=tick, **kept)
    again, teaching = learn(pictures, recipe, Features(), **kept)
    assert again.curve == expected.curve
    assert all(torch.equal(state(expected.network)[name], t) for name, t in state(again.network).items())
    pairs = zip(wanted.projections.parameters(), teaching.projections.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def beside_of(pull: Callable[[Tensor], Tensor]) -> tuple[nn.ModuleDict, Any]:
    """Weights beside a network, and an objective that asks them for something as well."""
    torch.manual_seed(0)
    beside = nn.ModuleDict({"projection_0": nn.Linear(2, 2, bias=False)})

    def objective(net: Any, batch: Any) -> Tensor:
        return supervised(net, batch) + pull(next(iter(beside.parameters())))

    return beside, objective


def test_weights_beside_the_network_train_at_the_rate_of_the_head_with_decay(pictures: Images) -> None:
    """By a step of signs: they move by the rate, after the decay."""
    recipe = Recipe(
        steps=1, batch_size=24, optimizer="lion", lr=1e-2, min_lr=1e-2, weight_decay=0.5, layer_decay=0.5, clip=None
    )
    beside, objective = beside_of(lambda weight: weight.sum())
    (weight,) = beside.parameters()
    before = weight.detach().clone()
    pool = Pool(pictures, np.arange(len(pictures)))
    fit(
        network(classes=2), pool, recipe, seed=3, device=CPU, normalise=NORMALISE, objective=objective, beside=beside
    )  # fmt: skip
    assert torch.allclose(weight, before * (1 - 1e-2 * 0.5) - 1e-2, atol=1e-7)


def test_the_gradient_of_weights_beside_the_network_is_clipped_with_the_others_and_named(pictures: Images) -> None:
    pool = Pool(pictures, np.arange(len(pictures)))

    def moved(pull: Callable[[Tensor], Tensor]) -> Tensor:
        recipe = Recipe(steps=1, batch_size=24, optimizer="sgd", lr=0.1, min_lr=0.1, weight_decay=0, clip=0.5)
        beside, objective = beside_of(pull)
        net = network(classes=2)
        weights = [*net.body.parameters(), *beside.parameters()]
        before = [p.detach().clone() for p in weights]
        fit(net, pool, recipe, seed=3, device=CPU, normalise=NORMALISE, objective=objective, beside=beside)
        return torch.cat([(p.detach() - q).flatten() for p, q in zip(weights, before, strict=True)])

    # timm's first step of SGD, with Nesterov's momentum of 0.9, is 1.9 gradients long.
    assert float(moved(lambda weight: 100 * weight.sum()).norm()) == pytest.approx(0.1 * 1.9 * 0.5, rel=1e-3)

    def overflow(weight: Tensor) -> Tensor:
        held = weight.sum()
        if held.requires_grad:  # the forward is repeated without
            held.register_hook(lambda gradient: gradient * float("inf"))
        return held

    with pytest.raises(InvalidInput, match=r"at step 1: the gradient of projection_0\.weight is not finite"):
        moved(overflow)


def test_states_come_nearer_to_the_teachers(pictures: Images) -> None:
    recipe = Recipe(epochs=8, batch_size=8, lr=3e-3, augment=STILL)
    views = NORMALISE(torch.from_numpy(pictures.pixels()).permute(0, 3, 1, 2).float() / 255)

    def distance(net: Network, teaching: Teaching) -> float:
        with torch.no_grad():
            _, own = net.eval()(views, None, (0, 1))
            _, others = teaching.teacher.states(views, (0, 2))
            widened = [p(s) for p, s in zip(teaching.projections.values(), own, strict=True)]
            return float(sum(feature_loss(s, t) for s, t in zip(widened, others, strict=True))) / 2

    far, begun = learn(pictures, Recipe(steps=1, batch_size=8, lr=1e-9, min_lr=0), Features())
    near, teaching = learn(pictures, recipe, Features())
    assert distance(near.network, teaching) < 0.6 * distance(far.network, begun)


# ---- answers that are asked for once


def test_a_teacher_that_is_asked_once_teaches_the_same_weights(pictures: Images) -> None:
    recipe = Recipe(epochs=3, batch_size=8, drop_path=0.2, augment=STILL)
    asked: list[int] = []

    def run(once: bool) -> tuple[Fitted, Teaching]:
        torch.manual_seed(5)
        teacher = network("deit", classes=2, seed=7)
        student = cut(teacher)
        teaching = Teaching(Distill(), student, taught_by(teacher))
        teacher.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
        pool = Pool(pictures, np.arange(2, len(pictures)))
        assert teaching.asked_again(pool, recipe)
        if once:
            teaching.remember(pool, 8, NORMALISE)
        fitted = fit(student, pool, recipe, seed=3, device=CPU, normalise=NORMALISE, objective=teaching)
        assert teaching.macs(pool, fitted.images) == sum(asked) * teacher.architecture.macs()
        return fitted, teaching

    often, _ = run(once=False)
    assert sum(asked) == often.images == 3 * (len(pictures) - 2)
    asked.clear()
    once, teaching = run(once=True)
    assert sum(asked) == len(pictures) - 2
    assert once.curve == often.curve
    assert all(torch.equal(state(often.network)[name], t) for name, t in state(once.network).items())
    assert teaching.remembered is not None
    views = NORMALISE(torch.from_numpy(pictures.pixels()).permute(0, 3, 1, 2).float() / 255)
    assert torch.allclose(teaching.remembered[2:], teaching.teacher.answer(views)[2:], atol=1e-5)


DRAWN: dict[str, dict[str, Any]] = {
    "shift": {"augment": Augmentation(shift=0.1, flip=False)},
    "zoom": {"augment": Augmentation(shift=0, flip=False, zoom=0.9)},
    "flip": {"augment": Augmentation(shift=0, flip=True)},
    "erase": {"augment": Augmentation(shift=0, flip=False, erase=0.1)},
    "rand": {"augment": Augmentation(shift=0, flip=False, rand="rand-m1")},
    "mixup": {"mixup": 0.1},
    "cutmix": {"cutmix": 0.1},
    "one pass": {"epochs": 1.0},
}


@pytest.mark.parametrize("what", DRAWN)
def test_answers_are_looked_up_only_where_an_image_comes_again_as_the_same_view(pictures: Images, what: str) -> None:
    pool, still = Pool(pictures, np.arange(len(pictures))), {"epochs": 2.0, "augment": STILL}
    teaching = Teaching(Distill(), network(classes=2), taught_by(network(classes=2)))
    assert teaching.asked_again(pool, Recipe(**still))  # type: ignore[arg-type]
    assert not teaching.asked_again(pool, Recipe(**still | DRAWN[what]))  # type: ignore[arg-type]


def test_answers_by_lot_and_states_are_never_looked_up(pictures: Images) -> None:
    pool, recipe = Pool(pictures, np.arange(len(pictures))), Recipe(epochs=2, augment=STILL)
    by_lot = network(classes=2).with_tokens((TokenDrop(1, 9, "random"),))
    assert not Teaching(Distill(), network(classes=2), taught_by(by_lot)).asked_again(pool, recipe)
    states = Teaching(Distill(features=Features()), network(classes=2), taught_by(network(classes=2)))
    assert not states.asked_again(pool, recipe)


# ---- the stage


def stage(tmp_path: Path, student: Network, **fields: Any) -> tuple[Context, Path]:
    """finetune on a student and its teacher, as the engine would run it."""
    image_folder(tmp_path / "images", per_class=12)
    block = DataConfig(source="images", image_size=32)
    classes = load_splits(block.model_dump(), tmp_path).train.classes
    inputs = {}
    for role, net in (("model", student), ("teacher", network("distilled", classes=2))):
        inputs[role] = Folder(tmp_path / role, kind_of_stage="train")
        inputs[role].root.mkdir()
        save_network(net, inputs[role].root)
        Preprocessing(32, (0.5,) * 3, (0.5,) * 3, classes).save(inputs[role].root)
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    name, args = FAMILIES["distilled"]
    ctx = Context(
        config=FinetuneConfig(batch_size=8, **fields),
        data=block,
        model=ModelConfig(name=name, args=args),
        seed=0,
        device="cpu",
        arm="main",
        entry="finetune",
        base=tmp_path,
        out=tmp_path / "out",
        work=tmp_path / "work",
        inputs=inputs,  # type: ignore[arg-type]
        many=(),
        references={},
        progress=Listening(),  # type: ignore[arg-type]
    )
    finetune.run(ctx)
    return ctx, tmp_path / "out"


def test_the_stage_teaches_a_cut_student_states_and_hands_on_the_student_alone(tmp_path: Path) -> None:
    student = cut(network("distilled", classes=2))
    ctx, out = stage(tmp_path, student, epochs=2, ema=0.8, distill=Distill(features=Features(blocks=(2,))))
    assert ctx.metrics["distill"] == {"remembered": False, "compared": [2]}
    assert set(load_file(out / "model.safetensors")) == set(student.body.state_dict())
    again = load_network(out)
    assert again.architecture == student.architecture
    assert ctx.metrics["parameters"] == sum(p.numel() for p in rebuild(again.architecture, device="meta").parameters())
    assert ctx.ledger["teacher_macs"] == ctx.ledger["images"] * network("distilled", classes=2).architecture.macs()
    assert not isinstance(again.train()(images(2)), tuple), "in training too it answers once"


def test_the_stage_books_only_the_answers_that_were_asked_for(tmp_path: Path) -> None:
    ctx, _ = stage(tmp_path, network("distilled", classes=2, seed=1), epochs=3, distill=Distill(), augment=STILL)
    assert ctx.metrics["distill"] == {"remembered": True, "compared": []}
    macs = network("distilled", classes=2).architecture.macs()
    assert ctx.ledger["teacher_macs"] == ctx.ledger["images"] // 3 * macs


# ---- refusals

DEIT = network("deit").architecture
assert isinstance(DEIT, Architecture)
GONE = DEIT.cut([DEIT.blocks[0], None, DEIT.blocks[2]], (48,))
WHOLE = Features()
REFUSED: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "family": (
        lambda: compared(DEIT, swin().architecture, Features()),
        "distill.features: the teacher swin_tiny_patch4_window7_224 is of another family than deit_tiny_patch16_224",
        "name a teacher with the student's tokens, or leave features out",
        "distill.features",
    ),
    "grid": (
        lambda: compared(DEIT, replace(DEIT, grid=(8, 8)), Features()),
        "distill.features: the teacher has 8 x 8 patches, the student 4 x 4",
        "name a teacher with the student's tokens, or leave features out",
        "distill.features",
    ),
    "prefix": (
        lambda: compared(DEIT, network("distilled").architecture, Features()),
        "distill.features: prefix tokens of the teacher: 2, of the student: 1",
        "name a teacher with the student's tokens, or leave features out",
        "distill.features",
    ),
    "no block in common": (
        lambda: compared(DEIT.cut([DEIT.blocks[0], None, None], (48,)), GONE.cut([None, DEIT.blocks[2]], (48,)), WHOLE),
        "distill.features: the student has none of the teacher's blocks",
        "name another teacher, or leave features out",
        "distill.features",
    ),
    "beyond": (
        lambda: compared(DEIT, DEIT, Features(blocks=(1, 3))),
        "distill.features.blocks: 3 for a teacher of 3 blocks",
        "use numbers from 0 to 2",
        "distill.features.blocks",
    ),
    "cut": (
        lambda: compared(GONE, DEIT, Features(blocks=(0, 1))),
        "distill.features.blocks: the student's block in the place of the teacher's 1 was cut",
        "choose from 0, 2, or leave blocks out",
        "distill.features.blocks",
    ),
    "tokens of the student": (
        lambda: compared(GONE, DEIT, Features(blocks=(0, 2)), (TokenDrop(1, 8),)),
        "distill.features.blocks: after the teacher's block 2 the student has fewer tokens, from its block 1 on",
        "choose from 0",
        "distill.features.blocks",
    ),
    "tokens of the teacher": (
        lambda: compared(DEIT, DEIT.with_tokens((TokenDrop(0, 8),)), Features()),
        "distill.features.blocks: after the teacher's block 0 the teacher has fewer tokens, from its block 0 on",
        "leave features out, or the tokens' reduction",
        "distill.features.blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_states_that_cannot_be_compared_are_refused_with_field_and_remedy(case: str) -> None:
    compare, message, remedy, field = REFUSED[case]
    with pytest.raises(InvalidInput) as caught:
        compare()
    assert (str(caught.value), caught.value.hint, caught.value.field) == (message, remedy, field)


def test_tokens_before_the_first_reduction_can_be_compared() -> None:
    """Of a student whose block 1 was cut, block 1 is the one in place 2."""
    assert compared(GONE, DEIT, Features(blocks=(0,)), (TokenDrop(1, 8),)) == [(0, 0)]
    assert compared(DEIT, DEIT, Features(blocks=(0, 1)), (TokenDrop(2, 8),)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"distill": {"teacher": "timm:regnety_160", "features": {}}},
            "features: timm:regnety_160 comes from timm as it is, and shows no hidden states; leave features out, or "
            "name a stage or an artifact",
        ),
        ({"distill": {"features": {"blocks": (1, 1)}}}, "blocks: [1, 1] names a block twice; name each once"),
        (
            {"distill": {"features": {}}, "tokens": {"blocks": (2, 1), "keep": 0.5}},
            "distill.features: from block 1 on tokens leaves fewer tokens than the teacher has; set "
            "distill.features.blocks to blocks before 1, or leave tokens out",
        ),
        (
            {"distill": {"features": {}}, "tokens": {"blocks": (0,), "keep": 0.5}},
            "distill.features: from block 0 on tokens leaves fewer tokens than the teacher has; leave one out",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FinetuneConfig(epochs=1, **fields)
    assert [error["msg"].removeprefix("Value error, ") for error in caught.value.errors()] == [message]


def test_features_of_a_network_in_parts_are_refused_at_their_line(tmp_path: Path) -> None:
    text = VIT.replace("finetune: {", "finetune: {distill: {features: {weight: 2.0}}, ")
    assert (
        Project(tmp_path, text + "launch: {processes: 2, sharding: fsdp2}\n").unplanned()
        == """\
invalid pipeline: stages.finetune.distill.features: projections are whole in every process, and fsdp2 divides weights
  --> pipeline.yaml:6:24
   |
 6 |   finetune: {distill: {features: {weight: 2.0}}, epochs: 1}
   |                        ^^^^^^^^
  help: leave features out, or use launch.sharding: ddp"""
    )


def test_a_teacher_that_drops_tokens_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    text = VIT.replace("train: {", "train: {tokens: {blocks: [1], keep: 0.5}, ")
    text = text.replace("finetune: {", "finetune: {distill: {features: {blocks: [0, 2]}}, ")
    assert (
        Project(tmp_path, text).refused()
        == """\
invalid pipeline: distill.features.blocks: after the teacher's block 2 the teacher has fewer tokens, from its \
block 1 on
  --> pipeline.yaml:6:35
   |
 6 |   finetune: {distill: {features: {blocks: [0, 2]}}, epochs: 1}
   |                                   ^^^^^^
  help: choose from 0"""
    )


def test_a_teacher_of_other_classes_is_refused(pictures: Images, tmp_path: Path) -> None:
    save_network(network("deit", classes=3), tmp_path)
    Preprocessing(32, (0.5,) * 3, (0.5,) * 3, ("a", "b", "c")).save(tmp_path)
    own = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, pictures.classes)
    with pytest.raises(InvalidInput, match="teacher train@1 answers other classes"):
        from_artifact(tmp_path, "train@1", own, CPU)
