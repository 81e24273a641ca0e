"""Core attention on whichever rank has time for it: its settings, and what they do not go with.

`tasks.py` says what is moved, `balance.py` where to, `dispatch.py` moves it; `pool.py` is what a model is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lmworks.core.errors import LmworksError, Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Ranks that compute each other's attention, so that long documents on one rank do not keep the others waiting."""

    tolerance: NonNegativeFloat = 0.1
    """By which share the most pairs of a query and a key on one rank may exceed their mean. More of it moves less."""
    ping_pong: bool | None = None
    """Take a micro-batch as two halves of its rows that pass through each block in turns: one is at work while the
    queries, keys and results of the other are on their way. Left out: where a micro-batch has several rows."""
    tile: PositiveInt = 128
    """Queries that stay together: documents are cut at multiples of it only, and shorter ones stay whole."""
    buffer_bytes: PositiveInt | None = None
    """Bytes that a rank may send, or receive, in one exchange of a forward pass; backward passes take up to three times
    as many. Where a plan needs more, its tolerance is raised until it fits, and in the end nothing moves: the run says
    so. Left out: no bound."""
    keep: Literal["resend", "cache"] = "resend"
    """What waits for the backward pass. 'resend': each rank keeps queries, keys, values and results of its own tokens,
    and sends them again. 'cache': the rank that computed them keeps them; less is sent, and memory follows the work."""

    def problems(self, pool: int | None, recipe: Any) -> Iterator[Problem]:
        """What they do not go with, with paths below `servers`. `pool`: the ranks that share attention, where known."""
        if pool == 1:
            yield Problem(path="", text="has no effect: no other rank holds tokens of the same blocks")
        if recipe.compile:
            yield Problem(path="", text="works on blocks that are not compiled. Legal: compile = false, or no servers")
        if pool is not None:
            rows = recipe.micro_batch_size or recipe.batch_size // recipe.layout.size("batch")
            if self.ping_pong and rows == 1:
                text = "needs two rows or more in a micro-batch, here is 1. Raise micro_batch_size, or leave it out"
                yield Problem(path="ping_pong", text=text)
        try:
            windows = {block.window for block in recipe.model.blocks()} - {None}
        except LmworksError:
            return  # told where it is wrong, or a folder that is not there yet
        if windows:
            text = f"computes causal attention of whole documents; the model's window is {min(windows)} tokens"
            yield Problem(path="", text=f"{text}. Legal: a model without one, or no servers")
