"""What may be said about two accuracies that were measured on the same images, and with the same seeds.

One seed shows that two networks differ (McNemar, Psychometrika 1947, on the images that only one of them has right).
That two ways of training differ is shown over seeds alone: a paired t test of the differences, seed by seed, since
runs of one way scatter by as much as ways differ. "As good as" is no missing difference but two one-sided tests
against a margin (Schuirmann 1987).

Accuracies are fractions; differences are left minus right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.05  # of every test; none is corrected for the number of tests, so each is printed with its p

Verdict = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True, slots=True)
class McNemar:
    """left, right: images that only this side has right. p: exact, two-sided; 1 where there are none."""

    left: int
    right: int
    p: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference with its 95 % interval, and what it was tested for.

    p: of no difference at all (expect greater), or of one as large as the margin (expect equal).
    by: which test; it names the smallest unit that was drawn again, seeds or images.
    """

    value: float
    low: float
    high: float
    p: float
    by: str
    verdict: Verdict


def accuracy_interval(top1: Sequence[float], images: int) -> tuple[float, float]:
    """The 95 % interval of a mean accuracy over runs on the same images, by Student's t, within 0 to 1.

    Raises: ValueError with fewer than two runs.
    """
    if len(top1) < 2:
        raise ValueError("a spread needs two runs at least")
    # Numbers rounded to one image scatter by 1 / sqrt(12) images at least.
    spread = max(float(np.std(top1, ddof=1)), 1 / (images * math.sqrt(12)))
    low, high = _Sample(float(np.mean(top1)), spread / math.sqrt(len(top1)), len(top1) - 1, len(top1)).interval()
    return max(0.0, low), min(1.0, high)


def mcnemar(left: np.ndarray, right: np.ndarray) -> McNemar:
    """The exact test of two networks. left, right: (M,) bool, correct on the same M images."""
    from scipy import stats

    only_left, only_right = int((left & ~right).sum()), int((right & ~left).sum())
    unlike = only_left + only_right
    p = float(stats.binomtest(only_left, unlike, 0.5).pvalue) if unlike else 1.0
    return McNemar(only_left, only_right, p)


def greater(left: np.ndarray, right: np.ndarray) -> Difference:
    """Whether left is better than right. left, right: (S, M) bool, correct by seed and image.

    Over two seeds or more a paired, two-sided t test; with one seed McNemar's, and the interval is that of a difference
    of paired proportions. The claim holds when left is better at the 5 % level, does not hold when the whole interval
    lies at or below no difference, and is not decided otherwise.
    """
    sample = _sample(left, right)
    if sample.seeds == 1:
        p, by = mcnemar(left[0], right[0]).p, "McNemar's test, one seed"
    else:
        p, by = sample.p_two_sided(), f"paired t over {sample.seeds} seeds"
    low, high = sample.interval()
    verdict: Verdict = "not decided"
    if p < LEVEL and sample.mean > 0:
        verdict = "holds"
    elif high <= 0:
        verdict = "does not hold"
    return Difference(sample.mean, low, high, p, by, verdict)


def equal(left: np.ndarray, right: np.ndarray, margin: float) -> Difference:
    """Whether left is as good as right to within the margin. left, right: (S, M) bool, correct by seed and image.

    Two one-sided tests, over seeds by t, with one seed by the normal approximation of paired proportions. The claim
    holds when both reject at the 5 % level, does not hold when the 95 % interval lies wholly outside the margin, and is
    not decided otherwise.
    """
    sample = _sample(left, right)
    p = max(sample.p_above(-margin), 1 - sample.p_above(margin))
    low, high = sample.interval()
    verdict: Verdict = "not decided"
    if p < LEVEL:
        verdict = "holds"
    elif high < -margin or low > margin:
        verdict = "does not hold"
    unit = f"t over {sample.seeds} seeds" if sample.seeds > 1 else "images of one seed"
    return Difference(sample.mean, low, high, p, f"two one-sided tests, {unit}", verdict)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A mean difference, its standard error, and the degrees of freedom of that (infinity: normal)."""

    mean: float
    error: float
    freedom: float
    seeds: int

    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        from scipy import stats

        reach = float(stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach

    def p_above(self, bound: float) -> float:
        """p of "the difference is at most `bound`", against "it is above"."""
        from scipy import stats

        return float(stats.t.sf((self.mean - bound) / self.error, self.freedom))

    def p_two_sided(self) -> float:
        above = self.p_above(0.0)
        return min(1.0, 2 * min(above, 1 - above))


def _sample(left: np.ndarray, right: np.ndarray) -> _Sample:
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(f"answers of {left.shape} and {right.shape} are no pairs of seeds and images")
    seeds, images = left.shape
    gaps = left.astype(np.int64) - right.astype(np.int64)
    # Accuracies come in steps of one image. That a few seeds show the very same difference is an accident of these
    # steps and no proof that nothing scatters: two numbers rounded to one image differ by 1 / sqrt(6) images (s.d.).
    least = 1 / (images * math.sqrt(6))
    if seeds == 1:
        return _Sample(float(gaps.mean()), max(float(gaps.std()) / math.sqrt(images), least), math.inf, seeds)
    by_seed = gaps.mean(1)
    spread = max(float(by_seed.std(ddof=1)), least)
    return _Sample(float(by_seed.mean()), spread / math.sqrt(seeds), seeds - 1, seeds)
