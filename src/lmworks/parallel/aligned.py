"""A pipeline whose stages share their attention: all go forward in a tick, or all backward.

Servers of one tick serve one kind of work, so ticks alternate: p forward ones to fill the pipeline, then backward and
forward by turns, then backward ones. Stage s has micro-batch i - s in forward tick i, and j - (p - 1 - s) in backward
tick j; a stage without one only serves. m micro-batches take 2 (m + p - 1) ticks, as many as 1f1b. The price is paid in
memory: stage s waits 2 (p - 1 - s) ticks of each kind for its backward pass, and holds up to 2 (p - s) - 1
micro-batches where 1f1b holds p - s.

Derived from what is told of DistCA's schedule (all stages in one phase, no more ticks, idle stages serve); how the
paper orders its deferred backward passes is not known to us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmworks.core.errors import UsageError
from lmworks.parallel.idle import Setting, shared_block, shared_plans
from lmworks.parallel.laying import Row, whole
from lmworks.parallel.schedule import Action, Kind, Order, order
from lmworks.parallel.speeds import BACKWARD_ATTENTION, BACKWARD_LINEAR, server_seconds
from lmworks.parallel.tasks import plain
from lmworks.parallel.timeline import simulate


class Tick(NamedTuple):
    """What all stages do at a time."""

    kind: Kind
    """Forward or backward."""
    micro_batches: tuple[int | None, ...]
    """Of each stage; None where it only serves."""


def ticks(stages: int, micro_batches: int) -> tuple[Tick, ...]:
    """The ticks of a pipeline. Raises UsageError where there are fewer micro-batches than stages."""
    if not 1 <= stages <= micro_batches:
        text = f"{micro_batches} micro-batches in {stages} stages"
        raise UsageError(text, where="aligned pipeline", legal=f"{max(1, stages)} micro-batches or more")
    count = micro_batches + stages - 1

    def present(number: int) -> int | None:
        return number if 0 <= number < micro_batches else None

    forward = [Tick(Kind.FORWARD, tuple(present(i - s) for s in range(stages))) for i in range(count)]
    backward = [Tick(Kind.BACKWARD, tuple(present(j - s) for s in reversed(range(stages)))) for j in range(count)]
    found = forward[:stages]
    for i in range(stages, count):
        found += [backward[i - stages], forward[i]]
    return (*found, *backward[count - stages :])


def order_of(made: Sequence[Tick]) -> Order:
    """The same as an order, for the checks and the pictures of other schedules."""
    ranks = [
        tuple(Action(tick.kind, stage, number) for tick in made if (number := tick.micro_batches[stage]) is not None)
        for stage in range(len(made[0].micro_batches))
    ]
    return Order(name="aligned", ranks=tuple(ranks))


class Piped(NamedTuple):
    """A step of replicas of a pipeline, one block a stage."""

    seconds: float
    idle: float
    """Part of the ranks' time in which they do not compute."""


Micro = Sequence[Sequence[Row]]
"""The micro-batches of one replica, each with its rows."""


def shared_pipeline(replicas: Sequence[Micro], stages: int, setting: Setting) -> Piped:
    """All ranks of all replicas and stages share their attention. `setting.ranks` is replicas x stages; rank
    r = replica * stages + stage."""
    seconds = busy = 0.0
    for tick in ticks(stages, len(replicas[0])):
        step = [() if m is None else micro[m] for micro in replicas for m in tick.micro_batches]
        took, busy_R = shared_block(step, shared_plans(step, setting), setting, backward=tick.kind is Kind.BACKWARD)
        seconds, busy = seconds + took, busy + float(busy_R.mean())
    return Piped(seconds, 1 - busy / seconds)


def plain_pipeline(replicas: Sequence[Micro], stages: int, setting: Setting) -> Piped:
    """1f1b in every replica, each stage with its own attention; the step ends with the slowest replica."""
    speeds, count = setting.speeds, len(replicas[0])
    spans, busy = [], 0.0
    for micro in replicas:
        held = [[length for row in rows for length in row] for rows in micro]
        linear = speeds.linear * np.array([float(sum(lengths)) for lengths in held])
        attention = server_seconds(plain(whole(held), count), speeds.attention)
        forward, backward = linear + attention, BACKWARD_LINEAR * linear + BACKWARD_ATTENTION * attention
        made = order("1f1b", ranks=stages, micro_batches=count)
        timeline = simulate(
            made, forward_seconds=1.0, backward_seconds=1.0, factors=(forward.tolist(), backward.tolist())
        )
        spans.append(timeline.makespan)
        busy += float((forward + backward).sum())
    seconds = max(spans)
    return Piped(seconds, 1 - busy / len(replicas) / seconds)
