"""Steps whose first gather is not begun early; and what is begun before rows are drawn."""

from __future__ import annotations

from typing import Any

import torch

from lmworks.data.load import Batch
from lmworks.parallel.apply import Placement
from lmworks.train.rehearse import MadeUp, Seen, placed, stepping
from tests.parallel.table import Case, train_all


def timid(rank: int, cases: list[Case], dtype: torch.dtype, steps: int) -> list[Seen]:
    """As `train_all`, and nothing is asked for before it is needed."""
    plain = Placement.begin
    Placement.begin = lambda self: None  # type: ignore[method-assign]
    try:
        return train_all(rank, cases, dtype, steps)
    finally:
        Placement.begin = plain  # type: ignore[method-assign]


def begun(rank: int, case: Case) -> list[int]:
    """Gathers that had been begun when rows were drawn, counted from the end of the step before: in three steps."""
    made = placed(rank, case.scene, torch.float32)
    step = stepping(made, case.scene)
    found: list[int] = []
    plain = MadeUp.draw

    def gathers() -> int:
        return sum(bill.calls for (_, kind), bill in made.wire.bills.items() if kind == "all-gather")

    def draw(self: MadeUp, *words: Any) -> Batch:
        found.append(gathers() - before)
        return plain(self, *words)

    MadeUp.draw = draw  # type: ignore[method-assign]
    try:
        for _ in range(3):
            before = gathers()
            step()
    finally:
        MadeUp.draw = plain  # type: ignore[method-assign]
    return found
