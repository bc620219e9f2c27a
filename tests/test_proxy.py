"""Proxy runs: what they say about the images, that arms share them, and who is charged."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vision import data, image_folder, network

from sievit.pipeline.errors import InputError, SpecError
from sievit.pipeline.plan import make_plan
from sievit.pipeline.preflight import check_settings
from sievit.pipeline.progress import Silent
from sievit.pipeline.runner import Manner, run
from sievit.pipeline.spec import load_pipeline
from sievit.pipeline.store import Artifact, Store
from sievit.stages import ticket
from sievit.stages.methods import InvalidInput
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.evaluate import logits
from sievit.stages.vision.network import Network
from sievit.stages.vision.preprocessing import Normaliser
from sievit.stages.vision.proxy import KINDS, statistic, train_proxy
from sievit.stages.vision.recipe import Recipe
from sievit.stages.vision.training import Fitted, _Run

CPU = torch.device("cpu")
NORMALISE = Normaliser((0.5,) * 3, (0.5,) * 3, CPU)
PIPELINE = """
name: small
seed: 1
data:  {source: images, image_size: 32, test_fraction: 0.3, calibration: 0.2}
model: {name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}}
stages:
  ticket:    {examples: {method: el2n, keep: 0.5}, proxy: {epochs: 2, batch_size: 8}}
arms:
  forget: {ticket: {examples: {method: forgetting}}}
"""


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


class Project:
    """A folder with images, a pipeline of tickets alone, and its store."""

    def __init__(self, folder: Path) -> None:
        image_folder(folder / "images", per_class=16)
        self.path = folder / "pipeline.yaml"
        self.path.write_text(PIPELINE)
        self.store = Store(folder / "artifacts")

    def run(self, *overrides: str, **options: Any) -> list[Artifact]:
        """The tickets of the arms, main's first."""
        plan = make_plan(load_pipeline(self.path, (ticket.STAGE,), overrides), (ticket.STAGE,))
        record = run(plan, self.store, Manner(Silent(), (InvalidInput,), command=()), **options)
        return [self.store.resolve(node.ref) for node in record.nodes if node.ref is not None]

    def proxies(self) -> list[str]:
        return [artifact.ref for artifact in self.store.artifacts("proxy")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here, and a disk takes its time
    # Pictures take longer than these networks; they have tests of their own.
    monkeypatch.setattr("sievit.stages.vision.score_figures.pictures", lambda *choice: ())
    return Project(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


def trained(images: Images, folder: Path, family: str = "deit", *, kill_at: int | None = None) -> Fitted:
    """2.5 epochs in `folder`/out; killed at a step, it goes on from `folder`/work when called again."""
    work, out = folder / "work", folder / "out"
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    steps = 0

    def tick(count: int, values: object) -> None:
        nonlocal steps
        steps += count if values else 0  # a resumed run tells first what was done before
        if steps == kill_at:
            raise Killed

    return train_proxy(
        network(family, classes=2), images, Recipe(epochs=2.5, batch_size=6, lr=3e-3), seed=3, device=CPU,
        normalise=NORMALISE, work=work, out=out, tick=tick,
    )  # fmt: skip


def features(net: Network, images: Images) -> torch.Tensor:
    """(M, H, C): what reaches the heads, by timm's own pooling of what leaves the last norm."""
    views = torch.from_numpy(images.pixels().copy()).permute(0, 3, 1, 2).float() / 255
    left: list[torch.Tensor] = []
    hook = net.body.norm.register_forward_hook(lambda module, inputs, output: left.append(output))
    with torch.inference_mode():
        net(NORMALISE(views))
        hook.remove()
        if hasattr(net.body, "head_dist"):
            return left[0][:, :2]
        pooled: torch.Tensor = net.body.forward_head(left[0], pre_logits=True)
    return pooled[:, None]


@pytest.mark.parametrize("family", ["deit", "distilled", "registers, average pool", "lv-vit"])
def test_the_statistics_after_the_last_epoch_are_those_of_the_network_handed_over(
    images: Images, tmp_path: Path, family: str
) -> None:
    net = trained(images, tmp_path, family).network
    p = logits(net, images, NORMALISE, CPU).softmax(1).double().numpy()
    read = features(net, images).double().numpy()
    labels, out = images.labels, tmp_path / "out"
    error = np.array([math.dist(row, np.eye(2)[label]) for row, label in zip(p, labels, strict=True)])
    heads = read.shape[1]
    gradient = [e * math.sqrt((x**2).sum() + heads) / heads for e, x in zip(error, read, strict=True)]
    means = np.array([read[labels == label].mean((0, 1)) for label in (0, 1)])
    distances = [math.dist(x.mean(0), means[label]) for x, label in zip(read, labels, strict=True)]
    assert statistic(out, "el2n", None) == pytest.approx(error, abs=1e-5)
    assert statistic(out, "grand", 3) == pytest.approx(gradient, rel=1e-4)
    assert statistic(out, "margin", None) == pytest.approx(1 - abs(p[:, 0] - p[:, 1]), abs=1e-5)
    assert statistic(out, "entropy", None) == pytest.approx(-(p * np.log(p)).sum(1), abs=1e-5)
    assert statistic(out, "distance", None) == pytest.approx(distances, rel=1e-3)
    correct = np.load(out / "correct.npy")
    assert correct.shape == (3, len(images))
    assert correct[-1].tolist() == (p.argmax(1) == labels).tolist()
    assert statistic(out, "forgetting", None).tolist() == [
        3 if not any(row) else sum(a and not b for a, b in pairwise(row)) for row in correct.T
    ]


def test_a_killed_run_leaves_the_same_files_as_an_undisturbed_one(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(images, tmp_path / "whole")
    save, saves = _Run.save, iter(range(100))

    def save_or_die(*arguments: Any) -> None:
        if next(saves) == 1:  # the second epoch's numbers are on the disk, the checkpoint that says so is not
            raise Killed
        save(*arguments)

    monkeypatch.setattr(_Run, "save", save_or_die)
    for step in (1, 4, 7, 2):
        with pytest.raises(Killed):
            trained(images, tmp_path / "killed", kill_at=step)
    with pytest.raises(Killed):
        trained(images, tmp_path / "killed")
    trained(images, tmp_path / "killed")
    for name in (*KINDS, "distance"):
        files = [(tmp_path / run / "out" / f"{name}.npy").read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1], name


def test_an_epoch_that_the_proxy_did_not_reach_is_refused(images: Images, tmp_path: Path) -> None:
    trained(images, tmp_path)
    with pytest.raises(InvalidInput, match=r"epoch is 4, and the proxy ran for 3"):
        statistic(tmp_path / "out", "el2n", 4)


def test_arms_with_other_scores_train_the_proxy_once_and_are_both_charged(project: Project) -> None:
    main, forget = project.run()
    assert project.proxies() == ["proxy@1"]
    assert [a.manifest["inputs"]["proxy-0"]["ref"] for a in (main, forget)] == ["proxy@1", "proxy@1"]
    assert [a.ledger["shared"][0]["made"] for a in (main, forget)] == [True, False]
    proxy = project.store.resolve("proxy@1")
    for name in ("images", "scoring_macs"):
        assert main.ledger[name] == forget.ledger[name] == proxy.ledger[name] > 0
    for artifact in (main, forget):
        assert artifact.ledger["scoring_seconds"] >= 0.99 * proxy.ledger["scoring_seconds"]
    assert np.load(main.root / "scores.npy").tolist() == np.load(proxy.root / "el2n.npy")[-1].tolist()


@pytest.mark.parametrize(
    ("override", "runs"),
    [
        ("ticket.examples.keep=0.7", 1),
        ("ticket.examples.method=ccs", 1),
        ("ticket.examples.epoch=1", 1),
        ("ticket.proxy.runs=2", 2),
        ("ticket.proxy.lr=0.01", 2),
        ("ticket.proxy.model={name: deit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 24, depth: 1, "
         "num_heads: 3}}", 2),
        ("seed=2", 2),
    ],
)  # fmt: skip
def test_only_what_a_proxy_run_depends_on_trains_another(project: Project, override: str, runs: int) -> None:
    project.run(arms=["main"])
    project.run(override, arms=["main"])
    assert len(project.proxies()) == runs


def test_scores_of_several_runs_are_their_mean(project: Project) -> None:
    main, _ = project.run("ticket.proxy.runs=3")
    runs = [np.load(artifact.root / "el2n.npy")[-1] for artifact in project.store.artifacts("proxy")]
    assert len(runs) == 3
    assert np.load(main.root / "scores.npy") == pytest.approx(np.mean(runs, 0), rel=1e-6)


@pytest.mark.parametrize("method", ["grand", "margin", "entropy", "moderate", "ccs"])
def test_every_method_keeps_the_asked_number_of_every_class(project: Project, method: str) -> None:
    (main,) = project.run(f"ticket.examples.method={method}", arms=["main"])
    labels = load_splits(main.manifest["data"], project.path.parent).train.labels
    kept = np.load(main.root / "kept.npy")
    for label in (0, 1):
        assert abs((labels[kept] == label).sum() - 0.5 * (labels == label).sum()) < 1


def test_a_class_without_an_image_is_refused_before_a_proxy_is_trained(project: Project) -> None:
    with pytest.raises(InputError, match=r"keeps 1 of \d+ images and none of the \d+ of class 'bee'"):
        project.run("ticket.examples.keep=0.01")
    assert project.proxies() == []


def test_an_unbalanced_choice_may_lose_a_class_only_when_told(project: Project) -> None:
    overrides = ("ticket.examples.keep=0.01", "ticket.examples.balanced=false")
    with pytest.raises(InputError, match="not balanced, keeps 1 of") as caught:
        project.run(*overrides, arms=["main"])
    assert "lose_classes: true" in caught.value.hint
    (main,) = project.run(*overrides, "ticket.examples.lose_classes=true", arms=["main"])
    assert len(np.load(main.root / "kept.npy")) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ticket.examples.skip_hardest=0.6", "more than there is"),
        ("ticket.examples.epoch=3", "proxy.epochs 2"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_the_plan(project: Project, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_pipeline(project.path, (ticket.STAGE,), [override])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ("{method: el2n, keep: 0.5, lose_classes: true}", "lose_classes"),
        ("{method: moderate, keep: 0.5, skip_hardest: 0.1}", "skip_hardest"),
        ("{method: forgetting, keep: 0.5, epoch: 1}", "epoch"),
        ("{method: el2n, keep: 0.5, strata: 9}", "strata"),
        ("{method: ccs, keep: 1.0, score: entropy}", "score"),
    ],
)
def test_settings_without_effect_are_refused_by_the_plan(project: Project, settings: str, field: str) -> None:
    project.path.write_text(PIPELINE.replace("{method: el2n, keep: 0.5}", settings).split("arms:")[0])
    plan = make_plan(load_pipeline(project.path, (ticket.STAGE,)), (ticket.STAGE,))
    with pytest.raises(SpecError, match=f"ticket.examples.{field} has no effect"):
        check_settings(plan, (InvalidInput,))
