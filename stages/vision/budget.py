"""How long an arm is trained so that arms are compared at equal cost, and what it then spent.

    epochs   passes over the examples that are kept: an arm with fewer examples takes fewer steps
    steps    as many steps as the epochs would take with all examples: equal iterations
    macs     until the arm has spent what the dense network would in these epochs over all examples; choosing the
             ticket and the selector's own training count, so a cheaper arm takes more steps

Looking at the calibration split is left out in all arms.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from ..methods import InvalidInput
from .architecture import AGAIN
from .example_settings import ExamplePolicy, Swap
from .mask_settings import MaskSettings, check_masks
from .recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .batches import Pool
    from .network import Network
    from .training import Fitted

Budget = Literal["epochs", "steps", "macs"]
FILE = "training.json"
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass(frozen=True, slots=True)
class Prices:
    """MACs of a forward pass, for one image; forward and backward are three of them. dense: of the whole network on all
    patches. ticket: of the network on the patches that enter it, none dropped inside. labelling: of the annotator, on
    every image. looking: of an online selector, on images that have a ticket.
    """

    dense: int
    ticket: int
    labelling: int
    looking: int

    def arm(self, phases: Iterable[tuple[float, bool, int]], *, kept: int, examples: int, scoring: int | None) -> Arm:
        """phases: as token_schedule.phases says what an image costs in the course of the training."""
        costs = tuple(
            (end, 3 * macs + self.labelling + (self.looking if ticketed else 0)) for end, ticketed, macs in phases
        )
        return Arm(kept, examples, costs, 3 * self.dense + self.labelling, scoring)

    def annotating(self, images: int) -> int:
        """MACs of the annotator, who labels every view of every image."""
        return images * self.labelling

    def selecting(self, fitted: Fitted) -> int:
        """MACs of an online selector in a whole training."""
        return fitted.ticketed * self.looking

    def trying(self, images: int) -> int:
        """MACs of trial trainings on so many images, all patches, forward and backward."""
        return 3 * images * self.dense


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm trains on, and what that costs.

    kept: examples trained on, of all examples `examples`. phases: share of the steps at which each part of the training
    ends (ascending, the last 1), and all MACs of training on one image once in it, an online selector's included.
    dense: these MACs on all patches of the whole network. scoring: MACs spent before the first step; None when the
    tickets do not say.
    """

    kept: int
    examples: int
    phases: tuple[tuple[float, int], ...]
    dense: int
    scoring: int | None

    def training_macs(self, steps: int, batch: int) -> int:
        """MACs of so many steps."""
        total = done = 0
        for end, macs in self.phases:
            until = passes(round(end * steps), self.kept, batch)
            total, done = total + (until - done) * macs, until
        return total


@dataclass(frozen=True, slots=True)
class Spent:
    """The record beside the weights. macs: of the training; scoring_macs: of all that came before its first step, null
    when the tickets do not say; allowed: both together, null unless the budget is one of MACs.
    """

    budget: Budget
    steps: int
    examples: int
    of: int
    images: int
    macs: int
    scoring_macs: int | None
    allowed: int | None

    @property
    def total(self) -> int | None:
        """MACs of the training and of all that came before it; None when that is not known."""
        return None if self.scoring_macs is None else self.macs + self.scoring_macs

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Spent | None:
    """The record of a model artifact, None when it has none (a network that `train` did not make). Raises:
    InvalidInput for one that cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Spent(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path}: not a readable record of a training ({error})", AGAIN) from error


def passes(steps: int, examples: int, batch: int) -> int:
    """Images seen in so many steps: batches are full but for the last of an epoch."""
    epochs, rest = divmod(steps, math.ceil(examples / batch))
    return epochs * examples + rest * batch


def allowance(recipe: Recipe, arm: Arm) -> int:
    """MACs of the dense network over all examples."""
    return arm.dense * passes(recipe.total_steps(arm.examples), arm.examples, recipe.batch_size)


def check_reached(
    recipe: Recipe,
    examples: int,
    keep_epochs: tuple[int, ...],
    policy: ExamplePolicy | None,
    masks: MaskSettings | None,
) -> None:
    """Raises: InvalidInput for kept epochs and swaps that the steps do not reach, and masks that do not change in them.
    examples: of a pass.
    """
    steps = recipe.total_steps(examples)
    try:
        check_masks(masks, steps)
    except ValueError as error:
        raise InvalidInput(f"train.{error}") from error
    last = steps // math.ceil(examples / recipe.batch_size)
    if keep_epochs and max(keep_epochs) > last:
        raise InvalidInput(
            f"train.keep_epochs names epoch {max(keep_epochs)}, training completes {last}",
            "name epochs from 1 to the last, or train longer",
        )
    if isinstance(policy, Swap) and policy.until >= last:
        raise InvalidInput(
            f"train.examples.until: swaps until epoch {policy.until}, and training completes {last}",
            "lower until, or train longer",
        )


def prices(network: Network, pool: Pool, labelling: int) -> Prices:
    """What images of a pool cost in the network that is trained on them. labelling: MACs of the annotator."""
    return Prices(network.architecture.macs(), network.ticket_cost(pool.entering)[1], labelling, pool.looking)


def recipe_for(recipe: AnyRecipe, budget: Budget, arm: Arm) -> AnyRecipe:
    """The recipe with the steps that the budget allows. Raises: InvalidInput as steps_for."""
    if budget == "epochs":
        return recipe
    return recipe.model_copy(update={"epochs": None, "steps": steps_for(recipe, budget, arm)})


def spent(recipe: Recipe, budget: Budget, arm: Arm, fitted: Fitted, *, beside: int, searching: int) -> Spent:
    """The record of a training. beside, searching: MACs of annotator and selector in the training, and all of the
    search for masks before it; recipe: as it was written, for what the budget allowed.
    """
    return Spent(
        budget=budget,
        steps=fitted.steps,
        examples=arm.kept,
        of=arm.examples,
        images=fitted.images,
        macs=3 * fitted.macs + beside,
        scoring_macs=None if arm.scoring is None else arm.scoring + searching,
        allowed=allowance(recipe, arm) if budget == "macs" else None,
    )


def steps_for(recipe: Recipe, budget: Budget, arm: Arm) -> int:
    """How many steps the arm takes: under `macs` the most that fit.

    Raises: InvalidInput when the tickets do not say what they cost, or cost more than there is.
    """
    if budget == "epochs":
        return recipe.total_steps(arm.kept)
    if budget == "steps":
        return recipe.total_steps(arm.examples)
    if arm.scoring is None:
        raise InvalidInput(
            "budget: macs needs to know what choosing the ticket cost, and its artifact does not say",
            "let the ticket stage train its own proxy, or take a selector.source that `train` made",
        )
    allowed = allowance(recipe, arm)
    left = allowed - arm.scoring
    if arm.training_macs(1, recipe.batch_size) > left:
        raise InvalidInput(
            f"choosing the ticket took {arm.scoring:,} MACs, the dense network's budget is {allowed:,}: nothing is "
            "left to train with",
            "train for more epochs, choose with a smaller or shorter proxy (ticket.proxy), or use budget: epochs",
        )
    least, most = 1, 2
    while arm.training_macs(most, recipe.batch_size) <= left:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if arm.training_macs(middle, recipe.batch_size) <= left:
            least = middle
        else:
            most = middle
    return least
