"""From a set of kept indices to a smaller network with the same outputs as the masked one.

Torch-Pruning's dependency graph knows which parameters share the embedding width and the MLP widths: it scores these
groups and cuts them. The parts of a fused attention are cut here by index. The result is a clean network rebuilt from
its architecture record, into which the cut weights are loaded strictly, so a width that the record and the weights
disagree on cannot pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..methods import InvalidInput, importance
from ..methods.allocation import Kept, KeptBlock, Scores
from .architecture import Architecture
from .attention import Attention, set_fused
from .network import rebuild
from .vit import ViT

Importance = Literal["taylor", "l1", "random"]


def score(network: ViT, method: Importance, seed: int) -> Scores:
    """Importance of all that can go. Taylor reads the gradients that the caller has accumulated (loss.backward()).

    Scores of MLP units and embedding channels come from Torch-Pruning's groups (GroupTaylorImportance,
    GroupMagnitudeImportance with p=1, or random); those of heads and head widths from methods.importance by the same
    rule.
    """
    graph = _graph(network)
    scorer: Any = None
    if method == "taylor":
        scorer = tp.importance.GroupTaylorImportance()
    elif method == "l1":
        scorer = tp.importance.GroupMagnitudeImportance(p=1)
    generator = torch.Generator().manual_seed(seed)

    def of_group(layer: nn.Module, function: Any, size: int) -> Tensor:
        if scorer is None:
            return torch.rand(size, generator=generator)
        group = graph.get_pruning_group(layer, function, idxs=list(range(size)))
        return cast(Tensor, scorer(group)).float().cpu()

    weigh = importance.taylor if method == "taylor" else importance.magnitude
    heads, qk, v, mlp = [], [], [], []
    for block in network.body.blocks:
        a: Attention = block.attn
        h, q, o = importance.attention_scores(
            a.qkv.weight.detach(), a.qkv.weight.grad, a.proj.weight.detach(), a.proj.weight.grad,
            heads=a.heads, qk=a.qk, v=a.v, weigh=weigh,
        )  # fmt: skip
        if method == "random":
            h, q, o = (importance.random_like(part, generator) for part in (h, q, o))
        heads.append(h.cpu())
        qk.append(q.cpu())
        v.append(o.cpu())
        mlp.append(of_group(block.mlp.fc1, tp.prune_linear_out_channels, block.mlp.fc1.out_features))
    conv = network.body.patch_embed.proj
    return Scores(heads, qk, v, mlp, of_group(conv, tp.prune_conv_out_channels, conv.out_channels))


def kept_architecture(architecture: Architecture, kept: Kept) -> Architecture:
    """The record of the network that cut() would make."""
    blocks = tuple(
        replace(b, heads=len(k.heads), qk=k.qk.shape[1], v=k.v.shape[1], mlp=len(k.mlp))
        for b, k in zip(architecture.blocks, kept.blocks, strict=True)
    )
    return replace(architecture, embed=len(kept.embed), blocks=blocks)


def cut(network: ViT, kept: Kept) -> ViT:
    """A new network without what is not kept; the old one is left as it was. The softmax scale of every block stays
    the trained one.
    """
    clone = ViT(copy.deepcopy(network.body), network.architecture).cpu()
    for p in clone.parameters():
        p.grad = None
    for block, keep in zip(clone.body.blocks, kept.blocks, strict=True):
        graph = _graph(clone)
        removed = _complement(keep.mlp, block.mlp.fc1.out_features)
        if removed:
            _prune(graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, idxs=removed))
        _cut_attention(block.attn, keep)
    removed = _complement(kept.embed, clone.body.patch_embed.proj.out_channels)
    if removed:
        _prune(_graph(clone).get_pruning_group(clone.body.patch_embed.proj, tp.prune_conv_out_channels, idxs=removed))
    fresh = rebuild(kept_architecture(network.architecture, kept))
    fresh.body.load_state_dict(clone.body.state_dict())
    return fresh.train(network.training)


def _prune(group: Any) -> None:
    """Cut a group of the graph, LayerNorms by our own hand.

    Torch-Pruning 1.6 keeps the channels of a LayerNorm in the order in which a Python set gives them (it sorts a tensor
    and drops the result). Where few channels stay, that is not their order, and weights would land on other channels.
    """
    norms = []
    for dependency, removed in group:
        norm = dependency.target.module
        if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
            kept = _complement(torch.tensor(removed), norm.normalized_shape[-1])
            norms.append((norm, {n: p.detach()[kept].clone() for n, p in norm.named_parameters()}))
    group.prune()
    for norm, parameters in norms:
        for name, values in parameters.items():
            setattr(norm, name, nn.Parameter(values))


def _complement(indices: Tensor, size: int) -> list[int]:
    """The numbers below `size` that are not among `indices`, ascending."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[indices] = False
    return [int(i) for i in mask.nonzero().flatten()]


def _cut_attention(attention: Attention, keep: KeptBlock) -> None:
    """Keep rows of q and k (the same positions of both), rows of v and the matching columns of proj."""
    if not isinstance(attention.q_norm, nn.Identity) and keep.qk.shape[1] != attention.qk:
        raise InvalidInput(
            "prune.axes.head_width: heads with normalised queries and keys cannot lose width, their norm spans "
            "the head",
            "set prune.axes.head_width: 0",
        )
    query = (keep.heads[:, None] * attention.qk + keep.qk).flatten()
    value = (keep.heads[:, None] * attention.v + keep.v).flatten()
    queries, values = attention.heads * attention.qk, attention.heads * attention.v
    rows = torch.cat([query, queries + query, 2 * queries + value])
    assert 2 * queries + values == attention.qkv.out_features
    attention.qkv = _linear(attention.qkv, attention.qkv.weight[rows], rows)
    attention.proj = _linear(attention.proj, attention.proj.weight[:, value], None)
    attention.heads, attention.qk, attention.v = len(keep.heads), keep.qk.shape[1], keep.v.shape[1]


def _linear(old: nn.Linear, weight: Tensor, rows: Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None)
    new.weight = nn.Parameter(weight.detach().clone())
    if old.bias is not None:
        new.bias = nn.Parameter((old.bias if rows is None else old.bias[rows]).detach().clone())
    return new


def _graph(network: ViT) -> Any:
    """The dependency graph of the body, raw parameters (tokens, position embedding, layer scales) included."""
    body = network.body
    raw: list[tuple[nn.Parameter, int]] = []
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        parameter = getattr(body, name, None)
        if isinstance(parameter, nn.Parameter):
            raw.append((parameter, parameter.dim() - 1))
    for block in body.blocks:
        raw.extend((scale.gamma, 0) for scale in (block.ls1, block.ls2) if hasattr(scale, "gamma"))
    size = network.architecture.image_size
    example = torch.zeros(2, 3, size, size, device=body.patch_embed.proj.weight.device)
    training = body.training
    fused = [a.fused for a in network.attentions]
    set_fused(body, False)  # plain products: what the graph's tracer knows
    body.eval()
    try:
        dense = ViT(body, replace(network.architecture, tokens=()))
        return tp.DependencyGraph().build_dependency(dense, example, unwrapped_parameters=raw, verbose=False)
    finally:
        body.train(training)
        _restore(network.attentions, fused)


def _restore(attentions: Sequence[Attention], fused: Sequence[bool]) -> None:
    for attention, flag in zip(attentions, fused, strict=True):
        attention.fused = flag
