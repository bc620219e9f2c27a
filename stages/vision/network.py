"""The network that trains, is pruned and is exported, of whichever family its timm model belongs to.

A family is one module (vit.py, swin.py) with a network class of one surface: called with images, for patch tickets with
`kept`, and for hidden states with `after`; `body` (timm's network, the only thing that is stored), `architecture`,
`blocks`, `attentions`, `ticket_grid`, `ticket_cost`, `parameter_count`, `with_tokens`. What belongs to which family is
decided here, by the class of timm's network; which of timm's models belong to none, and why, stands in families.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import timm
import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..methods import InvalidInput
from . import families, swin, vit
from .architecture import AGAIN, Architecture, SwinArchitecture
from .swin import Swin
from .tensors import load_state, read_tensors
from .vit import ViT

Network = ViT | Swin


def create(
    name: str,
    *,
    classes: int,
    image_size: int,
    args: dict[str, Any],
    pretrained: bool = False,
    weights: Path | None = None,
    drop_path: float = 0.0,
    trained_head: bool = False,
) -> Network:
    """A dense network from a timm name, with random or pretrained weights.

    Args:
        weights: a .safetensors file of that timm model; a head of another size is left random.
        trained_head: refuse that; the weights must answer as many classes.
    Raises: InvalidInput for an unknown name, wrong arguments, or a family that cannot be cut.
    """
    if ":" not in name and timm.is_model(name):
        families.check_module(name, timm.models.model_entrypoint(name).__module__)
    kwargs: dict[str, Any] = {**args, "num_classes": classes, "img_size": image_size, "drop_path_rate": drop_path}
    _check_grid(image_size, args.get("patch_size"))
    try:
        body = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError, AssertionError, ValueError, KeyError, ZeroDivisionError) as error:
        raise _refused(name, args, error) from error
    except OSError as error:  # the hub is out of reach
        raise InvalidInput(
            f"model {name!r}: pretrained weights could not be fetched ({error})",
            "check the network, or name a local file: model.weights",
            field="model.name",
        ) from error
    network = _of_family(body, name, args, classes, image_size)
    _check_grid(image_size, network.architecture.patch)
    known = getattr(body, "pretrained_cfg", {}).get("num_classes")
    if trained_head and weights is None and known != classes:
        raise _random_head(f"model.name: the pretrained {name}", str(known), classes, "model.name")
    if weights is not None:
        _load_local(network.body, weights, classes if trained_head else None)
    return network


def outline(name: str, *, image_size: int, args: Mapping[str, Any]) -> Architecture | SwinArchitecture:
    """The architecture of a timm name and its arguments, without the memory or the time of its weights. Its number of
    classes means nothing. Raises: InvalidInput as `create`.
    """
    with torch.device("meta"):
        return create(name, classes=2, image_size=image_size, args=dict(args)).architecture


def check_trained(name: str) -> None:
    """Raises: InvalidInput when timm has no trained weights of this model; whether they can be fetched is not tried."""
    if ":" not in name and not timm.is_model_pretrained(name):
        raise InvalidInput(
            f"model.pretrained: timm has no trained weights of {name}",
            "set pretrained: false, or name a file of your own: model.weights",
            field="model.pretrained",
        )


def trained_size(name: str) -> tuple[int, bool]:
    """(pixels a side of the images that a timm model is for, whether timm has trained weights of it). Raises:
    InvalidInput as `create`.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that is not known
        hint = families.meant(name.partition(".")[0])
        raise InvalidInput(f"model.name: {error}", hint, field="model.name") from error
    size = 224 if config is None else int(config.input_size[-1])
    outline(name, image_size=size, args={})
    return size, ":" in name or timm.is_model_pretrained(name)


@overload
def rebuild(architecture: Architecture, *, drop_path: float = 0.0, device: str = "cpu") -> ViT: ...
@overload
def rebuild(architecture: SwinArchitecture, *, drop_path: float = 0.0, device: str = "cpu") -> Swin: ...
def rebuild(architecture: Architecture | SwinArchitecture, *, drop_path: float = 0.0, device: str = "cpu") -> Network:
    """A clean network of exactly these widths, weights not yet loaded. On device "meta" it costs nothing and can be
    counted.
    """
    name, args, classes, size = architecture.model, architecture.args, architecture.classes, architecture.image_size
    kwargs = {**args, "num_classes": classes, "img_size": size, "drop_path_rate": drop_path}
    with torch.device(device):
        try:
            dense = _of_family(timm.create_model(name, pretrained=False, **kwargs), name, args, classes, size)
        except RuntimeError as error:
            raise InvalidInput(f"architecture names the model {name!r}: {error}", AGAIN) from error
        _check_record(dense.architecture, architecture)
        match dense, architecture:
            case ViT(), Architecture():
                if dense.architecture != replace(architecture, tokens=()):
                    vit.resize(dense.body, architecture)
                network: Network = ViT(dense.body, architecture)
            case Swin(), SwinArchitecture():
                if dense.architecture != architecture:
                    swin.resize(dense.body, architecture)
                network = Swin(dense.body, architecture)
        if len(architecture.blocks) < len(dense.architecture.blocks):
            _set_drop_path(network, drop_path)
    return network


def _check_record(dense: Architecture | SwinArchitecture, architecture: Architecture | SwinArchitecture) -> None:
    """What a cut cannot have changed must be as timm makes it, and every block must be one of its blocks."""
    have, stated = _uncut(dense), _uncut(architecture)
    for field, value in have.items():
        if stated.get(field) != value:
            raise InvalidInput(
                f"the architecture record is not that of {dense.model}: {field} {stated.get(field)} for {value}", AGAIN
            )
    places = [(stage, block.place) for stage, block in zip(architecture.stage_of, architecture.blocks, strict=True)]
    known = [(stage, block.place) for stage, block in zip(dense.stage_of, dense.blocks, strict=True)]
    beyond = [place for place in places if place not in known]
    if beyond:
        raise InvalidInput(
            f"architecture names block {beyond[0][1]} of stage {beyond[0][0]}, {dense.model} has {len(known)} blocks",
            AGAIN,
        )


def _uncut(architecture: Architecture | SwinArchitecture) -> dict[str, Any]:
    """The facts of a record that no cut and no token reduction changes."""
    facts = {name: value for name, value in architecture.as_json().items() if name not in ("embed", "blocks", "tokens")}
    if isinstance(architecture, SwinArchitecture):
        facts |= {"stages": len(architecture.stages), "windows": architecture.windows}
    return facts


def _set_drop_path(network: Network, rate: float) -> None:
    """Stochastic depth over the blocks that are left, as timm gives it to all: 0 at the first, `rate` at the last."""
    for block, own in zip(network.blocks, calculate_drop_path_rates(rate, len(network.blocks)), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(own) if own > 0 else nn.Identity() for _ in range(2))


def _of_family(body: nn.Module, name: str, args: dict[str, Any], classes: int, image_size: int) -> Network:
    """The network around timm's. Raises: InvalidInput for a class of timm that no family holds."""
    families.check_module(name, type(body).__module__)
    if isinstance(body, VisionTransformer):
        vit.adopt(body)
        return ViT(body, vit.describe(body, name, args, classes, image_size))
    if isinstance(body, SwinTransformer | SwinTransformerV2):
        swin.adopt(body)
        return Swin(body, swin.describe(body, name, args, classes, image_size))
    raise InvalidInput(
        f"{name} ({type(body).__name__} of timm) is of no family that is known here",
        families.WORKING,
        field="model.name",
    )


def _check_grid(image_size: int, patch: object) -> None:
    """timm's patch embedding would leave out the pixels at the border in silence."""
    if isinstance(patch, int) and patch > 0 and image_size % patch:
        raise InvalidInput(
            f"data.image_size {image_size} is no multiple of patch_size {patch}",
            f"patches must cover the image exactly: {max(patch, image_size - image_size % patch)} does",
            field="data.image_size",
        )


def _refused(name: str, args: dict[str, Any], error: Exception) -> InvalidInput:
    """What timm's refusal is about, as far as it can be told: the name, the family, or one of the arguments."""
    if "pretrained tag" in str(error) or (":" not in name and not timm.is_model(name)):
        return InvalidInput(f"model.name: {error}", families.meant(name), field="model.name")
    module = None if ":" in name else timm.models.model_entrypoint(name).__module__
    if "pretrained weights exist" in str(error) and module is not None:
        return InvalidInput(
            f"model: timm has no pretrained weights of {name}",
            "leave pretrained out, or name a local file: model.weights",
            field="model.pretrained",
        )
    if module not in families.SWIN and ("embed_dim" in args or "num_heads" in args):
        default = outline(name, image_size=224, args={})
        assert isinstance(default, Architecture)
        width = args.get("embed_dim", default.embed)
        heads = args.get("num_heads", default.blocks[0].heads)
        if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
            return InvalidInput(
                f"model.args: embed_dim {width} is no multiple of num_heads {heads}",
                "every head takes an equal share of the width",
                field="model.args.embed_dim" if "embed_dim" in args else "model.args.num_heads",
            )
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        message, field = f"model.args: {name} does not take {unknown[1]!r}", f"model.args.{unknown[1]}"
    else:
        message, field = f"model.args: {name} cannot be built with them: {error}", "model.args"
    return InvalidInput(message, "they go to the model's class in timm as keyword arguments", field=field)


def _random_head(who: str, answers: str, classes: int, field: str) -> InvalidInput:
    return InvalidInput(
        f"{who} answers {answers} classes, this data has {classes}: its head would be random",
        "train it on this data: put train before prune",
        field=field,
    )


def _load_local(body: nn.Module, path: Path, classes: int | None) -> None:
    """A checkpoint of this timm model; other patch grids are resampled by timm, a head of another size is left
    random, where the number of classes does not have to fit.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise InvalidInput(
            f"model.weights: {path} is not a .safetensors file", "convert it; pickled checkpoints are not read"
        )
    tensors, _ = read_tensors(path)
    match body:
        case SwinTransformer():
            loaded = swin_transformer.checkpoint_filter_fn(tensors, body)
        case SwinTransformerV2():
            loaded = swin_transformer_v2.checkpoint_filter_fn(tensors, body)
        case _:
            loaded = vision_transformer.checkpoint_filter_fn(tensors, body)
    own = body.state_dict()
    for name in [f"{head}.{part}" for head in (*vit.HEADS, swin.HEAD) for part in ("weight", "bias")]:
        if name in own and (name not in loaded or loaded[name].shape != own[name].shape):
            if classes is not None:
                answers = str(len(loaded[name])) if name in loaded else "no"
                raise _random_head(f"model.weights: {path}", answers, classes, "model.weights")
            loaded[name] = own[name]
    load_state(body, loaded, path)
