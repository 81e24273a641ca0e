"""Run folders of ranks whose times are made up, written by the recorder's own events."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmworks.core.events import Events
from lmworks.core.run import RunFolder
from lmworks.core.spans import Span, sums

STEP = 0.1
"""Seconds of a step without a slow rank."""


def spans_of(start: float, work: tuple[float, float, float], end: float, *, number: int) -> list[Span]:
    """One step: data, forward, backward with a wait inside that ends with the slowest rank, optimizer."""
    data, forward, backward = work
    edges = np.cumsum([start, data, forward])
    back = Span("backward", "main", float(edges[2]), end, number=0)
    waits = Span("fsdp reduce-scatter", "main", float(edges[2]) + backward, end, 4096, True, number)
    return [
        Span("data", "main", start, float(edges[1])),
        Span("forward", "main", float(edges[1]), float(edges[2]), number=0),
        back,
        waits,
        Span("fsdp all-gather", "beside", float(edges[1]), float(edges[2]) + 0.01, 4096, True, number),
        Span("optimizer", "main", end, end + 0.004),
    ]


def write(
    path: Path,
    *,
    ranks: int,
    steps: int,
    seed: int = 0,
    slow: int | None = None,
    factor: float = 1.5,
    noise: float = 0.1,
    skew: float = 0.0,
    pp: int = 1,
) -> Path:
    """A run in which `slow` takes `factor` times as long for its passes; rank r's clock is r times `skew` ahead.

    noise: how much the seconds of a pass vary, as the standard deviation of their logarithm.
    """
    random = np.random.default_rng(seed)
    run = RunFolder(path)
    path.mkdir(parents=True)
    writers = []
    for rank in range(ranks):
        folder = run if rank == 0 else run.of_rank(rank)
        axes = {"dp_shard": rank % (ranks // pp)} | ({"pp": rank // (ranks // pp)} if pp > 1 else {})
        writers.append(Events(folder.events, run=run.name, rank=rank, axes=axes, clock=lambda: 1e9))
        writers[-1].write("start", resumed_from=None)
        for at in (0.0, steps * 2 * STEP):
            mine = 1e9 + at + rank * skew
            writers[-1].write("clock", start=mine, end=mine, offset=-rank * skew, error=1e-4)
    now = 1e9
    for step in range(1, steps + 1):
        work_R3 = np.array([0.002, 0.03, 0.05]) * np.exp(noise * random.standard_normal((ranks, 3)))
        for rank in range(ranks):
            work_R3[rank, 1:] *= (factor if rank == slow else 1.0) * (2.0 if pp > 1 and rank >= ranks // pp else 1.0)
        end = now + float(work_R3.sum(axis=1).max()) + 0.001
        for rank, events in enumerate(writers):
            data, forward, backward = (float(value) for value in work_R3[rank])
            found = spans_of(now + rank * skew, (data, forward, backward), end + rank * skew, number=step)
            told = {name: [s.calls, s.seconds, s.bytes, int(s.exchange)] for name, s in sums(found).items()}
            events.step = step
            events.write("sums", start=now, end=end, stream="sums", spans=told)
            events.write("step", start=now + rank * skew, end=end + rank * skew + 0.004)
            if step % 10 == 0:
                events.spans(found, step=step)
        now = end + 0.005
    for events in writers:
        events.flush()
    return path
