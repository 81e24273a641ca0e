"""Core attention on whichever rank a plan says: rows of queries and keys go out, what was found comes back.

Each exchange is begun by one function and waited for by the next one, so that other work can stand between them:

    forward                                                 backward
    begin    q, k, v leave                                  dq, dk, dv come
    serve    q, k, v come; out, lse found; they leave       q, k, v, out, lse, dout come; dq, dk, dv found; they leave
    end      out, lse come                                  q, k, v, out, lse, dout leave

Autograd runs the backward passes in the reverse order of the forward ones: what was done in turns forward is done in
turns backward. With `keep = "cache"` the server keeps q, k, v, out and lse, and only dout travels backward; lse never.

Between two functions only a token flows through autograd, a number without meaning; tensors wait in a `Leg`. So nothing
is held by the graph but what `save_for_backward` was given, and blocks that are run again, saved tensors that go out
and the books see all of it. Rows travel in the type of q, rounded once. What several servers find for the same key is
added in float32 at least, server by server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths.causal import attend_runs, attend_runs_backward
from lmworks.maths.softmax import sums_in
from lmworks.model.sizes import BlockSizes
from lmworks.parallel.crossing import eager
from lmworks.parallel.routes import Lot, Routes
from lmworks.parallel.tasks import Plan
from lmworks.parallel.wire import Running, Sent, Wire

AXIS = "attention"
"""The pool: all ranks that hold tokens of one stage."""
Keep = Literal["resend", "cache"]


@dataclass(kw_only=True)
class Leg:
    """What is under way between two functions."""

    running: Running | None = None
    came: list[tuple[Tensor, Lot]] = field(default_factory=list)

    def take(self) -> list[tuple[Tensor, Lot]]:
        """Wait for it."""
        assert self.running is not None, "it was begun"
        self.running.wait()
        found, self.running, self.came = self.came, None, []
        return found


@dataclass(frozen=True, kw_only=True)
class Way:
    """Where rows of one micro-batch travel, and what is under way there."""

    wire: Wire
    routes: Routes
    keep: Keep
    out: Leg = field(default_factory=Leg)
    """To the servers."""
    home: Leg = field(default_factory=Leg)
    """Back to the owners."""

    def send_out(self, queries: Sequence[Tensor], keys: Sequence[Tensor], operation: str) -> None:
        """Begin to send rows of these tensors, each with an entry per token of this rank, to the servers."""
        goods = [(x[lot.rows], lot) for x, lot in self._lots(queries, keys)]
        self._post(self.out, goods, operation)

    def arrived(self) -> list[Tensor]:
        """What came for this rank to compute with, in the order of computing."""
        return [x[lot.order] for x, lot in self.out.take()]

    def send_home(self, queries: Sequence[Tensor], keys: Sequence[Tensor], operation: str) -> None:
        """Begin to send what was found by query or by key, in the order of computing, to the owners."""
        goods = [(x[lot.home], lot) for x, lot in self._lots(queries, keys)]
        self._post(self.home, goods, operation, back=True)

    def landed(self) -> list[Tensor]:
        """What was found for this rank's tokens; by key, the sums over servers."""
        queries = self.routes.queries
        return [self._placed(x, lot) if lot is queries else self._summed(x, lot) for x, lot in self.home.take()]

    def _lots(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[tuple[Tensor, Lot]]:
        return [*((x, self.routes.queries) for x in queries), *((x, self.routes.keys) for x in keys)]

    def _placed(self, x: Tensor, lot: Lot) -> Tensor:
        """Each token's row stands in one place: its query has one server."""
        whole = x.new_empty((self.routes.tokens, *x.shape[1:]))
        whole[lot.rows] = x
        return whole

    def _summed(self, x: Tensor, lot: Lot) -> Tensor:
        """Server by server, each of which has a key once: the order of additions is the same every time."""
        whole = x.new_zeros((self.routes.tokens, *x.shape[1:]), dtype=sums_in(x.dtype))
        for part, rows in zip(torch.split(x, list(lot.sent)), torch.split(lot.rows, list(lot.sent)), strict=True):
            whole[rows] += part
        return whole.to(x.dtype)

    def _post(self, leg: Leg, goods: Sequence[tuple[Tensor, Lot]], operation: str, *, back: bool = False) -> None:
        """Begin an exchange of rows in runs by rank; a rank's own rows are copied. `back`: from servers to owners."""
        here, sent, received = self.wire.place(AXIS), [], []
        for x, lot in goods:
            leaving, coming = (lot.came, lot.sent) if back else (lot.sent, lot.came)
            whole = x.new_empty((sum(coming), *x.shape[1:]))
            parts, blanks = torch.split(x, list(leaving)), torch.split(whole, list(coming))
            blanks[here].copy_(parts[here])
            sent += [Sent(part, to, operation) for to, part in enumerate(parts) if to != here and len(part)]
            received += [(blank, of) for of, blank in enumerate(blanks) if of != here and len(blank)]
            leg.came.append((whole, lot))
        leg.running = self.wire.begin_swap(sent, received, AXIS)


def sent(plan: Plan, here: int, block: BlockSizes, *, value_bytes: int, keep: Keep) -> tuple[int, int]:
    """Bytes that a rank sends for the attention of one block of these heads, forward and backward.

    For its tokens that others serve, and for those of others that it serves; what stays on a rank is not sent.
    """
    query, lse = block.n_heads * block.head_dim * value_bytes, block.n_heads * max(4, value_bytes)
    keys = 2 * block.n_kv_heads * block.head_dim * value_bytes
    queries_out, keys_out = sum(plan.sent_queries[here]), sum(plan.sent_keys[here])
    queries_home = sum(row[here] for row in plan.sent_queries)
    keys_home = sum(row[here] for row in plan.sent_keys)
    forth, home = queries_out * query + keys_out * keys, queries_home * query
    back = home + keys_home * keys
    if keep == "cache":
        return forth + home, queries_out * query + back
    return forth + home + queries_home * lse, forth + queries_out * (2 * query + lse) + back


class Trip:
    """The attention of one block under way: `model.attention.Pending`."""

    def __init__(self, way: Way, back: Way, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> None:
        self._way, self._back, self._shape = way, back, q_BTNh.shape
        q, k, v = (x.flatten(0, 1) for x in (q_BTNh, k_BGTh.transpose(1, 2), v_BGTh.transpose(1, 2)))
        self._token: Tensor = _Begin.apply(q, k, v, way, back)  # type: ignore[no-untyped-call]
        self._own = (q.detach(), k.detach(), v.detach()) if way.keep == "resend" else ()

    @eager
    def serve(self) -> None:
        """Wait for what this rank computes with, compute, and send it home."""
        self._token = _Serve.apply(self._token, self._way, self._back)  # type: ignore[no-untyped-call]

    @eager
    def end(self) -> Tensor:
        """(B, T, N, h): wait for what was found for this rank's queries."""
        out: Tensor = _End.apply(self._token, self._way, self._back, *self._own)  # type: ignore[no-untyped-call]
        return out.view(self._shape)


@eager
def begin(wire: Wire, routes: Routes, keep: Keep, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Trip:
    """Send the rows of this rank's tokens, (B, T, N, h) and (B, G, T, h), to where the plan says."""
    way, back = (Way(wire=wire, routes=routes, keep=keep) for _ in range(2))
    return Trip(way, back, q_BTNh, k_BGTh, v_BGTh)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, way: Way, back: Way) -> Tensor:
        ctx.back = back
        way.send_out((q,), (k, v), "to servers")
        return q.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.back.landed()
        return dq, dk, dv, None, None


class _Serve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, way: Way, back: Way) -> Tensor:
        ctx.back, cached = back, way.keep == "cache"
        q, k, v = way.arrived()
        out, lse = attend_runs(q, k, v, way.routes.runs)
        way.send_home((out,) if cached else (out, lse), (), "from servers")
        ctx.save_for_backward(*((out, lse, q, k, v) if cached else ()))
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor | None, ...]:
        back: Way = ctx.back
        cached = back.keep == "cache"
        dout, *came = back.arrived()
        out, lse, q, k, v = ctx.saved_tensors if cached else came
        found = attend_runs_backward(q, k, v, back.routes.runs, out_MNh=out, lse_MN=lse, dout_MNh=dout)
        dq, dk, dv = (x.to(q.dtype) for x in found)
        back.send_home((dq,), (dk, dv), "from servers, backward")
        return dtoken, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, way: Way, back: Way, *own: Tensor) -> Tensor:
        ctx.back, ctx.own = back, len(own)
        out, *lse = way.landed()
        ctx.save_for_backward(*((out, *lse, *own) if own else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        back: Way = ctx.back
        saved = ctx.saved_tensors  # out, lse, q, k, v; none where the server keeps them
        back.send_out((dout, *saved[:3]), saved[3:], "to servers, backward")
        return dout.new_zeros(()), None, None, *[None] * ctx.own
