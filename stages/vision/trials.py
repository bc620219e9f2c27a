"""Short trainings that look for masks before the first step of a stage: what they share, and who judges them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from .batches import Annotate, Pool
from .mask_settings import Applied
from .network import Network
from .objective import Objective
from .preprocessing import Normaliser
from .recipe import Recipe
from .training import Fitted, fit


class Progress(Protocol):
    """Where it is told how far the trials are."""

    def task(self, label: str, total: int) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Trials:
    """What the trials of a stage share with its training. judge: top-1 of a network on the calibration split, so that
    the test split has no say in the choice.
    """

    pool: Pool
    recipe: Recipe
    seed: int
    device: torch.device
    normalise: Normaliser
    objective: Objective
    annotate: Annotate | None
    judge: Callable[[Network], float]
    progress: Progress

    def fit(
        self, network: Network, steps: int, *, seed: int, members: np.ndarray | None = None, masks: Applied | None
    ) -> Fitted:
        """Train a copy for `steps` steps, with an optimiser and a schedule of its own; the network stays as it is.

        On whole images, with all tokens: so short a training on tickets alone would be judged by how badly it answers
        on whole ones, and not by its masks (LOTUS trains its weak masks on the tickets).

        members: positions of the examples that it sees, ascending; None: all of the pool.
        """
        return fit(
            copy.deepcopy(network),
            replace(self.pool, patches=None, members=self.pool.members if members is None else members),
            self.recipe.model_copy(update={"epochs": None, "steps": steps}),
            seed=seed,
            device=self.device,
            normalise=self.normalise,
            objective=self.objective,
            annotate=self.annotate,
            masks=masks,
        )
