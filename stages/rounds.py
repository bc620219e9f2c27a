"""Cutting in rounds: a part of the way, a short training to recover, and the next part by what has recovered then.

No pipeline file names this module; `prune` goes through it before its last cut. Every round goes the same ratio nearer
to the target, by what guides the search for it (targets.py); only the last cut is measured. After each cut the network,
its optimiser and its average are built anew. What recovers learns from the labels and from the network as it was given,
on the examples of the tickets, whole, in one process; all its weights train, zeros among them.

A round that is over lies in the stage's working folder, so that a run that was killed goes on with the round, and
within it with the step, that it had come to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from .vision.recipe import Recipe, Settings
from .vision.teaching_settings import Distill

if TYPE_CHECKING:
    import torch

    from sievit.pipeline.stage import Context

    from .methods.allocation import Kept
    from .vision.dataset import Splits
    from .vision.network import Network
    from .vision.preprocessing import Preprocessing


class Recover(Recipe):
    """The training between two cuts; its epochs, or steps, are those of one round."""

    lr: float = Field(5e-4, gt=0, description="peak learning rate of every round, after warm-up")
    taught: float = Field(
        0.5, ge=0, le=1, description="share of the loss that is the answers of the network as it was given; 0: labels"
    )


class Rounds(Settings):
    """Several smaller cuts in place of one."""

    count: int = Field(ge=2, le=50, description="cuts, the last one included, which `finetune` recovers from")
    recover: Recover = Field(description="the training between two cuts")


@dataclass(frozen=True)
class Approach:
    """Where all rounds but the last have led. kept: of the network as it was given, None before the first round; told,
    cost: a row for each round, and what its training took.
    """

    network: Network
    kept: Kept | None = None
    told: list[dict[str, float]] = field(default_factory=list)
    cost: list[dict[str, Any]] = field(default_factory=list)

    def ledger(self) -> dict[str, Any]:
        """What all trainings took together."""
        total: dict[str, Any] = {
            name: sum(row[name] for row in self.cost)
            for name in ("images", "epochs", "steps", "train_macs", "teacher_macs", "seconds")
        }
        seen = sum(row["images"] * row["tokens_per_image"] for row in self.cost)
        total["tokens_per_image"] = round(seen / total["images"], 2)
        peaks = [row["peak_gpu_memory_mb"] for row in self.cost if row["peak_gpu_memory_mb"] is not None]
        return total | {"peak_gpu_memory_mb": max(peaks, default=None)}


def approach(
    ctx: Context,
    rounds: Rounds,
    network: Network,
    preprocessing: Preprocessing,
    splits: Splits,
    device: torch.device,
    cut: Callable[[Network, Kept | None, float], tuple[Network, Kept]],
) -> Approach:
    """Every round but the last.

    Args:
        network: as it was given, on its device; it stays as it is, and teaches.
        cut: (network, what is kept so far, share of the way in (0, 1)) -> a smaller network, and what of the former it
            kept.
    Raises: as cut, and InvalidInput when a loss is not finite.
    """
    from .methods.allocation import compose
    from .vision.evaluate import top1

    normalise = preprocessing.normaliser(device)
    reached = Approach(network)
    for number in range(1, rounds.count):
        folder = ctx.work / f"round-{number}"
        if (done := _read(folder)) is not None:
            reached = replace(done, network=done.network.to(device))
            continue
        smaller, then = cut(reached.network, reached.kept, number / rounds.count)
        kept = then if reached.kept is None else compose(reached.kept, then)
        before = top1(smaller.to(device), splits.calibration, normalise, device)
        recovered, cost = _recovered(ctx, rounds, number, smaller, network, preprocessing, splits, device)
        row = {
            "round": number,
            "macs": recovered.architecture.macs() / network.architecture.macs(),
            "params": recovered.parameter_count() / network.parameter_count(),
            "top1_calibration_cut": before,
            "top1_calibration": top1(recovered, splits.calibration, normalise, device),
        }
        reached = Approach(recovered, kept, [*reached.told, row], [*reached.cost, cost])
        _write(folder, reached)
        ctx.progress.note(
            f"round {number} of {rounds.count}: {row['macs']:.1%} of the macs, top-1 {before:.1%} after the cut, "
            f"{row['top1_calibration']:.1%} recovered (calibration split)"
        )
    return reached


def _recovered(
    ctx: Context,
    rounds: Rounds,
    number: int,
    network: Network,
    given: Network,
    preprocessing: Preprocessing,
    splits: Splits,
    device: torch.device,
) -> tuple[Network, dict[str, Any]]:
    """The network after the training of this round, and what that took."""
    import torch

    from .vision import reports, tickets
    from .vision.network import rebuild
    from .vision.objective import supervised
    from .vision.teaching import Teacher, Teaching
    from .vision.training import fit

    recipe = rounds.recover
    normalise = preprocessing.normaliser(device)
    loaded = tickets.load(ctx.inputs["tickets"].root) if "tickets" in ctx.inputs else None
    pool = tickets.pool(splits.train, loaded, None)
    student = rebuild(network.architecture, drop_path=recipe.drop_path)
    student.body.load_state_dict(network.body.state_dict())
    torch.manual_seed(ctx.seed + number)
    teaching = None
    if recipe.taught:
        macs = given.architecture.macs()
        teacher = Teacher(deepcopy(given), preprocessing.mean, preprocessing.std, macs, preprocessing, device)
        teaching = Teaching(Distill(weight=recipe.taught), student, teacher)
    with ctx.progress.task(f"recovering, round {number}", recipe.total_steps(len(pool.members))) as task:
        fitted = fit(
            student,
            pool,
            recipe,
            seed=ctx.seed + number,
            device=device,
            normalise=normalise,
            objective=teaching or supervised,
            checkpoint=ctx.work / f"round-{number}.safetensors",
            tick=lambda n, values: task.advance(n, **values),
        )
    reports.tell(fitted, {}, ctx.progress)
    fitted.network.set_distilled_training(False)
    asked = 0 if teaching is None else teaching.macs(pool, fitted.images)
    return fitted.network.eval(), reports.cost(fitted) | {
        "teacher_macs": asked,
        "seconds": round(fitted.seconds, 3),
    }


def _write(folder: Path, reached: Approach) -> None:
    """Whole or not at all."""
    from .vision.weights import save_network

    assert reached.kept is not None
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_network(reached.network, temporary)
    content = {"kept": reached.kept.as_json(), "told": reached.told, "cost": reached.cost}
    (temporary / "round.json").write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(folder)


def _read(folder: Path) -> Approach | None:
    from .methods.allocation import Kept
    from .vision.weights import load_network

    if not folder.is_dir():
        return None
    found = json.loads((folder / "round.json").read_text(encoding="utf-8"))
    return Approach(load_network(folder).eval(), Kept.from_json(found["kept"]), found["told"], found["cost"])
