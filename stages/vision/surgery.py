"""From a set of kept indices to a smaller network with the same outputs as the masked one.

What goes together stands in coupling.py; Torch-Pruning's group importance scores the rows and columns, and
methods.importance the parts of a fused attention by the same rules. A cut indexes the tensors of the body and loads
them strictly into a clean network rebuilt from its architecture record, so a width that the record and the weights
disagree on cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..methods import InvalidInput, importance
from ..methods.allocation import Kept, KeptBlock, Scores
from . import coupling
from .architecture import Architecture, Block, SwinArchitecture
from .coupling import Member
from .network import Network, rebuild

Importance = Literal["taylor", "hessian", "l1", "random"]
# Added up over all weights that go together, and not set in proportion to the layer's other units: sums of different
# layers and axes can be weighed against each other.
SUM: Any = {"group_reduction": "sum", "normalizer": None}


def score(network: Network, method: Importance, seed: int) -> Scores:
    """Importance of all that can go. Taylor reads the gradients that the caller has accumulated (loss.backward());
    Hessian expects the mean squared gradients of single images in their place.

    Scores of MLP units and embedding channels come from Torch-Pruning (GroupTaylorImportance, GroupHessianImportance,
    GroupMagnitudeImportance with p=1, or random); those of heads, of widths inside heads and of blocks from
    methods.importance by the same rule.
    """
    generator = torch.Generator().manual_seed(seed)
    weigh, scorer = _rule(method)

    def of_members(members: Sequence[Member]) -> Tensor:
        group = _group(network.body, members)
        if scorer is None:
            return torch.rand(len(group[0].idxs), generator=generator)
        return cast(Tensor, scorer(group)).float().cpu()

    heads: list[Tensor] = []
    qk: list[Tensor] = []
    v: list[Tensor] = []
    depth: list[Tensor] = []
    mlp = []
    for name, block in zip(coupling.block_names(network), network.blocks, strict=True):
        a = block.attn
        matrices = [(m.weight.detach(), m.weight.grad) for m in (a.qkv, a.proj, block.mlp.fc1, block.mlp.fc2)]
        of_heads = importance.attention_scores(*matrices[0], *matrices[1], heads=a.heads, qk=a.qk, v=a.v, weigh=weigh)
        parts = [*of_heads, importance.block_score(matrices, weigh)]
        if method == "random":
            parts = [importance.random_like(part, generator) for part in parts]
        for scores, part in zip((heads, qk, v, depth), parts, strict=True):
            scores.append(part.float().cpu())
        mlp.append(of_members(coupling.hidden_units(name)))
    embed = [of_members(members) for members in coupling.streams(network)]
    architecture = network.architecture
    fixed = frozenset(drop.block for drop in architecture.tokens)  # without it, no attention would say which stay
    return Scores(heads, qk, v, mlp, embed, torch.stack(depth), architecture.stage_of, fixed)


def _rule(method: Importance) -> tuple[importance.Weigh, Any]:
    """How single weights are weighed, here and in Torch-Pruning."""
    match method:
        case "taylor":
            return importance.taylor, tp.importance.GroupTaylorImportance(**SUM)
        case "hessian":
            return importance.hessian, tp.importance.GroupHessianImportance(**SUM)
        case "l1":
            return importance.magnitude, tp.importance.GroupMagnitudeImportance(p=1, **SUM)
        case "random":
            return importance.magnitude, None


def _group(body: nn.Module, members: Sequence[Member]) -> Any:
    """Members as a group of Torch-Pruning, which scores the weights of layers and norms among them."""
    group = tp.dependency.Group()
    for member in members:
        layer, _, parameter = member.name.rpartition(".")
        module = body.get_submodule(layer)
        if parameter != "weight":
            continue
        match module:
            case nn.Linear():
                function = tp.prune_linear_in_channels if member.dim else tp.prune_linear_out_channels
            case nn.Conv2d():
                function = tp.prune_conv_out_channels
            case _:
                function = tp.prune_layernorm_out_channels
        node = tp.dependency.Node(module, None)
        size = module.get_parameter(parameter).shape[member.dim]
        group.add_dep(tp.dependency.Dependency(function, function, node, node), list(range(size)))
        group[-1].root_idxs = [index % (size // member.copies) for index in range(size)]
    return group


def kept_architecture(architecture: Architecture | SwinArchitecture, kept: Kept) -> Architecture | SwinArchitecture:
    """The record of the network that cut() would make."""
    blocks = [
        None if k is None else replace(b, heads=len(k.heads), qk=k.qk.shape[1], v=k.v.shape[1], mlp=len(k.mlp))
        for b, k in zip(architecture.blocks, kept.blocks, strict=True)
    ]
    return architecture.cut(blocks, [len(channels) for channels in kept.embed])


def narrows_queries(attention: Any) -> bool:
    """Whether queries and keys of its heads can lose width: not where a norm spans the head."""
    return isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)


def cut(network: Network, kept: Kept) -> Network:
    """A new network without what is not kept; the old one is left as it was. The softmax scale of every block stays
    the trained one.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.body.state_dict().items()}
    for members, channels in zip(coupling.streams(network), kept.embed, strict=True):
        _keep(state, members, channels)
    names = coupling.block_names(network)
    for name, block, own, keep in zip(names, network.blocks, network.architecture.blocks, kept.blocks, strict=True):
        if keep is not None:
            _keep(state, coupling.hidden_units(name), keep.mlp)
            _cut_attention(state, f"{name}.attn", block.attn, own, keep)
    fresh = rebuild(kept_architecture(network.architecture, kept))
    left = [name for name, keep in zip(names, kept.blocks, strict=True) if keep is not None]
    fresh.body.load_state_dict(_renamed(state, names, dict(zip(left, coupling.block_names(fresh), strict=True))))
    return fresh.train(network.training)


def _keep(state: dict[str, Tensor], members: Sequence[Member], kept: Tensor) -> None:
    """Only the kept positions of an axis, in all copies of it."""
    for member in members:
        if member.name in state:
            tensor = state[member.name]
            step = tensor.shape[member.dim] // member.copies
            index = (torch.arange(member.copies)[:, None] * step + kept).flatten()
            state[member.name] = tensor.index_select(member.dim, index)


def _cut_attention(state: dict[str, Tensor], name: str, attention: Any, own: Block, keep: KeptBlock) -> None:
    """Keep rows of q and k (the same positions of both), rows of v and the matching columns of proj; of what belongs to
    a head as a whole, its position biases and its learned scale.
    """
    if keep.qk.shape[1] != own.qk and not narrows_queries(attention):
        raise InvalidInput(
            "prune.axes.qk: heads with normalised queries and keys cannot lose width, their norm spans the head",
            "set prune.axes.qk: 0",
        )
    query = (keep.heads[:, None] * own.qk + keep.qk).flatten()
    value = (keep.heads[:, None] * own.v + keep.v).flatten()
    queries = own.heads * own.qk
    rows = torch.cat([query, queries + query, 2 * queries + value])
    along = {"qkv.weight": (0, rows), "qkv.bias": (0, rows), "proj.weight": (1, value)}
    along |= {"q_bias": (0, query), "v_bias": (0, value)}
    along |= {
        "relative_position_bias_table": (1, keep.heads),
        "cpb_mlp.2.weight": (0, keep.heads),
        "logit_scale": (0, keep.heads),
    }
    for part, (dim, index) in along.items():
        if f"{name}.{part}" in state:
            state[f"{name}.{part}"] = state[f"{name}.{part}"].index_select(dim, index)


def _renamed(state: dict[str, Tensor], names: Sequence[str], renamed: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of blocks that stay, under their new numbers, and of all that is in no block."""
    moved = {}
    for key, tensor in state.items():
        block = next((name for name in names if key.startswith(f"{name}.")), None)
        if block is None:
            moved[key] = tensor
        elif block in renamed:
            moved[renamed[block] + key.removeprefix(block)] = tensor
    return moved
