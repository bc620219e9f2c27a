"""What is cut together, against Torch-Pruning's dependency graph where that is right, and against loops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from tiny_vision import FAMILIES, SWINS, images, network, swin
from torch import Tensor, nn

from sievit.stages.vision import coupling
from sievit.stages.vision.attention import set_fused
from sievit.stages.vision.coupling import Member
from sievit.stages.vision.network import Network
from sievit.stages.vision.surgery import score

Place = tuple[str, int]


def graph_of(net: Network) -> Any:
    """Torch-Pruning's, of the plain attention that its tracer knows."""
    set_fused(net, False)
    body: Any = net.body
    raw = [(getattr(body, n), 2) for n in ("cls_token", "reg_token", "pos_embed") if getattr(body, n, None) is not None]
    raw += [(body.dist_token, 2)] if hasattr(body, "dist_token") else []
    raw += [(s.gamma, 0) for block in body.blocks for s in (block.ls1, block.ls2) if hasattr(s, "gamma")]
    return tp.DependencyGraph().build_dependency(net, images(2), unwrapped_parameters=raw, verbose=False)


def group(net: Network, graph: Any, layer: nn.Module, function: Any, size: int) -> Any:
    return graph.get_pruning_group(layer, function, idxs=list(range(size)))


def places(net: Network, group: Any) -> set[Place]:
    """The dimensions of parameters that a group cuts."""
    names: dict[int, str] = {id(m): n for n, m in net.body.named_modules()}
    names |= {id(p): n for n, p in net.body.named_parameters()}
    found: set[Place] = set()
    for dependency, _ in group:
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            found.add((names[id(module)], module.dim() - 1))
        elif dependency.handler in (tp.prune_linear_in_channels, tp.prune_conv_in_channels):
            found.add((f"{names[id(module)]}.weight", 1))
        elif id(module) in names:
            found |= {(f"{names[id(module)]}.{p}", 0) for p, _ in module.named_parameters(recurse=False)}
    return found


def stated(members: list[Member]) -> set[Place]:
    return {(member.name, member.dim) for member in members}


def roots(net: Network) -> Iterator[tuple[list[Member], nn.Module, Any, int]]:
    conv = net.body.patch_embed.proj
    yield coupling.streams(net)[0], conv, tp.prune_conv_out_channels, conv.out_channels
    for name, block in zip(coupling.block_names(net), net.blocks, strict=True):
        fc1 = block.mlp.fc1
        yield coupling.hidden_units(name), fc1, tp.prune_linear_out_channels, fc1.out_features


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_stated_to_go_together_is_what_torch_pruning_traces(family: str) -> None:
    net = network(family)
    graph = graph_of(net)
    for members, layer, function, size in roots(net):
        assert stated(members) == places(net, group(net, graph, layer, function, size))


@pytest.mark.parametrize("method", ["taylor", "l1"])
@pytest.mark.parametrize("family", ["deit", "lv-vit", "layer scale"])
def test_scores_are_those_of_torch_prunings_own_groups(family: str, method: Any) -> None:
    net = network(family)
    torch.nn.functional.cross_entropy(net(images(8)), torch.arange(8) % 5).backward()
    scores = score(net, method, 0)
    added: Any = {"group_reduction": "sum", "normalizer": None}
    scorer: Any = tp.importance.GroupMagnitudeImportance(p=1, **added)
    if method == "taylor":
        scorer = tp.importance.GroupTaylorImportance(**added)
    graph = graph_of(net)
    ours = [scores.embed[0], *scores.mlp]
    for mine, (_, layer, function, size) in zip(ours, roots(net), strict=True):
        assert torch.allclose(mine, scorer(group(net, graph, layer, function, size)), rtol=1e-4)


def elements(method: str, weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    w, g = weight.detach(), weight.grad
    return {"taylor": (w * g).abs(), "hessian": w * w * g, "l1": w.abs()}[method]


@pytest.mark.parametrize("method", ["taylor", "hessian", "l1"])
@pytest.mark.parametrize("family", [*SWINS, "deit"])
def test_scores_are_sums_over_everything_that_is_lost(family: str, method: Any) -> None:
    """Channel by channel and unit by unit, each layer's scores over their mean; heads and blocks as they are."""
    net = swin(family) if family in SWINS else network(family)
    torch.nn.functional.cross_entropy(net(images(4)), torch.arange(4) % 5).backward()
    for parameter in net.parameters():
        parameter.grad = parameter.grad.abs() if method == "hessian" and parameter.grad is not None else parameter.grad
    scores = score(net, method, 0)
    parameters = dict(net.body.named_parameters())
    groups = [*coupling.streams(net), *(coupling.hidden_units(name) for name in coupling.block_names(net))]
    for found, members in zip([*scores.embed, *scores.mlp], groups, strict=True):
        sums: dict[int, float] = defaultdict(float)
        for member in members:
            weight = parameters[member.name]
            if not member.name.endswith("weight") or ".gamma" in member.name:
                continue
            rows = elements(method, weight).transpose(0, member.dim).flatten(1) if weight.dim() > 1 else None
            values = elements(method, weight) if rows is None else rows.sum(1)
            for index, value in enumerate(values.tolist()):
                sums[index % len(found)] += value
        expected = torch.tensor([sums[i] for i in range(len(found))])
        assert torch.allclose(found / found.mean(), expected / expected.mean(), rtol=1e-3, atol=1e-5)
    for number, block in enumerate(net.blocks):
        a, total = block.attn, 0.0
        for head in range(a.heads):
            rows = [slice(p * a.heads * a.qk + head * a.qk, p * a.heads * a.qk + (head + 1) * a.qk) for p in range(3)]
            own = sum(float(elements(method, a.qkv.weight)[r].sum()) for r in rows)
            own += float(elements(method, a.proj.weight)[:, head * a.v : (head + 1) * a.v].sum())
            assert float(scores.heads[number][head]) == pytest.approx(own, rel=1e-3)
            total += own
        total += sum(float(elements(method, layer.weight).sum()) for layer in (block.mlp.fc1, block.mlp.fc2))
        assert float(scores.depth[number]) == pytest.approx(total, rel=1e-3)
