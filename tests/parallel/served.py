"""Attention that ranks compute for each other, and what each of them found of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.parallel import world
from lmworks.parallel.dispatch import AXIS, Keep, begin
from lmworks.parallel.layout import Layout
from lmworks.parallel.routes import routes
from lmworks.parallel.servers import Servers
from lmworks.parallel.tasks import Plan, arranged, plain
from lmworks.parallel.wire import Wire
from tests.parallel.layings import laid

HEAD_DIM, HEADS, GROUPS = 4, 6, 3
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Documents, the ranks that hold them, and the ranks that serve them."""

    lengths: list[int]
    holders: list[int]
    seed: int | None = None
    """Of random tasks; None: everyone serves himself."""
    servers: tuple[int, ...] | None = None
    """Ranks that random tasks go to; None: all."""
    keep: Keep = "resend"
    dtype: torch.dtype = torch.float64

    def plan(self, ranks: int) -> Plan:
        held = laid(self.lengths, self.holders)
        return plain(held, ranks) if self.seed is None else shuffled(plain(held, ranks), self.seed, self.servers)


def shuffled(whole: Plan, seed: int, servers: tuple[int, ...] | None = None, *, cuts: int = 3) -> Plan:
    """Other tasks for the same tokens: documents cut anywhere, each part served by anyone."""
    random, tasks = np.random.default_rng(seed), []
    for document, length in whole.lengths.items():
        edges = sorted({0, length, *random.integers(1, length + 1, cuts).tolist()})
        legal = servers or tuple(range(whole.ranks))
        tasks += [(document, a, b, int(random.choice(legal))) for a, b in pairwise(edges)]
    return arranged(whole.pieces, tasks, whole.ranks)


def drawn(work: Work, document: int) -> list[Tensor]:
    """q, k, v of a document and the gradient of its result, (L, heads, h) each."""
    generator = torch.Generator().manual_seed(document)
    shapes = [(work.lengths[document], n, HEAD_DIM) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(work.dtype) for shape in shapes]


def dense(work: Work, document: int) -> dict[str, np.ndarray]:
    """One document on one process by torch's own attention, in float64."""
    q, k, v, dout = (x.double().transpose(0, 1)[None] for x in drawn(work, document))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    found = (out, *torch.autograd.grad(out, leaves, dout))
    return {name: x.detach()[0].transpose(0, 1).numpy() for name, x in zip(NAMES, found, strict=True)}


@dataclass(kw_only=True)
class Found:
    """A rank's tokens of out, dq, dk and dv (M, heads, h), and its bills of one pass each."""

    tensors: dict[str, np.ndarray]
    forward: float
    backward: float
    operations: dict[tuple[str, str], float] = field(default_factory=dict)


def wire_of(rank: int, ranks: int) -> Wire:
    """A pool of ranks."""
    return world.wire(Layout(dp_shard=ranks, servers=Servers()), world.Seat(rank=rank, world=ranks))


def served(rank: int, ranks: int, works: list[Work]) -> list[Found]:
    """Several cases as one of the ranks, which are connected."""
    wire = wire_of(rank, ranks)
    return [_served(wire, work) for work in works]


def _served(wire: Wire, work: Work) -> Found:
    plan, here = work.plan(wire.size(AXIS)), wire.place(AXIS)
    wire.bills.clear()
    own = [drawn(work, document) for document, holder in enumerate(work.holders) if holder == here]
    blank = [torch.zeros(0, n, HEAD_DIM, dtype=work.dtype) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    q, k, v, dout = (torch.cat([blank[i], *(each[i] for each in own)])[None] for i in range(4))
    leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    route = routes(plan, here, q.device)
    trip = begin(wire, route, work.keep, leaves[0], leaves[1].transpose(1, 2), leaves[2].transpose(1, 2))
    trip.serve()
    out = trip.end()
    assert out.dtype == work.dtype
    forward = sum(bill.bytes for bill in wire.bills.values())
    gradients = torch.autograd.grad(out, leaves, dout)
    bills = {key: bill.bytes for key, bill in wire.bills.items()}
    found = {name: x.detach()[0].double().numpy() for name, x in zip(NAMES, (out, *gradients), strict=True)}
    return Found(tensors=found, forward=forward, backward=sum(bills.values()) - forward, operations=bills)


def repeated(rank: int, ranks: int, work: Work) -> list[dict[str, Any]]:
    """The same case twice."""
    wire = wire_of(rank, ranks)
    return [_served(wire, work).tensors for _ in range(2)]
