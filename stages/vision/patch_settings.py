"""Which patches of an image are kept and by which network, as settings. Imports no torch: see recipe.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..methods import InvalidInput
from .recipe import Settings


class Patches(Settings):
    """Which patches of each image are kept."""

    method: Literal["attention", "saliency", "random", "random_fixed", "inverse", "center"] = Field(
        "attention", description="how patches are ranked"
    )
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the patches kept, of every image; 1: all; null: what selector.keep_per_stage leaves, "
        "else all",
    )
    view: Literal["cached", "online"] = Field(
        "cached", description="rank each image once, or every view of it that training makes"
    )

    @model_validator(mode="after")
    def _fixed_is_of_the_image(self) -> Patches:
        if self.method == "random_fixed" and self.view == "online":
            raise ValueError("random_fixed draws once for each image and sees no view; use random, or view: cached")
        return self


class Selector(Settings):
    """The frozen network whose attention ranks the patches."""

    source: str | None = Field(None, description="a model artifact such as train@3 instead of the first proxy run")
    mode: Literal["corrected", "paper"] = Field(
        "corrected",
        description="paper: as the authors' code does on CIFAR, the dense network drops tokens without having been "
        "adapted to it",
    )
    adapt_epochs: float | None = Field(
        None, ge=0, description="epochs of training with token dropping on; null: 1, in mode paper 0"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate of these epochs")
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="blocks that drop tokens; null: at a quarter, a half and three quarters"
    )
    keep_per_stage: float | None = Field(
        None, gt=0, lt=1, description="fraction kept at each of these blocks, instead of patches.keep overall"
    )

    @property
    def adaptation(self) -> float:
        """Epochs of adapting."""
        if self.adapt_epochs is not None:
            return self.adapt_epochs
        return 1.0 if self.mode == "corrected" else 0.0

    @model_validator(mode="after")
    def _paper_does_not_adapt(self) -> Selector:
        if self.mode == "paper" and self.adapt_epochs:
            raise ValueError(f"mode: paper does not adapt the selector, adapt_epochs asks for {self.adapt_epochs:g}")
        return self


def check_cutmix(cutmix: float, patches: Patches, at: str) -> None:
    """Refuse to paste one image into another where a ticket knows one. cutmix: alpha of the training on patch tickets;
    at: where it stands in pipeline.yaml. Raises: InvalidInput.
    """
    if cutmix and patches.view == "cached" and patches.method != "random":
        raise InvalidInput(
            f"{at}: cached patch tickets know one image, cutmix shows two",
            "set cutmix: 0, patches.view: online, or patches.keep: 1.0; mixup goes with all",
            field=at,
        )
