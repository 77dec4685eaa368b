"""How well scores separate memorized prompts from ordinary ones: AUROC, TPR at 1 % FPR, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Scores of prompts, [n] float64; higher means memorized.
Scores: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number that was measured on a sample of prompts, with its 95 % bootstrap interval.

    Attributes:
        value: the number on all prompts.
        low, high: the 2.5th and the 97.5th percentile of the number over the resamples.
    """

    value: float
    low: float
    high: float


def auroc(memorized: Scores, ordinary: Scores) -> float:
    """Compute the area under the ROC curve: P(m > o) + ½ P(m = o) for a memorized prompt m and an ordinary prompt o.

    This is the Mann-Whitney statistic, which is exact, also with equal and infinite scores.

    Args:
        memorized: the scores of the memorized prompts, [n], n ≥ 1.
        ordinary: the scores of the ordinary prompts, [m], m ≥ 1.

    Returns:
        The area, from 0 to 1; ½ for scores that tell nothing.
    """
    ordered = np.sort(ordinary)
    below = np.searchsorted(ordered, memorized, "left")
    not_above = np.searchsorted(ordered, memorized, "right")
    # The counts are whole numbers, so only the last division rounds.
    return int(below.sum() + not_above.sum()) / (2 * len(memorized) * len(ordinary))


def false_positives_allowed(ordinary: int) -> int:
    """The number of ordinary prompts that may be called memorized at 1 % FPR, ⌊m / 100⌋; 0 for fewer than 100."""
    return ordinary // 100


def tpr_at_1_percent_fpr(memorized: Scores, ordinary: Scores) -> float:
    """Compute the highest true positive rate of a threshold with a false positive rate of at most 1 %.

    A prompt counts as memorized if its score is above the threshold. So a memorized prompt with the same score as the
    first ordinary prompt that must not be called memorized is missed. With fewer than 100 ordinary prompts no false
    positive is allowed: the result is then the TPR at an FPR of 0, and one ordinary prompt decides it.

    Args:
        memorized: the scores of the memorized prompts, [n], n ≥ 1.
        ordinary: the scores of the ordinary prompts, [m], m ≥ 1.

    Returns:
        The rate, from 0 to 1.
    """
    threshold = np.sort(ordinary)[-1 - false_positives_allowed(len(ordinary))]
    return float(np.mean(memorized > threshold))


@dataclass(frozen=True)
class Resamples:
    """Prompts drawn with replacement, each class from its own prompts (a stratified bootstrap).

    All detectors are evaluated on the same resamples. Equal arguments give equal resamples.

    Attributes:
        memorized: places among the memorized prompts, [R, n].
        ordinary: places among the ordinary prompts, [R, m].
    """

    memorized: NDArray[np.int64]
    ordinary: NDArray[np.int64]

    @classmethod
    def draw(cls, memorized: int, ordinary: int, resamples: int, seed: int) -> Resamples:
        """Draw R resamples of n memorized and m ordinary prompts."""
        generator = np.random.default_rng(seed)
        return cls(
            generator.integers(memorized, size=(resamples, memorized)),
            generator.integers(ordinary, size=(resamples, ordinary)),
        )

    def estimate(self, statistic: Callable[[Scores, Scores], float], memorized: Scores, ordinary: Scores) -> Estimate:
        """Compute a statistic on all prompts, and its percentile interval over the resamples.

        If the classes are separated completely, so are all resamples, and the interval has no width. The true value
        can still be lower. At an FPR of 0 no resample has a higher threshold than all prompts together, so the interval
        of the TPR reaches too far up rather than too far down.

        Args:
            statistic: a function of the two classes' scores, such as `auroc`.
            memorized: the scores of the memorized prompts, [n].
            ordinary: the scores of the ordinary prompts, [m].
        """
        values = [
            statistic(memorized[chosen], ordinary[others])
            for chosen, others in zip(self.memorized, self.ordinary, strict=True)
        ]
        low, high = np.quantile(values, (0.025, 0.975))
        return Estimate(statistic(memorized, ordinary), float(low), float(high))
