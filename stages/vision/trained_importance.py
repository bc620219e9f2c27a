"""What a training found out about the importance of its weights, handed on to `prune` beside them.

importance.safetensors holds a score for every weight of the blocks' matrices, by the matrix's name in the body. Scores
of whatever goes together add up. After group_lasso and hoyer a weight has its share w^2 / |group| of the norm of its
head or MLP unit, so that those of a head add up to the head's norm; after movement, how far the labels' gradients
pushed it away from zero (methods/importance.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..methods import InvalidInput
from ..methods.importance import head_shares, unit_shares
from .masks import pool
from .network import Network
from .tensors import read_tensors, write_tensors

FILE = "importance.safetensors"
Body = TypeVar("Body", bound=Network)


def shares_of_norms(network: Network) -> dict[str, Tensor]:
    """Of every weight of the pool, its share of the norm of its head or of its MLP unit."""
    shares: list[Tensor] = []
    for block in network.blocks:
        a, mlp = block.attn, block.mlp
        shares += head_shares(a.qkv.weight.detach(), a.proj.weight.detach(), a.heads, a.qk, a.v)
        shares += unit_shares(mlp.fc1.weight.detach(), mlp.fc2.weight.detach())
    return dict(zip(pool(network), shares, strict=True))


def write(folder: Path, method: str, scores: Mapping[str, Tensor]) -> None:
    """method: of the penalty that they are from."""
    write_tensors(folder / FILE, scores, {"method": method})


def check_handed_on(folder: Path, who: str) -> None:
    """Raises: InvalidInput when nothing was handed on."""
    if not (folder / FILE).exists():
        raise InvalidInput(
            f"importance: {who} hands on no importance of its weights",
            "train it with weights: {method: group_lasso}, hoyer or movement right before prune, or use taylor, l1 or "
            "random",
        )


def judged(network: Body, folder: Path, who: str) -> Body:
    """A copy of the network on which |w * gradient| is the score that was handed on: weights of one, and the scores,
    less the lowest where that is below zero, as gradients. So they are ranked as Taylor's are.

    Raises: InvalidInput when none were handed on, or of another network.
    """
    check_handed_on(folder, who)
    scores, _ = read_tensors(folder / FILE)
    twin = copy.deepcopy(network)
    matrices: dict[str, nn.Parameter] = pool(twin)
    if {n: t.shape for n, t in scores.items()} != {n: w.shape for n, w in matrices.items()}:
        raise InvalidInput(f"{folder / FILE}: these are the scores of another network", f"make {who} again")
    lowest = min(0.0, min(float(tensor.min()) for tensor in scores.values()))
    with torch.no_grad():
        for parameter in twin.body.parameters():
            parameter.fill_(1)
            parameter.grad = torch.zeros_like(parameter)
        for name, weight in matrices.items():
            weight.grad = (scores[name] - lowest).to(weight.device)
    return twin
