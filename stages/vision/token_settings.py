"""How many patch tokens go through a network, and along which connections they attend, as settings of `train` and
`finetune`. Imports no torch, so that a pipeline can be checked in milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .recipe import Settings


class Ramp(Settings):
    """From all tokens down to those that are kept, by a cosine (EViT, ICLR 2022, section 3.3)."""

    start: float = Field(1.0, gt=0, le=1, description="fraction kept until the ramp begins")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps before the ramp; EViT: 10 of 300 epochs")
    length: float = Field(0.33, gt=0, le=1, description="share of the steps on the ramp; EViT: 100 of 300 epochs")
    levels: int = Field(8, ge=1, le=64, description="equal steps down, so that a run has few different token counts")

    @model_validator(mode="after")
    def _ends_in_time(self) -> Ramp:
        if self.warmup + self.length > 1:
            raise ValueError(
                f"length: a ramp of {self.length:g} of the steps after {self.warmup:g} of them ends too late; "
                "warmup and length may add up to 1"
            )
        return self


class Tokens(Settings):
    """Token reduction inside the network, exported with it."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="blocks that reduce tokens between attention and MLP"
    )
    keep: float = Field(gt=0, lt=1, description="fraction of the patch tokens that reach a block kept by it")
    method: Literal["attention", "random", "tome"] = Field(
        "attention",
        description="attention: those with most attention stay; tome: those with like keys are merged; random: the "
        "control, which export refuses",
    )
    fuse: bool = Field(False, description="one token more, the sum of all that were dropped, weighted by attention")
    ramp: Ramp | None = Field(None, description="reach `keep` gradually; null: from the first step on")

    @model_validator(mode="after")
    def _coherent(self) -> Tokens:
        if self.fuse and self.method != "attention":
            raise ValueError(
                f"fuse: a fused token is weighted by attention, and method is {self.method}; leave fuse out, or use "
                "method: attention"
            )
        if self.method == "tome" and self.keep < 0.5:
            raise ValueError(
                f"keep: tome merges tokens in pairs, so that at least half of them stay, not {self.keep:g}; use more "
                "blocks and keep 0.5 or more"
            )
        if self.ramp is not None and self.ramp.start <= self.keep:
            raise ValueError(
                f"ramp.start: a ramp from {self.ramp.start:g} to keep {self.keep:g} does not go down; start above keep"
            )
        return self


class Connected(Settings):
    """Attention along the strongest connections between patch tokens. Of training only, and no faster on dense
    hardware: the whole map is computed and then covered.
    """

    keep: float = Field(
        gt=0,
        lt=1,
        description="fraction of the kept patch tokens that each goes on attending to, from the first step on",
    )
    mode: Literal["paper", "corrected"] = Field(
        "corrected",
        description="paper: the released formula, in which covered keys can take most of the weight; corrected: "
        "covered before the softmax, and no token loses itself",
    )
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="blocks after which connections are chosen anew; null: those of tokens"
    )


def check_connected(attention: Connected | None, tokens: Tokens | None) -> None:
    """Refuse connections that no block decides about, or between tokens that do not stay what they are. Raises:
    ValueError.
    """
    if attention is None:
        return
    if attention.blocks is None and tokens is None:
        raise ValueError("attention.blocks: without tokens there are no blocks to take; name some")
    if tokens is not None and (tokens.fuse or tokens.method == "tome"):
        what = "tokens.fuse makes a token" if tokens.fuse else "tokens.method: tome makes tokens"
        raise ValueError(
            f"attention: {what} that no attention map is about; leave attention out, or use tokens.method: attention "
            "without fuse"
        )
