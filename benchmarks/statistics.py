"""Medians, other quantiles, and how far they can be trusted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median and where it lies with a confidence of 95 %."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median of a sample and its percentile bootstrap interval (Efron 1979), drawn from a fixed seed.

    Args:
        values: at least 1; repeats that do not depend on each other.

    Returns:
        An `Interval`.

    Raises:
        ValueError: there are none.

    >>> median_interval([2.0, 2.0, 2.0])
    Interval(median=2.0, low=2.0, high=2.0)
    """
    sample = np.asarray(values, float)
    if sample.size == 0:
        raise ValueError("`values` must hold at least 1 number, got none")
    drawn = np.random.default_rng(0).choice(sample, (RESAMPLES, sample.size))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.median(sample)), float(low), float(high))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, between the two nearest values."""
    return float(np.quantile(np.asarray(values, float), q))
