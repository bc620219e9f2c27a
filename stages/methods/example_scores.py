"""Which training images are worth keeping: scores per example, and the selection from them.

Shapes: M examples, K classes, R proxy runs, E epochs. High score = worth keeping, in every function.

- EL2N: Paul, Ganguli & Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021, eq. 3.
- Forgetting: Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019, §3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import InvalidInput


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Euclidean norm of the error vector, ||p - onehot(y)||, averaged over runs.

    Args:
        probabilities: (R, M, K) softmax outputs of R proxy runs, early in their training.
        labels: (M,) int64.
    Returns: (M,) float32 in [0, sqrt(2)].
    """
    target = torch.nn.functional.one_hot(labels, probabilities.shape[-1]).to(probabilities.dtype)
    errors: Tensor = (probabilities - target).norm(dim=-1)
    return errors.mean(0).float()


def forgetting(correct: Tensor) -> Tensor:
    """How often an example went from right to wrong; one never right counts as forgotten at every chance.

    Args:
        correct: (R, E, M) bool, was the example classified correctly after each epoch of each run.
    Returns: (M,) float32, events per run.

    Differs from the paper: judged on clean views after each epoch, not on the augmented batch in passing, so that the
    count does not depend on mixup. Never-learned examples get E, above every count that can occur, as in the authors'
    code.
    """
    events = (correct[:, :-1] & ~correct[:, 1:]).sum(1)
    never = ~correct.any(1)
    return torch.where(never, torch.full_like(events, correct.shape[1]), events).float().mean(0)


def random_scores(examples: int, seed: int) -> Tensor:
    """Uniform scores, the control of every other method. Returns (M,) float32."""
    return torch.rand(examples, generator=torch.Generator().manual_seed(seed))


def select_examples(
    scores: np.ndarray,
    labels: np.ndarray,
    keep: float,
    *,
    balanced: bool,
    skip_hardest: float = 0.0,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """The ceil(keep * M) highest scores, ties to the lower index, as ascending indices.

    Args:
        scores, labels: (M,).
        keep: fraction kept, 0 < keep <= 1.
        balanced: take the same fraction of every class (largest remainders fill up, so the total is exact).
        skip_hardest: fraction of the highest scores passed over as probable label noise.
        names: of the classes, for messages.
    Returns: (ceil(keep * M),) int64 ascending.
    Raises: InvalidInput when keep + skip_hardest leave fewer examples than asked for, or, with balanced, none of a
    class.
    """
    total = len(scores)
    wanted = kept_count(total, keep)
    skipped = int(skip_hardest * total) if keep < 1 else 0  # everything is kept: nothing is passed over
    order = np.lexsort((np.arange(total), -scores.astype(np.float64)))[skipped:]
    if len(order) < wanted:
        raise InvalidInput(
            f"keep {keep} and skip_hardest {skip_hardest} ask for {wanted} of {len(order)} examples",
            "lower one of the two; together they must not pass 1",
        )
    if balanced:
        order = order[balanced_prefix(labels[order], wanted)]
        lost = np.setdiff1d(labels, labels[order])
        if len(lost):
            name = lost[0] if names is None else f"'{names[int(lost[0])]}'"
            settings = f"keep {keep:g}" + (f" and skip_hardest {skip_hardest:g}" if skipped else "")
            raise InvalidInput(
                f"{settings} leave none of the {int((labels == lost[0]).sum())} examples of class {name}",
                f"{'pass over fewer, ' if skipped else ''}keep more, or set examples.balanced: false",
            )
    return np.sort(order[:wanted]).astype(np.int64)


def kept_count(total: int, keep: float) -> int:
    """ceil(keep * total) without the surprise of binary fractions (0.55 * 100 is 55, not 56); at least 1."""
    return max(1, int(np.ceil(keep * total - 1e-9)))


def balanced_prefix(labels: np.ndarray, wanted: int) -> np.ndarray:
    """Positions of the first examples of each class, in proportion to the class sizes, `wanted` in all."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (wanted / len(labels))
    quota = np.floor(exact).astype(np.int64)
    remainders = np.lexsort((np.arange(len(classes)), -(exact - quota)))
    quota[remainders[: wanted - int(quota.sum())]] += 1
    return np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in zip(classes, quota, strict=True)])
