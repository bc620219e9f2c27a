"""nncf's pruning as masks: by magnitude, and by gates that are learned (nncf 3, function_hook.pruning).

nncf.prune wraps a network's forward, finds its weights by a trace and multiplies them there, so that names, averages,
checkpoints and the exporter would have to know of it. Here its algorithms work on a carrier, a module without a forward
that holds the very weights of the pool, and what they answer is written where all masks stand: zeros in the weights for
magnitudes, a projection around the forward for gates. So the network stays a plain one and resumes bit for bit.

What differs from nncf.prune: by magnitude, what is out is zero and stays out, where nncf leaves its value below the
mask. With gates, the pool is the blocks' matrices, the gates have an Adam of their own, and the noise of every step is
drawn from a seed. nncf goes through a set of names, whose order differs between processes; here the order is the
pool's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .mask_settings import NncfGates, NncfMagnitude
from .network import Network
from .resume import having
from .tensors import flatten_optimizer, restore_optimizer


class Carrier(nn.Module):
    """The weights of a pool as nncf is shown them. It has no forward: nothing runs through it."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights.values())

    @property
    def names(self) -> list[str]:
        """nncf's, in the order of the pool."""
        return [f"weights.{index}" for index in range(len(self.weights))]


def magnitude_masks(
    weights: Mapping[str, nn.Parameter], settings: NncfMagnitude, cut: int, cuts: int
) -> dict[str, Tensor]:
    """Masks after this cut of all, the first is 1, at the ratio of nncf's exponential scheduler.

    global: of all tensors together, each over its Euclidean norm; layer: of each. A weight stays if it is above the
    threshold, so equal ones go together and the number is about the asked one.
    """
    with _quiet():
        from nncf import PruneMode
        from nncf.torch.function_hook.pruning.magnitude.algo import apply_magnitude_pruning, get_pruned_modules
        from nncf.torch.function_hook.pruning.magnitude.schedulers import ExponentialMagnitudePruningScheduler
        from nncf.torch.function_hook.wrapper import wrap_model

    mode = PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    if settings.scope == "layer":
        mode = PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    carrier = Carrier(weights)
    apply_magnitude_pruning(wrap_model(carrier), carrier.names, mode, 0.0)
    scheduler = ExponentialMagnitudePruningScheduler(
        carrier, mode=mode, initial_ratio=0.0, target_ratio=1 - settings.keep, target_epoch=cuts
    )
    scheduler.step(cut)
    hooks = get_pruned_modules(carrier)
    return {name: hooks[f"weights.{index}"].binary_mask.clone() for index, name in enumerate(weights)}


class Gated:
    """A learned gate on every weight, closed or open at random by its own probability while training (Louizos et al.,
    ICLR 2018, as nncf takes it): forward and gradients see the weights that are open, and a loss pulls the share of
    open gates to the target. Weights stay dense while training; the average makes its choice by the same gates.

    It has all that Masks asks for.
    """

    changes_gradients = True

    def __init__(
        self,
        settings: NncfGates,
        network: Network,
        pool: Callable[[Network], Mapping[str, nn.Parameter]],
        total: int,
        seed: int,
    ) -> None:
        """pool: which weights of a network have gates. total: steps of the schedule."""
        with _quiet():
            from nncf.torch.function_hook.pruning.rb.algo import apply_regularization_based_pruning, get_pruned_modules
            from nncf.torch.function_hook.pruning.rb.losses import RBLoss
            from nncf.torch.function_hook.pruning.rb.schedulers import ExponentialRBPruningScheduler
            from nncf.torch.function_hook.wrapper import wrap_model

        self.settings, self.pool, self.seed, self.steps = settings, pool, seed, 0
        self.weights = weights = pool(network)
        self.carrier = Carrier(weights)
        apply_regularization_based_pruning(wrap_model(self.carrier), self.carrier.names)
        hooks = get_pruned_modules(self.carrier)
        self.gates: dict[str, Any] = {name: hooks[f"weights.{i}"] for i, name in enumerate(weights)}
        self.loss = RBLoss(self.carrier, target_ratio=1 - settings.keep)
        self.schedule = ExponentialRBPruningScheduler(
            self.loss,
            initial_ratio=0.0,
            target_ratio=1 - settings.keep,
            target_epoch=max(1, round(settings.end * total)),
        )
        self.optimizer = torch.optim.Adam([gate.mask for gate in self.gates.values()], lr=settings.lr)
        self.dense: dict[str, Tensor] = {}
        self.open: dict[str, Tensor] = {}

    def project(self) -> None:
        """The open weights, on a graph of nncf's that leads back to the dense ones and to the gates."""
        devices = sorted({weight.device.index for weight in self.weights.values() if weight.is_cuda})
        with torch.random.fork_rng(devices):
            # The fifth word keeps these draws apart from all others of a step.
            word = np.random.SeedSequence([self.seed, self.steps, 0, 0, 3]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(word) & (2**63 - 1))
            for name, weight in self.weights.items():
                self.dense[name] = weight.detach().clone().requires_grad_()
                self.open[name] = self.gates[name].train()(self.dense[name])
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.open[name])

    def on_gradients(self, now: float) -> None:
        self.schedule.step(now)
        self.optimizer.zero_grad(set_to_none=True)
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            dense = self.dense.pop(name)
            self.open.pop(name).backward(weight.grad)
            weight.grad = dense.grad
            with torch.no_grad():
                weight.copy_(dense)
        (self.settings.strength * self.loss()).backward()
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def on_skip(self) -> None:
        """Gates stay as they are, and the next step draws other noise."""
        self.open.clear()
        for name, weight in self.weights.items():
            weight.copy_(self.dense.pop(name))
        self.steps += 1

    def on_step(self, now: float) -> None:
        """Weights are dense between a step and the next forward."""

    @contextmanager
    def shown(self, network: Network) -> Iterator[None]:
        weights = self.pool(network)
        dense = {name: weight.detach().clone() for name, weight in weights.items()}
        self.settle(network)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(dense[name])

    @torch.no_grad()
    def settle(self, network: Network) -> None:
        """Zeros behind the closed gates, without noise."""
        for name, weight in self.pool(network).items():
            weight.copy_(self.gates[name].eval()(weight.detach()))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"gate.{name}": gate.mask.detach() for name, gate in self.gates.items()}
        return tensors | {f"adam.{name}": t for name, t in flatten_optimizer(self.optimizer).items()}, {
            "steps": self.steps
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        for name, gate in self.gates.items():
            gate.mask.copy_(tensors[f"gate.{name}"])
        restore_optimizer(self.optimizer, having(tensors, "adam."))
        self.steps = facts["steps"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Importing nncf without its telemetry, and with the logger class as it was: nncf puts its own in its place."""
    os.environ["NNCF_CI"] = "1"
    # Without the package that would send there is nothing to make a client id in the user's home.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    before = logging.getLoggerClass()
    try:
        yield
    finally:
        logging.setLoggerClass(before)
