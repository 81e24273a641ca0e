"""Every layout of a recipe on measured links: those that fit, by their time, and why the others are refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmworks.core.errors import RecipeError
from lmworks.parallel.footprint import vocabulary_of
from lmworks.parallel.layout import Layout, problems_of
from lmworks.parallel.links import Profile
from lmworks.parallel.pipeline import block_costs, split
from lmworks.parallel.schedule import order
from lmworks.parallel.timeline import Link, simulate
from lmworks.parallel.traffic import portions
from lmworks.plan.latency import Pipeline, pipette_seconds, two_level_seconds
from lmworks.plan.memory import heaviest
from lmworks.plan.placement import Ground, Placed, anneal, exact
from lmworks.train.saved import Recompute

BYTES = 257
"""Tokens where settings do not tell: a tokenizer that has to be read."""
GRADIENT_BYTES = 4
ALL_ORDERS = 6
"""Machines up to which all orders are tried; more are annealed."""
ROWS = (1, 2, 4, 8)
"""Micro-batches that the paper tries."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, its machines in order, and what a step of it takes; seconds."""

    layout: Layout
    micro_batch: int
    """Rows."""
    pipe: float
    """T_pipe by the closed form."""
    exchange: float
    """T_in + T_out."""
    bytes: int
    """Of the rank that takes most."""
    placed: Placed
    simulated: float | None = None
    """T_pipe on the clock; None for plans that were not among the best."""

    @property
    def seconds(self) -> float:
        """Of a step, as well as is known."""
        return (self.pipe if self.simulated is None else self.simulated) + self.exchange


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A layout that cannot be, or does not fit."""

    layout: Layout
    micro_batch: int
    reason: str
    bytes: int | None = None
    """What it would take, where memory is the reason."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a plan's seconds are made of."""

    forward: tuple[float, ...]
    """Seconds of a micro-batch in each stage."""
    backward: tuple[float, ...]
    boundary_bytes: float
    """S, of one rank."""
    gradient_bytes: float
    """Of the rank with most parameters."""
    micro_batches: int
    inside: float
    """Bytes per second inside of a machine."""


def plans(
    recipe: Any,
    links: Profile,
    *,
    memory_gib: float,
    flops: float,
    rows: Sequence[int | None] = (None,),
    moves: int = 20_000,
    simulated: int = 10,
    seed: int = 0,
) -> tuple[list[Plan], list[Refusal]]:
    """Plans by their seconds, and refusals. `links`: complete; `flops`: FLOP/s of a rank.

    `rows`: micro-batches to try, None for the recipe's; ROWS are the paper's.
    """
    found: list[Plan] = []
    refused: list[Refusal] = []
    for each in rows:
        own = recipe if each is None else dataclasses.replace(recipe, micro_batch_size=each)
        for layout in _layouts(own, links):
            said = _why_not(own, layout, memory_gib)
            if isinstance(said, Refusal):
                refused.append(said)
            else:
                found.append(_timed(own, layout, links, flops=flops, moves=moves, seed=seed, bytes_=said))
    found.sort(key=_rank)
    best = [_on_the_clock(plan, recipe, links, flops) for plan in found[:simulated]]
    return sorted(best, key=_rank) + found[simulated:], refused


def _rank(plan: Plan) -> tuple[float, int, int]:
    """Of two that take as long, the one with fewer stages and fewer tensor-parallel ranks."""
    return plan.seconds, plan.layout.pp, plan.layout.tp


def ready(recipe: Any, plan: Plan) -> Any:
    """The recipe with a plan's layout and micro-batch: it runs as it is."""
    return dataclasses.replace(recipe, layout=plan.layout, micro_batch_size=plan.micro_batch)


def _layouts(recipe: Any, links: Profile) -> Iterator[Layout]:
    """p divides the machines, t a machine's ranks."""
    machines, each = len(links.machines), links.ranks_per_machine
    for pp in (p for p in range(1, machines + 1) if machines % p == 0):
        for tp in (t for t in range(1, each + 1) if each % t == 0):
            data = machines * each // (pp * tp)
            own = recipe.batch_size // data
            micro = min(recipe.micro_batch_size or own, own)
            few = micro == 0 or own // micro < pp
            yield Layout(
                pp=pp,
                dp_replicate=data,
                dp_shard=1,
                tp=tp,
                sequence_parallel=tp > 1,
                schedule="gpipe" if few and pp > 1 else "1f1b",
            )


def _why_not(recipe: Any, layout: Layout, memory_gib: float) -> int | Refusal:
    """Bytes of the rank that takes most, or why the layout is refused."""
    micro = _micro(recipe, layout)
    try:
        wrong = problems_of(dataclasses.replace(recipe, layout=layout))
    except RecipeError as error:
        wrong = list(error.problems)
    if wrong:
        return Refusal(layout=layout, micro_batch=micro, reason="; ".join(str(problem) for problem in wrong))
    plain = dataclasses.replace(recipe, compile=False)
    rank, told = heaviest(plain, layout, vocabulary=vocabulary_of(recipe) or BYTES)
    if told.total > memory_gib * 2**30:
        text = f"rank {rank} takes {told.total / 2**30:.3g} GiB, most of it {told.largest}"
        return Refusal(layout=layout, micro_batch=micro, reason=text, bytes=told.total)
    return told.total


def _micro(recipe: Any, layout: Layout) -> int:
    """Rows of a micro-batch on one rank."""
    own: int = recipe.batch_size // layout.size("batch")
    return min(recipe.micro_batch_size or own, own)


def terms(recipe: Any, layout: Layout, links: Profile, flops: float) -> Terms:
    """What a layout's seconds are made of."""
    shape, length = getattr(recipe.model, "shape", recipe.model), recipe.data.sequence_length
    if shape.vocab_size is None:
        shape = shape.with_vocab(vocabulary_of(recipe) or BYTES)
    inside = _inside(links)
    micro, value = _micro(recipe, layout), 4 if recipe.precision == "fp32" else 2
    costs = block_costs(shape, sequence=length)
    stages = split(shape, layout, sequence=length)
    tokens = micro * length / layout.tp
    hidden = micro * length * shape.hidden_size * value
    sent = 4 * hidden * (layout.tp - 1) / layout.tp / inside  # two all-reduces of a block forward, two backward
    again = _again(recipe, shape.n_layers)
    forward, backward = [], []
    for blocks in stages:
        head = 2.0 * shape.vocab_size * shape.hidden_size if blocks.stop == shape.n_layers else 0.0
        inner = sum(costs[block] for block in blocks) * tokens / flops + len(blocks) * sent
        forward.append(inner + head * tokens / flops)
        backward.append(2 * forward[-1] - len(blocks) * sent + again * inner)
    parts = [portions(shape, layout, place * layout.ranks // layout.pp, sequence=length) for place in range(layout.pp)]
    values = max(sum(math.prod(part) for part in held.values()) for held in parts)
    return Terms(
        forward=tuple(forward),
        backward=tuple(backward),
        boundary_bytes=hidden / (layout.tp if layout.sequence_parallel else 1),
        gradient_bytes=float(GRADIENT_BYTES * values),
        micro_batches=recipe.batch_size // layout.size("batch") // micro,
        inside=inside,
    )


def _again(recipe: Any, blocks: int) -> float:
    """The share of blocks that run forward once more in the backward pass."""
    saved = recipe.saved
    return len(range(0, blocks, saved.every)) / blocks if isinstance(saved, Recompute) else 0.0


def _inside(links: Profile) -> float:
    """Bytes per second inside of the slowest machine; infinite where each has one rank."""
    return min((row[i] or math.inf for i, row in enumerate(links.bytes_per_second)), default=math.inf)


def _timed(recipe: Any, layout: Layout, links: Profile, *, flops: float, moves: int, seed: int, bytes_: int) -> Plan:
    """A plan with its machines placed."""
    made = terms(recipe, layout, links, flops)
    own_share = links.ranks_per_machine // layout.tp
    ground = ground_of(links, layout, made, own_share)
    placed = _placed(ground, links, moves=moves, seed=seed)
    pipeline = Pipeline(
        ranks=layout.pp,
        micro_batches=made.micro_batches,
        forward=max(made.forward),
        backward=max(made.backward),
        crossing=ground.slowest(placed.order),
    )
    inside, _ = two_level_seconds(
        made.gradient_bytes, inside_ranks=own_share, inside=made.inside, outside_ranks=1, outside=math.inf
    )
    rows = ground.rows(placed.order)  # ranks count with the stage slowest, the pipeline behind it
    names = tuple(links.machines[row[stage]] for stage in range(layout.pp) for row in rows)
    return Plan(
        layout=dataclasses.replace(layout, machines=names),
        micro_batch=_micro(recipe, layout),
        pipe=pipette_seconds(pipeline),
        exchange=inside + ground.exchange(placed.order),
        bytes=bytes_,
        placed=placed,
    )


def ground_of(links: Profile, layout: Layout, made: Terms, own_share: int) -> Ground:
    """What is sent between machines: of a rank's gradients each rank of the machine its part."""
    table = [[value or math.inf for value in row] for row in links.bytes_per_second]
    late = [[value or 0.0 for value in row] for row in links.latency_seconds]
    return Ground(
        bytes_per_second=table,
        latency_seconds=late,
        stages=layout.pp,
        boundary_bytes=made.boundary_bytes,
        gradient_bytes=made.gradient_bytes / own_share,
        rounds=max(1.0, made.micro_batches / layout.pp),
    )


def _placed(ground: Ground, links: Profile, *, moves: int, seed: int) -> Placed:
    """The best order; that of the launcher where it is as good as any."""
    same = tuple(range(ground.machines))
    ways = {links.bytes_per_second[i][j] for i in same for j in same if i != j}
    late = {links.latency_seconds[i][j] for i in same for j in same if i != j}
    if len(ways) > 1 or len(late) > 1:
        found = exact(ground) if ground.machines <= ALL_ORDERS else anneal(ground, seed=seed, moves=moves)
        if found.seconds < ground.seconds(same):
            return found
    return Placed(order=same, seconds=ground.seconds(same), tried=1)


def _on_the_clock(plan: Plan, recipe: Any, links: Profile, flops: float) -> Plan:
    """The plan with its slowest pipeline run through its order, each stage and link as it is."""
    layout = plan.layout
    own = dataclasses.replace(recipe, micro_batch_size=plan.micro_batch)
    made = terms(own, layout, links, flops)
    ground = ground_of(links, layout, made, links.ranks_per_machine // layout.tp)
    row = max(ground.rows(plan.placed.order), key=ground.crossing)
    lines = {
        (k, other): Link(
            bytes_per_second=ground.bytes_per_second[row[k]][row[other]],
            latency_seconds=links.latency_seconds[row[k]][row[other]] or 0.0,
        )
        for k in range(layout.pp)
        for other in (k - 1, k + 1)
        if 0 <= other < layout.pp
    }
    found = simulate(
        order(layout.schedule, ranks=layout.pp, micro_batches=made.micro_batches),
        forward_seconds=made.forward,
        backward_seconds=made.backward,
        link=lines,
        boundary_bytes=made.boundary_bytes,
    )
    return dataclasses.replace(plan, simulated=found.makespan)
