"""Attention by its definition: one query after the other, one key after the other, in Python's floats."""

from __future__ import annotations

import math

Vectors = list[list[float]]


def attention(queries: Vectors, keys: Vectors, values: Vectors, seen: list[list[bool]]) -> tuple[Vectors, list[float]]:
    """One head: the output of every query, and the logarithm of its sum of exponentials; zeros and -inf for none."""
    outs, sums = [], []
    for query, sees in zip(queries, seen, strict=True):
        scale = math.sqrt(len(query))
        scores = {
            j: sum(a * b for a, b in zip(query, key, strict=True)) / scale for j, key in enumerate(keys) if sees[j]
        }
        total = math.fsum(math.exp(score) for score in scores.values())
        width = len(values[0])
        outs.append([math.fsum(math.exp(s) / total * values[j][d] for j, s in scores.items()) for d in range(width)])
        sums.append(math.log(total) if scores else -math.inf)
    return outs, sums
