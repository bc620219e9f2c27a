"""Top-1 of files on the test split, with every provider that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..methods import InvalidInput
from .flips import SplitImages
from .isa import usable_cores
from .latency import Progress, Setting
from .predict import Accuracy, accuracy, answers, scores
from .variants import Variant

RunBy = Callable[[Variant, Setting], bool]  # whether a file runs in a setting


def check_classes(variants: Sequence[Variant], classes: Sequence[str]) -> None:
    """Refuse a file of another number of classes than the test split. Raises InvalidInput."""
    for variant in variants:
        sidecar = variant.bundle.sidecar
        if sidecar is not None and len(sidecar.classes) != len(classes):
            raise InvalidInput(
                f"{variant.bundle.path} tells {len(sidecar.classes)} classes apart, the test split has {len(classes)}",
                "measure it on the data it was trained for",
            )


def accuracies(
    variants: Sequence[Variant], images: SplitImages, settings: Sequence[Setting], run_by: RunBy, progress: Progress
) -> tuple[dict[tuple[str, str], Accuracy], dict[str, NDArray[np.int64]]]:
    """Top-1 of each distinct file on the test split, with each provider that runs it: (sha256, provider) -> accuracy.
    And what each answers with the first of them: sha256 -> class of each image.
    """
    found: dict[tuple[str, str], Accuracy] = {}
    answered: dict[str, NDArray[np.int64]] = {}
    for provider in dict.fromkeys(one.provider for one in settings):
        setting = next(one for one in settings if one.provider == provider)
        files = {one.bundle.sha256: one.bundle for one in variants if run_by(one, setting)}
        with progress.task(f"accuracy ({provider})", len(files) * len(images.labels)) as task:
            for digest, bundle in files.items():
                scored = scores(
                    bundle.path,
                    lambda start, stop: images.pixels(np.arange(start, stop)),
                    len(images.labels),
                    provider=provider,
                    threads=len(usable_cores()),
                    done=task.advance,
                )
                found[digest, provider] = accuracy(scored, images.labels)
                answered.setdefault(digest, answers(scored))
    return found, answered
