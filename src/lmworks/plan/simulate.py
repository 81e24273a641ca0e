"""A step on a clock: every block on the lanes of its rank, every micro-batch through the schedule's real order.

Two clocks, one inside the other. In a rank a micro-batch goes from block to block on three lanes: computing (with the
exchanges that nothing hides), the network (weights one block ahead, gradients behind), and saved tensors on their way
out and back. Between ranks `parallel.timeline` runs torch's order with the stages' seconds and the cluster's links. The
step ends when the last rank has summed its gradients and made its update; ranks of data parallel groups wait for the
slowest of them, so one slow rank holds all.

A long order repeats itself: where sends take less than a stage, each further round of p micro-batches takes as long as
the one before. Orders above `MOST` actions are run for two shorter numbers of micro-batches, and the rest follows from
their difference. V-shaped orders are run to their end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, final

from lmworks.parallel.holdings import resharded, sums_each
from lmworks.parallel.layout import V_SHAPED, Layout
from lmworks.parallel.schedule import Order, next_micro_batches, order
from lmworks.parallel.timeline import Timeline, simulate
from lmworks.plan.choice import Choice, Stage
from lmworks.plan.links import of_pipeline
from lmworks.plan.time import Passes, Seconds, boundary_bytes, passes, update
from lmworks.plan.work import Piece, Work, keeps_products

MOST = 2_000
"""Actions of an order that are run one by one."""


class Span(NamedTuple):
    """Something on a lane; seconds."""

    lane: str
    """compute, network, away."""
    what: str
    """forward, backward, gather, reduce, out, in."""
    start: float
    end: float


@final
@dataclass(frozen=True)
class Walk:
    """A micro-batch through a stage."""

    forward: float
    """Seconds until its forward pass is made."""
    backward: float
    """Seconds of its backward pass."""
    tail: float
    """Seconds until its gradients are summed, after that."""
    spans: tuple[Span, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """A simulated step."""

    seconds: Seconds
    timeline: Timeline | None
    """The whole pipeline, where it was run to its end; None without one, or for a long one."""
    walk: Walk
    """A micro-batch through the dearest stage: the last one of a step, with gathers and sums of gradients."""


def walk(work: Work, choice: Choice, stage: Stage, *, gathers: bool, reduces: bool, slow: float = 1.0) -> Walk:
    """One micro-batch through a stage on its rank's lanes. `slow`: how much longer it computes than others."""
    pieces = work.pieces(choice, stage)
    extra = 1 if stage.first else 0
    kept = keeps_products(choice.saved)
    backward = []
    for i, piece in enumerate(pieces):
        number = stage.start + i - extra
        runs = stage.start <= number < stage.stop and bool(choice.saved.again(number))
        backward.append(_back(piece, runs, kept, slow))
    forward = [slow * p.forward + p.tensor_forward + p.context_forward for p in pieces]
    regather = gathers and resharded(choice.layout)
    if not work.practice.gathers_overlap:  # then computing waits for all of each
        forward = [taken + gathers * p.gather for taken, p in zip(forward, pieces, strict=True)]
        backward = [taken + regather * p.gather_again for taken, p in zip(backward, pieces, strict=True)]
        gathers = regather = False
    spans: list[Span] = []
    made = _forward(pieces, forward, spans, gathers=gathers)
    end, network = _backward(pieces, backward, spans, start=made, gathers=regather, reduces=reduces, stage=stage)
    return Walk(made, end - made, max(0.0, network - end), tuple(sorted(spans, key=lambda span: span.start)))


def _back(piece: Piece, runs: bool, kept: bool, slow: float) -> float:
    seconds = slow * piece.backward + piece.tensor_backward + piece.context_backward
    if runs:
        computing = piece.again_moved if kept else piece.again
        seconds += slow * computing + piece.tensor_again + piece.context_forward
    return seconds


def _forward(pieces: Sequence[Piece], seconds: Sequence[float], spans: list[Span], *, gathers: bool) -> float:
    """Seconds until the forward pass is made."""
    now = network = away = began = 0.0
    for piece, taken in zip(pieces, seconds, strict=True):
        ready = now
        if gathers and piece.gather:
            begin = max(network, began)  # asked for when the block before begins
            network = begin + piece.gather
            spans.append(Span("network", "gather", begin, network))
            ready = max(now, network)
        began, now = ready, ready + taken
        spans.append(Span("compute", "forward", began, now))
        if piece.away:
            begin = max(away, now)
            away = begin + piece.away
            spans.append(Span("away", "out", begin, away))
    return now


def _backward(
    pieces: Sequence[Piece],
    seconds: Sequence[float],
    spans: list[Span],
    *,
    start: float,
    gathers: bool,
    reduces: bool,
    stage: Stage,
) -> tuple[float, float]:
    """When the backward pass is made, and when the network is done."""
    coming = max([start, *(span.end for span in spans if span.lane == "away")])
    ends = ({0} if stage.first else set()) | ({len(pieces) - 1} if stage.last else set())
    again = {i for i, piece in enumerate(pieces) if gathers and piece.gather_again and i not in ends}
    now, network, gathered = start, start, dict.fromkeys(range(len(pieces)), start)

    def ask(i: int, when: float) -> None:
        nonlocal network
        if i in again:
            begin = max(network, when)
            network = gathered[i] = begin + pieces[i].gather_again
            spans.append(Span("network", "gather", begin, network))

    ask(len(pieces) - 1, start)
    for i in reversed(range(len(pieces))):
        piece, ready = pieces[i], max(now, gathered[i])
        if piece.away:
            begin, coming = coming, coming + piece.away
            spans.append(Span("away", "in", begin, coming))
            ready = max(ready, coming)
        ask(i - 1, ready)  # when this block begins, and so in front of what it will send
        now = ready + seconds[i]
        spans.append(Span("compute", "backward", ready, now))
        if reduces and piece.reduce:
            begin = max(network, now)
            network = begin + piece.reduce
            spans.append(Span("network", "reduce", begin, network))
    return now, network


def of_choice(work: Work, choice: Choice, slow: Mapping[int, float] | None = None) -> Step:
    """A step of a choice. `slow`: places of the pipeline whose ranks compute so many times longer."""
    slow = slow or {}
    return _alone(work, choice, slow.get(0, 1.0)) if choice.layout.pp == 1 else _pipeline(work, choice, slow)


def _alone(work: Work, choice: Choice, slow: float) -> Step:
    stage = work.ground.stages(choice.layout)[0]
    overlaps = work.practice.data_overlaps
    each = sums_each(choice.layout)
    usual = walk(work, choice, stage, gathers=True, reduces=overlaps and each, slow=slow)
    last = walk(work, choice, stage, gathers=True, reduces=overlaps, slow=slow)
    mine, m = passes(work, choice, stage), choice.micro_batches
    updating = update(work, choice, 0)
    behind = last.tail if overlaps else mine.reduce
    reduce = (m if each else 1) * behind + mine.once
    pure = usual.forward + usual.backward
    total = (m - 1) * pure + last.forward + last.backward + reduce + updating
    return Step(seconds=_shared(work, choice, 0, total, reduce, updating, slow), timeline=None, walk=last)


def _pipeline(work: Work, choice: Choice, slow: Mapping[int, float]) -> Step:
    layout, ground, m = choice.layout, work.ground, choice.micro_batches
    overlaps = work.practice.data_overlaps
    ranks = [ground.held(layout, place) for place in range(layout.pp)]
    stages = ground.stages(layout)
    forward, backward = [0.0] * len(stages), [0.0] * len(stages)
    start, tails, walks = 0.0, [0.0] * layout.pp, []
    for place, held in enumerate(ranks):
        factor = slow.get(place, 1.0)
        for stage in held:
            usual = walk(work, choice, stage, gathers=False, reduces=False, slow=factor)
            once = walk(work, choice, stage, gathers=True, reduces=overlaps, slow=factor)
            number = stages.index(stage)
            forward[number], backward[number] = usual.forward, usual.backward
            start = max(start, once.forward + once.backward - usual.forward - usual.backward)
            mine = passes(work, choice, stage)
            tails[place] += (once.tail if overlaps else mine.reduce) + mine.once
            walks.append((usual.forward + usual.backward, once))
    ends, timeline = run(work, choice, tuple(forward), tuple(backward), m)
    updates = [update(work, choice, place) for place in range(layout.pp)]
    worst = max(range(layout.pp), key=lambda place: ends[place] + tails[place] + updates[place])
    total = start + ends[worst] + tails[worst] + updates[worst]
    seconds = _shared(work, choice, worst, total, tails[worst], updates[worst], slow.get(worst, 1.0))
    return Step(seconds=seconds, timeline=timeline, walk=max(walks, key=lambda pair: pair[0])[1])


def run(
    work: Work, choice: Choice, forward: tuple[float, ...], backward: tuple[float, ...], micro_batches: int
) -> tuple[list[float], Timeline | None]:
    """When each place of the pipeline has made its last pass; and the whole timeline where that is short."""
    layout = choice.layout
    sizes = (forward, backward, boundary_bytes(work, choice))
    if layout.schedule in V_SHAPED or 2 * micro_batches * layout.pp * layout.held <= MOST:
        timeline = _timed(work, layout, micro_batches, *sizes)
        return _ends(timeline), timeline
    few = _legal(layout, 2 * layout.pp + micro_batches % layout.pp)
    more = _legal(layout, few + layout.pp)
    if more >= micro_batches:
        timeline = _timed(work, layout, micro_batches, *sizes)
        return _ends(timeline), timeline
    one, two = (_ends(_timed(work, layout, number, *sizes)) for number in (few, more))
    rounds = (micro_batches - more) / (more - few)
    return [b + rounds * (b - a) for a, b in zip(one, two, strict=True)], None


def _timed(
    work: Work,
    layout: Layout,
    micro_batches: int,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    boundary: float,
) -> Timeline:
    key = ("timed", layout.schedule, layout.ranks, layout.pp, layout.held, micro_batches, forward, backward, boundary)
    found: Timeline | None = work.ground.kept(key)
    if found is not None:
        return found
    made = simulate(
        ordered(layout.schedule, layout.pp, micro_batches, layout.held),
        forward_seconds=forward,
        backward_seconds=backward,
        link=of_pipeline(work.cluster, layout),
        boundary_bytes=boundary,
    )
    kept: Timeline = work.ground.keep(key, made)
    return kept


@lru_cache(maxsize=256)
def ordered(schedule: str, ranks: int, micro_batches: int, held: int) -> Order:
    """torch's order, made once."""
    return order(schedule, ranks=ranks, micro_batches=micro_batches, stages_per_rank=held)


def _legal(layout: Layout, micro_batches: int) -> int:
    return next_micro_batches(layout.schedule, ranks=layout.pp, micro_batches=max(1, micro_batches))


def _ends(timeline: Timeline) -> list[float]:
    ends = [0.0] * len(timeline.order.ranks)
    for event in timeline.events:
        ends[event.rank] = max(ends[event.rank], event.end)
    return ends


def _shared(
    work: Work, choice: Choice, place: int, total: float, reduce: float, updating: float, slow: float
) -> Seconds:
    """A simulated total, shared out: what the rank of `place` does as the closed form has it; the rest is waiting."""
    mine: list[Passes] = [passes(work, choice, stage) for stage in work.ground.held(choice.layout, place)]
    m = choice.micro_batches
    again, tensor, context = (m * sum(getattr(p, n) for p in mine) for n in ("again", "tensor", "context"))
    compute = m * slow * sum(p.both for p in mine) - slow * (again + tensor + context)
    known = Seconds(compute=compute, again=slow * again, tensor=tensor, context=context, reduce=reduce, update=updating)
    left = max(0.0, total - known.total)
    away = min(left, m * sum(p.away for p in mine))
    if choice.layout.pp > 1:
        return dataclasses.replace(known, away=away, bubble=left - away)
    return dataclasses.replace(known, away=away, gather=left - away)
