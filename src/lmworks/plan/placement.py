"""Which machine does what: the order of machines in which a step's sends take least, on links that were measured.

Machines stand in rows of one pipeline each: place q s + k of an order is stage k of pipeline q, for s stages. Gradients
of a stage go round a ring of the machines that hold it, in the order of pipelines. `anneal` is Pipette's search, with
its five moves and its acceptance; `exact` tries all orders, and leaves those alone that cannot be better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from lmworks.core.errors import UsageError
from lmworks.maths.whole import legal_divisors
from lmworks.plan.latency import ring_seconds

Order = tuple[int, ...]
"""Machines by place."""
MOST_EXACT = 10
"""Machines up to which `exact` is asked; more take hours."""
COOLING = 0.999
"""What is left of the temperature after each move."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What is sent over which links. Raises UsageError for sizes that do not go together."""

    bytes_per_second: Sequence[Sequence[float]]
    """[i][j]: from machine i to j."""
    latency_seconds: Sequence[Sequence[float]] | None = None
    """The same; None: none."""
    stages: int
    """Machines of a pipeline."""
    boundary_bytes: float
    """That go from stage to stage for a micro-batch, each way."""
    gradient_bytes: float
    """Of a rank's gradients, which go between machines once a step."""
    rounds: float = 1.0
    """How often a step waits for C: once in the paper's objective, m / p times in its time of a step."""
    rings: Literal["slowest", "first"] = "slowest"
    """Which stage's ring counts: the slowest of all, or the first stage's as the paper has it."""

    def __post_init__(self) -> None:
        machines = len(self.bytes_per_second)
        if machines == 0 or machines % self.stages:
            legal = legal_divisors(machines)
            raise UsageError(f"{self.stages} stages do not share {machines} machines", where="placement", legal=legal)

    @property
    def machines(self) -> int:
        """How many."""
        return len(self.bytes_per_second)

    @property
    def pipelines(self) -> int:
        """How many of them stand beside each other."""
        return self.machines // self.stages

    def crossing(self, pipeline: Sequence[int]) -> float:
        """Seconds of a micro-batch there and back over the links of one pipeline, summed."""
        return sum(self._hop(a, b) for a, b in pairwise(pipeline))

    def _hop(self, a: int, b: int) -> float:
        late = self.latency_seconds
        there, back = self.bytes_per_second[a][b], self.bytes_per_second[b][a]
        sending = self.boundary_bytes / there + self.boundary_bytes / back
        return sending if late is None else sending + late[a][b] + late[b][a]

    def exchange(self, order: Sequence[int]) -> float:
        """Seconds of the ring that takes longest; only links whose two ends have a place count."""
        n, stages = self.pipelines, self.stages
        slowest = math.inf
        for place, machine in enumerate(order):
            if self.rings == "first" and place % stages:
                continue
            behind = (place + stages) % (n * stages)
            if behind < len(order) and n > 1:
                there, back = self.bytes_per_second[machine], self.bytes_per_second[order[behind]]
                slowest = min(slowest, there[order[behind]], back[machine])
        return ring_seconds(self.gradient_bytes, n, slowest) if slowest < math.inf else 0.0

    def slowest(self, order: Sequence[int]) -> float:
        """C: the crossing of the pipeline that takes longest; of one that is not full, its links so far."""
        starts = range(0, len(order), self.stages)
        return max((self.crossing(order[i : i + self.stages]) for i in starts), default=0.0)

    def seconds(self, order: Sequence[int]) -> float:
        """What a search makes small: C, and the exchange of gradients. Of the start of an order, no more than that."""
        return self.rounds * self.slowest(order) + self.exchange(order)

    def rows(self, order: Sequence[int]) -> tuple[Order, ...]:
        """The machines of each pipeline."""
        return tuple(tuple(order[i : i + self.stages]) for i in range(0, len(order), self.stages))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An order, and what it takes."""

    order: Order
    seconds: float
    tried: int
    """Orders that were looked at."""


def anneal(
    ground: Ground,
    *,
    seed: int,
    moves: int = 20_000,
    seconds: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> Placed:
    """The best order that simulated annealing meets in so many moves or seconds, whichever end first.

    With the same seed the same order, where the moves end it. A worse order is taken with probability exp(-d / T),
    where d is how much worse it is without its power of ten, from 0.1 to 1: whatever the unit, the same.
    """
    draw = np.random.default_rng(seed)
    order = [int(machine) for machine in draw.permutation(ground.machines)]
    cost = ground.seconds(order)
    best = Placed(order=tuple(order), seconds=cost, tried=1)
    until, temperature, tried = now() + seconds, 1.0, 1
    while tried <= moves and ground.machines > 1 and now() < until:
        other = _moved(order, draw)
        changed = ground.seconds(other)
        tried += 1
        if accepts(changed - cost, temperature, draw):
            order, cost = other, changed
            if cost < best.seconds:
                best = Placed(order=tuple(order), seconds=cost, tried=tried)
        temperature *= COOLING
    return Placed(order=best.order, seconds=best.seconds, tried=tried)


def accepts(worse: float, temperature: float, draw: np.random.Generator) -> bool:
    """Whether an order that takes so much longer is gone on from."""
    if worse <= 0:
        return True
    scaled = worse / 10 ** (math.floor(math.log10(worse)) + 1)
    return temperature > 0 and bool(draw.random() < math.exp(-scaled / temperature))


def _moved(order: list[int], draw: np.random.Generator) -> list[int]:
    """One of the five moves: a segment reversed, a machine moved, two swapped, a segment moved, moved and reversed."""
    size = len(order)
    i, j = sorted(int(place) for place in draw.choice(size, 2, replace=False))
    kind = int(draw.integers(5))
    if kind == 0:
        return order[:i] + order[i : j + 1][::-1] + order[j + 1 :]
    if kind == 2:
        other = order[:]
        other[i], other[j] = order[j], order[i]
        return other
    stop = i + 1 if kind == 1 else j + 1
    taken, rest = order[i:stop], order[:i] + order[stop:]
    where = int(draw.integers(len(rest) + 1))
    return rest[:where] + (taken[::-1] if kind == 4 else taken) + rest[where:]


def exact(ground: Ground) -> Placed:
    """The best order of all. Raises UsageError for more than ten machines.

    Depth first, machine by machine; a start that takes as long already as the best order is not gone on with.
    """
    if ground.machines > MOST_EXACT:
        legal = f"up to {MOST_EXACT}"
        raise UsageError(f"all orders of {ground.machines} machines", where="placement", legal=legal)
    best, tried = (math.inf, Order()), 0
    open_: list[Order] = [()]
    while open_:
        start = open_.pop()
        cost = ground.seconds(start)
        tried += 1
        if cost >= best[0]:
            continue
        if len(start) == ground.machines:
            best = cost, start
        else:
            open_ += [(*start, machine) for machine in reversed(range(ground.machines)) if machine not in start]
    return Placed(order=best[1], seconds=best[0], tried=tried)
