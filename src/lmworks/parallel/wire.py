"""The counted door: every collective of lmworks goes through a Wire, which knows the axes and keeps the bill.

Bytes are those that one rank must send by the ring algorithms, whatever the backend does: with n ranks on the axis,
all-gather, reduce-scatter and, on average, broadcast send (n - 1) / n of the whole tensor, all-reduce twice that,
all-to-all what is for others, a send what is sent. So formulas of papers can be held against the bill. An axis of one
rank sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lmworks.core.spans import BESIDE, Open, Spans
from lmworks.parallel.flight import Entry, Flight
from lmworks.parallel.layout import Layout

Group = dist.ProcessGroup
# torch 2.13 renamed these two
gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

BACK = "pp/back"
"""A second group of the ranks of a pipeline: gradients that go back wait for no hidden states that go forward."""
LAST = 6
"""How many of the last exchanges are told with the error of a rank that waited in vain."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What went over one axis by one operation."""

    calls: int = 0
    bytes: float = 0.0

    def plus(self, size: float) -> Bill:
        """One more call."""
        return Bill(calls=self.calls + 1, bytes=self.bytes + size)


@dataclass(frozen=True)
class Sent:
    """A tensor on its way to the rank at a place of the axis."""

    x: Tensor
    to: int
    operation: str = "send"
    """Under which it is billed."""


class Running(Protocol):
    """An exchange that goes on beside other work."""

    def wait(self) -> bool:
        """Return when it is done."""
        ...


class _Watched:
    """An exchange that goes on, with its span and its entry in the flight record."""

    def __init__(self, wire: Wire, running: Running, name: str, entry: Entry, span: Open | None) -> None:
        self._wire, self._running, self._name, self._entry, self._span = wire, running, name, entry, span

    def wait(self) -> bool:
        with self._wire.spans.span(f"{self._name} wait", exchange=True, number=self._entry.number):
            done = self._running.wait()
        if self._entry.left is None:
            self._wire.flight.leave(self._entry)
            if self._span is not None:
                self._span.__exit__()
        return done


@dataclass(frozen=True)
class _Swap:
    """One or more sends and receipts; their tensors stay until all are done."""

    parcels: list[Any]
    works: list[Any]

    def wait(self) -> bool:
        for work in self.works:
            work.wait()
        return True


class Wire:
    """Collectives of one rank by the name of the axis."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        groups: Mapping[str, Group],
        *,
        first_here: bool = True,
        here: range | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.first_here = first_here
        """Whether this is the first rank of its host."""
        self.here = here or range(rank, rank + 1)
        """The ranks of this machine."""
        self._groups = dict(groups)
        self.bills: dict[tuple[str, str], Bill] = {}
        """By (axis, operation)."""
        self.flight = Flight()
        """The last exchanges, for a rank that waits in vain."""
        self.spans = Spans()
        """Where this rank's time goes; off until somebody takes what is recorded."""

    @property
    def seat(self) -> tuple[int, int]:
        """(rank, ranks)."""
        return self.rank, self.layout.ranks

    def size(self, axis: str) -> int:
        """Ranks along an axis; the two ends of a pipeline are one too."""
        return 2 if axis == "ends" else self.layout.size(axis)

    def place(self, axis: str) -> int:
        """Where this rank stands along an axis."""
        return self.layout.place(self.rank, axis)

    def group(self, axis: str) -> Group:
        """torch's process group of an axis."""
        return self._groups[axis]

    def note(self, axis: str, operation: str, size: float) -> None:
        """Put a call on the bill: `size` bytes sent. For collectives that torch makes by itself."""
        self.bills[axis, operation] = self.bills.get((axis, operation), Bill()).plus(size)

    @contextmanager
    def counted(self, axis: str, operation: str, size: float, peer: int | None = None) -> Iterator[None]:
        """Around an exchange: it goes on the bill, on the flight record and on the timeline. One that raises was never
        left. `peer`: the place of the other rank where there is one."""
        self.note(axis, operation, size)
        entry = self.flight.enter(axis, operation, size, self._rank_at(axis, peer))
        with self.spans.span(f"{axis} {operation}", bytes=size, exchange=True, number=entry.number):
            yield
        self.flight.leave(entry)

    def watched(self, running: Running, axis: str, operation: str, size: float, peer: int | None = None) -> Running:
        """An exchange that has just begun and goes on beside other work: on the flight record and on the timeline until
        its `wait()`. It is on the bill already. `peer`: as `counted` takes it."""
        entry = self.flight.enter(axis, operation, size, self._rank_at(axis, peer))
        name = f"{axis} {operation}"
        span = self.spans.span(name, stream=BESIDE, bytes=size, exchange=True, number=entry.number)
        return _Watched(self, running, name, entry, span.__enter__())

    def members(self) -> dict[str, list[int]]:
        """The ranks of each group that this rank is in, by the name of the axis, in their order."""
        found: dict[str, Any] = dict(self._groups)
        here = {name: group for name, group in found.items() if isinstance(group, Group)}  # of 'ends' it may be none
        return {name: dist.get_process_group_ranks(group) for name, group in here.items()}

    def _rank_at(self, axis: str, place: int | None) -> int | None:
        return None if place is None else dist.get_global_rank(self.group(axis), place)

    def last(self) -> str:
        """The last exchanges that this rank began, oldest first: where ranks that wait for each other stand."""
        found = [f"{e.axis} {e.operation} {e.bytes:,} B" for e in self.flight.last(LAST)]
        return ", ".join(found) or "none"

    def sum(self, x: Tensor, axis: str) -> Tensor:
        """The sum over the axis, in place."""
        return self._reduce(x, axis, dist.ReduceOp.SUM)

    def begin_sum(self, x: Tensor, axis: str) -> Running:
        """Begin the sum over an axis of several ranks, in place; x may be used after `wait()` on what is returned."""
        n = self.size(axis)
        size = 2 * (n - 1) / n * x.nbytes
        self.note(axis, "all-reduce", size)
        return self.watched(dist.all_reduce(x, group=self.group(axis), async_op=True), axis, "all-reduce", size)

    def maximum(self, x: Tensor, axis: str) -> Tensor:
        """The largest over the axis, in place."""
        return self._reduce(x, axis, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, axis: str, op: Any) -> Tensor:
        n = self.size(axis)
        if n > 1:
            with self.counted(axis, "all-reduce", 2 * (n - 1) / n * x.nbytes):
                dist.all_reduce(x, op=op, group=self.group(axis))
        return x

    def broadcast(self, x: Tensor, axis: str) -> Tensor:
        """What the first rank of the axis has, in place."""
        n = self.size(axis)
        if n > 1:
            with self.counted(axis, "broadcast", (n - 1) / n * x.nbytes):
                dist.broadcast(x, group=self.group(axis), group_src=0)
        return x

    def anywhere(self, facts: Sequence[bool], device: torch.device) -> list[bool]:
        """Of each fact whether it holds on any rank."""
        if self.layout.ranks == 1:
            return list(facts)
        found = self.maximum(torch.tensor([float(fact) for fact in facts], device=device), "world")
        return [bool(x) for x in found]

    def gather(self, x: Tensor, axis: str, dim: int) -> Tensor:
        """The ranks' tensors, all of one shape, behind each other along `dim`."""
        n = self.size(axis)
        if n == 1:
            return x
        whole = _like(x, dim, n * x.shape[dim])
        front = whole.movedim(dim, 0)
        straight = front.is_contiguous()  # then ranks' parts lie behind each other as they come
        target = front if straight else torch.empty_like(front, memory_format=torch.contiguous_format)
        with self.counted(axis, "all-gather", (n - 1) / n * whole.nbytes):
            gather_into(target, x.movedim(dim, 0).contiguous(), group=self.group(axis))
        return whole if straight else whole.copy_(target.movedim(0, dim))

    def begin_gather(self, out_NW: Tensor, x_W: Tensor, axis: str) -> Running:
        """Begin to gather from N > 1 ranks, one in each row of `out`, which is there after `wait()`; contiguous."""
        n = self.size(axis)
        size = (n - 1) / n * out_NW.nbytes
        self.note(axis, "all-gather", size)
        running = gather_into(out_NW.view(-1), x_W.view(-1), group=self.group(axis), async_op=True)
        return self.watched(running, axis, "all-gather", size)

    def scatter_sum(self, x: Tensor, axis: str, dim: int) -> Tensor:
        """This rank's part, along `dim`, of the sum over the axis."""
        n = self.size(axis)
        if n == 1:
            return x
        part = _like(x, dim, x.shape[dim] // n)
        front = part.movedim(dim, 0)
        straight = front.is_contiguous()
        target = front if straight else torch.empty_like(front, memory_format=torch.contiguous_format)
        with self.counted(axis, "reduce-scatter", (n - 1) / n * x.nbytes):
            reduce_scatter_into(target, x.movedim(dim, 0).contiguous(), group=self.group(axis))
        return part if straight else part.copy_(target.movedim(0, dim))

    def begin_scatter_sum(self, out_W: Tensor, x_NW: Tensor, axis: str) -> Running:
        """Begin the sum over an axis of N > 1 ranks, this rank's row of it into `out`; x stays until `wait()`."""
        n = self.size(axis)
        size = (n - 1) / n * x_NW.nbytes
        self.note(axis, "reduce-scatter", size)
        running = reduce_scatter_into(out_W.view(-1), x_NW.view(-1), group=self.group(axis), async_op=True)
        return self.watched(running, axis, "reduce-scatter", size)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int], axis: str) -> Tensor:
        """All-to-all: rows of x in runs of `sent`, one run per rank, for the runs of `received` rows from each."""
        if self.size(axis) == 1:
            return x
        own = self.place(axis)
        out = torch.empty((sum(received), *x.shape[1:]), dtype=x.dtype, device=x.device)
        row = x[:1].nbytes if x.shape[0] else 0
        with self.counted(axis, "all-to-all", row * (sum(sent) - sent[own])):
            dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=self.group(axis))
        return out

    def send(self, x: Tensor, to: int, axis: str) -> None:
        """Send to the rank at place `to` of the axis; returns when it may be changed again."""
        with self.counted(axis, "send", x.nbytes, to):
            dist.send(x.contiguous(), group=self.group(axis), group_dst=to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, of: int, axis: str) -> Tensor:
        """A tensor from the rank at place `of` of the axis."""
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        with self.receiving(axis, x.nbytes, of):
            dist.recv(x, group=self.group(axis), group_src=of)
        return x

    @contextmanager
    def receiving(self, axis: str, size: float, of: int) -> Iterator[None]:
        """Around the receipt of a message: its sender has it on the bill."""
        entry = self.flight.enter(axis, "receive", size, self._rank_at(axis, of))
        with self.spans.span(f"{axis} receive", bytes=size, exchange=True, number=entry.number):
            yield
        self.flight.leave(entry)

    def begin_send(self, x: Tensor, to: int, axis: str, group: str | None = None) -> Running:
        """Begin to send to the rank at place `to` of the axis; x stays as it is until `wait()`. `group`: another one of
        the same ranks, so that it is in no turn with what else goes between them."""
        self.note(axis, "send", x.nbytes)
        x = x.contiguous()
        sending = _Swap([x], [dist.isend(x, group=self.group(group or axis), group_dst=to)])
        return self.watched(sending, axis, "send", x.nbytes, to)

    def begin_receive(self, x: Tensor, of: int, axis: str, group: str | None = None) -> Running:
        """Begin to receive from the rank at place `of` of the axis into x, contiguous, which is there after `wait()`.
        `group` as in `begin_send`."""
        receiving = _Swap([x], [dist.irecv(x, group=self.group(group or axis), group_src=of)])
        return self.watched(receiving, axis, "receive", x.nbytes, of)

    def begin_swap(self, sent: Sequence[Sent], received: Sequence[tuple[Tensor, int]], axis: str) -> Running:
        """Begin to send to some ranks of an axis and to receive from some, all at once; each of `received` is a
        contiguous tensor to fill and the place that it comes from. Two ranks name what goes between them in one order.
        """
        parcels = [dist.P2POp(dist.isend, s.x.contiguous(), group=self.group(axis), group_peer=s.to) for s in sent]
        parcels += [dist.P2POp(dist.irecv, x, group=self.group(axis), group_peer=of) for x, of in received]
        for each in sent:
            self.note(axis, each.operation, each.x.nbytes)
        swap = _Swap(parcels, dist.batch_isend_irecv(parcels) if parcels else [])
        if not parcels:  # it counts all the same: exchanges of an axis have one number on all its ranks
            self.flight.leave(self.flight.enter(axis, "swap", 0))
            return swap
        return self.watched(swap, axis, "swap", sum(each.x.nbytes for each in sent))

    def wait(self) -> None:
        """Return when every rank has come here, however long that takes: one may be tokenising."""
        if self.layout.ranks > 1:
            entry = self.flight.enter("patient", "barrier", 0)
            with self.spans.span("patient barrier", exchange=True, number=entry.number):
                dist.barrier(group=self.group("patient"))
            self.flight.leave(entry)

    def told(self, text: str) -> str:
        """What the first rank says."""
        if self.layout.ranks == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, group=self.group("patient"), group_src=0)
        data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group=self.group("patient"), group_src=0)
        return bytes(data.tolist()).decode()


def _like(x: Tensor, dim: int, length: int) -> Tensor:
    """A new tensor of x's shape but for one length. A tensor of its own and not a view: FSDP warns of views."""
    shape = list(x.shape)
    shape[dim] = length
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def alone() -> Wire:
    """The wire of a single rank: nothing is sent."""
    return Wire(Layout(dp_shard=1), 0, {})
