"""Small-sample statistics of paired differences: intervals by resampling, and what so many seeds could have shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np

EXACT = 50_000
"""Resamples up to which all of them are counted; above it as many are drawn."""


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    All n^n resamples are counted when they are few (n <= 5), so the answer has no luck in it. With n < 5 the 95 %
    interval is the range of the values: each of two extreme resamples has a share above 2.5 %, or there is none beyond.
    Raises ValueError for no values. Infinite values give infinite ends.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    n = len(values)
    if any(math.isinf(value) for value in values):
        finite = [value for value in values if not math.isinf(value)]
        low = min(finite, default=math.inf) if all(value > 0 for value in values) else -math.inf
        return low, max(values)
    array = np.asarray(values, dtype=np.float64)
    if n**n <= EXACT:
        means = np.array([array[list(pick)].mean() for pick in itertools.product(range(n), repeat=n)])
    else:
        picks = np.random.default_rng(seed).integers(0, n, (EXACT, n))
        means = array[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def smallest_effect(values: Sequence[float], *, confidence: float = 0.95, power: float = 0.8) -> float:
    """The mean difference that as many pairs with this spread would have told from zero, four times out of five.

    (t[1 - (1 - confidence)/2] + t[power]) * s / sqrt(n), with n - 1 degrees of freedom. Infinite for one value or
    an infinite spread.
    """
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return math.inf
    quantiles = t_quantile(1 - (1 - confidence) / 2, n - 1) + t_quantile(power, n - 1)
    return quantiles * stdev(values) / math.sqrt(n)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection of its distribution function; exact to 1e-9."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"needs 0 < probability < 1 and degrees >= 1, got {probability}, {degrees}")
    low, high = -1e6, 1e6
    while high - low > 1e-10 * max(1.0, abs(low)):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t with whole degrees of freedom: the finite sums of Abramowitz and Stegun 26.7.3 and 4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k) / (2 * k + 1)
        inside = (angle + sine * total) * 2 / math.pi
    else:
        term, total = 1.0, 0.0
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k - 1) / (2 * k)
        inside = sine * total
    return 0.5 + inside / 2


def centre(values: Sequence[float]) -> float:
    """The mean; infinite when a value is."""
    return math.inf if any(math.isinf(value) for value in values) else mean(values)


def risk_of_guessing(scores: Sequence[float], choices: int = 4) -> float:
    """RRGS: 1 minus how far accuracies of tests with so many choices lie from chance, on average.

    1 - mean |s - 1 / choices|: 1 where every test is answered at chance, 1 / choices where all are right. Lower is less
    like guessing. Scores below chance count as far as those above. Raises ValueError for scores outside of [0, 1].
    """
    if not scores or choices < 2 or not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"needs accuracies between 0 and 1 and two choices or more, got {list(scores)}, {choices}")
    return 1 - mean(abs(score - 1 / choices) for score in scores)
