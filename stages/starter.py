"""A commented pipeline.yaml to start from, its settings chosen by what was seen of the images, the reasons beside them.

What it writes loads, plans and passes every check before a run without a change (a test).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING, Literal

from .targets import Target

if TYPE_CHECKING:
    from .vision.census import Census

DIGITS = "builtin:digits"
SMALL_SIDES = (
    (48, 32),
    (96, 64),
)  # shorter sides below the first are shown in so many pixels, by a network of their own
FEW, SOME = 2_500, 25_000  # training images: up to these, small and middling batches
TEST_FRACTION, CALIBRATION = 0.25, 0.1  # what the data block sets aside when it says nothing
ERROR = 0.025  # of the answers, where a gate needs an idea of the standard error
PACKED = "A Swin sees the other patches blanked; `mosaic` saves their time for a keep whose patches fill a square."
UNTIL = {
    "macs": "this fraction of the multiply-accumulates is left",
    "params": "this fraction of the parameters is left",
    "size_mb": "the FP32 file has at most so many MB",
    "latency_ms": "the FP32 file takes at most so many milliseconds here (CPU, batch 1, 1 thread)",
    "speedup": "the FP32 file is so many times faster here (CPU, batch 1, 1 thread)",
}

TEMPLATE = Template("""\
# The whole way from labelled images to a small, fast ONNX file.
#   sievit plan       what would run, and why
#   sievit run        run it; what is unchanged is taken from artifacts/
#   sievit schema     the JSON schema of this file, for editors
name: $name
seed: 0
device: $device      # auto | cpu | cuda

# builtin:digits | a folder with a folder per class | a .tar of one | torch/<dataset> | hfds/<dataset>
$about
data: {$data}

# Several processes share training, scoring and evaluation, on cuda one a GPU:
# launch: {processes: 2}

# a timm model (ViT, DeiT, Swin, LV-ViT); args go to timm.create_model
model: $model

# Each stage reads the nearest earlier one that makes what it needs. `null` leaves one out.
stages:
  # Which images, and which patches of each, are worth training on. keep = fraction kept.
  ticket:    {examples: {method: el2n, keep: 0.9}, patches: {method: saliency, keep: $patches}$proxy}
  # Train on them; group_lasso pushes whole heads and MLP units towards zero, so that they can be cut.
  # $pace
  train:     {epochs: $epochs, weights: {method: group_lasso, strength: 1.0e-5}$packing$recipe}
  # Cut heads, MLP units and widths until $until.
  prune:     {importance: taylor, target: {$target}}
  # Recover, taught by the model before the cut.
  finetune:  {epochs: $recover, distill: {teacher: train}$recipe}
  # Write ONNX and check it against torch on images that neither has seen.
  export:    {opset: 20}
  # INT8, unless it loses more than this fraction of top-1 or is not faster here.
  quantize:  {max_drop: 0.01}
  # Accuracy and latency of the files of all arms, interleaved.
  benchmark: {providers: [cpu], batch_sizes: [1, 8], threads: [1]}

# The same pipeline with other settings; the report sets them side by side. Equal stages are made once.
arms:
  dense:  {ticket: {examples: {keep: 1.0}, patches: {keep: 1.0}}, train: {weights: null}, prune: null, quantize: null}
  random: {ticket: {examples: {method: random}, patches: {method: random}}}

# `sievit run` ends with exit code 6 when one is missed: at most this fraction of top-1 lost, at least this speed-up.
# $gate
gates: {accuracy_drop: $drop, speedup: $speedup}
""")


@dataclass(frozen=True, slots=True)
class Model:
    """A timm model. size: pixels a side of the images that it is for; trained: whether timm has trained weights."""

    name: str
    size: int
    trained: bool


PHOTO_MODEL = Model("deit_tiny_patch16_224", 224, True)  # the usual first choice for photographs


@dataclass(frozen=True, slots=True)
class Wish:
    """What a pipeline is wanted for. source: as the data block names it; model: None for what suits the images."""

    source: str = DIGITS
    model: Model | None = None
    target: Target | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def plain_digits(self) -> bool:
        """The project's own example, whose settings were tried."""
        return self.source == DIGITS and self.model is None

    @property
    def swin(self) -> bool:
        """Whether a Swin is wished for, which ranks no patches and takes tickets in a way of its own."""
        return self.model is not None and self.model.name.startswith("swin")


def starter(name: str, wish: Wish, census: Census | None = None) -> str:
    """The text of a pipeline.yaml. name: of the pipeline, made to fit; census: what was seen of the images, None where
    nobody looked.
    """
    size, model, why = _network(wish, census)
    target = wish.target or Target(macs=0.35 if wish.plain_digits else 0.5)
    epochs, recover, recipe, pace = _pace(wish, census)
    drop, gate = _gate(wish, census)
    data = {"source": json.dumps(wish.source, ensure_ascii=False), "image_size": size}
    if census is not None and census.broken:
        data["bad_images"] = "skip"
    about = [*_seen(census), f"image_size {size}: {why}"]
    return TEMPLATE.substitute(
        name=slug(name),
        device=wish.device,
        about="\n".join(f"# {line}" for line in about),
        data=", ".join(f"{key}: {value}" for key, value in data.items()),
        model=model,
        patches=0.75 if wish.plain_digits else 0.5,
        proxy=_proxy(wish, recipe),
        pace=pace + (f"\n  # {PACKED}" if wish.swin else ""),
        epochs=epochs,
        packing=", patches: zero" if wish.swin else "",
        recipe=recipe,
        until=UNTIL[target.kind],
        target=f"{target.kind}: {target.asked:g}",
        recover=f"{recover}, lr: 1.0e-3" if wish.plain_digits else recover,
        gate=gate,
        drop=drop,
        speedup=f"{target.asked:g}" if target.kind == "speedup" else "2.0" if wish.plain_digits else "1.5",
    )


def _network(wish: Wish, census: Census | None) -> tuple[int, str, str]:
    """(image size, the model block, why this size)."""
    if wish.plain_digits:
        return 32, _scratch(patch_size=8, depth=3), "16 patches of digits that were 8 x 8, for a network of 3 blocks"
    side = census.side if census is not None else None
    if wish.model is None and side is not None:
        for below, size in SMALL_SIDES:
            if side < below:
                why = (
                    f"the images have {side} px (median of shorter sides); 224 would cost {_times(size)} times as much"
                )
                return size, _scratch(patch_size=size // 8, depth=6), why
    model = wish.model or PHOTO_MODEL
    seen = f"; the images have {side} (median of the shorter sides)" if side is not None else ""
    note = "" if model.trained else "  # timm has no trained weights of it: training begins at random"
    return (
        model.size,
        f"{{name: {json.dumps(model.name)}, pretrained: {json.dumps(model.trained)}}}{note}",
        f"what {model.name} {'was trained at' if model.trained else 'is made for'}{seen}",
    )


def _times(size: int) -> int:
    return round((224 / size) ** 2)


def _scratch(*, patch_size: int, depth: int) -> str:
    """A small network for small images, to be trained from nothing."""
    args = f"{{patch_size: {patch_size}, embed_dim: 192, depth: {depth}, num_heads: 3}}"
    return f"{{name: {PHOTO_MODEL.name}, pretrained: false, args: {args}}}"


def _pace(wish: Wish, census: Census | None) -> tuple[int, int, str, str]:
    """(epochs of train, of finetune, how images are fed to both, why)."""
    if wish.plain_digits:
        recipe = ", batch_size: 32, augment: {flip: false, shift: 0.05}"
        return 14, 10, recipe, "Few images need many small steps; a mirrored 2 is no 2."
    flip = ", augment: {flip: false}" if wish.source == DIGITS else ""
    if census is None:
        return 10, 5, flip, "More epochs help as long as top-1 still rises."
    images = round(census.total * (1 - CALIBRATION) * (1 if census.test is not None else 1 - TEST_FRACTION))
    small = wish.model is None and census.side is not None and census.side < SMALL_SIDES[-1][0]
    wanted, least, most = (60_000, 10, 60) if small else (20_000, 3, 30)
    epochs = min(most, max(least, round(wanted / max(1, images))))
    batch, why = (
        (32, "few images need many small steps") if images <= FEW else (64, "") if images <= SOME else (128, "")
    )
    start = "a network that begins at random" if small else "a pretrained network"
    pace = f"{epochs} epochs: {epochs * images:,} images in all, a beginning for {start}; more help while top-1 rises."
    if why:
        pace += f"\n  # Batches of {batch}: {why}."
    return epochs, max(2, epochs // 2), f", batch_size: {batch}{flip}", pace


def _proxy(wish: Wish, recipe: str) -> str:
    """The short runs that score images; a Swin ranks no patches, and another network's tickets are taken."""
    ranker = [f"model: {{name: {PHOTO_MODEL.name}}}"] if wish.swin else []
    settings = [*ranker, *([f"epochs: 4{recipe}"] if recipe else [])]
    return f", proxy: {{{', '.join(settings)}}}" if settings else ""


def _gate(wish: Wish, census: Census | None) -> tuple[float, str]:
    """(the largest loss of top-1, why): one point and two standard errors of a difference between two files."""
    if census is None and not wish.plain_digits:
        return 0.01, "One point; with few test images chance alone takes more."
    images = 450 if census is None else census.test or round(census.total * TEST_FRACTION)
    error = math.sqrt(2 * ERROR * (1 - ERROR) / max(1, images))
    drop = round(round((0.01 + 2 * error) / 0.005) * 0.005, 3)
    return (
        drop,
        f"One point, and two standard errors ({100 * error:.1f} each) of a difference on {images:,} test images.",
    )


def _seen(census: Census | None) -> list[str]:
    """What the images are like, in lines."""
    if census is None:
        return []
    fewest, most = (pick(census.images, key=lambda name: census.images[name]) for pick in (min, max))
    low, high = census.images[fewest], census.images[most]
    each = f"{low:,} each" if low == high else f"{low:,} ({_plain(fewest)}) to {high:,} ({_plain(most)})"
    test = "" if census.test is None else f", and {census.test:,} for testing"
    lines = [f"{census.total:,} images in {len(census.images):,} classes, {each}{test}."]
    if high >= 5 * low:
        lines.append(f"They are out of balance: top-1 is mostly that of the large classes, such as {_plain(most)}.")
    if census.broken:
        lines.append(
            f"{len(census.broken):,} of {census.looked:,} opened are broken; bad_images: skip leaves such out."
        )
    elif not census.whole:
        lines.append(
            f"{census.looked:,} of them were opened, and none is broken; refuse (the default) names one that is."
        )
    return lines


def _plain(name: str) -> str:
    """A class's name in a comment: no line breaks, and short."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return text if len(text) <= 30 else f"{text[:29]}…"


def slug(name: str) -> str:
    """`name` as a pipeline may be called: lower case letters, digits, dots, dashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "pipeline"
