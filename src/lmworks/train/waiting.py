"""How long ranks wait for each other because a recipe's own documents are of unequal length.

Rows are those that training would read. Times are FLOPs at one rate, of attention's pairs and of all other products of
a block, and exchanges take none: what is told is what unequal work alone costs, and what shared attention would leave
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import UsageError
from lmworks.data.read import Progress
from lmworks.model.sizes import linear_flops
from lmworks.parallel.idle import Outcome, Packing, Setting, outcome, together
from lmworks.parallel.laying import Row
from lmworks.parallel.layout import Layout
from lmworks.parallel.servers import Servers
from lmworks.parallel.speeds import Roofline, Speeds
from lmworks.parallel.tasks import Sizes

STEPS = 8
"""Whose rows are read."""
BY: tuple[Packing, ...] = ("plain", "by-work", "shared")
"""What is told: rows as they are, whole documents laid out by their work, shared attention."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What so many ranks come to."""

    ranks: int
    """Groups of the ranks of cp and tp, each with rows of its own."""
    outcomes: dict[Packing, Outcome]
    """By packing; one block, all steps in sum."""

    @property
    def moved(self) -> float:
        """Bytes that shared attention moves forward, per token and block."""
        made = self.outcomes["shared"]
        return made.moved_bytes / max(1, made.tokens)


def waiting(
    recipe: Any, layout: Layout, counts: Sequence[int], *, steps: int = STEPS, progress: Progress | None = None
) -> list[Waiting]:
    """For each number of ranks, with as many rows each as under the settled layout. Reads and tokenises the documents.

    Raises UsageError for a model with sliding windows, whose attention does not grow with the square of a document.
    """
    shape = getattr(recipe.model, "shape", recipe.model)
    blocks = shape.blocks()
    if any(block.window is not None for block in blocks):
        raise UsageError("the model has sliding windows", where="--documents", legal="a model without them")
    heads, groups = (max(of) for of in zip(*((b.n_heads, b.n_kv_heads) for b in blocks), strict=True))
    sizes = Sizes.of(heads, groups, blocks[0].head_dim, 4 if recipe.precision == "fp32" else 2)
    pair = 4.0 * float(np.mean([block.n_heads * block.head_dim for block in blocks]))
    speeds = Speeds(
        attention=Roofline(flops_per_pair=pair, flops_per_second=1.0, sizes=sizes, tile=1),
        linear=linear_flops(shape),
        bytes_per_second=float("inf"),
        sizes=sizes,
    )
    own = recipe.batch_size // layout.size("batch")
    micro = min(recipe.micro_batch_size or own, own)
    servers = layout.servers or Servers()
    loader = recipe.data.prepare(seed=recipe.seed, progress=progress).train(prefetch=0)
    found = []
    for ranks in counts:
        setting = Setting(
            ranks=ranks,
            speeds=speeds,
            tolerance=servers.tolerance,
            tile=servers.tile,
            buffer_bytes=servers.buffer_bytes,
        )
        drawn = [loader.draw(ranks * own).documents_BT.numpy() for _ in range(steps)]
        found.append(Waiting(ranks=ranks, outcomes={by: _of(by, drawn, micro, setting) for by in BY}))
    loader.close()
    return found


def _of(packing: Packing, drawn: Sequence[NDArray[np.int64]], micro: int, setting: Setting) -> Outcome:
    """All steps under one packing: with shared attention ranks meet in every micro-batch, else at a step's end."""
    parts = []
    for documents_BT in drawn:
        own = [[lengths(row) for row in documents_BT[rank :: setting.ranks]] for rank in range(setting.ranks)]
        if packing == "shared":
            count = len(own[0])
            parts += [[halves(rows[at : at + micro]) for rows in own] for at in range(0, count, micro)]
        else:
            parts.append([tuple(rows) for rows in own])
    return together([outcome(packing, part, setting) for part in parts])


def lengths(documents_T: NDArray[np.int64]) -> Row:
    """Tokens of each document of a row, by the document of each token."""
    return tuple(np.unique(documents_T, return_counts=True)[1].tolist())


def halves(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The documents of the first and of the second half of the rows, as a block takes them; one half of one row."""
    middle = -(-len(rows) // 2)
    return tuple(tuple(length for row in half for length in row) for half in (rows[:middle], rows[middle:]) if half)


def facts(found: Sequence[Waiting]) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [
        {
            "ranks": one.ranks,
            "idle": {packing: made.idle for packing, made in one.outcomes.items()},
            "memory": {packing: made.memory for packing, made in one.outcomes.items()},
            "moved_bytes_per_token_and_block": one.moved,
            "reason": one.outcomes["shared"].reason,
        }
        for one in found
    ]


def told(found: Sequence[Waiting], asked: int) -> list[str]:
    """Lines for people; `asked`: the ranks of the recipe's layout."""
    lines = ["documents: part of their time in which ranks wait for the one with the most attention, exchanges apart"]
    lines.append(f"  {'ranks':>5}{'as packed':>12}{'by work':>12}{'shared':>12}{'bytes moved per token and block':>35}")
    for one in found:
        idle = "".join(f"{100 * one.outcomes[packing].idle:11.1f}%" for packing in BY)
        lines.append(f"  {one.ranks:5}{idle}{one.moved:35,.0f}{'  <- this layout' if one.ranks == asked else ''}")
    reasons = {one.ranks: one.outcomes["shared"].reason for one in found}
    lines += [
        f"  the first plan of {n} that is not as asked for: {why}" for n, why in reasons.items() if why is not None
    ]
    lines.append("  as packed: rows as they are; by work: whole documents, the longest first, each to the idlest rank;")
    lines.append('  shared: as packed, and ranks compute each other\'s attention: layout.use = "distca"')
    return lines
