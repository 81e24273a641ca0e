"""What a placement of states holds and sends of some parameters, on the first rank of tp and of the view fsdp.

That rank holds most. Values are those of `parallel.holdings` and `parallel.traffic`, which go through every name of a
rank: here they are counted for the parameters of one block, and for those around blocks, so that layouts share them.
Tests hold both to the same numbers. What travels as codes is counted in buckets of one block.

Exchanges have four moments: weights in front of a forward pass, and of a backward pass; sums behind a backward pass,
with every micro-batch (in a pipeline: with the last one); and what is done once, when all passes are made.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lmworks.parallel.holdings import WEIGHT, Counts, of_counts, resharded
from lmworks.parallel.layout import Layout
from lmworks.parallel.levels import TO_ALL
from lmworks.parallel.parcels import Parcels
from lmworks.parallel.shard import part_of, slice_of
from lmworks.parallel.traffic import COLUMNS, ROWS
from lmworks.plan.cluster import Cluster
from lmworks.plan.links import Ring, ring, spread

if TYPE_CHECKING:
    from lmworks.plan.shape import Ground

Named = Sequence[tuple[str, tuple[int, ...]]]
"""Parameters: name and whole shape."""
Moment = Literal["gather", "again", "sum", "once"]


class Exchange(NamedTuple):
    """Something that a rank sends of a placement of states."""

    moment: Moment
    axis: str
    operation: str
    """'ring', or one that begins with `levels.TO_ALL`."""
    sent: float
    """Bytes, each time."""


def on_first(name: str, shape: Sequence[int], tp: int) -> tuple[int, ...]:
    """The shape of a parameter on the first rank of tp, whose part is the largest."""
    leaf, (first, *rest) = name.rpartition(".")[0].rpartition(".")[2], shape
    if leaf in (*COLUMNS, "embed", "head"):
        first = -(-first // tp)
    elif leaf in ROWS and len(shape) == 2:
        rest[0] = -(-rest[0] // tp)
    return first, *rest


# --- what is held -----------------------------------------------------------------------------------------------------


def counts(parameters: Named, layout: Layout, optimizer: Any) -> Counts:
    """Of these parameters. The state is what the optimizer adds for them; what it keeps once is left out."""
    held = in_blocks = trained = summed = 0
    stepped: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters:
        first, *rest = on_first(name, shape, layout.tp)
        row, whole = math.prod(rest), name.endswith("expert_bias")
        lies = slice_of(part_of(first, layout.size("weights"), 0).length, layout, 0)
        values = (first if whole else lies.rows) * row
        held += values
        in_blocks += values if name.startswith("blocks.") else 0
        if not whole:
            trained += values
            summed += lies.gradients.chunk * row
            stepped[name] = (lies.optimizer.length, *rest)
    constant = optimizer.state_bytes({})
    return Counts(
        held=held,
        trained=trained,
        in_blocks=in_blocks,
        stepped=sum(math.prod(shape) for shape in stepped.values()),
        summed=summed if layout.masters else 0,
        state=optimizer.state_bytes(stepped) - constant if constant is not None else 0,
    )


def added(each: Iterable[tuple[Counts, int]], *, constant: int) -> Counts:
    """The sum of counts, each so many times. `constant`: bytes that the optimizer keeps once."""
    found = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
    found["state"] = constant
    for one, times in each:
        for name in found:
            found[name] += times * getattr(one, name)
    return Counts(**found)


def placed(ground: Ground, layout: Layout, place: int) -> Counts:
    """Values of the rank that holds most at a place of the pipeline."""
    stages, optimizer, shapes = ground.held(layout, place), ground.recipe.optimizer, ground.shapes

    def of(key: Any, names: Iterable[str]) -> Counts:
        kept = ("state counts", key, layout.tp, layout.size("fsdp"), layout.state)
        found: Counts | None = ground.kept(kept)
        if found is None:
            found = counts([(name, shapes[name]) for name in names], layout, optimizer)
            ground.keep(kept, found)
        return found

    blocks = Counter(kind for stage in stages for kind in ground.kinds[stage.start : stage.stop])
    each = [(of(kind, ground.inside(kind)), number) for kind, number in blocks.items()]
    each += [(of(name, [name]), 1) for name in sorted({n for stage in stages for n in ground.around(stage)})]
    return added(each, constant=optimizer.state_bytes({}) or 0)


def standing(ground: Ground, layout: Layout, place: int) -> tuple[int, int, int | None]:
    """Bytes of weights, gradients and optimizer state."""
    held = of_counts(layout, placed(ground, layout, place), value=ground.value)
    known = ground.recipe.optimizer.state_bytes({}) is not None
    return held.weights, held.gradients, held.optimizer if known else None


def beside(ground: Ground, layout: Layout, place: int) -> int:
    """Bytes of a second copy of weights, and of what codes of gradients missed; 0 without a placement."""
    state = layout.state
    if state is None or (state.secondary is None and not state.feedback):
        return 0
    held = of_counts(layout, placed(ground, layout, place), value=ground.value)
    return held.copy + held.missed


# --- what is sent -----------------------------------------------------------------------------------------------------


def exchanges(parameters: Named, layout: Layout, *, value: int, summed: int = WEIGHT) -> list[Exchange]:
    """Of trained parameters. `value`: bytes of a weight as it is computed with; `summed`: of a gradient in a sum."""
    state = layout.state
    assert state is not None, "a layout with a placement of states"
    sizes = [_sizes(on_first(name, shape, layout.tp), layout) for name, shape in parameters]
    blocks = sum(size.whole for size, (name, _) in zip(sizes, parameters, strict=True) if name.startswith("blocks."))
    whole, sums, fine = (sum(getattr(size, name) for size in sizes) for name in ("whole", "sums", "fine"))
    f = {axis: 1 - 1 / layout.size(axis) for axis in ("weights", "gradients", "optimizer", "copies", "secondary")}
    used, up = min(value, WEIGHT), min(value, WEIGHT) if layout.narrow_weights else WEIGHT
    found = list(_coming(layout, sizes, blocks, f["weights"] * used * whole, used))
    if state.gradients_as == "plain":
        found.append(Exchange("sum", "weights", "ring", f["weights"] * summed * whole))
        if layout.masters:
            found.append(Exchange(_down(layout), "gradients", "ring", f["gradients"] * summed * sums))
    else:
        found += _coded_sums(layout, sizes)
    if layout.masters:
        found.append(Exchange("once", "gradients", "ring", f["gradients"] * up * sums))
        found.append(Exchange("once", "optimizer", "ring", f["optimizer"] * fine * (summed + up)))
    copied = fine / layout.size("optimizer")
    found.append(Exchange("once", "copies", "ring", 2 * f["copies"] * summed * copied))
    return [each for each in found if each.sent]


class _Sizes(NamedTuple):
    """Values of a parameter, with the rows that fill chunks up: over the ranks of weights, gradients, optimizer."""

    whole: int
    sums: int
    fine: int
    part: int
    """Of one rank of weights."""
    slice: int
    """Of one rank of gradients."""


def _sizes(local: tuple[int, ...], layout: Layout) -> _Sizes:
    weights, gradients, optimizer = (layout.size(axis) for axis in ("weights", "gradients", "optimizer"))
    (first, *rest), chunk = local, part_of(local[0], weights, 0).chunk
    row, lies = math.prod(rest), slice_of(part_of(first, weights, 0).length, layout, 0)
    fine = lies.optimizer.chunk * optimizer if optimizer > 1 else lies.gradients.chunk
    sums = lies.gradients.chunk
    return _Sizes(chunk * weights * row, sums * gradients * row, fine * row, chunk * row, sums * row)


def _coming(layout: Layout, sizes: Sequence[_Sizes], blocks: int, plain: float, used: int) -> Iterator[Exchange]:
    """Weights in front of a forward pass, and of a backward pass where they were given back."""
    state = layout.state
    assert state is not None, "asked for one"
    parcels, parts = Parcels(layout=layout, state=state), [[size.part for size in sizes]]
    gathered = plain if state.weights_as == "plain" else parcels.gathered(parts)
    yield Exchange("gather", "weights", "ring", gathered)
    if not blocks:
        return
    if state.secondary is None:
        if resharded(layout):
            yield Exchange("again", "weights", "ring", gathered)
    elif state.secondary_as == "plain":
        yield Exchange("again", "secondary", "ring", (1 - 1 / layout.size("secondary")) * used * blocks)
    else:
        yield Exchange("again", "secondary", "ring", parcels.copied(parts))


def _coded_sums(layout: Layout, sizes: Sequence[_Sizes]) -> Iterator[Exchange]:
    """Sums of gradients in hops of codes."""
    assert layout.state is not None, "asked for one"
    parcels = Parcels(layout=layout, state=layout.state)
    for axis, rows in (("weights", [size.part for size in sizes]), ("gradients", [size.slice for size in sizes])):
        if layout.size(axis) > 1:
            moment: Moment = "sum" if axis == "weights" else _down(layout)
            for hop, sent in parcels.summed(axis, [rows]).items():
                yield Exchange(moment, hop, TO_ALL, sent)


def _down(layout: Layout) -> Moment:
    """When gradients go down to the ranks of `gradients`: in a pipeline hooks rest until all passes are made."""
    return "sum" if layout.pp == 1 else "once"


def seconds(cluster: Cluster, layout: Layout, exchange: Exchange) -> float:
    """What an exchange takes on a cluster's links."""
    return _ring(cluster, layout, exchange).seconds(exchange.sent)


def _ring(cluster: Cluster, layout: Layout, exchange: Exchange) -> Ring:
    assert layout.state is not None, "a layout with a placement of states"
    apart = layout.state.stride(exchange.axis, layout.size("fsdp")) * layout.tp
    carried = spread if exchange.operation.startswith(TO_ALL) else ring
    return carried(cluster, layout.size(exchange.axis), apart)
