"""Which training images are kept: the settings, a score of each image from proxy runs, and the choice.

Imports no torch before it scores, so that a pipeline can be checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from .recipe import Settings

if TYPE_CHECKING:
    import numpy as np

    from .dataset import Images


class Examples(Settings):
    """Which training images are kept."""

    method: Literal["random", "el2n", "grand", "forgetting", "margin", "entropy", "moderate", "ccs"] = Field(
        "el2n", description="how images are chosen"
    )
    keep: float = Field(1.0, gt=0, le=1, description="fraction of the training images kept")
    balanced: bool = Field(True, description="keep the same fraction of every class")
    lose_classes: bool = Field(False, description="let an unbalanced choice leave whole classes without an image")
    skip_hardest: float = Field(
        0.0, ge=0, lt=1, description="fraction of the highest scores passed over as probable label noise"
    )
    epoch: int | None = Field(
        None, ge=1, description="epoch of the proxy after which el2n, grand, margin, entropy are read; null: the last"
    )
    score: Literal["el2n", "grand", "forgetting", "margin", "entropy"] = Field(
        "el2n", description="the score that ccs divides into strata"
    )
    strata: int = Field(50, ge=2, le=10_000, description="equally wide ranges of the score for ccs")

    @model_validator(mode="after")
    def _enough_left(self) -> Examples:
        if self.keep < 1 and self.keep + self.skip_hardest > 1 + 1e-9:
            raise ValueError(
                f"skip_hardest: {self.skip_hardest:g} with keep {self.keep:g} is more than there is; together at most 1"
            )
        return self

    @property
    def statistic(self) -> str | None:
        """What of a proxy run scores the images; None: nothing does."""
        if self.keep == 1 or self.method == "random":
            return None
        return {"ccs": self.score, "moderate": "distance"}.get(self.method, self.method)

    @property
    def unscored(self) -> str:
        """Why nothing scores the images, where nothing does."""
        return "examples.keep is 1" if self.keep == 1 else f"examples.method is {self.method}"

    def idle(self) -> dict[str, str]:
        """Fields that have no part in the choice as it is made here, and why."""
        found: dict[str, str] = {}
        chosen = f"examples.method is {self.method}"
        if self.statistic is None or self.method == "moderate":
            found["skip_hardest"] = self.unscored
        if self.statistic in (None, "forgetting", "distance"):
            whole = f"{chosen}, which looks at whole runs"
            found["epoch"] = self.unscored if self.statistic is None else whole
        if self.statistic is None or self.method != "ccs":
            found |= dict.fromkeys(("score", "strata"), self.unscored)
        if self.balanced:
            found["lose_classes"] = "examples.balanced is true"
        return found


def score(settings: Examples, train: Images, runs: Iterable[Path], seed: int) -> np.ndarray:
    """(M,) float32, the mean over proxy runs (vision/proxy.py): the score of the method, for moderate the distance to
    the class centre.

    Args:
        runs: the folders of the runs. None is asked for where nothing needs a score, so that none is paid for.
        seed: of random scores.
    """
    import numpy as np

    from ..methods.example_scores import random_scores
    from .proxy import statistic

    name = settings.statistic
    if name is None:
        return random_scores(len(train), seed)
    total, count = np.zeros(len(train)), 0
    for folder in runs:
        total += statistic(folder, name, settings.epoch)
        count += 1
    mean: np.ndarray = (total / count).astype(np.float32)
    return mean


def groups(settings: Examples, train: Images) -> np.ndarray:
    """(M,) int64: within what images are compared, their class or all of them."""
    return train.labels if settings.balanced else train.labels * 0


def choose(settings: Examples, scores: np.ndarray, train: Images, seed: int) -> np.ndarray:
    """Ascending indices of the kept images. Raises: InvalidInput for a choice that leaves a class without any."""
    from ..methods.example_scores import moderate
    from ..methods.example_selection import check_classes, select_examples

    kept = select_examples(
        moderate(scores, groups(settings, train)) if settings.method == "moderate" else scores,
        train.labels,
        settings.keep,
        balanced=settings.balanced,
        skip_hardest=0 if "skip_hardest" in settings.idle() else settings.skip_hardest,
        strata=settings.strata if settings.method == "ccs" else None,
        seed=seed,
    )
    if not settings.lose_classes:
        how = f"examples: {settings.method}, keep {settings.keep:g}, {'' if settings.balanced else 'not '}balanced,"
        remedy = "" if settings.balanced else ", set balanced: true, or lose_classes: true if that is meant"
        check_classes(kept, train.labels, train.classes, how, f"raise examples.keep{remedy}")
    return kept
