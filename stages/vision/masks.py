"""Masks on the weights of a network in training: in weights, gradients, the optimiser's moments and the average.

The loop asks at five moments of a step: before the forward, on the gradients, after the step, when the network is
looked at, and when it is handed on. Weights that are left out are zeros in the network itself, so that forward,
backward and what is saved need to know of no mask. Only 2:4 differs: its weights stay dense while training, and are
projected for a forward and for whoever looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.weight_masks import (
    cosine_fraction,
    cubic_keep,
    drop_and_grow,
    erk_counts,
    first_of,
    highest,
    n_of_m,
    weights_kept,
)
from .mask_settings import Applied, Hold, Magnitude, NncfGates, NncfMagnitude, Pattern, RigL, mask_steps
from .network import Network, create
from .nncf_masks import Gated, magnitude_masks


class Masks(Protocol):
    """What the loop knows of masks. now: nominal steps gone (clock.py). changes_gradients: whether on_gradients may."""

    changes_gradients: bool

    def project(self) -> None:
        """Before a forward."""

    def on_gradients(self, now: float) -> None:
        """After the backward, before gradients are clipped."""

    def on_skip(self) -> None:
        """In its place where the step is left out, its gradients being of no use."""

    def on_step(self, now: float) -> None:
        """After the optimiser's step and that of the average."""

    def shown(self, network: Network) -> AbstractContextManager[None]:
        """Within, the network (the trained one, or the average) is as it would be handed on now."""

    def settle(self, network: Network) -> None:
        """Make it so for good."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold: tensors, and facts for JSON."""

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Undo state() on masks that were made in the same way, on a network that is restored already."""


def apply(
    settings: Applied | None,
    network: Network,
    optimizer: torch.optim.Optimizer,
    average: ModelEmaV3 | None,
    total: int,
    seed: int,
) -> Masks:
    """The masks of these settings on a network that is about to be trained; what is left out at the start is zero now.

    total: steps of the schedule.
    Raises: InvalidInput for tensors that have no whole groups of four, and for zeros to hold where there are none.
    """
    if settings is None:
        return Unmasked()
    if isinstance(settings, Pattern):
        return Projected(settings, network)
    if isinstance(settings, NncfGates):
        return Gated(settings, network, pool, total, seed)
    return Held(settings, network, optimizer, average, total, seed)


def pool(network: Network, mode: str = "corrected") -> dict[str, nn.Parameter]:
    """The weights that masks choose from, by their names in the body.

    corrected: query, key and value, output and both MLP matrices of all blocks. paper: with them what Sparse then
    Prune's code lists: patch embedding, gains of the blocks' norms, classifier.
    """
    body, chosen = network.body, []
    if mode == "paper":
        chosen.append(body.patch_embed.proj.weight)
    for block in network.blocks:
        matrices = (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight)
        gains = (block.norm1.weight, block.norm2.weight) if mode == "paper" else ()
        chosen += [*matrices, *(gain for gain in gains if gain is not None)]
    if mode == "paper":
        heads = body.get_classifier()
        chosen += [head.weight for head in (heads if isinstance(heads, tuple) else (heads,))]
    names = {id(parameter): name for name, parameter in body.named_parameters()}
    return {names[id(weight)]: weight for weight in chosen}


def densities(network: Network, mode: str = "corrected") -> dict[str, Any]:
    """Fraction of the weights that are not zero, of the pool together and of each tensor, counted in the network."""
    weights = pool(network, mode)
    left = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {
        "weights": total,
        "nonzero": sum(left.values()),
        "global": round(sum(left.values()) / total, 6),
        "tensors": {name: round(left[name] / weight.numel(), 6) for name, weight in weights.items()},
    }


def check_groups(network: Network) -> None:
    """Raises: InvalidInput for a matrix whose rows are no multiple of four."""
    for name, weight in pool(network).items():
        if weight.shape[1] % 4:
            raise InvalidInput(
                f"masks.pattern: {name} has rows of {weight.shape[1]} weights, which are no whole groups of four",
                "use widths that are multiples of 4, or the method magnitude",
            )


def check_outline(name: str, *, image_size: int, args: Mapping[str, Any]) -> None:
    """As check_groups, for a timm name and its arguments, without the memory or the time of its weights."""
    with torch.device("meta"):
        check_groups(create(name, classes=2, image_size=image_size, args=dict(args)))


class Unmasked:
    """All weights train."""

    changes_gradients = False

    def project(self) -> None:
        return

    def on_gradients(self, now: float) -> None:
        return

    def on_skip(self) -> None:
        return

    def on_step(self, now: float) -> None:
        return

    @contextmanager
    def shown(self, network: Network) -> Iterator[None]:
        yield

    def settle(self, network: Network) -> None:
        return

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        return


class Held(Unmasked):
    """Masks that hold from one change to the next: by magnitude, at random, by drop and grow, or as they were found."""

    changes_gradients = True

    def __init__(
        self,
        settings: Magnitude | RigL | Hold | NncfMagnitude,
        network: Network,
        optimizer: torch.optim.Optimizer,
        average: ModelEmaV3 | None,
        total: int,
        seed: int,
    ) -> None:
        self.settings, self.optimizer, self.seed = settings, optimizer, seed
        mode = getattr(settings, "mode", "corrected")
        self.weights = pool(network, mode)
        self.averages = {} if average is None else pool(average.module, mode)
        self.steps, self.total = mask_steps(settings, total), total
        self.changes = 0
        self.kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        if isinstance(settings, RigL):
            self._begin_at_random(settings)
        if isinstance(settings, Hold):
            self.kept = _found(self.weights)
        self.on_step(0.0)

    def on_gradients(self, now: float) -> None:
        due = self._due(now)
        if isinstance(self.settings, RigL) and due > self.changes:
            self._exchange(self.settings, self.steps[due - 1])
            self.changes = due
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.kept[name], 0)

    def on_step(self, now: float) -> None:
        due = self._due(now)
        if isinstance(self.settings, Magnitude | NncfMagnitude):
            if due > self.changes:
                self._cut(due)
                self.changes = due
            if self.changes == 0:
                return  # everything is kept yet
        self._hold()

    def settle(self, network: Network) -> None:
        """Zeros stand in the weights already."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.kept), {"changes": self.changes}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = {name: tensors[name].to(weight.device) for name, weight in self.weights.items()}
        self.changes = facts["changes"]

    def _due(self, now: float) -> int:
        return sum(step <= now for step in self.steps)

    def _hold(self) -> None:
        """Zeros in weights, in moments of their shape (adafactor's are sums over rows and columns), in the average."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                out = ~self.kept[name]
                weight.masked_fill_(out, 0)
                for moment in self.optimizer.state.get(weight, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        moment.masked_fill_(out, 0)
                if name in self.averages:
                    self.averages[name].masked_fill_(out, 0)

    def _cut(self, due: int) -> None:
        """Masks by magnitude of what is kept so far, or as many weights of every tensor by lot. due: from 1."""
        settings = self.settings
        if isinstance(settings, NncfMagnitude):
            self.kept = magnitude_masks(self.weights, settings, due, len(self.steps))
            return
        assert isinstance(settings, Magnitude)
        keep = settings.keep
        if settings.schedule == "cubic":
            begin = round(settings.begin * self.total)
            keep = cubic_keep((self.steps[due - 1] - begin) / (self.steps[-1] - begin), settings.keep)
        self.kept = _chosen(settings, keep, self.weights, self.kept, self.seed)

    def _begin_at_random(self, settings: RigL) -> None:
        weights = list(self.weights.values())
        if settings.densities == "erk":
            everything = sum(weight.numel() for weight in weights)
            counts = erk_counts([tuple(weight.shape) for weight in weights], weights_kept(settings.keep, everything))
        else:
            counts = [weights_kept(settings.keep, weight.numel()) for weight in weights]
        for index, (name, weight) in enumerate(self.weights.items()):
            self.kept[name] = first_of(_order(self.seed, index, weight), counts[index], weight.shape)

    def _exchange(self, settings: RigL, step: int) -> None:
        """Gradients are dense here: no forward multiplies by a mask. A weight that comes begins at zero."""
        share = cosine_fraction(step / round(settings.end * self.total), settings.exchange)
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            kept = int(self.kept[name].sum())
            count = min(math.floor(share * kept), weight.numel() - kept)
            self.kept[name] = drop_and_grow(weight.detach(), weight.grad, self.kept[name], count)
        self._hold()


def cut(network: Network, settings: Magnitude, keep: float, seed: int) -> None:
    """Leave this fraction of the network's weights, in place and for good."""
    weights = pool(network, settings.mode)
    whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    write(network, _chosen(settings, keep, weights, whole, seed), settings.mode)


@torch.no_grad()
def write(network: Network, kept: Mapping[str, Tensor], mode: str = "corrected") -> None:
    """Zeros for the weights of the pool that these masks leave out."""
    for name, weight in pool(network, mode).items():
        weight.masked_fill_(~kept[name], 0)


def _chosen(
    settings: Magnitude, keep: float, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Masks by magnitude of what is kept so far, or as many weights of every tensor by lot."""
    # What is out stays out, also where a kept weight has become zero.
    scores = [torch.where(kept[name], weight.detach().abs(), -1.0) for name, weight in weights.items()]
    masks = highest(scores, keep, scope=settings.scope)
    if settings.method == "random":
        masks = [first_of(_order(seed, index, mask), int(mask.sum()), mask.shape) for index, mask in enumerate(masks)]
    return dict(zip(weights, masks, strict=True))


def _found(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that are not zero. Raises: InvalidInput where there is no zero to hold."""
    kept = {name: weight.detach() != 0 for name, weight in weights.items()}
    if all(bool(mask.all()) for mask in kept.values()):
        raise InvalidInput(
            "masks: hold keeps zeros where they are, and none of the weights is zero",
            "leave masks out, or begin with a network that was trained with masks",
        )
    return kept


def _order(seed: int, index: int, like: Tensor) -> Tensor:
    """An order of the positions of a tensor, the same whenever it is asked for."""
    # The fifth word keeps the lots apart from those of steps and of example policies.
    word = np.random.SeedSequence([seed, index, 0, 0, 1]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(word) & (2**63 - 1))
    return torch.randperm(like.numel(), generator=generator).to(like.device)


class Projected(Unmasked):
    """2:4: a forward and its gradients see the larger two of four, the step is the dense weights' (straight through).

    Zhou et al. (ICLR 2021), eq. 9: those left out are pulled towards zero, decay times themselves in the gradient, so
    that the choice settles. The average is one of dense weights and makes its own choice. Under Adam the pull is
    rescaled as every gradient is; the paper's results are with SGD.
    """

    changes_gradients = True

    def __init__(self, settings: Pattern, network: Network) -> None:
        check_groups(network)
        self.settings, self.weights = settings, pool(network)
        self.dense: dict[str, Tensor] = {}

    def project(self) -> None:
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
        _project(self.weights)

    @torch.no_grad()
    def on_gradients(self, now: float) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            dense = self.dense.pop(name)
            weight.grad.add_(torch.where(n_of_m(dense, 2, 4), 0.0, dense), alpha=self.settings.decay)
            weight.copy_(dense)

    @torch.no_grad()
    def on_skip(self) -> None:
        for name, weight in self.weights.items():
            weight.copy_(self.dense.pop(name))

    @contextmanager
    def shown(self, network: Network) -> Iterator[None]:
        weights = pool(network)
        dense = {name: weight.detach().clone() for name, weight in weights.items()}
        _project(weights)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(dense[name])

    def settle(self, network: Network) -> None:
        _project(pool(network))


@torch.no_grad()
def _project(weights: Mapping[str, nn.Parameter]) -> None:
    for weight in weights.values():
        weight.masked_fill_(~n_of_m(weight, 2, 4), 0)
