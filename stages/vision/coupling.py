"""What goes together when something is cut: which dimensions of which parameters lie along the same axis.

Stated, not traced: Torch-Pruning's dependency graph follows a ViT and agrees with this list (tests/test_coupling.py),
but where a Swin merges 2 x 2 tokens it maps a channel to wrong places. Names are those of timm's state dict, so that a
cut is an indexing of tensors, and whatever the list forgot fails to load into the rebuilt network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .network import Network
from .swin import Swin
from .vit import HEADS, TOKENS


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a parameter of the body. copies: how often the axis stands in it, one copy after the other."""

    name: str
    dim: int
    copies: int = 1


def block_names(network: Network) -> list[str]:
    """The name of every block in the body, in order of execution."""
    names = {id(module): name for name, module in network.body.named_modules()}
    return [names[id(block)] for block in network.blocks]


def hidden_units(block: str) -> list[Member]:
    """The units of a block's MLP."""
    first, second = f"{block}.mlp.fc1", f"{block}.mlp.fc2"
    return [Member(f"{first}.weight", 0), Member(f"{first}.bias", 0), Member(f"{second}.weight", 1)]


def streams(network: Network) -> list[list[Member]]:
    """The channels of every residual stream: of the one of a ViT, of each stage of a Swin."""
    found = _of_swin(network) if isinstance(network, Swin) else [_of_vit(block_names(network))]
    there = network.body.state_dict().keys()
    return [[member for member in members if member.name in there] for members in found]


def _of_vit(blocks: Iterable[str]) -> list[Member]:
    members = [Member("patch_embed.proj.weight", 0), Member("patch_embed.proj.bias", 0), *_norm("patch_embed.norm")]
    members += [Member(name, 2) for name in TOKENS]
    for block in blocks:
        members += _of_block(block)
    for norm in ("norm_pre", "norm", "fc_norm"):
        members += _norm(norm)
    return [*members, *(Member(f"{head}.weight", 1) for head in HEADS)]


def _of_swin(network: Swin) -> Iterator[list[Member]]:
    """Merging lays the channels of 2 x 2 tokens side by side: V1 normalises them so, V2 what it has made of them."""
    first = network.architecture.generation == 1
    stages, blocks = network.architecture.stages, iter(block_names(network))
    for number, stage in enumerate(stages):
        own = f"layers.{number}.downsample"
        if number == 0:
            members = [Member("patch_embed.proj.weight", 0), Member("patch_embed.proj.bias", 0)]
            members += _norm("patch_embed.norm")
        else:
            members = [Member(f"{own}.reduction.weight", 0), *([] if first else _norm(f"{own}.norm"))]
        for _ in stage.blocks:
            members += _of_block(next(blocks))
        if number == len(stages) - 1:
            members += [*_norm("norm"), Member("head.fc.weight", 1)]
        else:
            following = f"layers.{number + 1}.downsample"
            members += [Member(f"{following}.reduction.weight", 1, 4)]
            members += _norm(f"{following}.norm", 4) if first else []
        yield members


def _of_block(block: str) -> list[Member]:
    """What reads the stream and what adds to it."""
    members = [*_norm(f"{block}.norm1"), *_norm(f"{block}.norm2")]
    members += [Member(f"{block}.attn.qkv.weight", 1), Member(f"{block}.mlp.fc1.weight", 1)]
    for layer in ("attn.proj", "mlp.fc2"):
        members += [Member(f"{block}.{layer}.weight", 0), Member(f"{block}.{layer}.bias", 0)]
    return [*members, Member(f"{block}.ls1.gamma", 0), Member(f"{block}.ls2.gamma", 0)]


def _norm(name: str, copies: int = 1) -> list[Member]:
    return [Member(f"{name}.weight", 0, copies), Member(f"{name}.bias", 0, copies)]
