"""How many ranks share each kind of state: one record whose points are ZeRO-1, 2 and 3, HSDP, MiCS, hpZ and the like.

The N ranks of the view fsdp (dp_shard x cp) stand in rank order. A degree is a count of neighbours among them that
share one copy of a state, each holding a part. Degrees nest, so that a finer part is always a slice of the coarser one:

    weights | gradients | optimizer | N        each divides the next

From them come five axes, along which ranks exchange that state:

    weights     the neighbours that share weights: gathered in front of a block, gradients summed behind it
    gradients   gradients / weights ranks with equal parts of the weights: gradients, with every micro-batch
    optimizer   optimizer / gradients ranks with equal parts of the gradients: once a step, gradients and weights back
    copies      N / optimizer ranks with equal parts of everything: gradients, once a step
    secondary   the neighbours that share a second copy of the gathered weights, for the backward pass

What travels as codes is summed in hops where an axis leaves the largest of `levels`: 'weights/inside' and
'weights/across' are its ranks inside and across groups of that level, and so for gradients.

In a pipeline torch's schedules sum gradients once a step, with the last micro-batch, whatever the degree says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction, PositiveInt
from lmworks.maths.whole import divisors, legal_divisors

STATE_AXES = ("weights", "gradients", "optimizer", "copies", "secondary")
"""Axes that a placement of states adds to those of a layout."""
DEGREES = ("weights", "gradients", "optimizer")
"""From the coarsest part to the finest."""
BLOCK = 256
"""A scale of 4 bytes is 1.6 % of as many values in int8, 3.1 % in int4; wider blocks round more of int4 to zero."""


@final
@dataclass(frozen=True, kw_only=True)
class StatePlacement:
    """How many neighbouring ranks of dp_shard x cp share each kind of state. Degrees that are left out: all of them."""

    weights: PositiveInt | None = None
    """Ranks that share the weights; divides `gradients`. 1: every rank holds all of them."""
    gradients: PositiveInt | None = None
    """Ranks that share the sums of gradients; divides `optimizer`. Sums are made over them with every micro-batch."""
    optimizer: PositiveInt | None = None
    """Ranks that share the optimizer's state, and the float32 weights that it steps; divides dp_shard x cp."""
    secondary: PositiveInt | None = None
    """Ranks that share a second copy of the weights, kept by the forward pass and read by the backward pass; more than
    1, and a true divisor of `weights`, which are then all ranks; as int8, any divisor of dp_shard x cp. Left out: no
    copy; the backward pass reads the weights again."""
    levels: tuple[PositiveInt, ...] = ()
    """Ranks joined by faster links, from the fastest on, each a divisor of the next: [2, 8] for pairs in nodes of 8.
    The network is above. Bytes are told by these levels."""
    weights_as: Literal["plain", "int8"] = "plain"
    """In what weights travel to a block. 'plain': the type that they are used in. 'int8': blocks with one scale."""
    secondary_as: Literal["plain", "int8"] = "plain"
    """In what the second copy is kept and travels."""
    gradients_as: Literal["plain", "int4", "int8"] = "plain"
    """In what gradients travel with every micro-batch. 'plain': float32."""
    block: PositiveInt = BLOCK
    """Values that share a scale, where something travels as int4 or int8. Fewer are more exact, above all in int4."""
    feedback: Fraction = 0.0
    """Share of what rounding took from a gradient that is added to the next one; 0 is off."""

    def degree(self, name: str, ranks: int) -> int:
        """Ranks that share a state, of `ranks` in the view fsdp."""
        found: int | None = getattr(self, name)
        return ranks if found is None else found

    def size(self, axis: str, ranks: int) -> int:
        """Ranks along one of the axes."""
        if axis == "secondary":
            return self.secondary or 1
        below, above = self._ends(axis, ranks)
        return above // below

    def place(self, axis: str, ranks: int, here: int) -> int:
        """Where a rank stands along an axis; `here`: its place in the view fsdp."""
        return here // self.stride(axis, ranks) % self.size(axis, ranks)

    def stride(self, axis: str, ranks: int) -> int:
        """How far apart neighbours along an axis stand in the view fsdp."""
        return 1 if axis == "secondary" else self._ends(axis, ranks)[0]

    def _ends(self, axis: str, ranks: int) -> tuple[int, int]:
        """The degrees below and above an axis, or a hop of it."""
        whole, _, hop = axis.partition("/")
        rungs = [1, *(self.degree(name, ranks) for name in DEGREES), ranks]
        at = STATE_AXES.index(whole)
        below, above = rungs[at], rungs[at + 1]
        if not hop:
            return below, above
        middle = self._node(below, above)
        assert middle is not None, "asked of an axis with hops"
        return (below, middle) if hop == "inside" else (middle, above)

    def hops(self, axis: str, ranks: int) -> tuple[str, ...]:
        """The axes along which sums of an axis go one after the other: itself, or inside a level and then across."""
        one = self._node(*self._ends(axis, ranks)) is None
        return (axis,) if one else (f"{axis}/inside", f"{axis}/across")

    def axes(self, ranks: int) -> tuple[str, ...]:
        """All axes of this placement, hops of sums that travel as codes among them."""
        coded = ("weights", "gradients") if self.gradients_as != "plain" else ()
        more = tuple(hop for axis in coded for hop in self.hops(axis, ranks) if hop != axis)
        return STATE_AXES + more

    def _node(self, below: int, above: int) -> int | None:
        """The largest level that an axis between two degrees leaves and fills whole."""
        found = [size for size in self.levels if below < size < above and size % below == 0 and above % size == 0]
        return found[-1] if found else None

    def masters(self, ranks: int) -> bool:
        """Whether the optimizer steps finer parts than those that blocks are given."""
        return self.degree("weights", ranks) < self.degree("optimizer", ranks)

    def level(self, one: int, other: int) -> int:
        """The fastest level that joins two places of the view fsdp; len(levels): only the network does."""
        joined = [one // size == other // size for size in self.levels]
        return joined.index(True) if True in joined else len(self.levels)


def smaller(state: StatePlacement, ranks: int) -> tuple[StatePlacement, int]:
    """The placement, and the ranks, with degrees that rise by the same steps, each of them 2."""
    rungs = {1, state.secondary or 1, *(state.degree(name, ranks) for name in DEGREES), ranks}
    small = {large: 2**step for step, large in enumerate(sorted(rungs))}

    def fewer(size: int | None) -> int | None:
        return None if size is None else small[size]

    levels = {small[max(rung for rung in rungs if rung <= level)] for level in state.levels} - {1}
    found = dataclasses.replace(
        state,
        weights=fewer(state.weights),
        gradients=fewer(state.gradients),
        optimizer=fewer(state.optimizer),
        secondary=fewer(state.secondary),
        levels=tuple(sorted(levels)),
    )
    return found, small[ranks]


def unrounded(state: StatePlacement, ranks: int, *, tp: int) -> StatePlacement:
    """The placement with everything sent plain; a second copy that can only be int8 is left out."""
    copy, shared = state.secondary, state.degree("weights", ranks)
    if copy is not None and (tp > 1 or shared != ranks or copy >= shared):
        copy = None
    return dataclasses.replace(
        state,
        weights_as="plain",
        secondary_as="plain",
        gradients_as="plain",
        secondary=copy,
        block=BLOCK,
        feedback=0.0,
    )


def problems(state: StatePlacement, layout: Any) -> Iterator[Problem]:
    """What is wrong with a placement of states in its layout, with paths relative to the placement."""
    ranks = layout.size("fsdp") if layout.settled else None
    if ranks == 1:
        yield Problem(path="", text="has no effect: dp_shard x cp = 1, and one rank shares nothing")
        return
    if layout.dp_replicate > 1:
        text = f"has degrees for copies: not with dp_replicate = {layout.dp_replicate}"
        yield Problem(
            path="", text=f"{text}. Take dp_replicate = 1 and optimizer = dp_shard x cp / {layout.dp_replicate}"
        )
    if layout.ep > 1:
        text = f"divides every parameter along the same ranks, and ep = {layout.ep} takes experts out. Take ep = 1"
        yield Problem(path="", text=text)
    nested = list(_nested(state, ranks))
    yield from nested
    yield from _levels(state, ranks)
    if not nested:
        yield from _secondary(state, layout, ranks)
        yield from _travel(state, ranks)


def _nested(state: StatePlacement, ranks: int | None) -> Iterator[Problem]:
    """Degrees that do not divide one another."""
    given = [(name, getattr(state, name)) for name in DEGREES if getattr(state, name) is not None]
    if ranks is not None:
        given = [(name, state.degree(name, ranks)) for name in DEGREES] + [("dp_shard x cp", ranks)]
    for (fine, below), (coarse, above) in pairwise(given):
        if above % below:
            legal = legal_divisors(above)
            yield Problem(path=fine, text=f"{below} does not divide {coarse} = {above}. Legal: {legal}")


def _levels(state: StatePlacement, ranks: int | None) -> Iterator[Problem]:
    """Levels that do not rise, or do not divide one another or the ranks."""
    above = () if ranks is None else (ranks,)
    for fast, slow in pairwise((*state.levels, *above)):
        if slow % fast or (fast == slow and slow != ranks):
            text = f"{list(state.levels)}: {fast} does not divide {slow}" if slow % fast else f"{fast} stands twice"
            of = f" and divide dp_shard x cp = {ranks}" if ranks is not None else ""
            yield Problem(path="levels", text=f"{text}. Sizes rise, each a divisor of the next{of}")
            return


def _secondary(state: StatePlacement, layout: Any, ranks: int | None) -> Iterator[Problem]:
    """A second copy that is none, or that nobody reads."""
    copy, shared = state.secondary, state.weights if ranks is None else state.degree("weights", ranks)
    if copy is None:
        if state.secondary_as != "plain":
            yield Problem(path="secondary_as", text="has no effect without secondary")
        return
    if state.secondary_as == "plain" and shared is not None and (shared % copy or not 1 < copy < shared):
        legal = ", ".join(map(str, divisors(shared)[1:-1])) or "none; leave it out"
        text = f"{copy} is no true divisor above 1 of weights = {shared}"
        yield Problem(path="secondary", text=f"{text}. Legal: {legal}")
    elif state.secondary_as != "plain" and ranks is not None and (ranks % copy or copy == 1):
        legal = ", ".join(map(str, divisors(ranks)[1:]))
        yield Problem(path="secondary", text=f"{copy} is no divisor above 1 of dp_shard x cp = {ranks}. Legal: {legal}")
    if shared == 1:
        yield Problem(path="secondary", text="has no effect: weights = 1, so nothing is gathered to copy")
    apart = layout.tp > 1 or (ranks is not None and shared != ranks)
    if apart and layout.pp == 1 and state.secondary_as == "plain":
        why = f"tp = {layout.tp}" if layout.tp > 1 else f"weights = {shared} of {ranks}"
        text = f"is made by torch for one set of ranks, and there are several: {why}"
        yield Problem(path="secondary", text=f"{text}. Take secondary_as = 'int8', or tp = 1 and all ranks for weights")
    if layout.reshard is not None or layout.pp > 1:
        text = "has no effect where gathered weights are kept for the backward pass"
        why = "a pipeline keeps them" if layout.pp > 1 else f"reshard = {str(layout.reshard).lower()} says what is done"
        yield Problem(path="secondary", text=f"{text}: {why}. Leave one of them out")


def _travel(state: StatePlacement, ranks: int | None) -> Iterator[Problem]:
    """Forms of what does not travel, and settings of forms that are not asked for."""
    if state.weights_as != "plain" and state.weights == 1:
        yield Problem(path="weights_as", text="has no effect: weights = 1, so they do not travel to a block")
    if state.gradients_as != "plain" and (state.gradients or ranks) == 1:
        yield Problem(path="gradients_as", text="has no effect: gradients = 1, so they are not summed over ranks so")
    small = [name for name in ("weights_as", "secondary_as", "gradients_as") if getattr(state, name) != "plain"]
    if not small and state.block != BLOCK:
        yield Problem(path="block", text="has no effect: nothing travels as int4 or int8")
    if state.gradients_as == "plain" and state.feedback:
        yield Problem(path="feedback", text="has no effect with gradients_as = 'plain', which rounds nothing off")
