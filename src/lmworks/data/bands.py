"""Locality-sensitive hashing by bands: a pair collides when all rows of one band agree."""

from __future__ import annotations

from functools import cache

import numpy as np


def collision(similarity: float, bands: int, rows: int) -> float:
    """Probability that a pair of this Jaccard similarity agrees in a whole band: 1 - (1 - s^rows)^bands."""
    return float(1 - (1 - similarity**rows) ** bands)


@cache
def best_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """The (bands, rows) whose curve is nearest to a step at the threshold, with bands * rows <= permutations.

    Nearest: the areas of pairs below that collide and of pairs above that do not, weighted alike, add up to the least.
    The first such pair counts, with fewer bands before more.
    """
    below, above = np.linspace(0, threshold, 2001), np.linspace(threshold, 1, 2001)
    best, least = (1, 1), float("inf")
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            false = float(np.trapezoid(1 - (1 - below**rows) ** bands, below))
            missed = float(np.trapezoid((1 - above**rows) ** bands, above))
            if 0.5 * (false + missed) < least:
                best, least = (bands, rows), 0.5 * (false + missed)
    return best
