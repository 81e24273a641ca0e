"""Steps whose first gather is not begun early; and what is begun before rows are drawn."""

from __future__ import annotations

from typing import Any

import torch

from lmworks.data.load import Batch
from lmworks.parallel.apply import Placement
from lmworks.parallel.schedule import Action
from lmworks.parallel.wire import Running, Wire
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


class _Told:
    """An exchange that tells when it is waited for."""

    def __init__(self, running: Running, done: list[str]) -> None:
        self._running, self._done = running, done

    def wait(self) -> bool:
        self._done.append("sent")
        return self._running.wait()


def mail(rank: int, case: Case) -> list[str]:
    """A step of a pipeline: when it posts receives, works, sends, and waits for what it sent."""
    made = placed(rank, case.scene, torch.float32)
    step = stepping(made, case.scene)
    done: list[str] = []
    receive, send = Wire.begin_receive, Wire.begin_send

    def receiving(self: Wire, *words: Any) -> Running:
        done.append("receive")
        return receive(self, *words)

    def sending(self: Wire, *words: Any) -> Running:
        done.append("send")
        return _Told(send(self, *words), done)

    def working(action: Action, behind: Action | None) -> None:
        done.append(str(action.kind))

    assert made.pipeline is not None
    made.pipeline.on_stage = working
    Wire.begin_receive, Wire.begin_send = receiving, sending  # type: ignore[method-assign, assignment]
    try:
        step()
    finally:
        Wire.begin_receive, Wire.begin_send = receive, send  # type: ignore[method-assign]
    return done
