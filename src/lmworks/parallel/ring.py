"""Attention over tokens on several ranks that pass each other keys or queries, one hop at a time, while they compute.

    ring         keys and values go round; backward, their gradients follow them and come home (Liu et al. 2023)
    tokenring    keys and values stay. Queries go round one way, and what they found goes straight back the other way:
                 forward out and lse, backward dq, for which q, dout, lse and delta went round (arXiv 2412.20501)

Step i of n at place r works on what place r - i sent out. Each step's sends run while it computes, all in one exchange,
so that both directions of a link carry data at once. Only what flash attention keeps waits for the backward pass: this
rank's q, k, v, out and lse. Sums are kept in float32 by whoever adds them up; what a rank found for another's queries
travels in the queries' own type, rounded once, while sums that go round travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths.softmax import attend_part, attend_part_backward, delta, merge, sums_in
from lmworks.parallel.crossing import eager
from lmworks.parallel.sight import Pair, Sight
from lmworks.parallel.wire import Sent, Wire

AXIS = "cp"
Work = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]
"""(the owner's place, what it sent out) -> what is found for it."""


@eager
def ring(wire: Wire, sight: Sight, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Tensor:
    """(B, T, N, h): attention of this rank's queries over all ranks' keys, which go round."""
    out_BNTh: Tensor = _Ring.apply(q_BTNh.transpose(1, 2), k_BGTh, v_BGTh, wire, sight)  # type: ignore[no-untyped-call]
    return out_BNTh.transpose(1, 2)


@eager
def tokenring(wire: Wire, sight: Sight, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Tensor:
    """(B, T, N, h): attention of this rank's queries, which go round, over all ranks' keys."""
    q_BNTh = q_BTNh.transpose(1, 2)
    out_BNTh: Tensor = _TokenRing.apply(q_BNTh, k_BGTh, v_BGTh, wire, sight)  # type: ignore[no-untyped-call]
    return out_BNTh.transpose(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, wire: Wire, sight: Sight) -> Tensor:
        here, found = wire.place(AXIS), _Found(q)

        def work(owner: int, goods: Sequence[Tensor]) -> Sequence[Tensor]:
            found.take(_attend(q, goods[0], goods[1], sight.pair(here, owner)))
            return ()

        _round(wire, (k.contiguous(), v.contiguous()), work)
        return _keep(ctx, q, k, v, found, wire, sight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wire, sight = ctx.over
        here, kind = wire.place(AXIS), sums_in(q.dtype)
        dq, lowered_BNT = torch.zeros_like(q, dtype=kind), delta(out, dout)
        dk, dv = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)

        def work(owner: int, goods: Sequence[Tensor]) -> Sequence[Tensor]:
            pair = sight.pair(here, owner)
            mine, *others = _gradients(q, goods[0], goods[1], pair, (dout, lse, lowered_BNT))
            dq.add_(mine)
            return others

        def take(arrived: Sequence[Tensor]) -> None:
            dk.add_(arrived[0])
            dv.add_(arrived[1])

        _round(wire, (k.contiguous(), v.contiguous()), work, like=(dk, dv), take=take, relay=True)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _TokenRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, wire: Wire, sight: Sight) -> Tensor:
        here, found = wire.place(AXIS), _Found(q)

        def work(owner: int, goods: Sequence[Tensor]) -> Sequence[Tensor]:
            return _attend(goods[0], k, v, sight.pair(owner, here))

        q = q.contiguous()
        _round(wire, (q,), work, like=(q, found.lse), take=found.take)
        return _keep(ctx, q, k, v, found, wire, sight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wire, sight = ctx.over
        here, kind = wire.place(AXIS), sums_in(q.dtype)
        dq = torch.zeros_like(q, dtype=kind)
        dk, dv = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)

        def work(owner: int, goods: Sequence[Tensor]) -> Sequence[Tensor]:
            query, *rest = goods
            theirs, dk_part, dv_part = _gradients(query, k, v, sight.pair(owner, here), rest)
            dk.add_(dk_part)
            dv.add_(dv_part)
            return (theirs,)

        goods = (q, dout.to(q.dtype).contiguous(), lse, delta(out, dout))
        _round(wire, goods, work, like=(q,), take=lambda arrived: dq.add_(arrived[0]))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _Found:
    """What queries found in the keys so far: out (B, N, T, h) and lse (B, N, T), in the type of sums."""

    def __init__(self, q_BNTh: Tensor) -> None:
        kind = sums_in(q_BNTh.dtype)
        self.out = torch.zeros(q_BNTh.shape, dtype=kind, device=q_BNTh.device)
        self.lse = torch.full(q_BNTh.shape[:-1], -math.inf, dtype=kind, device=q_BNTh.device)

    def take(self, part: Sequence[Tensor]) -> None:
        """Merge with what was found in other keys."""
        self.out, self.lse = merge(self.out, self.lse, *part)


def _keep(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: _Found, wire: Wire, sight: Sight) -> Tensor:
    """What the backward pass needs; the result, in the order (B, T, N, h) in which the next layer keeps it too."""
    out = found.out.transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2)
    ctx.save_for_backward(q, k, v, out, found.lse)
    ctx.over = (wire, sight)
    return out


def _attend(q_BNTh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor, pair: Pair | None) -> tuple[Tensor, Tensor]:
    """out and lse of all these queries; a rank's keys that none of them sees cost nothing."""
    found = _Found(q_BNTh)
    if pair is not None:
        k_BGkh, v_BGkh = k_BGTh[:, :, pair.keys], v_BGTh[:, :, pair.keys]
        out_BNqh, lse_BNq = attend_part(q_BNTh[:, :, pair.queries], k_BGkh, v_BGkh, pair.seen)
        found.out[:, :, pair.queries] = out_BNqh
        found.lse[:, :, pair.queries] = lse_BNq
    return found.out, found.lse


def _gradients(
    q_BNTh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor, pair: Pair | None, rest: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv by these queries on these keys. `rest`: dout, lse and delta of the queries."""
    kind = sums_in(q_BNTh.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q_BNTh, k_BGTh, v_BGTh))
    if pair is not None:
        dout_BNqh, lse_BNq, delta_BNq = (x[:, :, pair.queries] for x in rest)
        dq[:, :, pair.queries], dk[:, :, pair.keys], dv[:, :, pair.keys] = attend_part_backward(
            q_BNTh[:, :, pair.queries],
            k_BGTh[:, :, pair.keys],
            v_BGTh[:, :, pair.keys],
            pair.seen,
            lse_BNT=lse_BNq,
            dout_BNTh=dout_BNqh,
            delta_BNT=delta_BNq,
        )
    return dq, dk, dv


def _round(
    wire: Wire,
    goods: Sequence[Tensor],
    work: Work,
    *,
    like: Sequence[Tensor] = (),
    take: Callable[[Sequence[Tensor]], object] | None = None,
    relay: bool = False,
) -> None:
    """Send goods round all ranks, work on everyone's, and `take` what others found for this rank.

    `like`: shapes and types in which what is found travels; none where it stays. It goes straight home; with `relay`
    it goes on behind the goods, and every rank adds its own to it. What a rank finds for itself is not sent.
    """
    here, ranks = wire.place(AXIS), wire.size(AXIS)
    found: Sequence[Tensor] = ()
    for step in range(ranks + 1 if take else ranks):
        sent: list[Sent] = []
        received: list[tuple[Tensor, int]] = []
        coming, arrived = goods, None
        if step < ranks - 1:
            coming = _post(sent, received, goods, goods, (here, 1, ranks), "send forth")
        if take and step >= 2:
            hops, way = (1, "send forth") if relay else (1 - step, "send back")
            arrived = _post(sent, received, found, like, (here, hops, ranks), way)
        running = wire.begin_swap(sent, received, AXIS)
        found = work((here - step) % ranks, goods) if step < ranks else ()
        running.wait()
        if take and step == 0:
            take(found)
        elif arrived is not None and relay and step < ranks:
            found = [x + y for x, y in zip(found, arrived, strict=True)]
        elif take and arrived is not None:
            take(arrived)
        goods = coming


def _post(
    sent: list[Sent],
    received: list[tuple[Tensor, int]],
    things: Sequence[Tensor],
    like: Sequence[Tensor],
    where: tuple[int, int, int],
    way: str,
) -> list[Tensor]:
    """Put things into an exchange, for the rank so many hops away; the tensors in which others' will come."""
    here, hops, ranks = where
    blank = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]
    sent += [Sent(x.to(y.dtype), (here + hops) % ranks, way) for x, y in zip(things, like, strict=True)]
    received += [(x, (here - hops) % ranks) for x in blank]
    return blank
