"""Pipette's objective term by term, as its page writes it, and the best order by trying all."""

from __future__ import annotations

from itertools import permutations

import numpy as np


def seconds(order, bandwidth, *, stages, boundary, gradients, all_stages=True):
    """C_pp + T_out, bandwidth as an array [from, to]; 2 S / bandwidth of a link is S / bandwidth of each way."""
    grid = np.array(order).reshape(-1, stages)
    crossings = [
        sum(
            boundary / bandwidth[row[k], row[k + 1]] + boundary / bandwidth[row[k + 1], row[k]]
            for k in range(stages - 1)
        )
        for row in grid
    ]
    pipelines = len(grid)
    exchange = 0.0
    for k in range(stages if all_stages else 1):
        if pipelines > 1:
            ring = grid[:, k]
            links = [(ring[q], ring[(q + 1) % pipelines]) for q in range(pipelines)]
            slowest = min(min(bandwidth[a, b], bandwidth[b, a]) for a, b in links)
            exchange = max(exchange, 2 * (pipelines - 1) / pipelines * gradients / slowest)
    return max(crossings) + exchange


def best(bandwidth, **facts):
    """The least of all orders."""
    return min(seconds(order, bandwidth, **facts) for order in permutations(range(len(bandwidth))))
