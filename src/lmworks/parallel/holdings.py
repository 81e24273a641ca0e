"""What a rank holds of weights, gradients and optimizer state, in bytes, from settings alone.

weights     its part of the model, float32; beside masters, in the type that they are used in
gradients   the same, of what is trained; beside masters, the sums that stay and the masters' own, where finer
optimizer   what the optimizer says of the parts that it steps, and the masters
whole       of what is divided over ranks, what is whole for a while: weights that were gathered, gradients
copy        of the blocks' weights, which forward passes leave for backward passes
missed      of gradients, what is fed back: a byte and a share of a scale for each value that a hop sends
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmworks.model.sizes import Shape
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.traffic import Degree, portions, summed

WEIGHT = 4
"""Bytes of a weight, of its gradient, and of a logit in the loss."""


class Stepping(Protocol):
    """An optimizer's settings, as far as they are asked here."""

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes of its state for parameters of these shapes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    copy: int
    missed: int


def holdings(shape: Shape, layout: Layout, rank: int, *, sequence: int, value: int, optimizer: Stepping) -> Holdings:
    """Of a rank of a settled layout. `value`: bytes of a value as it is computed with; `sequence`: tokens of a row."""

    def held(degree: Degree) -> dict[str, tuple[int, ...]]:
        return portions(shape, layout, rank, sequence=sequence, degree=degree)

    parts = held("weights")
    trained = {name: part for name, part in held("optimizer").items() if not name.endswith("expert_bias")}
    counts = Counts(
        held=_values(parts.values()),
        trained=_values(parts[name] for name in trained),
        in_blocks=_values(part for name, part in parts.items() if name.startswith("blocks.")),
        stepped=_values(trained.values()),
        summed=summed(shape, layout, rank, sequence=sequence) if layout.masters else 0,
        state=optimizer.state_bytes(trained),
    )
    return of_counts(layout, counts, value=value)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Values of one rank's parts, by what is done with them."""

    held: int
    """Of weights, experts' biases among them."""
    trained: int
    """Those that are trained."""
    in_blocks: int
    """Those that stand in blocks."""
    stepped: int
    """That its optimizer steps."""
    summed: int
    """Of the sums of gradients beside masters, with the rows that fill chunks up; else 0."""
    state: int
    """Bytes of the optimizer's state."""


def of_counts(layout: Layout, counts: Counts, *, value: int) -> Holdings:
    """Bytes of so many values under a settled layout. `value`: bytes of one as it is computed with."""
    stepped = WEIGHT * counts.stepped
    weights, gradients, state = WEIGHT * counts.held, stepped, counts.state
    if layout.masters:
        gradients = WEIGHT * counts.summed + (stepped if layout.size("optimizer") > 1 else 0)
        state += stepped
    if layout.narrow_weights:
        weights -= (WEIGHT - value) * counts.trained
    copy, missed = 0, 0
    if layout.state is not None:
        copy = _copy(layout, layout.state, counts.in_blocks, value)
        missed = _missed(layout, layout.state, counts.trained)
    return Holdings(weights=weights, gradients=gradients, optimizer=state, copy=copy, missed=missed)


def _copy(layout: Layout, state: StatePlacement, in_blocks: int, value: int) -> int:
    """Bytes of this rank's part of a second copy, plain or in codes."""
    if state.secondary is None:
        return 0
    kept = value if state.secondary_as == "plain" else _coded(state)
    return int(kept * in_blocks * layout.size("weights") // state.secondary)


def _missed(layout: Layout, state: StatePlacement, values: int) -> int:
    """Bytes of what codes of gradients missed; `values`: of this rank's weights. A hop sends what the last one left."""
    found, left = 0.0, values * layout.size("weights")
    for axis in ("weights", "gradients") if state.feedback else ():
        if layout.size(axis) > 1:
            for hop in state.hops(axis, layout.size("fsdp")):
                found += left * _coded(state)
                left //= layout.size(hop)
    return int(found)


def _coded(state: StatePlacement) -> float:
    """Bytes of a value in int8, with its share of a scale."""
    return 1 + 4 / state.block


def _values(shapes: Iterable[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --- whole for a while ------------------------------------------------------------------------------------------------


def whole(shape: Shape, layout: Layout, rank: int, *, sequence: int, value: int, several: bool) -> int:
    """Bytes of what is divided over fsdp while it is whole. `several`: whether a step has several micro-batches."""
    if layout.size("fsdp") == 1:
        return 0
    alone = dataclasses.replace(layout, dp_replicate=1, dp_shard=1, cp=1, state=None, servers=None)
    here = layout.place(rank, "pp") * layout.tp + layout.place(rank, "tp")
    blocks: dict[str, int] = {}
    ends = 0
    for name, part in portions(shape, alone, here, sequence=sequence).items():
        size = WEIGHT * math.prod(part)
        if name.startswith("blocks."):
            number = name.split(".", 2)[1]
            blocks[number] = blocks.get(number, 0) + size
        else:
            ends += size
    return of_wholes(layout, list(blocks.values()), ends, value=value, several=several)


def of_wholes(layout: Layout, blocks: Sequence[int], ends: int, *, value: int, several: bool) -> int:
    """The same from the bytes of each block's weights and of those around blocks, not divided, in float32.

    Two blocks are gathered at a time, or all where they are not given back; what stands around blocks always.
    Gradients are summed over ranks behind the last micro-batch: with several, those of all blocks wait in float32, and
    with one those of a block, in the type of its products as well.
    """
    gathered = sum(sorted(blocks)[-2:]) if resharded(layout) else sum(blocks)
    narrow = min(WEIGHT, value) / WEIGHT
    wait = several and not sums_each(layout)
    waiting = sum(blocks) + ends if wait else (1 + narrow) * (max(blocks) + ends)
    held = layout.state is not None and layout.size("weights") == 1  # whole by themselves
    return round((0 if held else narrow * (gathered + ends)) + waiting)


def resharded(layout: Layout) -> bool:
    """Whether a block's weights are given back behind its forward pass."""
    return layout.reshard if layout.reshard is not None else layout.pp == 1


def sums_each(layout: Layout) -> bool:
    """Whether gradients are summed over ranks with every micro-batch, and not with the last one only."""
    return layout.state is not None and layout.pp == 1
