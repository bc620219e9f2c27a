"""Repair of a network whose MLP units and heads are about to be cut: the layers that read them make up for the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import repair
from ..methods.allocation import Kept, KeptBlock
from ..methods.repair import Moments
from .network import Network


def ridge(
    network: Network, kept: Kept, batches: Iterable[Tensor], strength: float
) -> tuple[Network, list[dict[str, Any]]]:
    """A copy whose proj and fc2 are repaired for this cut, on their kept inputs; what they read of the others is as it
    was and goes with the cut. And per repaired layer the share of its output's mean square error that is left.

    batches: images (B, 3, S, S), normalised, on the network's device. All activations are those of the network before
    the cut. strength: see methods.repair.ridge.
    """
    mended = copy.deepcopy(network)
    layers = dict(_layers(mended, kept))
    moments = {name: Moments(layer.in_features) for name, (layer, _) in layers.items()}
    hooks = [layer.register_forward_pre_hook(_adder(moments[name])) for name, (layer, _) in layers.items()]
    mended.eval()
    with torch.no_grad():
        for images in batches:
            mended(images)
    for hook in hooks:
        hook.remove()
    rows = []
    for name, (layer, inputs) in layers.items():
        weight, bias = layer.weight.detach().cpu(), None if layer.bias is None else layer.bias.detach().cpu()
        made = repair.ridge(weight, bias, moments.pop(name), inputs, strength)
        with torch.no_grad():
            layer.weight[:, inputs] = made.weight.to(layer.weight.device)
            if made.bias is not None:
                layer.bias.copy_(made.bias)
        block, _, part = name.partition(".")
        rows.append({"block": int(block), "layer": part, "without": made.without, "left": made.left})
    return mended.train(network.training), rows


def _layers(network: Network, kept: Kept) -> Iterable[tuple[str, tuple[nn.Linear, Tensor]]]:
    """Every proj and fc2 that loses inputs, with those that it keeps."""
    for number, (block, keep) in enumerate(zip(network.blocks, kept.blocks, strict=True)):
        if keep is None:
            continue
        for part, layer, inputs in (
            ("proj", block.attn.proj, value_columns(block.attn.v, keep)),
            ("fc2", block.mlp.fc2, keep.mlp),
        ):
            if len(inputs) < layer.in_features:
                yield f"{number}.{part}", (layer, inputs)


def value_columns(width: int, keep: KeptBlock) -> Tensor:
    """The columns of proj that stay. width: of a head's values before the cut."""
    return (keep.heads[:, None] * width + keep.v).flatten()


def _adder(moments: Moments) -> Any:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0].flatten(0, -2))

    return add
