"""Leakage audit: can the records that trained an adapter be told from others by their losses?

    members, others: nats per token the adapter took off the base's loss  ->  AUC, true positives at 1 % false ones

The attack is a threshold on the ratio of the two likelihoods (Carlini et al. 2022, arXiv:2112.03570, with the base as
reference). An AUC of 0.5 is chance. Records of val must be like those of train, or the AUC measures the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_FALSE_POSITIVES = 0.01
_Z95 = 1.959964  # standard normal quantile of 0.975

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auc(members: Array, others: Array) -> Rate:
    """The probability that a member scores above another record, ties counted half; interval of Hanley and McNeil 1982.

    >>> print(auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])).value)
    0.875
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    below_or_equal = np.searchsorted(ordered, members, "right")
    value = float((below + below_or_equal).sum() / 2 / (len(members) * len(others)))
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (len(members) - 1) * (q1 - value**2) + (len(others) - 1) * (q2 - value**2)
    error = _Z95 * math.sqrt(max(variance, 0.0) / (len(members) * len(others)))
    return Rate(value, max(0.0, value - error), min(1.0, value + error))


def true_positive_rate(members: Array, others: Array, max_false: float = MAX_FALSE_POSITIVES) -> Rate:
    """Members above the score that at most that fraction of the others exceeds; exact interval.

    >>> true_positive_rate(np.array([9.0] * 10), np.arange(100) / 100).value
    1.0
    """
    allowed = int(max_false * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return exact_rate(int((members > threshold).sum()), len(members))


def exact_rate(count: int, total: int) -> Rate:
    """A fraction with its exact interval (Clopper and Pearson 1934).

    >>> print(exact_rate(0, 10), exact_rate(5, 10))
    0.000 [0.000, 0.308] 0.500 [0.187, 0.813]
    """
    from scipy import stats  # slow to import

    low = float(stats.beta.ppf(0.025, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
    return Rate(count / total, low, high)


def membership(members: Sequence[float] | Array, others: Sequence[float] | Array) -> dict[str, Rate]:
    """How well a threshold on the score tells members from others.

    Args:
        members: nats per token below the base, of records of train.
        others: of records of val.
    """
    first, second = np.asarray(members, float), np.asarray(others, float)
    return {"auc": auc(first, second), "tpr_at_1_percent_fpr": true_positive_rate(first, second)}
