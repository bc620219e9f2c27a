"""How a network is trained, as settings: every field with its unit and its reason. Imports no torch, so that a
pipeline can be checked in milliseconds.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

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


class Swap(Settings):
    """A fixed number of examples; by forgetting, the easiest go and removed ones come back (Tri-Level E-ViT, 2023)."""

    policy: Literal["swap"] = Field(description="swap by forgetting counts")
    mode: Literal["paper", "corrected"] = Field(
        "corrected",
        description="paper: an answer is judged on the view as it was trained on, mixed or not, and among equally "
        "forgotten examples those with the flattest attention go; corrected: an answer counts where more than half of "
        "the view is the example's own, and lots decide between equals",
    )
    removed: float = Field(0.2, gt=0, lt=1, description="fraction of the examples that is out at any time")
    swap: float = Field(0.05, gt=0, lt=1, description="fraction of the examples that goes, and comes back, at a swap")
    every: int = Field(ge=1, description="epochs from one swap to the next")
    until: int = Field(ge=1, description="epoch after which no more swaps are made")

    @model_validator(mode="after")
    def _enough_on_both_sides(self) -> Swap:
        if self.swap > self.removed:
            raise ValueError(
                f"swap: {self.swap:g} of the examples would come back, but only {self.removed:g} are out; "
                f"give swap at most {self.removed:g}"
            )
        if self.removed + self.swap >= 1:
            raise ValueError(
                f"removed: {self.removed:g} out and {self.swap:g} to go leave no example that stays; "
                "the two must add up to less than 1"
            )
        if self.every > self.until:
            raise ValueError(f"every: the first swap would come after epoch {self.every}, swaps end at {self.until}")
        return self


class InfoBatch(Settings):
    """Each pass drops a share of the examples with a low loss and rescales the others' (Qin et al., ICLR 2024)."""

    policy: Literal["infobatch"] = Field(description="unbiased soft pruning")
    prune: float = Field(0.5, gt=0, lt=1, description="share dropped of the examples whose loss is below the mean")
    anneal: float = Field(0.125, ge=0, lt=1, description="share of the epochs, at the end, that see every example")


class Subset(Settings):
    """A fresh random subset in each pass, the control of the other two."""

    policy: Literal["random"] = Field(description="a fresh random subset each epoch")
    keep: float = Field(gt=0, lt=1, description="fraction of the examples that a pass sees")


ExamplePolicy = Annotated[Swap | InfoBatch | Subset, Field(discriminator="policy")]


def check_examples(policy: Swap | InfoBatch | Subset | None, epochs: float | None, budget: str) -> None:
    """Refuse a policy that contradicts the length of the training. Raises: ValueError."""
    if policy is None:
        return
    if isinstance(policy, InfoBatch) and budget != "epochs":
        raise ValueError(
            f"budget: {budget} cannot be kept with infobatch: what a pass takes is known only when it begins; "
            "use budget: epochs"
        )
    if epochs is None or epochs != int(epochs):
        raise ValueError(
            f"examples: the policy {policy.policy} acts between passes; give epochs as a whole number"
            + (" instead of steps" if epochs is None else f", not {epochs:g}")
        )
    if isinstance(policy, Swap) and policy.every >= epochs:
        raise ValueError(f"examples.every: a swap every {policy.every} epochs never comes in {epochs:g}")
    if isinstance(policy, Swap) and policy.until >= epochs:
        raise ValueError(
            f"examples.until: swaps until epoch {policy.until}, but training ends after {epochs:g}; "
            f"until can be at most {epochs - 1:g}"
        )
    if isinstance(policy, InfoBatch) and pruned_epochs(policy.anneal, int(epochs)) < 1:
        raise ValueError(
            f"examples: infobatch would drop nothing: of {epochs:g} epochs the first sees every example, and so does "
            f"the last {policy.anneal:g} of them; raise epochs or lower anneal"
        )


def pruned_epochs(anneal: float, epochs: int) -> int:
    """Epochs in which infobatch drops examples: not the first, and none that reaches into the last `anneal` share."""
    return max(0, math.floor((1 - anneal) * epochs + 1e-9) - 1)
