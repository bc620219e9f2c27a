"""Masks on weights as settings: every field with its unit and its reason. Imports no torch, as recipe.py."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..methods import InvalidInput
from .recipe import Settings


class Magnitude(Settings):
    """The weights of the largest magnitude stay, at once or in a gradual cut; or as many random ones, the control."""

    method: Literal["magnitude", "random"] = Field(
        description="magnitude: the largest stay; random: as many of each tensor, drawn by lot"
    )
    keep: float = Field(gt=0, lt=1, description="fraction of the weights that is kept in the end")
    scope: Literal["global", "layer"] = Field(
        "global", description="global: all tensors are ranked together; layer: the same fraction of each"
    )
    schedule: Literal["one_shot", "cubic"] = Field(
        "cubic", description="one_shot: all at begin; cubic: from begin to end, less and less at a time"
    )
    begin: float = Field(
        0.2, ge=0, le=1, description="share of the steps before the first cut; 1 with one_shot: after training"
    )
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which the cubic schedule is over")
    every: int = Field(20, ge=1, description="steps from one cut of the cubic schedule to the next")
    also: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="further fractions kept whose accuracy is measured when the cut comes after training; the network "
        "that is saved has `keep` alone",
    )
    mode: Literal["paper", "corrected"] = Field(
        "corrected",
        description="paper: patch embedding, gains of the norms in the blocks and classifier are cut too, as in Sparse "
        "then Prune; corrected: the matrices of the blocks alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Magnitude:
        if self.schedule == "cubic" and self.begin >= self.end:
            field = "end" if "end" in self.model_fields_set else "begin"
            raise ValueError(
                f"{field}: the cut would begin after {self.begin:g} of the steps and end after {self.end:g}; "
                "give an end above begin, or schedule: one_shot"
            )
        if self.also and not self.after_training:
            raise ValueError(
                "also: further fractions are measured on one trained network, and this one trains on with its masks; "
                "use schedule: one_shot with begin: 1.0, or leave also out"
            )
        return self

    @property
    def after_training(self) -> bool:
        """Whether nothing is trained any more once weights are cut."""
        return self.schedule == "one_shot" and self.begin == 1


class RigL(Settings):
    """Sparse from the first step: the smallest weights go, and as many come where the gradient is largest."""

    method: Literal["rigl"] = Field(description="drop and grow (RigL; SViTE for ViTs)")
    keep: float = Field(gt=0, lt=1, description="fraction of the weights that is kept, at every step")
    densities: Literal["erk", "uniform"] = Field(
        "erk", description="erk: small and oblong tensors stay denser; uniform: the same fraction of each"
    )
    exchange: float = Field(
        0.3, gt=0, lt=1, description="share of the kept weights exchanged at first, falling to 0 as a cosine"
    )
    every: int = Field(100, ge=1, description="steps from one exchange to the next")
    end: float = Field(0.75, gt=0, le=1, description="share of the steps after which the masks stay as they are")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)


class Pattern(Settings):
    """Two of every four inputs of an output, what sparse tensor cores take; chosen anew at every step (SR-STE)."""

    method: Literal["sr_ste"] = Field(description="a pattern, learned with straight-through gradients")
    pattern: Literal["2:4"] = Field("2:4", description="weights kept of consecutive inputs")
    decay: float = Field(2e-4, ge=0, description="pull on the weights that are left out; 0 is plain straight-through")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        for name in ("keep", "scope", "schedule"):
            if isinstance(fields, dict) and name in fields:
                raise ValueError(
                    f"{name}: sr_ste keeps two weights of every four, and the same tensors cannot have another mask as "
                    f"well; remove {name}, or take the method magnitude"
                )
        return fields


def _refuse_pattern(fields: Any) -> Any:
    if isinstance(fields, dict) and "pattern" in fields:
        raise ValueError(
            "pattern: the same tensors cannot have a pattern and another mask; remove pattern, or take method: sr_ste, "
            'which keeps "2:4"'
        )
    if isinstance(fields, dict):
        # What a validator has held in hands counts as Python to pydantic, whose strict tuples take no lists.
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return fields


class Essential(Settings):
    """The fewest weights of a pretrained network that still answer as well: a sweep, then a one-shot cut before the
    first step (essential sparsity).
    """

    method: Literal["essential"] = Field(description="magnitude at the last level before accuracy falls")
    levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4),
        min_length=1,
        description="fractions kept that are tried, falling; the dense network is tried before them",
    )
    steps: int = Field(
        ge=1, description="steps on whole images that each of them trains before it is judged, on the calibration split"
    )
    tolerance: float = Field(0.01, ge=0, lt=1, description="top-1 that a level may lose against the dense network")
    scope: Literal["global", "layer"] = Field("global", description="as of the method magnitude")
    mode: Literal["paper", "corrected"] = Field("corrected", description="as of the method magnitude")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)

    @model_validator(mode="after")
    def _falling(self) -> Essential:
        if any(later >= earlier for earlier, later in pairwise(self.levels)):
            raise ValueError(f"levels: {list(self.levels)} do not fall from one to the next; sort them, highest first")
        return self

    def at(self, keep: float) -> Magnitude | None:
        """The masks of one level; none for the dense network's, 1."""
        if keep == 1:
            return None
        return Magnitude(
            method="magnitude", keep=keep, scope=self.scope, schedule="one_shot", begin=0.0, mode=self.mode
        )


class Soup(Settings):
    """Weak masks of short trainings on little data, joined into one (instant soup pruning, as in LOTUS)."""

    method: Literal["soup"] = Field(description="weak masks, joined, before the first step")
    keep: float = Field(gt=0, lt=0.95, description="fraction of the weights that is kept in the end")
    masks: int = Field(5, ge=2, le=50, description="weak masks a round, each from a training of its own")
    data: float = Field(0.1, gt=0, le=1, description="fraction of the examples that each of them is trained on")
    cut: float = Field(0.1, gt=0, lt=1, description="fraction of the weights still kept that each of them leaves out")
    steps: int = Field(
        ge=1, description="steps, on whole images, of each weak training and of the network before every round"
    )
    votes: float = Field(
        0.5, gt=0, le=1, description="mode corrected: a weight stays that at least this share of the weak masks keep"
    )
    mode: Literal["paper", "corrected"] = Field(
        "corrected",
        description="paper: a weight stays that any weak mask keeps, whatever comes of it; corrected: by votes, and "
        "where magnitudes alone answer better on the calibration split, these",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)


class NncfMagnitude(Settings):
    """nncf's pruning by magnitude: each tensor's weights over its norm, a threshold, an exponential schedule."""

    method: Literal["nncf_magnitude"] = Field(description="nncf's masks by magnitude")
    keep: float = Field(gt=0, lt=1, description="fraction of the weights that is kept in the end, about")
    scope: Literal["global", "layer"] = Field("global", description="as of the method magnitude")
    begin: float = Field(0.2, ge=0, lt=1, description="share of the steps before the first cut")
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which the schedule is over")
    every: int = Field(20, ge=1, description="steps from one cut to the next")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> NncfMagnitude:
        if self.begin >= self.end:
            field = "end" if "end" in self.model_fields_set else "begin"
            raise ValueError(
                f"{field}: the cut would begin after {self.begin:g} of the steps and end after {self.end:g}; "
                "give an end above begin"
            )
        return self


class NncfGates(Settings):
    """nncf's regularisation-based pruning: a gate on every weight, learned beside it."""

    method: Literal["nncf_rb"] = Field(description="nncf's learned gates")
    keep: float = Field(gt=0, lt=1, description="fraction of open gates that the loss pulls towards")
    strength: float = Field(1.0, gt=0, description="weight of nncf's loss, ((open - keep) / 0.05)^2")
    lr: float = Field(
        0.02, gt=0, description="learning rate of the gates, which begin at logit 0.99 = 4.6 and close at 0"
    )
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which `keep` is what is pulled towards")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, fields: Any) -> Any:
        return _refuse_pattern(fields)


class Hold(Settings):
    """Weights that are zero when the training begins stay zero."""

    method: Literal["hold"] = Field(description="what an earlier stage has left out stays out")
    mode: Literal["paper", "corrected"] = Field("corrected", description="where zeros are, as of the method magnitude")


MaskSettings = Annotated[
    Magnitude | RigL | Pattern | Essential | Soup | Hold | NncfMagnitude | NncfGates, Field(discriminator="method")
]
Applied = Magnitude | RigL | Pattern | Hold | NncfMagnitude | NncfGates  # what a training loop can be given


def mask_steps(settings: Magnitude | RigL | Hold | NncfMagnitude, total: int) -> tuple[int, ...]:
    """The steps, of `total`, after which masks change; those of rigl before the step that follows. Ascending."""
    if isinstance(settings, Hold):
        return ()
    if isinstance(settings, RigL):
        return tuple(range(settings.every, round(settings.end * total), settings.every))
    begin, end = round(settings.begin * total), round(settings.end * total)
    if isinstance(settings, Magnitude) and settings.schedule == "one_shot":
        return (begin,)
    return (*range(begin + settings.every, end, settings.every), end)


def last_cut(settings: Applied | None, total: int) -> int:
    """The step, of `total`, from which on the asked fraction is kept; 0 where it is so throughout."""
    if isinstance(settings, NncfGates):
        return round(settings.end * total)
    if isinstance(settings, Magnitude | NncfMagnitude):
        return max(mask_steps(settings, total))
    return 0


def check_masks(settings: Applied | Essential | Soup | None, total: int) -> None:
    """Refuse masks that do not change in a run of `total` steps as they are meant to. Raises: ValueError."""
    if not isinstance(settings, Magnitude | RigL | NncfMagnitude):
        return
    end = round(settings.end * total)
    if isinstance(settings, RigL) and not mask_steps(settings, total):
        raise ValueError(
            f"masks.every: an exchange every {settings.every} steps, and they end at step {end} of {total}: "
            f"there would be none; every can be at most {end - 1}"
        )
    if isinstance(settings, RigL) or (isinstance(settings, Magnitude) and settings.schedule == "one_shot"):
        return
    if len(mask_steps(settings, total)) < 2:
        begin = round(settings.begin * total)
        remedy = "lower every" if isinstance(settings, NncfMagnitude) else "lower every, or use schedule: one_shot"
        raise ValueError(
            f"masks.every: a cut every {settings.every} steps between step {begin} and step {end} of {total} is a "
            f"single one; {remedy}"
        )


def check_budget(settings: MaskSettings | None, budget: str) -> None:
    """Refuse to compare at equal MACs where masks are found by trials. Raises: ValueError."""
    if isinstance(settings, Essential | Soup) and budget == "macs":
        raise ValueError(
            f"budget: macs leaves out what finding the masks costs; use steps or epochs with {settings.method}"
        )


def idle_masks(settings: MaskSettings | None) -> dict[str, str]:
    """Fields without effect, and why: a schedule of cuts where there is one cut, votes that are not asked."""
    if isinstance(settings, Soup) and settings.mode == "paper":
        return {"votes": "masks.mode paper keeps what any mask keeps"}
    if isinstance(settings, Magnitude) and settings.schedule == "one_shot":
        return dict.fromkeys(("end", "every"), "masks.schedule is one_shot")
    return {}


def check_room(settings: Applied | Essential | Soup | None, most: int, why: str, at: str) -> None:
    """As check_masks, for a run of which nothing is known but that it takes at most `most` steps: refused when no such
    run would do. why: there are no more; at: where the masks stand in pipeline.yaml. Raises: InvalidInput.
    """
    try:
        check_masks(settings, most)
    except ValueError as error:
        assert isinstance(settings, Magnitude | RigL | NncfMagnitude)
        # Rounding may leave a shorter run a step more, but never fewer steps than this a single change.
        begin = 0.0 if isinstance(settings, RigL) else settings.begin
        least = math.floor(settings.every / (settings.end - begin))
        if not any(_changes(settings, total) for total in range(least, most)):
            told = str(error).removeprefix("masks.")
            raise InvalidInput(f"{at}.{told} ({why})", "train longer, or lower every", field=f"{at}.every") from error


def _changes(settings: Magnitude | RigL | NncfMagnitude, total: int) -> bool:
    try:
        check_masks(settings, total)
    except ValueError:
        return False
    return True


def check_start(settings: MaskSettings | None, trained: bool, at: str) -> None:
    """Refuse masks that ask a trained network what it can do without where training begins at random.

    at: where the masks stand in pipeline.yaml. Raises: InvalidInput.
    """
    if isinstance(settings, Essential | Soup | Hold) and not trained:
        what = {"essential": "tries what", "soup": "joins masks of what", "hold": "keeps what"}[settings.method]
        raise InvalidInput(
            f"{at}: {settings.method} {what} a trained network can do without, and this one begins at random",
            "name a network: start, model.pretrained or model.weights; or use the method magnitude",
            field=f"{at}.method",
        )
