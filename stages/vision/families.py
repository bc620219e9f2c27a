"""Which of timm's models go through the pipeline, and why others do not: by the module of timm that a model comes from.

A family goes through when its tokens can be ranked and left out, its widths cut so that the cut network equals the
masked one, and its cost stated from the widths. A reason stands here for those that a user may well ask for.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import timm

from ..methods import InvalidInput
from .lvvit import LVViT

VIT = ("timm.models.vision_transformer", "timm.models.deit", LVViT.__module__)
SWIN = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")
WORKING = "models that work: vit_*, deit_*, deit3_*, distilled ones too; lvvit_t, lvvit_s, lvvit_m; swin_*, swinv2_*"

PAIRS = (
    "its attention adds a learned bias for every pair of places in the whole grid, "
    "which the patches of a ticket would have to bring along"
)
REASONS = {
    "pit": "PiT pools its tokens by a strided convolution over the whole grid between its stages, "
    "and the patches of a ticket are no grid",
    "naflexvit": "NaFlexViT takes images of any shape as lists of patches, and tickets and cuts need one fixed grid; "
    "the vit_* of the same size has one",
    "eva": "its attention turns queries and keys by their place in the whole grid (rotary positions), "
    "which the patches of a ticket would have to bring along",
    "beit": PAIRS,
    "vision_transformer_relpos": PAIRS,
    "vision_transformer_sam": "its attention works in windows of the whole grid, "
    "and the patches of a ticket are no grid",
    "vision_transformer_hybrid": "its patches come from a convolutional network, whose widths are not cut "
    "and whose cost is not counted here",
    "swin_transformer_v2_cr": "it is another Swin V2 than swinv2_*, with its own blocks and attention",
}


def meant(name: str) -> str:
    """The hint for a model name that timm does not have: those of the families here that come nearest."""
    modules = [module.rpartition(".")[2] for module in (*VIT, *SWIN)]
    close = nearest(name, [known for module in modules for known in timm.list_models(module=module)])
    return f"did you mean {', '.join(close)}?" if close else WORKING


def nearest(name: str, known: Sequence[str], most: int = 3) -> list[str]:
    """Names that a user may have meant, the nearest first. timm's end in patch and image sizes, which people leave out
    (deit_tiny), so that a name also counts by its beginning, a little less than by the whole.
    """
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(name.lower().replace("-", "_"))

    def likeness(candidate: str) -> float:
        matcher.set_seq1(candidate)
        whole = matcher.ratio()
        matcher.set_seq1(candidate[: len(name)])
        return max(whole, matcher.ratio() - 0.05)

    scores = {candidate: likeness(candidate) for candidate in known}
    close = [candidate for candidate in known if scores[candidate] >= 0.7]
    # Of equals those that begin alike for longer.
    differs = {one: [a != b for a, b in zip(name, one, strict=False)] for one in close}
    return sorted(close, key=lambda one: (-scores[one], differs[one], len(one)))[:most]


def check_module(name: str, module: str) -> None:
    """module: of timm, where the model or its class is defined. Raises: InvalidInput for one outside the families."""
    if module in (*VIT, *SWIN):
        return
    reason = REASONS.get(module.rpartition(".")[2], "")
    message = f"{name} cannot be used: {reason}" if reason else f"{name} is of no family that is known here"
    raise InvalidInput(message, WORKING, field="model.name")
