"""The training loop of every stage that trains: proxies and selectors of `ticket`, `train`, `finetune`.

A step's randomness (order, augmentation, mixing, dropout) is drawn from seeds computed from (seed, epoch, step) and
from nothing else. So a checkpoint needs no generator states, and a run killed at any moment ends with the same bits
as one that was never killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from . import processes, resume
from .batches import Annotate, Batch, Batches, Pool
from .clock import Clock
from .device import peak_mb, start_peak
from .examples import Everything, Policy
from .mask_settings import Applied, last_cut
from .network import Network
from .objective import Objective, supervised
from .penalty import Penalty
from .preprocessing import Normaliser
from .recipe import Recipe, StopEarly
from .resume import having
from .step import Step
from .tensors import write_tensors
from .token_schedule import TokenSchedule

Tick = Callable[[int, Mapping[str, float]], None]


@dataclass
class Best:
    """The best epoch so far, from 1, by top-1 on the calibration split; epoch 0: none counted yet. last: the last epoch
    that was trained. stopped: before the schedule ended.
    """

    epoch: int = 0
    top1: float = -1.0
    last: int = 0
    stopped: bool = False


@dataclass
class Fitted:
    """The result of fit: the network that is kept (the average, where there is one), and what it took.

    images: forward and backward passes in all; ticketed: those on the patches of a ticket. tokens, macs: patch tokens
    (mean over the blocks) and forward multiply-accumulates of the network, of all these images together. passes: of the
    examples, or of the policy that chose among them.
    """

    network: Network
    curve: list[dict[str, float]]
    images: int
    ticketed: int
    tokens: float
    macs: int
    steps: int
    passes: float
    skipped: int  # steps of fp16 whose gradients overflowed, counted in `steps`
    best: Best | None  # with early stopping: which epoch is kept
    peak_gpu_mb: float | None  # what torch had allocated at most on the GPU, in MB (10^6 bytes); None on a CPU
    seconds: float
    earlier_seconds: float  # the part of `seconds` that an earlier, killed attempt spent
    early: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def fit(
    network: Network,
    pool: Pool,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    normalise: Normaliser,
    finish: float = 0.0,
    policy: Policy | None = None,
    tokens: TokenSchedule | None = None,
    objective: Objective = supervised,
    beside: nn.Module | None = None,
    annotate: Annotate | None = None,
    penalty: Penalty | None = None,
    masks: Applied | None = None,
    judge: Callable[[Network], float] | None = None,
    after_epoch: Callable[[int, Network], None] | None = None,
    keep_epochs: tuple[int, ...] = (),
    stop: StopEarly | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 20.0,
    tick: Tick = lambda steps, values: None,
    sharding: Literal["ddp", "fsdp2"] = "ddp",
) -> Fitted:
    """Train and return what is kept: the network given, but for an average and for one that is held in parts.

    Several processes (processes.py) call it alike and get the same; the first alone writes the checkpoint. They train
    to the numbers of one process, but for rounding and for what networks draw: dropout and stochastic depth are each
    process's own.

    Args:
        finish: share of the schedule at the end that sees whole images although the pool has patch tickets.
        policy: which examples each pass sees (None: all). It is told what every step saw; its state is in the
            checkpoint.
        tokens: token reduction and connections of every step (None: those that the network came with); what is kept has
            the last of them. The curve then also says top1_final_tokens.
        beside: weights of the objective. They train with the network, by the same optimiser, and are in the checkpoint,
            but not in the average nor in what is returned.
        annotate: labels every patch of the un-mixed views in [0, 1]; batches then carry token_labels.
        masks: which weights are kept, from when on; those that are left out are zeros in what is returned.
        judge: called after each epoch on the network that would be kept; its answer goes into the curve as
            top1_calibration.
        after_epoch: called after each epoch (number from 1) on the raw network; used for proxy statistics.
        keep_epochs: epochs after which a copy of the raw weights is set aside (for rewinding).
        stop: ends the training once the judge sees no gain, and keeps the best epoch. Only epochs count that begin to
            be like the last: on whole images, with the last tokens, all masks in place.
        checkpoint: a file to resume from if it is there, and to write to at least every checkpoint_seconds and at
            each epoch's end.
        tick: called after each step, and each epoch that was judged, with the nominal steps gone since the last
            (clock.py) and with values to show.
        sharding: how several processes hold the network: ddp, each the whole of it; fsdp2, a part of it each.
    Raises: InvalidInput when the loss is not finite, with the step; for a batch that cannot be divided among the
    processes.
    """
    network.to(device)
    policy = policy or Everything(pool.members)
    clock = Clock(math.ceil(policy.size / recipe.batch_size), recipe.total_steps(policy.size))
    batches = Batches(
        pool,
        recipe,
        policy,
        seed=seed,
        device=device,
        normalise=normalise,
        grid=network.architecture.grid,
        annotate=annotate,
        whole_from=round((1 - finish) * clock.total),
    )
    step = Step(
        network,
        recipe,
        clock.total,
        seed=seed,
        policy=policy,
        objective=objective,
        beside=beside,
        penalty=penalty,
        masks=masks,
        shards=sharding == "fsdp2",
    )
    counts_from = max(
        batches.whole_from if pool.patches is not None and finish else 0,
        last_cut(masks, clock.total),
        0 if tokens is None else tokens.settled(clock.total),
    )
    run = _Run(step, clock, policy, tokens, checkpoint, None if stop is None else Stopping(stop, counts_from))
    start_peak(device)
    run.resume()
    processes.check_alike(step.taken, "checkpoints at steps")
    earlier = run.tally.seconds
    if gone := int(clock.now):
        tick(gone, {})  # before the run was cut off
    network.train()
    while not (clock.done or run.stopped):
        for batch in batches.rest(clock):
            gone = int(clock.now)
            run.advance(batch)
            tick(int(clock.now) - gone, {"loss": run.tally.loss})
            # Not at an epoch's last step: what ends the epoch has not been done yet and would be lost.
            if clock.within and run.due(checkpoint_seconds):
                run.save()
        run.end_epoch(judge, after_epoch, keep_epochs)
        if judge is not None:
            tick(0, {"top1": run.curve[-1]["top1_calibration"]})
        run.save()
    kept = step.kept
    step.masks.settle(kept)
    if run.stopping is not None and run.stopping.weights:
        kept.body.load_state_dict(run.stopping.weights)
        if penalty is not None:
            penalty.restore(run.stopping.scores)
    if tokens is not None:
        tokens.apply(kept, clock.total, clock.total)
    return Fitted(
        network=kept.eval(),
        curve=run.curve,
        images=run.tally.images,
        ticketed=run.tally.ticketed,
        tokens=run.tally.tokens,
        macs=run.tally.macs,
        steps=step.taken,
        passes=clock.now / clock.nominal,
        skipped=step.skipped,
        best=None if run.stopping is None else run.stopping.best,
        peak_gpu_mb=peak_mb(device),
        seconds=run.seconds,
        earlier_seconds=earlier,
        early=run.early,
    )


@dataclass
class _Tally:
    """What a run has taken so far, as in Fitted. losses, counted: of the present pass, summed over its examples.
    seconds: of the attempts before this one.
    """

    images: int = 0
    ticketed: int = 0
    tokens: float = 0.0
    macs: int = 0
    losses: float = 0.0
    counted: float = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The mean of the present pass."""
        return self.losses / max(1, self.counted)

    def add(self, batch: Batch, loss: float, network: Network) -> None:
        images, kept = batch.rows.count, None if batch.kept is None else batch.kept.shape[1]
        tokens, macs = network.ticket_cost(kept)
        self.images += images
        self.ticketed += 0 if kept is None else images
        self.tokens += images * tokens
        self.macs += images * macs
        # With weights, an estimate of the mean over all examples: those that count more stand for those left out.
        self.losses += loss * images
        self.counted += batch.counted


class Stopping:
    """Early stopping: the best epoch and the weights that would be handed on had it been the last."""

    def __init__(self, settings: StopEarly, counts_from: int) -> None:
        """counts_from: an epoch counts that ends after this step; 0: all do."""
        self.settings, self.counts_from = settings, counts_from
        self.best = Best()
        self.weights: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}

    def after(
        self, row: Mapping[str, float], now: float, total: int, kept: Network, scores: Mapping[str, Tensor]
    ) -> None:
        """An epoch has ended, with this row of the curve. kept: as it would be handed on; scores: the penalty's."""
        epoch = int(row["epoch"])
        self.best.last = epoch
        if now <= self.counts_from and self.counts_from:
            return
        top1 = row.get("top1_final_tokens", row["top1_calibration"])
        if not self.best.epoch or top1 > self.best.top1 + self.settings.gain:
            self.best.epoch, self.best.top1 = epoch, top1
            self.weights = {name: t.detach().cpu().clone() for name, t in kept.body.state_dict().items()}
            self.scores = {name: t.detach().clone() for name, t in scores.items()}
        self.best.stopped = epoch - self.best.epoch >= self.settings.patience and now < total

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kept = {f"weights.{name}": t for name, t in self.weights.items()}
        return kept | {f"scores.{name}": t for name, t in self.scores.items()}, asdict(self.best)

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.weights, self.scores = having(tensors, "weights."), having(tensors, "scores.")
        self.best = Best(**facts)


class _Run:
    """One call of fit: a part of its own checkpoint, beside the step and the policy."""

    def __init__(
        self,
        step: Step,
        clock: Clock,
        policy: Policy,
        tokens: TokenSchedule | None,
        checkpoint: Path | None,
        stopping: Stopping | None,
    ) -> None:
        self.step, self.clock, self.policy, self.tokens, self.checkpoint = step, clock, policy, tokens, checkpoint
        self.stopping = stopping
        self.tally = _Tally()
        self.curve: list[dict[str, float]] = []
        self.early: dict[int, dict[str, Tensor]] = {}
        self.begun = self.saved = time.monotonic()

    @property
    def stopped(self) -> bool:
        return self.stopping is not None and self.stopping.best.stopped

    @property
    def seconds(self) -> float:
        return self.tally.seconds + time.monotonic() - self.begun

    def due(self, seconds: float) -> bool:
        """Whether a checkpoint is to be written now, the last one being so many seconds old."""
        old = self.checkpoint is not None and time.monotonic() - self.saved > seconds
        # Parts of a network are put together by all of the processes.
        return bool(processes.decided(np.array([old], np.uint8))[0]) if self.step.copies.parted else old

    def advance(self, batch: Batch) -> None:
        """One step, and what it took."""
        network = self.step.network
        if self.tokens is not None:
            self.tokens.apply(network, self.clock.now, self.clock.total)
        self.tally.add(batch, self.step.take(batch, self.clock), network)

    def end_epoch(
        self,
        judge: Callable[[Network], float] | None,
        after_epoch: Callable[[int, Network], None] | None,
        keep_epochs: tuple[int, ...],
    ) -> None:
        network, epoch = self.step.raw, self.clock.epoch + 1
        self.policy.end(self.clock.epoch)
        row = {"epoch": float(epoch), "loss": self.tally.loss, "lr": self.step.lr}
        self.tally.losses, self.tally.counted = 0.0, 0
        if judge is not None:
            with self.step.masks.shown(self.step.kept):
                row |= self._judged(judge)
                if self.stopping is not None:
                    scores = {} if self.step.penalty is None else self.step.penalty.state()
                    self.stopping.after(row, self.clock.now, self.clock.total, self.step.kept, scores)
        self.curve.append(row)
        if after_epoch is not None:
            after_epoch(epoch, network)
        if epoch in keep_epochs:
            self.early[epoch] = {name: t.detach().cpu().clone() for name, t in network.body.state_dict().items()}
        self.step.network.train()
        self.clock.end_epoch()

    def _judged(self, judge: Callable[[Network], float]) -> dict[str, float]:
        """As the network stands, and where its tokens are on a schedule, with those that it will end with."""
        kept, now, total = self.step.kept, self.clock.now, self.clock.total
        if self.tokens is None:
            return {"top1_calibration": judge(kept)}
        self.tokens.apply(kept, now, total)
        current = judge(kept)
        if self.tokens.at(now, total) == self.tokens.final:
            return {"top1_calibration": current, "top1_final_tokens": current}
        self.tokens.apply(kept, total, total)
        return {"top1_calibration": current, "top1_final_tokens": judge(kept)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"early.{epoch}.{name}": t for epoch, state in self.early.items() for name, t in state.items()}
        tally = asdict(self.tally) | {"seconds": self.seconds}
        return tensors, {"clock": asdict(self.clock), "tally": tally, "curve": self.curve}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        clock = Clock(**facts["clock"])
        if (clock.total, clock.nominal) != (self.clock.total, self.clock.nominal):
            raise InvalidInput(
                f"{self.checkpoint}: a checkpoint of {clock.total} steps for a run of {self.clock.total}", "delete it"
            )
        vars(self.clock).update(facts["clock"])  # the loop holds the clock itself
        self.tally, self.curve = _Tally(**facts["tally"]), facts["curve"]
        for name, tensor in having(tensors, "early.").items():
            epoch, _, rest = name.partition(".")
            self.early.setdefault(int(epoch), {})[rest] = tensor

    @property
    def _parts(self) -> dict[str, resume.Part]:
        parts: dict[str, resume.Part] = {"run": self, "step": self.step, "policy": self.policy}
        return parts if self.stopping is None else parts | {"best": self.stopping}

    def save(self) -> None:
        if self.checkpoint is None or (processes.rank() and not self.step.copies.parted):
            return
        state = resume.state(self._parts)
        if not processes.rank():
            write_tensors(self.checkpoint, *state)
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Go on where the checkpoint stands, if there is one."""
        if self.checkpoint is not None and self.checkpoint.exists():
            resume.restore(self.checkpoint, self._parts)
            self.step.schedule.step_update(self.clock.now)
            self.begun = self.saved = time.monotonic()
