"""One step of a training: forward, loss and penalty, backward, then optimiser, average and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..methods import InvalidInput
from . import processes, schedule
from .batches import Batch
from .clock import Clock
from .examples import Policy, Watch
from .forward import Precise, compiling, first_not_finite, gradient_not_finite
from .mask_settings import Applied
from .masks import apply as apply_masks
from .network import Network
from .objective import Objective
from .penalty import Penalty
from .recipe import Recipe
from .resume import having
from .sharding import Copies, Parted, Whole
from .tensors import flatten_optimizer, full, restore_optimizer

# torch's scale begins at 2^16: when it has been halved so often, it is not the scale that is too large.
MOST_SKIPPED = 24


class Step:
    """What a step changes: the network, the weights of the objective, the optimiser's moments, the average, the masks.
    skipped: steps of fp16 whose gradients overflowed, in_a_row of them since the last that did not.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        total: int,
        *,
        seed: int,
        policy: Policy,
        objective: Objective,
        beside: nn.Module | None = None,
        penalty: Penalty | None = None,
        masks: Applied | None = None,
        shards: bool = False,
    ) -> None:
        """Args: network: on its device; total: nominal steps of the run (clock.py); beside: weights of the objective,
        as for fit; shards: several processes hold a part of the network each, and there is nothing beside it."""
        self.network, self.recipe, self.policy = network, recipe, policy
        parted = shards and processes.count() > 1
        self.copies: Copies = Parted(network) if parted else Whole(network)
        self.objective, self.penalty = objective, penalty
        self.watch = Watch(network, attention=policy.attention) if policy.watches else None
        self.taken = self.skipped = self.in_a_row = 0
        device = next(network.parameters()).device
        self.forward = Precise(self.copies.trained, recipe, device)
        self.beside = nn.Module() if beside is None else beside.to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        # timm's optimiser factory leaves biases, norms and tokens without weight decay.
        self.optimizer = create_optimizer_v2(
            network.body,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            # Fused, torch's AdamW goes over the weights once in a step; plain, once for each of its operations.
            **({"fused": True} if recipe.optimizer == "adamw" else {}),
        )
        if own := list(self.beside.parameters()):  # they have no depth: with layer decay they train at lr, as the head
            self.optimizer.add_param_group({"params": own, "weight_decay": recipe.weight_decay})
        self.schedule = schedule.create(recipe, self.optimizer, total)
        self.ema = ModelEmaV3(network, decay=recipe.ema, use_warmup=True) if recipe.ema is not None else None
        self.masks = apply_masks(masks, network, self.optimizer, self.ema, total, seed)

    @property
    def raw(self) -> Network:
        """The network as it stands, whole, to look at."""
        return self.copies.whole()

    @property
    def kept(self) -> Network:
        """The network that would be handed on now."""
        return self.raw if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes; with layer decay the head's."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def take(self, batch: Batch, clock: Clock) -> float:
        """One step, and the clock is one further. Returns: the batch's mean loss, without the penalty.

        Raises: InvalidInput when loss or gradient is not finite, with the step and the layer, before any weight has
        changed. Under fp16 a gradient that overflows makes the step be left out; too many in a row are refused.
        """
        self.masks.project()
        loss, total = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        weights = [*self.network.parameters(), *self.beside.parameters()]
        gradients = [p.grad for p in weights if p.grad is not None]
        norm = get_total_norm(gradients)
        of_all = processes.total(torch.stack([loss, total]))
        # The one time in a step that the host waits for the device.
        value, whole, length = torch.cat([of_all, full(norm).to(loss).view(1)]).tolist()
        if not math.isfinite(whole) or (not math.isfinite(length) and not self.scaler.is_enabled()):
            raise self._not_finite(batch, whole, length)
        if math.isfinite(length):
            # The penalty first: it asks for the weights that the loss saw, which some masks put back.
            if self.penalty is not None:
                self.penalty.on_gradients(self.network, self.lr)
            self.masks.on_gradients(clock.now)
            if self.recipe.clip is not None:
                if self.masks.changes_gradients:  # or gives others in their place
                    norm = get_total_norm([p.grad for p in weights if p.grad is not None])
                clip_grads_with_norm_(weights, self.recipe.clip, norm)
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self._skip()
        self.scaler.update()
        self.taken += 1
        clock.position += 1
        self.schedule.step_update(clock.now)  # timm computes with fractions as well
        if self.ema is not None:
            self.ema.update(self.network, step=self.taken)
        self.masks.on_step(clock.now)
        return float(value)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of the whole batch, a part at a time, the mean of those of all processes. Returns: what the rows of
        this one add to the mean loss, and with the penalty, both ().
        """
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(batch.draws)  # dropout and stochastic depth draw from the global generators
        losses, totals = [], []
        parts = list(batch.parts(self.recipe.accumulate))
        for number, part in enumerate(parts):
            share = len(part.images) / len(batch.images) * batch.rows.scale
            with compiling() if self.recipe.compile else nullcontext(), self.copies.part(part.rows, number, len(parts)):
                loss, total = self._forward(part, share, first=number == 0)
                self.scaler.scale(total).backward()
            losses.append(loss.detach())
            totals.append(total.detach())
        for weight in self.beside.parameters() if processes.count() > 1 else ():
            assert weight.grad is not None
            weight.grad = processes.total(weight.grad) / processes.count()  # as DDP does for the network
        return torch.stack(losses).sum() / processes.count(), torch.stack(totals).sum() / processes.count()

    def _forward(self, part: Batch, share: float, *, first: bool) -> tuple[Tensor, Tensor]:
        """What a part of a batch adds to the mean loss of the whole, and to the loss with the penalty."""
        penalty = self.penalty
        with self.watch or nullcontext(), nullcontext() if penalty is None else penalty.watch(self.network):
            each = self.objective(self.forward, part)
        loss = each if part.weights is None else each * part.weights
        loss = loss.mean() * share
        if self.watch is not None:
            seen = self.watch.seen(part.ids, part.clean, each, part.share)
            self.policy.observe(seen.first(part.rows.own))
        if penalty is None or (penalty.of_weights and not first):
            return loss, loss
        # A penalty of the weights counts once in a step, and each process has it whole: the mean of all is the penalty.
        return loss, loss + penalty(self.network) * (1.0 if penalty.of_weights else share)

    def _skip(self) -> None:
        """Leave the step out. A scale that is too high comes down by half each time."""
        self.masks.on_skip()
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == MOST_SKIPPED:
            raise InvalidInput(
                f"precision: fp16 holds no gradient of the last {MOST_SKIPPED} steps, to step {self.taken + 1}; "
                f"of {gradient_not_finite(self.network, self.beside)} it is not finite whatever the loss is scaled by",
                "use precision: bf16 or fp32, or lower lr",
            )

    def _not_finite(self, batch: Batch, total: float, norm: float) -> InvalidInput:
        """Where it began: the forward is repeated with the same draws, before masks or optimiser touch the weights."""

        def again() -> None:
            torch.manual_seed(batch.draws)
            for part in batch.parts(self.recipe.accumulate):
                self.objective(self.forward.eager, part)

        what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {norm}"
        layer = self._first(first_not_finite(self.network, again))
        parameter = gradient_not_finite(self.network, self.beside)
        if layer is not None:
            where = f"{layer} is the first layer whose output is not finite"
        elif parameter is not None and math.isfinite(total):
            where = f"the gradient of {parameter} is not finite, and the outputs of all layers are"
        else:
            where = "the outputs of all layers are finite"
        clip = "" if self.recipe.clip is not None else ", or clip gradients (clip: 1.0)"
        remedy = f"lower lr, which is {self.recipe.lr:g}{clip}"
        if self.recipe.precision == "fp16":
            remedy = f"use precision: bf16 or fp32; or {remedy}"
        return InvalidInput(f"{what} at step {self.taken + 1}: {where}", remedy)

    def _first(self, layer: str | None) -> str | None:
        """Of the layers that the processes found, each in its own rows, that of the first which found one."""
        names = [name for name, _ in self.network.body.named_modules()]
        found = processes.gather(np.array([[-1.0 if layer is None else names.index(layer)]])).ravel()
        return next((names[int(number)] for number in found if number >= 0), None)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of several processes that hold a part each, all of them must ask for it at once."""
        tensors = {f"model.{n}": t for n, t in self.raw.body.state_dict().items()}
        tensors |= {f"beside.{n}": t for n, t in self.beside.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in flatten_optimizer(self.optimizer).items()}
        if self.ema is not None:
            tensors |= {f"ema.{n}": t for n, t in self.ema.module.body.state_dict().items()}
        if self.penalty is not None:
            tensors |= {f"penalty.{n}": t for n, t in self.penalty.state().items()}
        masks, mask_facts = self.masks.state()
        facts = {
            "taken": self.taken,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "scaler": self.scaler.state_dict(),
            "masks": mask_facts,
        }
        return tensors | {f"mask.{n}": t for n, t in masks.items()}, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.copies.load(having(tensors, "model."))
        self.beside.load_state_dict(having(tensors, "beside."))
        restore_optimizer(self.optimizer, having(tensors, "optimizer."))
        if self.ema is not None:
            self.ema.module.body.load_state_dict(having(tensors, "ema."))
        if self.penalty is not None:
            device = next(self.network.parameters()).device
            self.penalty.restore({name: t.to(device) for name, t in having(tensors, "penalty.").items()})
        self.masks.restore(having(tensors, "mask."), facts["masks"])
        self.scaler.load_state_dict(facts["scaler"])
        self.taken, self.skipped, self.in_a_row = facts["taken"], facts["skipped"], facts["in_a_row"]
