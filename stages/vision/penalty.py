"""Penalties on a network: on the weights of its blocks, or on the attention of a forward in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..methods import InvalidInput, regularisers
from ..methods.importance import attention_scores, movement
from .attention import Attention
from .loss_settings import HANDED_ON
from .masks import pool
from .network import Network
from .trained_importance import shares_of_norms
from .vit import ViT

# Method -> the blocks whose attention it looks at. Sparse-then-Prune's code overwrites the value of every block by
# that of the next, so that the last one's alone reaches the loss.
ATTENTION = {"attention_log": slice(-1, None), "attention_entropy": slice(None)}


class Penalty(Protocol):
    """What the loop knows of a penalty: `with penalty.watch(network)` around the forward, then its value.

    of_weights: it is the same whatever the forward saw, so that a step in several parts asks for it once.
    """

    of_weights: bool

    def watch(self, network: Network) -> Any: ...

    def __call__(self, network: Network) -> Tensor: ...

    def on_gradients(self, network: Network, lr: float) -> None:
        """After the backward, before gradients are clipped. lr: of the step that comes."""

    def importance(self, network: Network) -> dict[str, Tensor]:
        """What it hands on to prune, of a network in whose training it was: a score for every weight of the blocks'
        matrices; nothing where it tells nothing about heads and units.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo state()."""


def create(method: str, strength: float) -> Penalty:
    """The penalty of that name. strength: its weight in the loss."""
    if method == "movement":
        return Movement(strength)
    return AttentionPenalty(method, strength) if method in ATTENTION else WeightPenalty(method, strength)


class Stateless:
    """What penalties have in common that look at the present weights only."""

    def on_gradients(self, network: Network, lr: float) -> None:
        return

    def importance(self, network: Network) -> dict[str, Tensor]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        return


class WeightPenalty(Stateless):
    """group_lasso and hoyer over all heads and all MLP units of all blocks, the groups that `prune` removes; l1 and l2
    over the matrices of all blocks.
    """

    of_weights = True

    def __init__(self, method: str, strength: float) -> None:
        self.method, self.strength = method, strength

    @contextmanager
    def watch(self, network: Network) -> Iterator[None]:
        yield

    def __call__(self, network: Network) -> Tensor:
        total = network.body.patch_embed.proj.weight.new_zeros(())
        for block in network.blocks:
            total = total + self._of(block)
        weighted: Tensor = self.strength * total
        return weighted

    def importance(self, network: Network) -> dict[str, Tensor]:
        return shares_of_norms(network) if self.method in HANDED_ON else {}

    def _of(self, block: Any) -> Tensor:
        a, mlp = block.attn, block.mlp
        if self.method in ("l1", "l2"):
            of = regularisers.l1 if self.method == "l1" else regularisers.l2
            return of((a.qkv.weight, a.proj.weight, mlp.fc1.weight, mlp.fc2.weight))
        heads = regularisers.head_norms(a.qkv.weight, a.proj.weight, a.heads, a.qk, a.v)
        units = regularisers.unit_norms(mlp.fc1.weight, mlp.fc2.weight)
        if self.method == "hoyer":
            return regularisers.hoyer_square(heads) + regularisers.hoyer_square(units)
        per_head = 2 * (a.qk + a.v) * a.qkv.in_features
        return regularisers.group_lasso(heads, per_head) + regularisers.group_lasso(units, 2 * mlp.fc1.in_features)


class Movement(Stateless):
    """Group lasso whose groups are pressed the less the more the labels' gradients made them grow so far.

    Movement pruning learns scores by gradients and a regulariser on the scores (Sanh et al. 2020; nncf's movement
    sparsity, which ends in whole heads and units). Here the scores are added up beside the training, without masks, and
    the regulariser is on the groups that prune removes.
    """

    of_weights = True

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.scores: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, network: Network) -> Iterator[None]:
        yield

    def __call__(self, network: Network) -> Tensor:
        weights = pool(network)
        scores = [self.scores.get(name) for name in weights]
        total = network.body.patch_embed.proj.weight.new_zeros(())
        for number, block in enumerate(network.blocks):
            a, mlp = block.attn, block.mlp
            heads = regularisers.head_norms(a.qkv.weight, a.proj.weight, a.heads, a.qk, a.v)
            units = regularisers.unit_norms(mlp.fc1.weight, mlp.fc2.weight)
            qkv, proj, fc1, fc2 = scores[4 * number : 4 * number + 4]
            if qkv is not None and proj is not None and fc1 is not None and fc2 is not None:
                of_heads = attention_scores(
                    qkv, None, proj, None, heads=a.heads, qk=a.qk, v=a.v, weigh=lambda score, none: score
                )[0]
                heads = heads * regularisers.kept_back(of_heads)
                units = units * regularisers.kept_back(fc1.sum(1) + fc2.sum(0))
            per_head = 2 * (a.qk + a.v) * a.qkv.in_features
            total = total + regularisers.group_lasso(heads, per_head)
            total = total + regularisers.group_lasso(units, 2 * mlp.fc1.in_features)
        weighted: Tensor = self.strength * total
        return weighted

    def on_gradients(self, network: Network, lr: float) -> None:
        """Scores of the labels' gradients alone: what the penalty itself adds is taken off."""
        weights = pool(network)
        own = torch.autograd.grad(self(network), list(weights.values()))
        for (name, weight), penalised in zip(weights.items(), own, strict=True):
            assert weight.grad is not None, f"{name} has no gradient"
            moved = movement(weight.detach(), weight.grad - penalised, lr)
            self.scores[name] = moved if name not in self.scores else self.scores[name].add_(moved)

    def importance(self, network: Network) -> dict[str, Tensor]:
        return dict(self.scores)

    def state(self) -> dict[str, Tensor]:
        return dict(self.scores)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.scores = dict(tensors)


class AttentionPenalty(Stateless):
    """attention_log of the last block, or attention_entropy as the mean over all blocks.

    The logits are computed a second time from queries and keys, since fused attention does not hand them out: of each
    block that is looked at it takes H T T floats of memory and as many multiply-accumulates as its scores.
    """

    of_weights = False

    def __init__(self, method: str, strength: float) -> None:
        self.method, self.strength = method, strength
        self._logits: list[Tensor] = []

    @contextmanager
    def watch(self, network: Network) -> Iterator[None]:
        self._logits.clear()
        attentions = attentions_of(network, self.method)[ATTENTION[self.method]]
        hooks = [one.qkv.register_forward_hook(partial(self._see, one)) for one in attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, attention: Attention, module: Any, inputs: Any, projected: Tensor) -> None:
        with torch.autocast(projected.device.type, enabled=False):
            q, k, _ = attention.split(projected.float())
            self._logits.append(q * attention.scale @ k.transpose(-2, -1))

    def __call__(self, network: Network) -> Tensor:
        of = regularisers.attention_log if self.method == "attention_log" else regularisers.attention_entropy
        seen, self._logits = self._logits, []
        return self.strength * cast(Tensor, sum(of(logits) for logits in seen)) / len(seen)


def attentions_of(network: Network, method: str) -> list[Attention]:
    """Raises: InvalidInput for a network whose attention is computed in windows."""
    if isinstance(network, ViT):
        return network.attentions
    raise no_rows(network.architecture.model, method)


def no_rows(model: str, method: str) -> InvalidInput:
    """The refusal of a penalty on attention for a Swin."""
    return InvalidInput(
        f"weights.method: {method} needs attention among all tokens, and {model} attends inside windows",
        "use group_lasso, hoyer, l1 or l2",
    )
