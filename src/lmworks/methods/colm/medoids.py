"""Which rows stand for all: budgets of the sources, and medoids by facility location. NumPy and whole numbers only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Similarity = NDArray[np.float64]


def budgets(counts: Sequence[int], total: int) -> list[int]:
    """How many of `total` rows each source gives: its share rounded down, what is left one by one to the smallest.

    Nobody gives more than it has; ties go to the first. Raises ValueError when `total` is more than all have.
    """
    whole = sum(counts)
    if not 0 <= total <= whole:
        raise ValueError(f"{total} rows cannot be chosen from {whole}")
    given = [count * total // whole if whole else 0 for count in counts]
    while left := total - sum(given):
        open_ones = sorted((g, i) for i, g in enumerate(given) if g < counts[i])
        for _, i in open_ones[:left]:
            given[i] += 1
    return given


def similarity(distance_NN: NDArray[np.float64]) -> Similarity:
    """Distances as similarities: the largest distance minus each. None is negative, so more medoids are never worse."""
    wide = distance_NN.astype(np.float64)
    result: Similarity = wide.max(initial=0.0) - wide
    return result


def value(similarity_NN: Similarity, chosen: Sequence[int]) -> float:
    """What the medoids are worth: the sum over all rows of the similarity to the nearest of them."""
    return float(similarity_NN[:, list(chosen)].max(axis=1).sum()) if len(chosen) else 0.0


def medoids(similarity_NN: Similarity, count: int) -> list[int]:
    """`count` rows of large value, greedily, in the order found; among equals the first row wins.

    Lazy (Minoux): a row's gain only shrinks, so an old gain is an upper bound, and most rows are never looked at again.
    Rounding keeps this true, since sums of smaller terms in the same order are never larger; so the rows are those of
    the plain greedy search, which is within 1 - 1/e of the best.
    """
    rows = similarity_NN.shape[0]
    if not 0 <= count <= rows:
        raise ValueError(f"{count} medoids cannot be chosen from {rows} rows")
    columns = np.ascontiguousarray(similarity_NN.T)
    nearest = np.zeros(rows)
    bounds = [(-float(columns[i].sum()), i) for i in range(rows)]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < count:
        _, i = heapq.heappop(bounds)
        entry = (-float(np.maximum(columns[i] - nearest, 0.0).sum()), i)
        if bounds and entry > bounds[0]:
            heapq.heappush(bounds, entry)
            continue
        chosen.append(i)
        nearest = np.maximum(nearest, columns[i])
    return chosen


def cluster_sizes(similarity_NN: Similarity, chosen: Sequence[int]) -> list[int]:
    """How many rows each medoid stands for, itself included; a row between two goes to the one found first."""
    nearest_N = similarity_NN[:, list(chosen)].argmax(axis=1)
    nearest_N[list(chosen)] = np.arange(len(chosen))
    return [int(n) for n in np.bincount(nearest_N, minlength=len(chosen))]
