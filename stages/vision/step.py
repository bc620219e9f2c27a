"""One step of a training: forward, loss and penalty, backward, then optimiser, average and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from ..methods import InvalidInput
from .batches import Batch
from .clock import Clock
from .examples import Policy, Watch
from .mask_settings import Magnitude, Pattern, RigL
from .masks import apply as apply_masks
from .network import Network
from .objective import Objective
from .penalty import Penalty
from .recipe import Recipe
from .resume import having
from .tensors import flatten_optimizer, restore_optimizer


class Step:
    """What a step changes: the network, the optimiser's moments, the average, the masks."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        total: int,
        *,
        seed: int,
        policy: Policy,
        objective: Objective,
        penalty: Penalty | None = None,
        masks: Magnitude | RigL | Pattern | None = None,
    ) -> None:
        """Args: network: on its device; total: nominal steps of the run (clock.py)."""
        self.network, self.recipe, self.policy = network, recipe, policy
        self.objective, self.penalty = objective, penalty
        self.watch = Watch(network, attention=policy.attention) if policy.watches else None
        self.taken = 0
        # timm's optimiser factory leaves biases, norms and tokens without weight decay.
        self.optimizer = create_optimizer_v2(
            network.body, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=total,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup * total),
            warmup_lr_init=recipe.min_lr,
            t_in_epochs=False,
        )
        self.schedule.step_update(0)
        self.ema = ModelEmaV3(network, decay=recipe.ema, use_warmup=True) if recipe.ema is not None else None
        self.masks = apply_masks(masks, network, self.optimizer, self.ema, total, seed)

    @property
    def kept(self) -> Network:
        """The network that would be handed on now."""
        return self.network if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def take(self, batch: Batch, clock: Clock) -> float:
        """One step, and the clock is one further. Returns: the batch's mean loss, without the penalty.

        Raises: InvalidInput when it is not finite.
        """
        self.masks.project()
        loss = self._backward(batch)
        self.masks.on_gradients(clock.now)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.taken += 1
        clock.position += 1
        self.schedule.step_update(clock.now)  # timm computes with fractions as well
        if self.ema is not None:
            self.ema.update(self.network, step=self.taken)
        self.masks.on_step(clock.now)
        return loss

    def _backward(self, batch: Batch) -> float:
        torch.manual_seed(batch.draws)  # dropout and stochastic depth draw from the global generators
        with self.watch or nullcontext(), nullcontext() if self.penalty is None else self.penalty.watch(self.network):
            losses = self.objective(self.network, batch)
        loss = losses if batch.weights is None else losses * batch.weights
        loss = loss.mean()
        total = loss if self.penalty is None else loss + self.penalty(self.network)
        value = float(total.detach())
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss is {value} at step {self.taken + 1}", "lower lr, or clip gradients (clip: 1.0)"
            )
        if self.watch is not None:
            self.policy.observe(self.watch.seen(batch.ids, batch.clean, losses, batch.share))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        return float(loss.detach())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{n}": t for n, t in self.network.body.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in flatten_optimizer(self.optimizer).items()}
        if self.ema is not None:
            tensors |= {f"ema.{n}": t for n, t in self.ema.module.body.state_dict().items()}
        masks, mask_facts = self.masks.state()
        return tensors | {f"mask.{n}": t for n, t in masks.items()}, {"taken": self.taken, "masks": mask_facts}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.network.body.load_state_dict(having(tensors, "model."))
        restore_optimizer(self.optimizer, having(tensors, "optimizer."))
        if self.ema is not None:
            self.ema.module.body.load_state_dict(having(tensors, "ema."))
        self.masks.restore(having(tensors, "mask."), facts["masks"])
        self.taken = facts["taken"]
