"""Seconds of a step in closed form: good enough to rank thousands of layouts; `simulate` looks at the best.

f, w: seconds of a micro-batch forward and backward through all stages of the dearest rank; m micro-batches, p ranks of
the pipeline, v stages on each; C: seconds of one round trip of a micro-batch's hidden states over all boundaries.

    alone          m (f + w)
    GPipe, m < p   (m + p - 1) (f + w) + C
    1F1B           (m + p - 1) (f + w) + (m / p) C + C (p - 2) / (p - 1)
    interleaved    (m + (p - 1) / v) (f + w) + C             where C goes over all v p - 1 boundaries

Megatron's, with sends. 1F1B has p micro-batches in flight, and so pays the round trip once for every p of them
(Pipette's "hidden critical path", whose m / p is not rounded down here), and its fill and drain wait for p - 2 of the
p - 1 hops each way on top. The interleaved order warms up deeper, which hides all but one. With equal stages and hops
up to f / v both are what the simulator says, to rounding.

Stages of other ranks that are cheaper shorten the way through the pipeline, (p - 1) (f + w), to what they take.
Exchanges over tp and cp stand in f and w. Weights are gathered one block ahead: what takes longer than the block before
is waited for. Gradients are summed behind the last backward pass of each block; what is left at its end is waited for.
A placement of states sums them behind every backward pass, and exchanges the rest when all are made, beside nothing.
Saved tensors that go away have the whole forward pass to go and the whole backward pass to come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lmworks.parallel.holdings import resharded, sums_each
from lmworks.parallel.layout import V_SHAPED
from lmworks.plan.choice import Choice, Stage
from lmworks.plan.links import of_pipeline
from lmworks.plan.states import placed
from lmworks.plan.work import WEIGHT, Work, keeps_products, update_seconds

CLASSES = ("compute", "again", "tensor", "context", "gather", "away", "bubble", "reduce", "update")


@final
@dataclass(frozen=True, kw_only=True)
class Seconds:
    """A step by what its time goes to, on the dearest rank: nothing is counted twice."""

    compute: float = 0.0
    """Forward and backward passes."""
    again: float = 0.0
    """Forward passes that are made again."""
    tensor: float = 0.0
    """Exchanges over tp, all of them waited for."""
    context: float = 0.0
    """Exchanges over cp that attention does not hide."""
    gather: float = 0.0
    """Weights that are waited for."""
    away: float = 0.0
    """Saved tensors that are waited for."""
    bubble: float = 0.0
    """Waiting for other stages, and for what they send."""
    reduce: float = 0.0
    """Gradients that are summed when nothing else is left to do."""
    update: float = 0.0
    """The optimizer's step."""

    @property
    def total(self) -> float:
        """Of the whole step."""
        return float(sum(getattr(self, name) for name in CLASSES))

    def by_class(self) -> dict[str, float]:
        """Class and seconds, in order."""
        return {name: getattr(self, name) for name in CLASSES}


@final
@dataclass(frozen=True)
class Passes:
    """A micro-batch through some stages of one rank; seconds."""

    forward: float
    backward: float
    """What is run again included."""
    again: float
    tensor: float
    context: float
    away: float
    """Waited for, both ways."""
    gather_forward: float
    """Waited for, where weights are gathered."""
    gather_backward: float
    reduce: float
    """Waited for behind the last backward pass, or with `sums_each` behind every one."""
    once: float
    """When all passes are made."""

    @property
    def both(self) -> float:
        """f + w, without gathers."""
        return self.forward + self.backward


def passes(work: Work, choice: Choice, stage: Stage) -> Passes:
    """A stage of a choice."""
    layout, makeup = choice.layout, work.ground.makeup(stage, choice.saved)
    key: tuple[Any, ...] = (makeup, keeps_products(choice.saved), choice.saved.leaves(), choice.rows, layout.tp)
    key += (layout.cp, layout.dp_shard, layout.dp_replicate, layout.context, layout.order, layout.sequence_parallel)
    key = ("passes", *key, layout.ep, resharded(layout), layout.state, layout.state and layout.pp > 1)
    found: Passes | None = work.ground.kept(key)
    return found or work.ground.keep(key, _passes(work, choice, makeup))


def _passes(work: Work, choice: Choice, makeup: tuple[Any, ...]) -> Passes:
    first, last, kinds = makeup
    blocks = [(work.block(choice, kind), again, count) for (kind, again), count in kinds]
    ends = [work.first(choice)] if first else []
    ends += [work.last(choice, alone=not first)] if last else []
    kept = keeps_products(choice.saved)
    again = sum(n * (p.again_moved if kept else p.again) for p, runs, n in blocks if runs)
    tensor_again = sum(n * p.tensor_again for p, runs, n in blocks if runs)
    context_again = sum(n * p.context_forward for p, runs, n in blocks if runs)

    def of(name: str) -> float:
        inside = sum(n * getattr(p, name) for p, _, n in blocks)
        return float(inside + sum(getattr(p, name) for p in ends))

    tensor, context = of("tensor_forward"), of("context_forward")
    back_tensor, back_context = of("tensor_backward") + tensor_again, of("context_backward") + context_again
    forward = of("forward") + tensor + context
    backward = of("backward") + again + back_tensor + back_context
    number = sum(n for *_, n in blocks)
    inner = sum(n * p.gather_again for p, _, n in blocks), max(p.gather_again for p, *_ in blocks), number
    whole = of("gather"), max(inner[1], *(p.gather for p in ends), 0.0), number + len(ends)
    reduce = of("reduce")
    most = max(p.reduce for p in [*(p for p, *_ in blocks), *ends])
    away, hides = of("away"), work.practice.gathers_overlap
    return Passes(
        forward=forward,
        backward=backward,
        again=again,
        tensor=tensor + back_tensor,
        context=context + back_context,
        away=max(0.0, away - forward) + max(0.0, away - backward),
        gather_forward=_waited(*whole, forward) if hides else whole[0],
        gather_backward=(_waited(*inner, backward) if hides else inner[0]) if resharded(choice.layout) else 0.0,
        reduce=_waited(reduce, most, whole[2], backward) if work.practice.data_overlaps else reduce,
        once=of("once"),
    )


def _waited(total: float, most: float, number: int, beside: float) -> float:
    """What of exchanges one by one is waited for: one block's by itself, and what the other blocks do not hide."""
    return most + max(0.0, total - most - beside * (1 - 1 / number))


def pipe_seconds(
    *, ranks: int, micro_batches: int, stages_per_rank: int, both: float, round_trip: float, gpipe: bool = False
) -> float:
    """Seconds of equal stages through a pipeline. `both`: f + w; `round_trip`: C."""
    p, m, v = ranks, micro_batches, stages_per_rank
    if p == 1:
        return m * both
    trips = m / p + (p - 2) / (p - 1) if v == 1 and m >= p and not gpipe else 1.0
    return (m + (p - 1) / v) * both + trips * round_trip


def of_step(work: Work, choice: Choice) -> Seconds:
    """A step in closed form."""
    layout = choice.layout
    if layout.pp == 1:
        return _alone(work, choice)
    ranks = [[passes(work, choice, stage) for stage in held] for held in work.ground.all_held(layout)]
    both = [sum(p.both + p.away for p in mine) for mine in ranks]
    dearest = max(range(layout.pp), key=lambda place: both[place])
    mine, m, v = ranks[dearest], choice.micro_batches, layout.held
    pipe = pipe_seconds(
        ranks=layout.pp,
        micro_batches=m,
        stages_per_rank=2 * v if layout.schedule in V_SHAPED else v,
        both=both[dearest],
        round_trip=round_trip(work, choice),
        gpipe=layout.schedule == "gpipe",
    )
    pipe += (sum(both) - layout.pp * both[dearest]) / v
    gather = max(sum(p.gather_forward + p.gather_backward for p in rank) for rank in ranks)
    found = _work_of(mine, m)
    return dataclasses.replace(
        found,
        bubble=pipe - m * both[dearest],
        gather=gather,
        reduce=max(sum(p.reduce + p.once for p in rank) for rank in ranks),
        update=update(work, choice, dearest),
    )


def _alone(work: Work, choice: Choice) -> Seconds:
    mine = [passes(work, choice, stage) for stage in work.ground.stages(choice.layout)]
    m = choice.micro_batches
    found = _work_of(mine, m)
    gather = sum(p.gather_forward + p.gather_backward for p in mine)
    reduce = (m if sums_each(choice.layout) else 1) * sum(p.reduce for p in mine) + sum(p.once for p in mine)
    return dataclasses.replace(found, gather=m * gather, reduce=reduce, update=update(work, choice, 0))


def _work_of(mine: Sequence[Passes], micro_batches: int) -> Seconds:
    """What a rank does in all micro-batches."""
    again, tensor, context, away = (sum(getattr(p, n) for p in mine) for n in ("again", "tensor", "context", "away"))
    both = sum(p.both for p in mine)
    m = micro_batches
    return Seconds(
        compute=m * (both - again - tensor - context),
        again=m * again,
        tensor=m * tensor,
        context=m * context,
        away=m * away,
    )


def update(work: Work, choice: Choice, place: int) -> float:
    """Seconds of the optimizer's step at a place of the pipeline."""
    weights, _, state = work.ground.standing(choice.layout, place)
    values = weights / WEIGHT
    if choice.layout.state is not None:
        values = placed(work.ground, choice.layout, place).stepped
        state = (state or 0) - (WEIGHT * values if choice.layout.masters else 0)  # masters are weights that it steps
    return update_seconds(values, state or 0, work.cluster)


def boundary_bytes(work: Work, choice: Choice) -> float:
    """What a rank sends to the next stage for each micro-batch, as far as anybody waits for it."""
    layout, ground = choice.layout, work.ground
    if work.practice.sends_overlap:
        return 0.0
    divided = layout.tp if layout.sequence_parallel or work.practice.divided_sends else 1
    values: int = choice.rows * (ground.sequence // layout.cp) * ground.shape.hidden_size
    return values * ground.value / divided


def round_trip(work: Work, choice: Choice) -> float:
    """C: hidden states over all boundaries and their gradients back."""
    layout, size = choice.layout, boundary_bytes(work, choice)
    key = ("trip", size, layout.pp, layout.held, layout.ranks, layout.schedule)
    found: float | None = work.ground.kept(key)
    if found is not None:
        return found
    links = of_pipeline(work.cluster, layout)
    hops = {pair: size / link.bytes_per_second + link.latency_seconds for pair, link in links.items()}
    once = 2 * sum(hops[place, place + 1] for place in range(layout.pp - 1))
    back = 0.0 if layout.schedule in V_SHAPED else 2 * hops[layout.pp - 1, 0]  # to the first rank's next stage
    kept: float = work.ground.keep(key, layout.held * once + (layout.held - 1) * back)
    return kept
