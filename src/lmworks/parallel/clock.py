"""Clocks of a run: a GPU's own, on which work ends later than it is asked for, and how far those of ranks are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from lmworks.core.spans import MAIN, Clock, HostClock
from lmworks.parallel.wire import Wire

ROUNDS = 8
"""Questions that each rank asks the first one when clocks are compared; the quickest answer counts."""
CHAIN = 10.0
"""Seconds after which a mark becomes the one that later marks are held against: CUDA tells intervals as float32 ms."""


def clock_of(device: torch.device) -> Clock:
    """The clock by which work on a device is timed."""
    return GpuClock(device) if device.type == "cuda" else HostClock()


@final
class GpuClock:
    """Marks are CUDA events on the stream that is current; they are placed on the host's clock by one moment at which
    the GPU was known to be idle."""

    behind = 1

    def __init__(self, device: torch.device) -> None:
        self._host = HostClock()
        self._main = torch.cuda.default_stream(device).cuda_stream
        self._reference, self._reference_at = self._idle(device)

    def _idle(self, device: torch.device) -> tuple[Any, float]:
        torch.cuda.synchronize(device)
        event = self.mark()
        event.synchronize()
        return event, self._host.now()

    def mark(self) -> Any:
        """This moment on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def at(self, mark: Any) -> float:
        """When the GPU came to a mark; waits for it."""
        found = self._reference_at + self.between(self._reference, mark)
        if found - self._reference_at > CHAIN:
            self._reference, self._reference_at = mark, found
        return found

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; waits for the second one."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def now(self) -> float:
        """Seconds since the epoch, by the host."""
        return self._host.now()

    def stream(self) -> str:
        """'main' for the stream that torch computes on by default, else its number."""
        current = torch.cuda.current_stream().cuda_stream
        return MAIN if current == self._main else f"stream {current}"


@dataclass(frozen=True, kw_only=True)
class Offset:
    """What is added to a rank's clock to get the first rank's."""

    seconds: float
    error: float
    """At most so far off: half of the way there and back."""
    at: float
    """When it was found, by the rank's own clock."""


def align(wire: Wire, now: Callable[[], float], *, rounds: int = ROUNDS) -> Offset:
    """How far this rank's clock is from the first rank's (Cristian 1989). All ranks call it together.

    A rank asks the first one for its time, and takes the middle of the way there and back for the moment of the answer.
    The quickest of `rounds` questions counts: what it can be wrong by is half of its way.
    """
    if wire.layout.ranks == 1:
        return Offset(seconds=0.0, error=0.0, at=now())
    if wire.rank == 0:
        for rank in range(1, wire.layout.ranks):
            _answer(wire, now, rank, rounds)
        return Offset(seconds=0.0, error=0.0, at=now())
    group, found = wire.group("patient"), []
    for _ in range(rounds):
        told = _double(0.0)
        asked = now()
        dist.send(_double(asked), group=group, group_dst=0)
        dist.recv(told, group=group, group_src=0)
        heard = now()
        middle = (asked + heard) / 2
        found.append(Offset(seconds=float(told) - middle, error=(heard - asked) / 2, at=middle))
    return min(found, key=lambda offset: offset.error)


def _answer(wire: Wire, now: Callable[[], float], rank: int, rounds: int) -> None:
    question, group = _double(0.0), wire.group("patient")
    for _ in range(rounds):
        dist.recv(question, group=group, group_src=rank)
        dist.send(_double(now()), group=group, group_dst=rank)


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
