"""From the settings of a learning rate to timm's scheduler of it, in steps of the clock."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler, TanhLRScheduler
from timm.scheduler.scheduler import Scheduler

from .recipe import Recipe


def create(recipe: Recipe, optimizer: torch.optim.Optimizer, total: int) -> Scheduler:
    """The schedule of these settings, at its first step. total: steps of the whole run, warm-up included."""
    warm = {"warmup_t": round(recipe.warmup * total), "warmup_lr_init": recipe.min_lr, "t_in_epochs": False}
    chosen = recipe.schedule
    factor = 0.1 if chosen.factor is None else chosen.factor
    made: Scheduler
    match chosen.shape:
        case "cosine":
            made = CosineLRScheduler(optimizer, t_initial=total, lr_min=recipe.min_lr, **warm)
        case "tanh":
            made = TanhLRScheduler(optimizer, t_initial=total, lr_min=recipe.min_lr, **warm)
        case "linear" | "poly":
            power = 1.0 if chosen.shape == "linear" else chosen.power
            assert power is not None
            made = PolyLRScheduler(optimizer, t_initial=total, lr_min=recipe.min_lr, power=power, **warm)
        case "step":
            assert chosen.every is not None
            every = max(1, round(chosen.every * total))
            made = StepLRScheduler(optimizer, decay_t=every, decay_rate=factor, warmup_prefix=False, **warm)
        case "multistep":
            assert chosen.at is not None
            # timm falls at the step before the one that it is told.
            falls = [round(share * total) + 1 for share in chosen.at]
            made = MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=factor, warmup_prefix=False, **warm)
        case "constant":
            made = StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, warmup_prefix=False, **warm)
    made.step_update(0)
    return made
