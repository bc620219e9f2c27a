"""LV-ViT (Jiang et al., "All Tokens Matter", NeurIPS 2021) on timm's classes, registered there as lvvit_t, lvvit_s and
lvvit_m.

Four things set it apart from a ViT, and each stands where the rest of the network need not know of it:

- A convolutional stem embeds the patches. Its convolutions overlap, so that a patch's embedding depends on its
  neighbours: a patch ticket gathers after it, and the stem costs the same whatever is kept.
- Residual branches are divided by `skip_lam`: a module without weights in the place of timm's layer scale.
- Queries, keys and values have no bias.
- A second head answers for every patch token. A trained network's answer is the class token's logits plus half of the
  largest logit that any patch token gives each class; of a ticket, any kept token.

Parameter names are those of the authors' release (zihangJiang/TokenLabeling), so that its weights load once they are
converted to safetensors. Where we differ: MixToken is left out (mixup and cutmix are the training loop's), and without
token labels the loss is that of the combined answer, which is what is deployed; theirs gives every patch token the
image's label.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

AUXILIARY_SHARE = 0.5  # of the best patch token's logits in the answer


class ConvStem(PatchEmbed):  # type: ignore[misc]  # timm is not typed
    """images (B, 3, S, S) -> patch tokens (B, N, C): three convolutions at half the resolution, then one that cuts
    patches.

    patch_size must be even: the first convolution halves the image once, the last takes patch_size / 2 of what is
    left. With 4, as for images of 32 px, that is a kernel of 2.
    """

    def __init__(
        self, *, patch_size: int, embed_dim: int, stem_dim: int, in_chans: int = 3, bias: bool = True, **more: Any
    ) -> None:
        if patch_size % 2:
            raise ValueError(f"patch_size {patch_size} is odd, and the convolutional stem halves the image first")
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **more)
        to = {name: more[name] for name in ("device", "dtype") if name in more}
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False, **to)
        self.bn1 = nn.BatchNorm2d(stem_dim, **to)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **to)
        self.bn2 = nn.BatchNorm2d(stem_dim, **to)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **to)
        self.bn3 = nn.BatchNorm2d(stem_dim, **to)
        self.relu = nn.ReLU(inplace=True)
        half = patch_size // 2
        self.proj = nn.Conv2d(stem_dim, embed_dim, half, stride=half, bias=bias, **to)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return tokens


class ResidualScale(nn.Module):
    """x * factor, without weights: where timm has a layer scale, LV-ViT divides every residual branch by skip_lam."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class LVViT(VisionTransformer):  # type: ignore[misc]
    """images (B, 3, S, S) -> logits (B, K); in token training a pair (class logits (B, K), patch logits (B, N, K)).

    stem_dim: channels of the stem. skip_lam: what residual branches are divided by.
    """

    def __init__(self, *, stem_dim: int = 64, skip_lam: float = 1.0, weight_init: str = "", **kwargs: Any) -> None:
        super().__init__(embed_layer=partial(ConvStem, stem_dim=stem_dim), weight_init="skip", **kwargs)
        if self.global_pool != "token":
            raise ValueError("LV-ViT answers from its class token: leave global_pool out")
        self.token_training = False
        self.aux_head = _head(self.embed_dim, self.num_classes, self.cls_token)
        if skip_lam != 1:
            for block in self.blocks:
                block.ls1, block.ls2 = ResidualScale(1 / skip_lam), ResidualScale(1 / skip_lam)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, and the authors' for the class token."""
        super().init_weights(mode=mode, needs_reset=needs_reset)
        trunc_normal_(self.cls_token, std=0.02)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The head of the class token and that of the patch tokens."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh heads for another number of classes."""
        if global_pool not in (None, "token"):
            raise ValueError("LV-ViT answers from its class token")
        super().reset_classifier(num_classes)
        self.aux_head = _head(self.embed_dim, num_classes, self.cls_token).train(self.training)

    def token_logits(self, x: Tensor) -> Tensor:
        """What the patch tokens of normalised features (B, P+N, C) answer: (B, N, K)."""
        logits: Tensor = self.aux_head(x[:, self.num_prefix_tokens :])
        return logits

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Normalised features (B, P+N, C) of all patches, or of those that a ticket or token reduction has left."""
        answer = super().forward_head(x, pre_logits)
        if pre_logits:
            return answer
        if self.token_training and self.training:
            return answer, self.token_logits(x)
        return answer + AUXILIARY_SHARE * self.token_logits(x).amax(1)


def _head(width: int, classes: int, like: Tensor) -> nn.Module:
    return nn.Linear(width, classes, device=like.device, dtype=like.dtype) if classes > 0 else nn.Identity()


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000, "input_size": (3, 224, 224), "crop_pct": crop, "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "classifier": ("head", "aux_head"),
        }
        for name, crop in (("lvvit_t", 0.9), ("lvvit_s", 0.9), ("lvvit_m", 1.0))
    }
)  # fmt: skip


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> LVViT:
    common = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
    network: LVViT = build_model_with_cfg(
        LVViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**common, **sizes, **given}
    )
    return network


def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """8.5 million weights."""
    return _create("lvvit_t", pretrained, {"embed_dim": 240, "depth": 12, "num_heads": 4}, kwargs)


def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """26 million weights."""
    return _create("lvvit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}, kwargs)


def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """56 million weights."""
    return _create("lvvit_m", pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}, kwargs)


for entrypoint in (lvvit_t, lvvit_s, lvvit_m):
    register_model(entrypoint)
