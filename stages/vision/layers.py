"""Widths of layers: other ones, for a network that is rebuilt from its record (untrained), and their names in timm."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..methods import InvalidInput


class HeadWidths:
    """timm's names for the widths of an attention, true after every cut. Its one width of a head is that of the values
    here; queries and keys have their own.
    """

    heads: int
    v: int

    @property
    def num_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.v

    @property
    def attn_dim(self) -> int:
        """What goes into proj."""
        return self.heads * self.v


def linear(old: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=old.bias is not None)


def conv(old: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """Of the patch embedding: its kernel and stride, no padding."""
    size, stride = old.kernel_size, old.stride
    return nn.Conv2d(old.in_channels, outputs, (size[0], size[1]), (stride[0], stride[1]), bias=old.bias is not None)


def norm(old: nn.Module, width: int) -> nn.Module:
    """Over `width` channels; Identity stays. Raises: InvalidInput for another norm than LayerNorm."""
    if isinstance(old, nn.Identity):
        return old
    if isinstance(old, nn.LayerNorm):
        fresh = copy.copy(old)  # timm's subclasses differ in their constructors; a copy keeps eps and flags
        fresh._parameters = dict(old._parameters)
        fresh.normalized_shape = (width,)
        if old.elementwise_affine:
            fresh.weight = nn.Parameter(torch.ones(width))
            fresh.bias = nn.Parameter(torch.zeros(width)) if old.bias is not None else None
        return fresh
    raise InvalidInput(f"norm of class {type(old).__name__} cannot be cut", "use a ViT with LayerNorm")
