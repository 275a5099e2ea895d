"""Means, their intervals, and paired differences."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from scipy import stats

CONFIDENCE = 0.95
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval, which takes at least two values."""

    mean: float
    half_width: float | None
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent values, with Student's t-interval.

    Args:
        values: at least one.
        confidence: probability that the interval covers the expectation, if the values are normal.

    Example:
        >>> interval = mean_interval([0.7, 0.8, 0.9])
        >>> round(interval.mean, 3), round(interval.half_width, 3), interval.number
        (0.8, 0.248, 3)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Interval(mean, quantile * math.sqrt(variance / count), count)


def paired_difference(
    values: Mapping[Key, float], baseline: Mapping[Key, float], confidence: float = CONFIDENCE
) -> Interval | None:
    """The mean difference to the baseline over the pairs that both have, with its t-interval; None without a pair.

    Pairing takes out what a seed does to both, such as the class order.

    Args:
        values: a value for each key, such as seed and class order.
        baseline: the same of the baseline.
        confidence: of the interval.

    Example:
        >>> paired_difference({1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.25, 3: 0.9})
        Interval(mean=0.25, half_width=0.0, number=2)
    """
    differences = [value - baseline[key] for key, value in values.items() if key in baseline]
    return mean_interval(differences, confidence) if differences else None
