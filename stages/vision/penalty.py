"""Penalties on a network: on the weights of its blocks, or on the attention of a forward in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..methods import InvalidInput, regularisers
from .attention import Attention
from .network import Network
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


def create(method: str, strength: float) -> Penalty:
    """The penalty of that name. strength: its weight in the loss."""
    return AttentionPenalty(method, strength) if method in ATTENTION else WeightPenalty(method, strength)


class WeightPenalty:
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


class AttentionPenalty:
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
