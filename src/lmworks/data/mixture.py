"""Which source the next row comes from, when several are mixed by weight.

The schedule uses no random numbers: after any number of rows n, source i with share w has given between w*n - 1 and
w*n + 1 rows. The counts so far are the whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import final


@final
class Mixture:
    """Shares of several sources, and the order in which they take turns (Tijdeman, the chairman assignment problem).

    Taking always the source that lags most ("largest deficit") looks simpler, but with weights such as 2, 8, 2, 40, 40,
    40 one source drifts by more than a row. So among those that lag enough, the one whose next turn is due first goes.
    A source of weight 0 never has a turn.
    The arithmetic is in integers: every machine gives the same order.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) < 0 or max(weights) <= 0:
            raise ValueError(f"weights must not be negative, and one must be positive, got {list(weights)}")
        exact = [Fraction(weight) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self._parts = [int(weight * scale) for weight in exact]
        self._whole = sum(self._parts)
        self._taking = sum(part > 0 for part in self._parts)
        self._largest = self._parts.index(max(self._parts))

    def next(self, counts: Sequence[int]) -> int:
        """The source of the next row, when `counts` rows of each were taken so far by this rule."""
        k = self._taking
        if k == 1:
            return self._largest
        turn = sum(counts) + 1
        slack = 2 * k - 2
        best, best_due = -1, 0
        for i, (part, count) in enumerate(zip(self._parts, counts, strict=True)):
            lag = slack * (part * turn - self._whole * count)  # slack * whole times the rows it is behind
            if part == 0 or lag < self._whole:
                continue
            due = (slack - 1) * self._whole - lag  # over `part`: turns until it is a row short
            if best < 0 or due * self._parts[best] < best_due * part:
                best, best_due = i, due
        assert best >= 0, "the lags add up to one row, so at least one of k is 1/k or more"
        return best

    def take(self, counts: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
        """The sources of the next `rows` rows, and the counts after them."""
        after, order = list(counts), []
        for _ in range(rows):
            source = self.next(after)
            after[source] += 1
            order.append(source)
        return order, after
