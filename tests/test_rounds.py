"""Pruning in rounds: each cut judged anew, a training between them, and the numbers of a run that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmark import Folder, Listening
from tiny_vision import ARGS, image_folder, network

from sievit.pipeline.settings import DataConfig, ModelConfig
from sievit.pipeline.stage import Context
from sievit.stages import prune
from sievit.stages.axes import Press, pressure
from sievit.stages.methods import InvalidInput
from sievit.stages.methods.allocation import Kept, KeptBlock, allocate
from sievit.stages.prune import PruneConfig
from sievit.stages.rounds import Recover, Rounds
from sievit.stages.targets import Target
from sievit.stages.vision.preprocessing import choose
from sievit.stages.vision.surgery import cut, kept_architecture, score
from sievit.stages.vision.weights import load_network, save_network

RECOVER = {"batch_size": 4, "augment": {"flip": False, "shift": 0.1}}


def context(tmp_path: Path, config: PruneConfig, name: str = "first") -> Context:
    data = DataConfig(source=str(tmp_path / "i"), image_size=32)
    if not (tmp_path / "m").is_dir():
        image_folder(tmp_path / "i", per_class=8)
        (tmp_path / "m").mkdir()
        made = network(classes=2)
        save_network(made, tmp_path / "m")
        choose(made, data, ("ant", "bee"), pretrained=False).save(tmp_path / "m")
    out, work = tmp_path / name / "out", tmp_path / name / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    return Context(
        config=config, data=data, model=ModelConfig(name="deit_tiny_patch16_224", args=ARGS), seed=0, device="cpu",
        arm="main", entry="prune", base=tmp_path, out=out, work=work,
        inputs={"model": Folder(tmp_path / "m")}, many=(), references={}, progress=Listening(),  # type: ignore[dict-item,arg-type]
    )  # fmt: skip


def in_rounds(count: int, **recover: Any) -> PruneConfig:
    rounds = Rounds(count=count, recover=Recover(**(RECOVER | {"steps": 3} | recover)))
    return PruneConfig(importance="l1", target=Target(macs=0.4), rounds=rounds)


def test_with_a_training_that_moves_nothing_rounds_are_cuts_one_after_the_other_by_scores_of_their_own(
    tmp_path: Path,
) -> None:
    ctx = context(tmp_path, in_rounds(3, lr=1e-30, min_lr=0.0, weight_decay=0.0))
    prune.run(ctx)
    net = load_network(tmp_path / "m")
    whole = net.architecture
    axes = pressure(PruneConfig(target=Target(macs=0.4)).pressed(), len(whole.blocks), None)
    for part in (1 / 3, 2 / 3, 1):
        record = net.architecture
        limit = whole.macs() * 0.4**part

        def macs(kept: Kept, record: Any = record) -> float:
            return float(kept_architecture(record, kept).macs())

        kept = allocate(score(net, "l1", 0), macs, limit, axes, round_to=8, head_round_to=8)
        assert kept is not None
        net = cut(net, kept)
    made = load_network(ctx.out)
    assert made.architecture == net.architecture
    assert all(torch.equal(tensor, net.body.state_dict()[name]) for name, tensor in made.body.state_dict().items())
    plan = Kept.from_json(json.loads((ctx.out / "plan.json").read_text()))
    once = cut(load_network(tmp_path / "m"), plan)
    assert all(torch.equal(tensor, made.body.state_dict()[name]) for name, tensor in once.body.state_dict().items())


def test_rounds_go_equal_ratios_and_train_between_the_cuts(tmp_path: Path) -> None:
    ctx = context(tmp_path, in_rounds(3))
    prune.run(ctx)
    rows = ctx.metrics["rounds"]
    assert [row["round"] for row in rows] == [1, 2]
    for row, part in zip(rows, (1 / 3, 2 / 3), strict=True):
        assert 0.9 * 0.4**part < row["macs"] <= 0.4**part
    assert 0.38 < ctx.metrics["reached"]["macs"] <= 0.4
    assert ctx.ledger["steps"] == 2 * 3
    assert ctx.ledger["images"] == 2 * 10, "three steps are a pass over the ten training images"
    assert ctx.ledger["teacher_macs"] == 20 * load_network(tmp_path / "m").architecture.macs()
    plan = Kept.from_json(json.loads((ctx.out / "plan.json").read_text()))
    untrained = cut(load_network(tmp_path / "m"), plan)
    made = load_network(ctx.out)
    assert made.architecture == untrained.architecture
    assert not torch.equal(made.body.blocks[0].mlp.fc1.weight, untrained.body.blocks[0].mlp.fc1.weight)


class Killed(Exception):
    """Stands in for a kill: whatever was written down until then is all there is."""


def test_rounds_that_were_killed_again_and_again_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_rounds(3, steps=4, ema=0.9)
    undisturbed = context(tmp_path, config)
    prune.run(undisturbed)
    from sievit.stages.vision import training

    whole = training.fit

    def ticked(*given: Any, **named: Any) -> Any:
        told = 0

        def tick(steps: int, values: Any) -> None:
            nonlocal told
            told += bool(values)  # a resumed run tells first what was done before
            if told > 1:
                raise Killed

        return whole(*given, **(named | {"tick": tick, "checkpoint_seconds": 0.0}))

    monkeypatch.setattr(training, "fit", ticked)
    kills, done = 0, False
    while not done:
        again = context(tmp_path, config, "killed")
        try:
            prune.run(again)
            done = True
        except Killed:
            kills += 1
            assert kills < 20
    assert kills >= 4
    assert sorted(path.name for path in again.work.glob("round-*") if path.is_dir()) == ["round-1", "round-2"]
    for path in undisturbed.out.iterdir():
        assert (again.out / path.name).read_bytes() == path.read_bytes(), path.name
    assert again.metrics["rounds"] == undisturbed.metrics["rounds"]


def test_blocks_are_numbered_as_before_the_first_cut() -> None:
    """Of five blocks the second is gone: number 2 is the second one that is left."""
    one = KeptBlock(*(torch.zeros(1, dtype=torch.long),) * 4)
    so_far = Kept((one, None, one, one, one), (torch.arange(4),))
    named = {
        "heads": Press(press=1.0),
        "qk": Press(press=0.0),
        "v": Press(press=1.0, blocks=(1,)),
        "mlp": Press(press=0.5, blocks=(0, 2)),
        "embed": Press(press=1.0),
        "depth": Press(press=1.0, spare=(0, 4)),
    }
    axes = pressure(named, 5, so_far)
    assert axes.heads.blocks == {0, 1, 2, 3}
    assert axes.mlp.blocks == {0, 1}
    assert not any(axes.v.touches(block) for block in range(4))
    assert axes.depth.blocks == {1, 2}
    assert axes.embed.blocks is None
    with pytest.raises(InvalidInput, match="for a network of 2 blocks"):
        pressure(named, 2, None)
