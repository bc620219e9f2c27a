"""`sievit init`: a commented pipeline.yaml to start from. What it writes loads and plans without a change (a test)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from .errors import InputError, UsageError

DIGITS = "builtin:digits"
READERS = ("builtin:", "torch/", "hfds/")  # sources that are a name, not a path

# A network small enough for digits on a laptop, and the pretrained one that is the usual choice for photographs.
DIGITS_MODEL = (
    "{name: deit_tiny_patch16_224, pretrained: false, args: {patch_size: 8, embed_dim: 192, depth: 3, num_heads: 3}}"
)
PHOTO_MODEL = "deit_tiny_patch16_224"
# Few images need many small steps; a mirrored 2 is no 2.
SMALL = "batch_size: 32, augment: {flip: false, shift: 0.05}"

TEMPLATE = Template("""\
# The whole way from labelled images to a small, fast ONNX file.
#   sievit plan       what would run, and why
#   sievit run        run it; what is unchanged is taken from artifacts/
#   sievit schema     the JSON schema of this file, for editors
name: $name
seed: 0

# builtin:digits | a folder with a folder per class | a .tar of one | torch/<dataset> | hfds/<dataset>
data: {source: $source, image_size: $size}

# Several processes share training, scoring and evaluation, on cuda one a GPU:
# launch: {processes: 2}

# a timm model (ViT, DeiT); args go to timm.create_model
model: $model

# Each stage reads the nearest earlier one that makes what it needs. `null` leaves one out.
stages:
  # Which images, and which patches of each, are worth training on. keep = fraction kept.
  ticket:    {examples: {method: el2n, keep: 0.9}, patches: {method: saliency, keep: $patches}$proxy}
  # Train on them; group_lasso pushes whole heads and MLP units towards zero, so that they can be cut.
  train:     {epochs: $epochs, weights: {method: group_lasso, strength: 1.0e-5}$augment}
  # Cut heads, MLP units and widths until this fraction of the multiply-accumulates is left.
  prune:     {importance: taylor, target: {macs: $macs}}
  # Recover, taught by the model before the cut.
  finetune:  {epochs: $recover, distill: {teacher: train}$augment}
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
gates: {accuracy_drop: $drop, speedup: 2.0}
""")


def starter(name: str, *, source: str = DIGITS, model: str | None = None) -> str:
    """The text of a pipeline.yaml named `name` for `source`; `model` is a timm name, taken pretrained."""
    digits = source == DIGITS and model is None
    block = (
        DIGITS_MODEL
        if digits
        else f"{{name: {json.dumps(model or PHOTO_MODEL, ensure_ascii=False)}, pretrained: true}}"
    )
    return TEMPLATE.substitute(
        name=_slug(name),
        source=json.dumps(source, ensure_ascii=False),
        size=32 if digits else 224,
        model=block,
        proxy=f", proxy: {{epochs: 4, {SMALL}}}" if digits else "",
        patches=0.75 if digits else 0.5,
        epochs="14" if digits else "10",
        drop="0.03" if digits else "0.01",  # few test images leave more to chance
        macs=0.35 if digits else 0.5,
        recover="10, lr: 1.0e-3" if digits else "5",
        augment=f", {SMALL}" if digits else ", augment: {flip: false}" if source == DIGITS else "",
    )


def write_starter(target: Path, *, data: str = DIGITS, model: str | None = None, force: bool = False) -> Path:
    """Write `target` (a .yaml file, or a folder that gets a pipeline.yaml) and return the file.

    Raises UsageError when the file exists and force is False, InputError when `data` is a path to nothing.
    """
    target = target.resolve()
    path = target if target.suffix in {".yaml", ".yml"} else target / "pipeline.yaml"
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="name another file, or --force to overwrite it")
    text = starter(path.parent.name, source=_source(data, path.parent), model=model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return path


def _source(data: str, base: Path) -> str:
    """`data` as pipeline.yaml must say it: names as they are, paths relative to the file's folder where they can be."""
    if data.startswith(READERS):
        return data
    path = Path(data).resolve()
    if not path.exists():
        raise InputError(
            f"no data at {data}",
            hint="a folder with a folder per class, a .tar of one, builtin:digits, torch/<dataset> or hfds/<dataset>",
        )
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _slug(name: str) -> str:
    """`name` as a pipeline may be called: lower case letters, digits, dots, dashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "pipeline"
