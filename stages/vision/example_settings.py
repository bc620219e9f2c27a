"""Policies on examples as settings: which of them a pass sees. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .recipe import Settings, StopEarly


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


def check_examples(
    policy: Swap | InfoBatch | Subset | None, epochs: float | None, budget: str, stop: StopEarly | None
) -> None:
    """Refuse a policy that contradicts the length of the training. Raises: ValueError."""
    if policy is None:
        return
    if isinstance(policy, InfoBatch) and stop is not None:
        raise ValueError(
            "stop_early: infobatch owes its last passes to the examples that it dropped; leave one of them out"
        )
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
