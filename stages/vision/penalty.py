"""The penalty that prepares a cut: it pushes whole heads and MLP units of a network towards zero."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..methods.regularisers import group_lasso, head_norms, unit_norms
from .network import Network


def group_penalty(strength: float) -> Callable[[Network], Tensor]:
    """Group lasso over all heads and all MLP units of all blocks, the groups that `prune` removes, as a function of the
    network. strength: its weight in the loss.
    """

    def penalty(network: Network) -> Tensor:
        total = network.body.patch_embed.proj.weight.new_zeros(())
        for block in network.blocks:
            a, mlp = block.attn, block.mlp
            heads = head_norms(a.qkv.weight, a.proj.weight, a.heads, a.qk, a.v)
            units = unit_norms(mlp.fc1.weight, mlp.fc2.weight)
            per_head = 2 * (a.qk + a.v) * a.qkv.in_features
            total = total + group_lasso(heads, per_head) + group_lasso(units, 2 * mlp.fc1.in_features)
        weighted: Tensor = strength * total
        return weighted

    return penalty
