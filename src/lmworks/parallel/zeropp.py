"""ZeRO++: all states are shared by all ranks, as in ZeRO-3; three switches say what is sent instead of plain weights.

"ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", 2023, arXiv 2306.10209. Of M bytes of
weights ZeRO-3 sends 3 M over the network for every micro-batch; with all three switches it is 0.75 M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import Problem, RecipeError
from lmworks.core.recipe import Fraction, PositiveInt
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.parallel.state import BLOCK, StatePlacement


@final
@dataclass(frozen=True, kw_only=True)
class ZeroPlusPlus(Arrangement):
    """All states shared by all ranks, with ZeRO++'s three ways to send less, each a switch."""

    ranks: PositiveInt | None = None
    """Ranks. Left out: as many as there are."""
    node: PositiveInt = 8
    """Ranks of a node."""
    qwz: bool = True
    """Weights travel as int8."""
    hpz: bool = True
    """A second copy of the gathered weights, shared inside a node, serves the backward pass. Not where one node holds
    all ranks, which share the first one as fast."""
    qgz: bool = True
    """Gradients travel as int4, inside the node and then across."""
    block: PositiveInt = BLOCK
    """Values that share a scale."""
    feedback: Fraction = 0.0
    """Share of what codes missed of a gradient that is added to the next one; 0 is off."""

    @property
    def asked(self) -> int | None:
        """`ranks`, where they are given."""
        return self.ranks

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings without effect."""
        if not (self.qwz or self.hpz or self.qgz):
            text = "all three switches are off, which is ZeRO-3. Turn one on, or leave layout out"
            yield Problem(path="", text=text)
        if self.block != BLOCK and not (self.qwz or self.qgz):
            yield Problem(path="block", text="has no effect without qwz and qgz")
        if self.feedback and not self.qgz:
            yield Problem(path="feedback", text="has no effect without qgz")

    def settle(self, world: int, recipe: Any) -> Layout:
        """The plain layout. Raises RecipeError where other ranks are asked for."""
        must_be(world, self.ranks)
        if world == 1:
            return Layout(dp_shard=1)
        if self._uneven(world):
            return whole_nodes(world, self.node)
        several = 1 < self.node < world
        state = StatePlacement(
            levels=(self.node,) if several else (),
            secondary=self.node if self.hpz and several else None,
            weights_as="int8" if self.qwz else "plain",
            gradients_as="int4" if self.qgz else "plain",
            block=self.block,
            feedback=self.feedback,
        )
        return Layout(dp_shard=world, state=state)

    def notes(self, world: int, recipe: Any) -> list[str]:
        """What uneven nodes make of it."""
        return [note_of(whole_nodes(world, self.node), why=f"nodes of {self.node}")] if self._uneven(world) else []

    def _uneven(self, world: int) -> bool:
        return world > self.node and world % self.node > 0


def must_be(world: int, ranks: int | None) -> None:
    """Raises RecipeError where a layout asks for other ranks than were started."""
    if ranks not in (None, world):
        text = f"is {ranks}, but {world} were started. Leave it out, or: lmworks launch RECIPE --local {ranks}"
        raise RecipeError([Problem(path="layout.ranks", text=text)])


def whole_nodes(world: int, node: int) -> Layout:
    """HSDP for ranks that do not make whole nodes: groups that share all states, the largest of one size that lie in
    one node each."""
    shared = world if world < node else math.gcd(world, node)
    return Layout(dp_replicate=world // shared, dp_shard=shared)


def note_of(layout: Layout, *, why: str) -> str:
    """What people should know of such a layout; `why`: what the ranks do not make."""
    groups = f"{layout.ranks // layout.size('dp_shard')} groups of {layout.size('dp_shard')} ranks"
    return (
        f"layout: {layout.ranks} ranks do not make {why}; this is hsdp, in {groups} that share one copy of the weights"
    )
