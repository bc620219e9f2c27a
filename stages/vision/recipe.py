"""How a network is trained, as settings: every field with its unit and its reason. Imports no torch, so that a
pipeline can be checked in milliseconds.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The sections of a RandAugment text after the first, which is "rand" (timm.data.auto_augment.rand_augment_transform).
RAND_SECTION = re.compile(
    r"m\d+ | n[1-9]\d* | p(0\.\d+|1(\.0*)?) | mstd\d+(\.\d*)? | mmax\d+ | inc[01] | t(weights|3aw?)", re.VERBOSE
)
RAND_SECTIONS = "m9 n2 p0.5 mstd0.5 mmax10 inc1"  # examples, for messages

Optimizer = Literal["adamw", "sgd", "nadamw", "lion", "radam", "rmsprop", "adafactor", "muon", "adopt"]


class Settings(BaseModel):
    """Frozen and strict; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class Augmentation(Settings):
    """What a training image goes through before the network sees it."""

    shift: float = Field(
        0.125, ge=0, le=0.5, description="largest translation, as a fraction of the side; whole pixels, zero-filled"
    )
    zoom: float = Field(
        1.0, gt=0, le=1, description="smallest side of a random crop, as a fraction of the side; 1 never crops"
    )
    flip: bool = Field(
        True, description="mirror half of the images; off where left and right mean something, as in digits"
    )
    erase: float = Field(0.0, ge=0, le=1, description="probability of a box of noise (random erasing)")
    rand: str | None = Field(
        None,
        description='timm RandAugment text such as "rand-m9-mstd0.5-inc1"; with patch tickets its colour '
        "operations only",
    )

    @model_validator(mode="after")
    def _grammar(self) -> Augmentation:
        """timm passes over sections that it does not know, or fails on them when training begins."""
        name, *sections = ["rand"] if self.rand is None else self.rand.split("-")
        if name != "rand":
            raise ValueError(
                f"rand: {self.rand!r} is no RandAugment text of timm; write rand-m9-mstd0.5-inc1 or the like"
            )
        wrong = [s for s in sections if not RAND_SECTION.fullmatch(s)]
        if wrong:
            raise ValueError(
                f"rand: {wrong[0]!r} is no section of timm's RandAugment; its sections are {RAND_SECTIONS}"
            )
        return self


class Recipe(Settings):
    """Optimiser, schedule, regularisation and augmentation, all through timm."""

    epochs: float | None = Field(None, gt=0, le=10_000, description="passes over the kept examples; this or steps")
    steps: int | None = Field(None, ge=1, description="optimiser steps; this or epochs")
    batch_size: int = Field(64, ge=1, le=65_536, description="images a step")
    optimizer: Optimizer = Field("adamw", description="timm's optimiser of that name; these resume bit for bit")
    lr: float = Field(1e-3, gt=0, description="peak learning rate, after warm-up; not scaled by batch size")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at both ends of the cosine")
    weight_decay: float = Field(0.05, ge=0, description="on matrices only; biases, norms and tokens are left out")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps spent warming up")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null leaves gradients alone")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0 is off; needs whole images")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the weight average that is kept instead of the last weights"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth at the last block, rising linearly from 0")
    augment: Augmentation = Field(Augmentation(), description="augmentation of the training images")

    @model_validator(mode="after")
    def _one_duration(self) -> Recipe:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    @model_validator(mode="after")
    def _falling(self) -> Recipe:
        if self.min_lr > self.lr:
            field = "min_lr" if "min_lr" in self.model_fields_set else "lr"
            raise ValueError(f"{field}: min_lr {self.min_lr:g} is above lr {self.lr:g}, the peak; lower it or raise lr")
        return self

    def total_steps(self, examples: int) -> int:
        """Optimiser steps for a pool of this size."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * math.ceil(examples / self.batch_size)))
