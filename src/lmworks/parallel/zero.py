"""Layouts by the name of a known way to divide weights, gradients and optimizer state over ranks.

    stage     weights   gradients   optimizer   what else
    ddp       1         1           1           gradients are summed once a step
    zero-1    1         1           all
    zero-2    1         all         all
    zero-3    all       all         all
    mics      node      node        node        copies are summed once a step
    hpz       all       all         all         the backward pass reads a copy that a node shares
    hsdp      node      node        node        torch's: gradients stay whole until the last micro-batch

A degree of `gradients` above 1 means that they are summed over so many ranks with every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import PositiveInt
from lmworks.maths.whole import divisors
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.zeropp import whole_nodes

IN_NODES = ("hsdp", "mics", "hpz")
USUAL = 8
"""Ranks that share weights where nodes are not known: no node that is common has fewer."""


@final
@dataclass(frozen=True, kw_only=True)
class Zero(Arrangement):
    """All ranks share the rows; how many share each state, the stage says."""

    stage: Literal["ddp", "zero-1", "zero-2", "zero-3", "hsdp", "mics", "hpz"]
    """Who shares what: see the table of the page about layouts."""
    ranks_per_node: PositiveInt | None = None
    """Ranks that fast links join, for 'hsdp', 'mics' and 'hpz'. Where it does not divide the ranks, all three are hsdp
    in the largest groups of one size that lie in one node each; where it is left out, in groups of at most 8. A note
    says so."""

    @property
    def asked(self) -> None:
        """It takes as many as there are."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Nodes where the stage asks for none."""
        if self.ranks_per_node is not None and self.stage not in IN_NODES:
            text = f"has no effect with stage = '{self.stage}'. Stages in nodes: {', '.join(IN_NODES)}"
            yield Problem(path="ranks_per_node", text=text)

    def settle(self, world: int, recipe: Any) -> Layout:
        """The plain layout of so many ranks."""
        if world == 1:
            return Layout(dp_shard=1)
        if self.stage == "ddp":
            return Layout(dp_replicate=world, dp_shard=1)
        if self.stage not in IN_NODES:
            states = {"zero-1": (1, 1), "zero-2": (1, None), "zero-3": (None, None)}
            weights, gradients = states[self.stage]
            return Layout(dp_shard=world, state=StatePlacement(weights=weights, gradients=gradients))
        node = self._node(world)
        if node is None or self.stage == "hsdp":
            shared = node or self._group(world)
            return Layout(dp_replicate=world // shared, dp_shard=shared)
        levels = (node,) if 1 < node < world else ()
        if self.stage == "mics":
            state = StatePlacement(weights=node, gradients=node, optimizer=node, levels=levels)
            return Layout(dp_shard=world, state=state)
        state = StatePlacement(secondary=node if 1 < node < world else None, levels=levels)
        return Layout(dp_shard=world, state=state, reshard=False if node == 1 else None)

    def notes(self, world: int, recipe: Any) -> list[str]:
        """Why it is hsdp where the stage is another, and in which groups."""
        if world == 1 or self.stage not in IN_NODES or self._node(world) is not None:
            return []
        asked = self.ranks_per_node
        why = f"nodes of {asked} do not divide {world} ranks" if asked else "layout.ranks_per_node is left out"
        size = self._group(world)
        return [f"layout: {why}; this is hsdp, in groups of {size} ranks that share one copy of the weights"]

    def _node(self, world: int) -> int | None:
        """Ranks of each node; None where that is not known, or where nodes are uneven."""
        node = min(self.ranks_per_node, world) if self.ranks_per_node is not None else None
        return None if node is None or world % node else node

    def _group(self, world: int) -> int:
        """Ranks that share weights where nodes are uneven, or not known: then few enough for the usual node."""
        if self.ranks_per_node is not None:
            return whole_nodes(world, self.ranks_per_node).size("dp_shard")
        return max(d for d in divisors(world) if d <= USUAL)
