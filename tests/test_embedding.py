"""Embedding a ticket: what is gathered before the embedding equals what is gathered after it."""

from __future__ import annotations

import pytest
import torch
from timm.layers import PatchEmbed
from tiny_vision import FAMILIES, images, network
from torch import nn

from sievit.stages.methods.token_reduction import gather_tokens
from sievit.stages.vision.embedding import embed, kept_pixels, separable
from sievit.stages.vision.network import Network

TICKET = torch.tensor([[0, 3, 15], [7, 5, 12]])


class Stem(PatchEmbed):  # type: ignore[misc]
    """A convolution before the patches: a pixel reaches into the next patch."""

    def __init__(self, plain: PatchEmbed) -> None:
        super().__init__(32, 8, 3, plain.proj.out_channels)
        self.smear = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = super().forward(self.smear(x))
        return tokens


def gathered_after(net: Network, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    tokens = net.body._pos_embed(net.body.patch_embed(x))
    return gather_tokens(tokens, kept, net.architecture.prefix)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *((family, {}) for family in FAMILIES),
        # timm's distilled DeiT takes neither: it always has a position for every token.
        *((family, {"no_embed_class": True}) for family in FAMILIES if family != "distilled"),
        *((family, {"pos_embed": "none"}) for family in FAMILIES if family != "distilled"),
    ],
    ids=str,
)
def test_embedding_the_kept_patches_equals_gathering_after_the_embedding(family: str, more: dict[str, object]) -> None:
    net, x = network(family, **more), images(2)
    assert separable(net.body.patch_embed) == (family != "lv-vit")  # a convolutional stem overlaps
    assert torch.allclose(embed(net.body, x, TICKET), gathered_after(net, x, TICKET), atol=1e-5)


def test_its_gradients_are_those_of_gathering_after() -> None:
    net, x = network("distilled"), images(2)
    grads = []
    for form in (embed(net.body, x, TICKET), gathered_after(net, x, TICKET)):
        net.zero_grad()
        form.square().sum().backward()
        grads.append([p.grad.clone() for p in net.body.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 5  # weight, bias, class token, distillation token, positions
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_the_pixels_of_a_patch_are_its_square_of_the_image() -> None:
    x = torch.randn(2, 3, 24, 32)
    pixels = kept_pixels(x, torch.tensor([[0, 11], [5, 2]]), (8, 8))
    assert torch.equal(pixels[0, 1], x[0, :, 16:24, 24:32].flatten())
    assert torch.equal(pixels[1, 0], x[1, :, 8:16, 8:16].flatten())


def test_overlapping_embeddings_see_the_whole_image_before_the_ticket_is_gathered() -> None:
    net, x = network(), images(2)
    net.body.patch_embed = Stem(net.body.patch_embed)
    assert not separable(net.body.patch_embed)
    assert torch.equal(embed(net.body, x, TICKET), gathered_after(net, x, TICKET))
    beside = x.clone()
    beside[0, :, 0:8, 8] += 5.0  # patch 1, which is not kept, one pixel from patch 0, which is
    assert not torch.equal(embed(net.body, beside, TICKET)[0, 1], embed(net.body, x, TICKET)[0, 1])
