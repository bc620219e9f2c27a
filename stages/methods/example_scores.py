"""What a training image is worth: scores per example, from what a proxy run answers about it.

Shapes: B examples of a batch, M of the data set, K classes, E epochs, C features, H linear heads. A score is
computed batch by batch and averaged over proxy runs by the caller, so that nothing larger than one number an example
is ever held. A high score is worth keeping, in every function but `class_distances`, which `moderate` turns into one.

- EL2N, GraNd: Paul, Ganguli & Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021, definitions 2.1 and 2.2.
- Forgetting: Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019, §3.
- Margin, entropy: Coleman et al., "Selection via Proxy", ICLR 2020, §2.
- Moderate: Xia et al., "Moderate Coreset", ICLR 2023, §3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # importing torch takes more memory than 1.3 million scores do

ROWS = 16_384  # examples whose features are in memory at once


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Euclidean norm of the error vector, ||p - onehot(y)||.

    Args:
        probabilities: (B, K) softmax outputs, early in training.
        labels: (B,) int64.
    Returns: (B,) in [0, sqrt(2)].
    """
    errors = probabilities.scatter_add(1, labels[:, None], probabilities.new_full((len(labels), 1), -1.0))
    lengths: Tensor = errors.norm(dim=-1)
    return lengths


def grand(probabilities: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
    """Norm of the gradient of the cross-entropy with respect to the last linear layer's weights and biases.

    The gradient is the outer product of the error vector and [features, 1], so its norm is the product of theirs:
    ||p - onehot(y)|| * ||[features, 1]||. Logits that are the mean of H heads give each head 1/H of the error.

    Args:
        probabilities: (B, K). labels: (B,) int64.
        inputs: (B, H, C), what each of the linear heads reads; H is 1 but for distilled networks.
    Returns: (B,), not negative.

    Differs from the paper: the last layer's part of the gradient instead of all weights', early in training and not
    at initialisation, where the ranking says nothing (Kirsch, "Does 'Deep Learning on a Data Diet' reproduce?", 2023).
    """
    heads = inputs.shape[1]
    extended = (inputs.square().sum((1, 2)) + heads).sqrt() / heads
    norms: Tensor = el2n(probabilities, labels) * extended
    return norms


def margin(probabilities: Tensor) -> Tensor:
    """1 - (highest - second highest probability): the least decided ones first. (B, K) -> (B,) in [0, 1]."""
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return 1 - (first - second)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p in nats. (B, K) -> (B,) in [0, log K]."""
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)


def forgetting(correct: Iterable[np.ndarray]) -> np.ndarray:
    """How often an example went from right to wrong; one never right counts as forgotten at every chance.

    Args:
        correct: E rows (M,) bool in the order of the epochs, was the example classified correctly after each. They
            are read one after the other.
    Returns: (M,) float32, events of this run.

    Differs from the paper: judged on clean views after each epoch, not on the augmented batch in passing, so that the
    count does not depend on mixup. Never-learned examples get E, above every count that can occur, as in the authors'
    code.
    """
    rows = iter(correct)
    before = np.asarray(next(rows))
    events, ever, epochs = np.zeros(len(before), np.float32), before.copy(), 1
    for row in rows:
        events += before & ~row
        ever |= row
        before, epochs = row, epochs + 1
    events[~ever] = epochs
    return events


def class_distances(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Euclidean distance of each example's features to the mean of its class.

    Args:
        features: (M, C), may be a memory map: it is read in blocks of rows, twice.
        labels: (M,) int64 in 0..classes-1.
    Returns: (M,) float32.

    Differs from the authors' code, whose centre is the median of each feature: a mean needs no sorting of all of them.
    """
    sums = np.zeros((classes, features.shape[1]))
    blocks = [slice(start, start + ROWS) for start in range(0, len(labels), ROWS)]
    for block in blocks:
        order = np.argsort(labels[block], kind="stable")
        present, starts = np.unique(labels[block][order], return_index=True)
        sums[present] += np.add.reduceat(np.asarray(features[block], np.float64)[order], starts)
    centres = sums / np.maximum(1, np.bincount(labels, minlength=classes))[:, None]
    distances = [np.linalg.norm(features[block] - centres[labels[block]], axis=1) for block in blocks]
    return np.concatenate(distances).astype(np.float32)


def moderate(distances: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How near an example's distance to its class centre is to the median, by rank: 0 in the middle, falling outwards.

    The best n of a group are the window of n around its median, which is what the authors' code keeps; equal
    distances go by index.

    Args:
        distances: (M,). groups: (M,) int64, within which the median is meant: the labels, or zeros for one median.
    Returns: (M,) float32, exact integers: -|2 rank + 1 - group size|.
    """
    order = np.lexsort((distances, groups))
    sizes = np.bincount(groups)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    scores = np.empty(len(distances), np.float32)
    scores[order] = -np.abs(2 * (np.arange(len(order)) - starts) + 1 - np.repeat(sizes, sizes))
    return scores


def random_scores(examples: int, seed: int) -> np.ndarray:
    """Uniform scores, the control of every other method. Returns (M,) float32."""
    return np.random.default_rng(seed).random(examples, np.float32)
