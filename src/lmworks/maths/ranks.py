"""Rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values_N: Sequence[float] | Floats) -> Floats:
    """1 for the smallest value, N for the greatest; equal values share the mean of their ranks."""
    values = np.asarray(values_N, dtype=np.float64)
    _, place_N, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts - 1) / 2
    return mean[place_N]


def spearman(a_N: Sequence[float] | Floats, b_N: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation. nan for fewer than two pairs, or where one side is all alike.

    Raises ValueError for two lengths.
    """
    if len(a_N) != len(b_N):
        raise ValueError(f"pairs are needed, got {len(a_N)} and {len(b_N)} values")
    if len(a_N) < 2:
        return math.nan
    a, b = ranks(a_N), ranks(b_N)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan
