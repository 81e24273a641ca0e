"""Block quantisation and a sum over ranks by hops, slowly: value by value, rank by rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Row = Sequence[float]


def blocks(lengths: Sequence[int], block: int) -> list[tuple[int, int]]:
    """(start, stop) of each block of a row that is cut in runs."""
    found, at = [], 0
    for length in lengths:
        found += [(at + i, at + min(i + block, length)) for i in range(0, length, block)]
        at += length
    return found


def scale_of(values: Row, top: int) -> float:
    """max |x| / top in float32; NaN where a value is not finite; never below the smallest normal number."""
    if not all(math.isfinite(x) for x in values):
        return math.nan
    largest = np.float32(max(abs(x) for x in values))
    if largest == 0:
        return 0.0
    return float(max(largest / np.float32(top), np.finfo(np.float32).tiny))


def coded(values: Row, top: int) -> tuple[float, list[int]]:
    """Scale and codes of one block."""
    scale = scale_of(values, top)
    if scale == 0 or math.isnan(scale):
        return scale, [0] * len(values)
    return scale, [max(-top, min(top, round(float(np.float32(x) / np.float32(scale))))) for x in values]


def there_and_back(row: Row, lengths: Sequence[int], block: int, top: int) -> list[float]:
    """A row as its codes tell it."""
    found: list[float] = []
    for start, stop in blocks(lengths, block):
        scale, codes = coded(row[start:stop], top)
        found += [float(np.float32(scale) * np.float32(code)) for code in codes]
    return found


def summed(
    parts: Sequence[Row], hops: Sequence[int], lengths: Sequence[int], block: int, top: int
) -> list[list[float]]:
    """What each of the ranks is left with: its slice of the sum, each hop's parcels coded once.

    `parts`: one row for each rank, as many slices as there are ranks. `hops`: the sizes of groups, the first of
    neighbours; ranks count with it fastest.
    """
    ranks, size = len(parts), sum(lengths)
    held = [{to: list(part[to * size : (to + 1) * size]) for to in range(ranks)} for part in parts]
    stride = 1
    for hop in hops:
        after: list[dict[int, list[float]]] = []
        for rank in range(ranks):
            here = rank // stride % hop
            group = [rank + (other - here) * stride for other in range(hop)]
            wanted = [to for to in held[rank] if to // stride % hop == here]
            total = {to: [0.0] * size for to in wanted}
            for peer in group:
                row = [x for to in wanted for x in held[peer][to]]
                seen = there_and_back(row, list(lengths) * len(wanted), block, top)
                for i, to in enumerate(wanted):
                    piece = seen[i * size : (i + 1) * size]
                    total[to] = [float(np.float32(a) + np.float32(b)) for a, b in zip(total[to], piece, strict=True)]
            after.append(total)
        held, stride = after, stride * hop
    return [held[rank][rank] for rank in range(ranks)]
