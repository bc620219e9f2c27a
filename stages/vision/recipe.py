"""How a network is trained, as settings: every field with its unit and its reason. Imports no torch, so that a
pipeline can be checked in milliseconds.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..methods import InvalidInput

# The sections of a RandAugment text after the first, which is "rand" (timm.data.auto_augment.rand_augment_transform).
RAND_SECTION = re.compile(
    r"m\d+ | n[1-9]\d* | p(0\.\d+|1(\.0*)?) | mstd\d+(\.\d*)? | mmax\d+ | inc[01] | t(weights|3aw?)", re.VERBOSE
)
RAND_SECTIONS = "m9 n2 p0.5 mstd0.5 mmax10 inc1"  # examples, for messages

# Settings of a Recipe that cost nothing, neither time nor memory, whatever they are.
COSTLESS = ("lr", "min_lr", "schedule", "layer_decay", "weight_decay", "warmup", "smoothing")

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

    @property
    def still(self) -> bool:
        """Whether it leaves every image as it is."""
        return not (self.shift or self.flip or self.erase) and self.zoom == 1 and self.rand is None

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


class Schedule(Settings):
    """The shape of the learning rate after warm-up. Shares are of all steps, warm-up included."""

    shape: Literal["cosine", "linear", "poly", "tanh", "step", "multistep", "constant"] = Field(
        "cosine",
        description="cosine, linear, poly and tanh fall from lr to min_lr; step and multistep fall by a factor at a "
        "time; constant stays at lr. A one-cycle policy, as in Sparse then Prune, is cosine with a longer warmup",
    )
    power: float | None = Field(
        None, gt=0, le=10, description="of the remaining share, poly only, which needs it; 1 is linear"
    )
    every: float | None = Field(
        None, gt=0, lt=1, description="share of the steps from one fall to the next, step only, which needs it"
    )
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        None, description="shares of the steps at which it falls, ascending, multistep only, which needs them"
    )
    factor: float | None = Field(
        None, gt=0, lt=1, description="what a fall multiplies it by, step and multistep only; null: 0.1"
    )

    @model_validator(mode="after")
    def _of_the_shape(self) -> Schedule:
        owners = {"power": ("poly",), "every": ("step",), "at": ("multistep",), "factor": ("step", "multistep")}
        for name, shapes in owners.items():
            if getattr(self, name) is not None and self.shape not in shapes:
                raise ValueError(f"{name}: {self.shape} has none; it belongs to {' and '.join(shapes)}")
        if self.shape == "poly" and self.power is None:
            raise ValueError("power: poly needs it, such as 2.0")
        if self.shape == "step" and self.every is None:
            raise ValueError("every: step needs it, the share of the steps from one fall to the next")
        if self.shape == "multistep" and (not self.at or list(self.at) != sorted(set(self.at))):
            raise ValueError("at: multistep needs shares of the steps in ascending order, such as [0.5, 0.75]")
        return self


class StopEarly(Settings):
    """Ends a training that no longer gets better on the calibration split, and hands on its best epoch."""

    patience: int = Field(ge=1, description="epochs without a gain after which training ends")
    gain: float = Field(0.0, ge=0, lt=1, description="top-1 that an epoch must gain on the best one to count as better")


class Recipe(Settings):
    """Optimiser, schedule, regularisation and augmentation, all through timm."""

    epochs: float | None = Field(None, gt=0, le=10_000, description="passes over the kept examples; this or steps")
    steps: int | None = Field(None, ge=1, description="optimiser steps; this or epochs")
    batch_size: int = Field(64, ge=1, le=65_536, description="images a step")
    accumulate: int = Field(
        1,
        ge=1,
        le=65_536,
        description="parts that a step's images go through the network in, one after the other, for less memory; the "
        "gradient is that of the whole step (but for the batch statistics of an LV-ViT's stem)",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of the forward and its backward (torch.autocast); weights, losses, penalties, average and "
        "optimiser are fp32 in all three; fp16 scales the loss, and leaves out a step whose gradients overflow",
    )
    compile: bool = Field(
        False,
        description="torch.compile for forward and backward; every shape and level of tokens is compiled once a run, "
        "for up to minutes; pays in long runs on a GPU",
    )
    optimizer: Optimizer = Field("adamw", description="timm's optimiser of that name; these resume bit for bit")
    lr: float = Field(1e-3, gt=0, description="peak learning rate, after warm-up; not scaled by batch size")
    min_lr: float = Field(1e-5, ge=0, description="learning rate where warm-up begins, and where the schedule ends")
    schedule: Schedule = Field(default_factory=Schedule, description="how the learning rate falls after warm-up")
    layer_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="learning rate of a block as a share of the next one's, the head at lr and the embedding last; for "
        "pretrained networks; null: the same for all",
    )
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
    augment: Augmentation = Field(default_factory=Augmentation, description="augmentation of the training images")

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

    @model_validator(mode="after")
    def _pairs(self) -> Recipe:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"batch_size: mixup and cutmix mix images in pairs, and {self.batch_size} is odd; "
                f"take {self.batch_size + 1}"
            )
        return self

    @model_validator(mode="after")
    def _parts_of_a_step(self) -> Recipe:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: {self.batch_size} images a step make no {self.accumulate} parts; "
                f"accumulate can be at most {self.batch_size}"
            )
        return self

    @property
    def same_views(self) -> bool:
        """Whether an image's view is the same in every pass, since nothing about it is drawn."""
        return not (self.mixup or self.cutmix) and self.augment.still

    def idle(self) -> dict[str, str]:
        """Fields without effect, and why."""
        falls = self.schedule.shape in ("cosine", "linear", "poly", "tanh")
        return {} if falls or self.warmup else {"min_lr": f"schedule.shape is {self.schedule.shape}, and warmup is 0"}

    def total_steps(self, examples: int) -> int:
        """Optimiser steps for a pool of this size."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0) * math.ceil(examples / self.batch_size)))


def check_stop(
    stop: StopEarly | None, epochs: float | None, budget: str = "epochs", keep_epochs: tuple[int, ...] = ()
) -> None:
    """Refuse patience that cannot run out, and what an early end would leave undone. Raises: ValueError."""
    if stop is None:
        return
    if epochs is None:
        raise ValueError("stop_early: it looks after each epoch; give epochs instead of steps")
    if stop.patience >= epochs:
        raise ValueError(
            f"stop_early.patience: {stop.patience} epochs without a gain never come in {epochs:g}; "
            "lower it, or train longer"
        )
    if budget != "epochs":
        raise ValueError(f"stop_early: a training that may end early spends no equal {budget}; use budget: epochs")
    if keep_epochs:
        raise ValueError("keep_epochs: training may stop before these epochs; leave out keep_epochs or stop_early")


def check_compile(recipe: Recipe, looks: str | None) -> None:
    """Refuse to compile a network that a training looks into, and say what does: a compiled forward is not taken apart
    for those who look. Raises: ValueError.
    """
    if recipe.compile and looks is not None:
        raise ValueError(f"compile: {looks} looks into the forward, which a compiled one does not show; leave one out")


def check_processes(recipe: Recipe, processes: int, sharding: str, at: str) -> None:
    """Refuse a batch that so many processes cannot share, and what does not go with a network in parts.

    at: where the recipe stands in pipeline.yaml. Raises: InvalidInput.
    """
    size = recipe.batch_size
    if size < processes:
        raise InvalidInput(
            f"{at}.batch_size: there are more processes ({processes}) than images in a batch ({size})",
            "raise it to a multiple of launch.processes times nodes, or start fewer",
            field=f"{at}.batch_size",
        )
    if size % processes:
        raise InvalidInput(
            f"{at}.batch_size: {size} images cannot be divided evenly among {processes} processes",
            f"take a multiple of {processes}, such as {size - size % processes}",
            field=f"{at}.batch_size",
        )
    if (recipe.mixup or recipe.cutmix) and size < 2 * processes:
        raise InvalidInput(
            f"{at}.batch_size: images are mixed in pairs, and {size} make {size // 2} for {processes} processes",
            f"take {2 * processes} or more",
            field=f"{at}.batch_size",
        )
    if processes > 1 and recipe.compile:
        raise InvalidInput(
            f"{at}.compile: the network of one process is compiled, and there are {processes}",
            "set compile: false, or start one process",
            field=f"{at}.compile",
        )
    if processes > 1 and sharding == "fsdp2" and recipe.ema is not None:
        raise looks_at_whole_tensors(f"{at}.ema")
    if processes > 1 and sharding == "fsdp2" and recipe.precision == "fp16":
        raise InvalidInput(
            f"{at}.precision: an overflow is seen in whole gradients, and fsdp2 leaves each process a part",
            "use precision: bf16 or fp32, or launch.sharding: ddp",
            field=f"{at}.precision",
        )


def looks_at_whole_tensors(at: str) -> InvalidInput:
    """The refusal of a setting that does not go with a network in parts. at: where it stands in pipeline.yaml."""
    return InvalidInput(
        f"{at}: looks at whole tensors, and fsdp2 leaves each process a part of them",
        "leave it out, or use launch.sharding: ddp",
        field=at,
    )
