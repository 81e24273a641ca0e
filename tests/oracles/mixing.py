"""Tijdeman's rule for taking turns, written with fractions as in the paper (Discrete Mathematics 32, 1980)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count


def turns(weights: Sequence[float]) -> Iterator[int]:
    """The source of row 1, 2, 3, ..."""
    k = len(weights)
    if k == 1:
        while True:
            yield 0
    whole = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) / whole for weight in weights]
    taken = [0] * k
    least = Fraction(1, 2 * k - 2)
    for n in count(1):
        behind = [share * n - x for share, x in zip(shares, taken, strict=True)]
        waiting = [i for i in range(k) if behind[i] >= least]
        chosen = min(waiting, key=lambda i: (1 - least - behind[i]) / shares[i])
        taken[chosen] += 1
        yield chosen
