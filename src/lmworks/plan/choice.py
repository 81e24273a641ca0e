"""What a plan decides, and the pieces of a model that its costs are told of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from lmworks.parallel.layout import Layout


@final
@dataclass(frozen=True)
class Stage:
    """Successive blocks of a pipeline."""

    start: int
    stop: int
    first: bool
    last: bool


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a plan decides."""

    layout: Layout
    """Settled."""
    rows: int
    """Of a micro-batch on one rank."""
    micro_batches: int
    """Of one rank in a step."""
    saved: Any
    """What is kept for the backward pass: a part of the slot `saved`."""


@final
@dataclass(frozen=True)
class Matrix:
    """A matrix of a block that multiplies tokens."""

    rows: int
    """Values that it gives."""
    columns: int
    """Values that it takes."""
    divided: str
    """What tp divides: rows, columns, or none."""
    experts: int = 0
    """Matrices of which each token uses `top_k`; 0 for one that all use."""
    top_k: int = 1

    def sides(self, tokens: int, tp: int) -> tuple[float, float, float]:
        """Tokens, rows and columns of the product on one rank."""
        rows = self.rows / tp if self.divided == "rows" else self.rows
        columns = self.columns / tp if self.divided == "columns" else self.columns
        return (tokens * self.top_k / self.experts if self.experts else tokens), rows, columns
