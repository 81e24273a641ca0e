"""What a pipeline's order comes to on a clock: when each action runs, how long ranks wait, and where it gets stuck.

An action starts when its rank is free and what it needs has arrived. A rank computes one thing at a time; sends go on
beside it, one after the other on each line from rank to rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

from lmworks.core.errors import LmworksError, UsageError
from lmworks.parallel.schedule import Action, Kind, Order

PerStage = float | Sequence[float]
"""Seconds of every stage, or of each."""


class Deadlock(LmworksError):
    """An order in which ranks wait for each other, or for themselves, for ever."""


@final
@dataclass(frozen=True, kw_only=True)
class Link:
    """The line from a rank to another. A message takes latency + bytes / bandwidth, and the bandwidth alone."""

    latency_seconds: float = 0.0
    """From the last byte sent to its arrival."""
    bytes_per_second: float = math.inf
    """Bandwidth of one direction."""


Links = Mapping[tuple[int, int], Link]
"""The line from each rank to each that it sends to."""


class Event(NamedTuple):
    """One action on the clock; seconds."""

    rank: int
    kind: Kind
    stage: int
    micro_batch: int
    start: float
    end: float


@final
@dataclass(frozen=True, kw_only=True)
class Timeline:
    """An order with its times."""

    order: Order
    events: tuple[Event, ...]
    """By start, then by rank."""

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((event.end for event in self.events), default=0.0)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        busy = [0.0] * len(self.order.ranks)
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(busy)

    @property
    def bubble_share(self) -> float:
        """Seconds that ranks wait over the seconds that they compute, all ranks together: idle / ideal."""
        busy = sum(self.busy_seconds)
        return (self.makespan * len(self.order.ranks) - busy) / busy if busy else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """The most micro-batches that each rank holds at a time, counted per stage: see `Order.peak_live`."""
        return self.order.peak_live


class _Result(NamedTuple):
    """What an action makes: hidden states on the way forward, their gradient on the way back."""

    forward: bool
    stage: int
    micro_batch: int


def simulate(
    order: Order,
    *,
    forward_seconds: PerStage,
    backward_seconds: PerStage,
    input_share: float = 0.5,
    link: Link | Links | None = None,
    boundary_bytes: float = 0.0,
) -> Timeline:
    """Run an order on a clock.

    Times are those of one micro-batch in one stage. `backward_seconds` is a whole backward pass, of which the gradient
    of the input takes `input_share`. What goes from stage to stage has `boundary_bytes` in each direction, and is there
    at once without a `link` or between stages of one rank. `link`: one for all pairs of ranks, or one for each pair.

    Raises Deadlock when the order gets stuck, UsageError for times that are not those of its stages.
    """
    clock = _Clock(order, _seconds(order, forward_seconds, backward_seconds, input_share), link, boundary_bytes)
    turn = deque(range(len(order.ranks)))
    waits: dict[_Result, int] = {}
    while turn:
        rank = turn.popleft()
        while (action := clock.next(rank)) is not None:
            missing = clock.missing(action)
            if missing is not None:
                waits[missing] = rank
                break
            made = clock.run(rank, action)
            if made is not None and made in waits:
                turn.append(waits.pop(made))
    stuck = [(rank, action) for rank in range(len(order.ranks)) if (action := clock.next(rank)) is not None]
    if stuck:
        raise _deadlock(clock, stuck)
    return Timeline(order=order, events=tuple(sorted(clock.events, key=lambda event: (event.start, event.rank))))


class _Clock:
    """The state of a simulation."""

    def __init__(
        self, order: Order, seconds: dict[Kind, list[float]], link: Link | Links | None, nbytes: float
    ) -> None:
        self.order, self.seconds = order, seconds
        self.link, self.nbytes = link or Link(), nbytes
        self.done = [0] * len(order.ranks)
        """Actions behind each rank."""
        self.free = [0.0] * len(order.ranks)
        """When each rank has time."""
        self.line_free: dict[tuple[int, int], float] = {}
        self.arrived: dict[_Result, float] = {}
        """When a result is where the next stage wants it."""
        self.events: list[Event] = []

    def next(self, rank: int) -> Action | None:
        """What a rank is to do; None when it has done everything."""
        actions, done = self.order.ranks[rank], self.done[rank]
        return actions[done] if done < len(actions) else None

    def missing(self, action: Action) -> _Result | None:
        """The first thing that an action needs and that is not made yet."""
        return next((need for need in _needs(action, self.order.stages) if need not in self.arrived), None)

    def run(self, rank: int, action: Action) -> _Result | None:
        """Do an action whose needs are there; gives what it made, None for gradients of weights."""
        ready = [self.arrived[need] for need in _needs(action, self.order.stages) if need.stage != action.stage]
        start = max([self.free[rank], *ready])
        end = start + self.seconds[action.kind][action.stage]
        self.free[rank], self.done[rank] = end, self.done[rank] + 1
        self.events.append(Event(rank, action.kind, action.stage, action.micro_batch, start, end))
        if action.kind is Kind.BACKWARD_WEIGHT:
            return None
        forward = action.kind is Kind.FORWARD
        made = _Result(forward, action.stage, action.micro_batch)
        self.arrived[made] = self._arrival(rank, action.stage + (1 if forward else -1), end)
        return made

    def _arrival(self, rank: int, stage: int, end: float) -> float:
        """When a result that is made at `end` is at the rank of `stage`."""
        target = self.order.holder.get(stage, rank)
        if target == rank:
            return end
        link = self.link if isinstance(self.link, Link) else self.link[rank, target]
        sent = max(end, self.line_free.get((rank, target), 0.0)) + self.nbytes / link.bytes_per_second
        self.line_free[rank, target] = sent
        return sent + link.latency_seconds


def _needs(action: Action, stages: int) -> Iterator[_Result]:
    """The results that must be there before an action starts."""
    kind, stage, micro_batch = action
    if kind is Kind.FORWARD:
        if stage > 0:
            yield _Result(True, stage - 1, micro_batch)
    elif kind is Kind.BACKWARD_WEIGHT:
        yield _Result(False, stage, micro_batch)
    else:
        yield _Result(True, stage, micro_batch)
        if stage < stages - 1:
            yield _Result(False, stage + 1, micro_batch)


def _seconds(order: Order, forward: PerStage, backward: PerStage, input_share: float) -> dict[Kind, list[float]]:
    """Seconds by kind and stage."""
    if not 0 <= input_share <= 1:
        raise UsageError(f"input_share = {input_share}", where="simulate", legal="a share between 0 and 1")
    found = {}
    for name, value in (("forward_seconds", forward), ("backward_seconds", backward)):
        each = list(value) if isinstance(value, Sequence) else [float(value)] * order.stages
        if len(each) != order.stages or min(each, default=0.0) < 0:
            legal = f"one number, or {order.stages}: one for every stage; none below 0"
            raise UsageError(f"{name} = {value}", where=f"pipeline order '{order.name}'", legal=legal)
        found[name] = each
    backwards = found["backward_seconds"]
    return {
        Kind.FORWARD: found["forward_seconds"],
        Kind.BACKWARD: backwards,
        Kind.BACKWARD_INPUT: [seconds * input_share for seconds in backwards],
        Kind.BACKWARD_WEIGHT: [seconds * (1 - input_share) for seconds in backwards],
    }


def _deadlock(clock: _Clock, stuck: Sequence[tuple[int, Action]]) -> Deadlock:
    """The error that names what every stuck rank waits for."""
    lines = []
    for rank, action in stuck:
        missing = clock.missing(action)
        assert missing is not None, "a rank stops only for something that is missing"
        needed = f"{'forward' if missing.forward else 'backward'} of micro-batch {missing.micro_batch}"
        holder = clock.order.holder[missing.stage]
        lines.append(f"rank {rank} waits with {action} for {needed} in stage {missing.stage}, on rank {holder}")
    return Deadlock(
        "the ranks wait for each other: " + "; ".join(lines),
        where=f"pipeline order '{clock.order.name}'",
        next_step="let the rank that is waited for do that action before the one that it waits with",
    )


COLOURS = {
    Kind.FORWARD: "#8ab6e8",
    Kind.BACKWARD: "#f2b27c",
    Kind.BACKWARD_INPUT: "#f2cf6b",
    Kind.BACKWARD_WEIGHT: "#a8d5a2",
}
"""Fill of each kind of action; dark text reads on all of them."""
NUMBERED = 600
"""Up to so many actions a picture carries their micro-batches' numbers; more would overlap."""


def draw(timeline: Timeline, path: Path, *, title: str | None = None, unit: str = "seconds") -> None:
    """Write a timeline as PNG: a row per rank, micro-batches by number, a rank's later stages paler; time in `unit`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only for pictures)
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    rows = len(timeline.order.ranks)
    figure = Figure(figsize=(12, 1.3 + 0.38 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for event in timeline.events:
        _box(axes, event, timeline.order.held[event.rank].index(event.stage))
        if len(timeline.events) <= NUMBERED:
            middle = (event.start + event.end) / 2
            axes.text(middle, event.rank, str(event.micro_batch), ha="center", va="center", fontsize=7, color="#222222")
    axes.set_yticks(range(rows), [f"rank {rank}" for rank in range(rows)])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in Kind if any(event.kind is kind for event in timeline.events)]
    keys = [Patch(facecolor=COLOURS[kind], label=kind.value) for kind in kinds]
    keys += [Patch(facecolor="white", edgecolor="#777777", label="waiting")]
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), frameon=False, fontsize=8)
    known = (
        f"{timeline.order.name}: {timeline.makespan:.4g} {unit}, bubble {100 * timeline.bubble_share:.3g} % of the work"
    )
    axes.set_title(title or known, loc="left", fontsize=10)
    figure.savefig(path, dpi=120)


def _box(axes: Any, event: Event, chunk: int) -> None:
    """One action as a box; `chunk` counts the stages of its rank."""
    axes.barh(
        event.rank,
        event.end - event.start,
        left=event.start,
        height=0.86,
        color=COLOURS[event.kind],
        edgecolor="white",
        linewidth=0.6,
        alpha=max(0.45, 1.0 - 0.3 * chunk),
    )
