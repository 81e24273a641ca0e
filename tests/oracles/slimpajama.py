"""SlimPajama-DC's measures, one term after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence


def kl_bits(first: Sequence[int], second: Sequence[int], added: float) -> float:
    """KL of two lists of counts, each with so many occurrences more of every token; in bits."""
    totals = [sum(counts) + added * len(counts) for counts in (first, second)]
    found = 0.0
    for a, b in zip(first, second, strict=True):
        p, q = (a + added) / totals[0], (b + added) / totals[1]
        if p > 0:
            found += math.inf if q == 0 else p * math.log2(p / q)
    return found


def risk_of_guessing(scores: Sequence[float]) -> float:
    """The paper's formula for tests of four choices."""
    total = 0.0
    for score in scores:
        total += score - 0.25 if score > 0.25 else 0.25 - score
    return 1 - total / len(scores)


def phases(lengths: Sequence[int], factors: Sequence[float]) -> list[float]:
    """The factor at every step of a run whose phases have these lengths."""
    found: list[float] = []
    for length, factor in zip(lengths, factors, strict=True):
        found += [factor] * length
    return found
