"""Importance that a training hands on: what adds up to what, movement against gradients of the labels alone, and that
prune removes what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_preflight import Project
from test_training import CPU, NORMALISE, Killed, pool
from tiny_vision import data, image_folder, images, network
from torch import Tensor

from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Axis, Pressure, allocate
from sievit.stages.methods.importance import attention_scores, head_shares, unit_shares
from sievit.stages.methods.regularisers import head_norms, kept_back, unit_norms
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.mask_settings import NncfGates, Pattern
from sievit.stages.vision.masks import pool as weights_of
from sievit.stages.vision.penalty import create
from sievit.stages.vision.recipe import Recipe, StopEarly
from sievit.stages.vision.surgery import kept_architecture, score
from sievit.stages.vision.tensors import read_tensors
from sievit.stages.vision.trained_importance import FILE, judged, write
from sievit.stages.vision.training import fit
from sievit.stages.vision.weights import load_network


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def trained(splits: Images, net: Any, penalty: Any, *, steps: int = 6, **more: Any) -> Any:
    recipe = Recipe(steps=steps, batch_size=8, lr=1e-3, clip=0.5)
    return fit(net, pool(splits, False), recipe, seed=3, device=CPU, normalise=NORMALISE, penalty=penalty, **more)


def test_shares_of_weights_add_up_to_the_norms_of_heads_and_units() -> None:
    qkv, proj = torch.randn(3 * (2 * 4 + 5), 6), torch.randn(6, 15)
    norms = head_norms(qkv, proj, 3, 4, 5)
    shares = head_shares(qkv, proj, 3, 4, 5)
    heads, pairs, values = attention_scores(
        shares[0], None, shares[1], None, heads=3, qk=4, v=5, weigh=lambda weight, none: weight
    )
    assert torch.allclose(heads, norms)
    for head in range(3):
        rows = [qkv[head * 4 + 1], qkv[12 + head * 4 + 1]]
        assert float(pairs[head, 1]) == pytest.approx(sum(float(r.square().sum()) for r in rows) / float(norms[head]))
        value = qkv[24 + head * 5 + 2].square().sum() + proj[:, head * 5 + 2].square().sum()
        assert float(values[head, 2]) == pytest.approx(float(value / norms[head]), rel=1e-5)
    fc1, fc2 = torch.randn(7, 6), torch.randn(6, 7)
    in_, out = unit_shares(fc1, fc2)
    assert torch.allclose(in_.sum(1) + out.sum(0), unit_norms(fc1, fc2))


def test_groups_that_the_labels_make_larger_are_pressed_least() -> None:
    assert kept_back(torch.zeros(3)).tolist() == [1, 1, 1]
    pressed = kept_back(torch.tensor([-3.0, 0.0, 1.0, 8.0]))
    assert pressed.tolist() == sorted(pressed.tolist(), reverse=True)
    assert float(pressed[1]) == 1 and 0 < float(pressed[3]) < float(pressed[0]) < 2


def test_movement_is_of_the_labels_gradient_alone_and_adds_up() -> None:
    """A twin without a penalty says what the labels' gradient is."""
    net, twin, x, labels = network(), network(), images(6), torch.arange(6) % 5
    penalty = create("movement", 0.1)
    expected = {name: torch.zeros_like(weight) for name, weight in weights_of(net).items()}
    for lr in (0.5, 0.2):
        twin.body.load_state_dict(net.body.state_dict())
        for one in (net, twin):
            one.zero_grad()
        (torch.nn.functional.cross_entropy(net(x), labels) + penalty(net)).backward()
        torch.nn.functional.cross_entropy(twin(x), labels).backward()
        penalty.on_gradients(net, lr)
        for name, weight in weights_of(twin).items():
            assert not torch.allclose(weights_of(net)[name].grad, weight.grad)
            expected[name] -= lr * weight.detach() * weight.grad
        with torch.no_grad():
            for weight in weights_of(net).values():
                weight -= lr * weight.grad
    scores = penalty.importance(net)
    assert all(torch.allclose(scores[name], wanted, atol=1e-6) for name, wanted in expected.items())
    assert any(bool((s < 0).any()) for s in scores.values())


@pytest.mark.parametrize(
    "masks", [Pattern(method="sr_ste", decay=0.1), NncfGates(method="nncf_rb", keep=0.4, lr=1.0, end=0.5)]
)
def test_movement_is_of_the_weights_that_the_loss_saw_under_masks_that_keep_others(splits: Images, masks: Any) -> None:
    """The first step's scores hang on the labels alone, so that the strength of the penalty has no say in them."""
    found = []
    for strength in (1e-12, 0.1):
        penalty = create("movement", strength)
        net = trained(splits, network(classes=2), penalty, steps=1, masks=masks).network
        found.append(penalty.importance(net))
    weak, strong = found
    total = sum(float(s.norm()) for s in weak.values())
    moved = sum(float((weak[name] - s).norm()) for name, s in strong.items())
    assert total > 0 and moved < 1e-3 * total


def test_movement_is_that_of_the_epoch_that_is_kept(splits: Images) -> None:
    def run(answers: list[float], stop: StopEarly) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given, penalty = iter(answers), create("movement", 1e-3)
        recipe = Recipe(epochs=len(answers), batch_size=8, lr=1e-3)
        net = fit(
            network(classes=2), pool(splits, False), recipe, seed=3, device=CPU, normalise=NORMALISE, penalty=penalty,
            judge=lambda _: next(given), stop=stop, after_epoch=lambda n, _: seen.append(clone(penalty)),
        ).network  # fmt: skip
        return dict(net.body.state_dict()), penalty.importance(net)

    def clone(penalty: Any) -> dict[str, Tensor]:
        return {name: score.clone() for name, score in penalty.state().items()}

    seen: list[dict[str, Tensor]] = []
    _, scores = run([0.5, 0.9, 0.6, 0.7], StopEarly(patience=3))
    assert len(seen) == 4
    assert all(torch.equal(scores[name], wanted) for name, wanted in seen[1].items())
    assert any(not torch.equal(scores[name], last) for name, last in seen[3].items())


def test_movement_survives_a_kill_bit_for_bit(splits: Images, tmp_path: Path) -> None:
    def run(penalty: Any, **more: Any) -> dict[str, Tensor]:
        net = trained(splits, network(classes=2), penalty, **more).network
        return {**net.body.state_dict(), **{f"score {n}": t for n, t in penalty.importance(net).items()}}

    steps = 0

    def tick(number: int, values: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed

    expected, file = run(create("movement", 1e-3)), tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        run(create("movement", 1e-3), checkpoint=file, checkpoint_seconds=0, tick=tick)
    again = run(create("movement", 1e-3), checkpoint=file, checkpoint_seconds=0)
    assert all(torch.equal(expected[name], t) for name, t in again.items())


HEADS, UNITS = [(0, 1), (2, 0)], [(0, range(0, 60)), (1, range(30, 90)), (2, range(100, 140))]


def planted() -> Any:
    """Two of nine heads and 160 of 576 MLP units do nothing at all."""
    net = network(classes=2)
    with torch.no_grad():
        for block, head in HEADS:
            a, own = net.blocks[block].attn, slice(head * 16, head * 16 + 16)
            a.qkv.weight.view(3, 48, 48)[:, own] = 0
            a.proj.weight[:, own] = 0
        for block, units in UNITS:
            net.blocks[block].mlp.fc1.weight[list(units)] = 0
            net.blocks[block].mlp.fc2.weight[:, list(units)] = 0
    return net


def kept_of(net: Any, folder: Path, axes: Pressure, share: float) -> Any:
    scores = score(judged(net, folder, "model"), "taylor", seed=0)
    target = share * net.architecture.macs()
    return allocate(scores, lambda k: kept_architecture(net.architecture, k).macs(), target, axes, round_to=1)


@pytest.mark.parametrize("method", ["group_lasso", "hoyer"])
def test_heads_and_units_that_do_nothing_go_first(splits: Images, tmp_path: Path, method: str) -> None:
    penalty, net = create(method, 1e-5), planted()
    trained(splits, net, penalty)
    write(tmp_path, method, penalty.importance(net))
    before = {name: weight.clone() for name, weight in net.body.state_dict().items()}
    kept = kept_of(net, tmp_path, Pressure(heads=Axis(1.0)), 0.94)
    assert kept is not None
    gone = [(b, h) for b, k in enumerate(kept.blocks) for h in range(3) if h not in k.heads.tolist()]
    assert gone == HEADS
    kept = kept_of(net, tmp_path, Pressure(mlp=Axis(1.0)), 0.86)
    assert kept is not None
    for block, units in UNITS:
        left = set(kept.blocks[block].mlp.tolist())
        assert not left & set(units) or len(left) == 192 - len(units) + len(left & set(units))
    removed = sum(192 - len(k.mlp) for k in kept.blocks)
    dead = sum(len(set(units) - set(kept.blocks[block].mlp.tolist())) for block, units in UNITS)
    assert dead == min(removed, 160) and removed > 100
    assert all(torch.equal(before[name], t) for name, t in net.body.state_dict().items())


def test_scores_below_zero_rank_as_they_are(tmp_path: Path) -> None:
    """A head whose weights the labels shrink goes before one that they leave alone."""
    net = network(classes=2)
    scores = {name: torch.zeros_like(weight) for name, weight in weights_of(net).items()}
    for block, head, value in ((1, 2, -1e-3), (2, 0, -2e-3), (0, 0, 3e-3)):
        scores[f"blocks.{block}.attn.qkv.weight"].view(3, 48, 48)[:, head * 16 : head * 16 + 16] = value
    write(tmp_path, "movement", scores)
    kept = kept_of(net, tmp_path, Pressure(heads=Axis(1.0)), 0.94)
    assert kept is not None
    assert [k.heads.tolist() for k in kept.blocks] == [[0, 1, 2], [0, 1], [1, 2]]


def test_scores_of_another_network_or_none_are_refused(tmp_path: Path) -> None:
    net = network(classes=2)
    with pytest.raises(InvalidInput, match="train@3 hands on no importance"):
        judged(net, tmp_path, "train@3")
    write(tmp_path, "hoyer", {name: weight[:, :-1] for name, weight in weights_of(net).items()})
    with pytest.raises(InvalidInput, match="scores of another network"):
        judged(net, tmp_path, "train@3")


PIPELINE = """\
data:  {source: i, image_size: 32}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
stages:
  train: {epochs: 1, batch_size: 8, weights: {method: movement, strength: 1.0e-4}}
  prune: {importance: trained, target: {macs: 0.6}}
"""


def test_a_pipeline_prunes_by_what_its_training_handed_on(tmp_path: Path) -> None:
    image_folder(tmp_path / "i", per_class=16)
    project = Project(tmp_path, PIPELINE)
    project.run()
    root = project.store.resolve("train").root
    scores, facts = read_tensors(root / FILE)
    assert facts == {"method": "movement"}
    assert {n: t.shape for n, t in scores.items()} == {n: w.shape for n, w in weights_of(load_network(root)).items()}
    assert project.store.resolve("prune").manifest["metrics"]["importance"] == "trained"
    project.run("train.weights=null", "prune=null")
    said = project.refused(alone="prune", inputs_override={"model": "train@2"})
    assert "model train@2 hands on no importance of its weights" in said


@pytest.mark.parametrize(
    ("written", "instead", "entry"),
    [
        ("method: movement", "method: l1", "train"),
        ("batch_size: 8, weights: {method: movement, strength: 1.0e-4}", "batch_size: 8", "train"),
        ("  prune:", "  finetune: {epochs: 1}\n  prune:", "finetune"),
    ],
)
def test_ranking_by_what_nothing_hands_on_is_refused_before_anything_runs(
    tmp_path: Path, written: str, instead: str, entry: str
) -> None:
    said = Project(tmp_path, PIPELINE.replace(written, instead)).unplanned()
    assert f"stages.prune.importance: trained is what a training hands on, and {entry} hands none on" in said
    assert f"pipeline.yaml:{5 + (entry == 'finetune')}:23" in said
