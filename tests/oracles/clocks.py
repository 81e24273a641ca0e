"""Attention on a clock, step by step: tiles of a kernel, and one block of two nano-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def blocks(start: int, stop: int, tile: int) -> int:
    """Tiles of (queries, keys) that a kernel computes for queries [start, stop) on keys [0, stop)."""
    found = 0
    for first in range(start, stop, tile):
        last = min(first + tile, stop)
        for key in range(0, stop, tile):
            found += key < last
    return found


def ticks(linear: Sequence[Any], attention: Sequence[Any], exchanges: Sequence[tuple[float, float]]) -> float:
    """Four ticks, each as long as the slowest rank or the exchange beside it."""
    beside = [
        (exchanges[0][0], linear[1]),
        (exchanges[1][0], attention[0]),
        (exchanges[0][1], attention[1]),
        (exchanges[1][1], linear[0]),
    ]
    return sum(max(sent, *work) for sent, work in beside)


def in_block(
    linear: Sequence[Any], attention: Sequence[Any], exchanges: Sequence[tuple[float, float]], before: float
) -> float:
    """A program of instructions for each rank, run until none is left; an exchange ends when all have begun it."""
    program = [
        ("run", "linear before", 0),
        ("begin", "in", 0),
        ("run", "linear before", 1),
        ("begin", "in", 1),
        ("wait", "in", 0),
        ("run", "attention", 0),
        ("begin", "out", 0),
        ("wait", "in", 1),
        ("run", "attention", 1),
        ("begin", "out", 1),
        ("wait", "out", 0),
        ("run", "linear behind", 0),
        ("wait", "out", 1),
        ("run", "linear behind", 1),
    ]
    ranks = range(len(linear[0]))
    clock, at = [0.0 for _ in ranks], [0 for _ in ranks]
    begun: dict[tuple[str, int], dict[int, float]] = {}
    ended: dict[tuple[str, int], float] = {}
    free = 0.0
    work = {
        "linear before": [[before * x for x in half] for half in linear],
        "linear behind": [[(1 - before) * x for x in half] for half in linear],
        "attention": [list(half) for half in attention],
    }
    while any(step < len(program) for step in at):
        for rank in ranks:
            if at[rank] == len(program):
                continue
            what, name, half = program[at[rank]]
            if what == "run":
                clock[rank] += work[name][half][rank]
            elif what == "begin":
                begun.setdefault((name, half), {})[rank] = clock[rank]
                if len(begun[name, half]) == len(ranks):
                    free = max(free, *begun[name, half].values()) + exchanges[half][name == "out"]
                    ended[name, half] = free
            elif (name, half) not in ended:
                continue
            else:
                clock[rank] = max(clock[rank], ended[name, half])
            at[rank] += 1
    return max(clock)
