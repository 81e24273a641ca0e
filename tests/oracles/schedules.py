"""Pipeline orders in closed form, and their times by iteration to a fixed point; neither torch nor lmworks is asked."""

from __future__ import annotations

from collections.abc import Sequence

Step = tuple[str, int, int]
"""'F' or 'B' or 'I' or 'W', stage, micro-batch."""


def one_forward_one_backward(p: int, m: int) -> list[list[Step]]:
    """Rank r: min(p - 1 - r, m) forward passes, then forward and backward in turn, then the backward passes left."""
    ranks = []
    for r in range(p):
        warmup = min(p - 1 - r, m)
        ranks.append(_alternate([("F", r, k) for k in range(m)], [("B", r, k) for k in range(m)], warmup))
    return ranks


def interleaved(p: int, m: int, v: int, *, whole_when_equal: bool = False) -> list[list[Step]]:
    """Rank r: a pass of a chunk is a unit, k = 0 .. m v - 1. Rounds of R micro-batches (p of them where p divides m).

    Unit k works on chunk (k mod R v) div R, backward v - 1 minus that, and on micro-batch (k div R v) R + k mod R.
    Warm-up: 2 (p - 1 - r) + (v - 1) R units, at most all. `whole_when_equal`: all units when m = p, as in the paper.
    """
    size = m // max(1, m // p)
    ranks = []
    for r in range(p):
        units = [((k % (size * v)) // size, (k // (size * v)) * size + k % size) for k in range(m * v)]
        forward = [("F", chunk * p + r, j) for chunk, j in units]
        backward = [("B", (v - 1 - chunk) * p + r, j) for chunk, j in units]
        warmup = m * v if whole_when_equal and m == p else min(2 * (p - 1 - r) + (v - 1) * size, m * v)
        ranks.append(_alternate(forward, backward, warmup))
    return ranks


def _alternate(forward: list[Step], backward: list[Step], warmup: int) -> list[Step]:
    steps = forward[:warmup]
    for i, unit in enumerate(forward[warmup:]):
        steps += [unit, backward[i]]
    return steps + backward[len(forward) - warmup :]


def ends(ranks: Sequence[Sequence[Step]], seconds: dict[Step, float], hop: float) -> dict[Step, float]:
    """When every step ends: start times are raised until nothing moves. A hop between ranks takes `hop` seconds."""
    where = {stage: rank for rank, steps in enumerate(ranks) for _, stage, _ in steps}
    last = max(where)
    found = {step: seconds[step] for steps in ranks for step in steps}
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(ranks):
            for i, step in enumerate(steps):
                start = found[steps[i - 1]] if i else 0.0
                for other in _before(step, last):
                    if other in found:
                        start = max(start, found[other] + (hop if where[other[1]] != rank else 0.0))
                end = start + seconds[step]
                if end > found[step] + 1e-12:
                    found[step], moved = end, True
    return found


def _before(step: Step, last: int) -> list[Step]:
    kind, stage, j = step
    if kind == "F":
        return [("F", stage - 1, j)]
    if kind == "W":
        return [("I", stage, j)]
    return [("F", stage, j), *([("B", stage + 1, j), ("I", stage + 1, j)] if stage < last else [])]
