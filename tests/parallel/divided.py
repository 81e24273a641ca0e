"""Attention over tokens that several ranks hold, and what each of them found of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.model.attention import boolean_mask
from lmworks.parallel import world
from lmworks.parallel.context import Context
from lmworks.parallel.layout import Engine, Layout, Order

HEAD_DIM = 4


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows, and who holds their tokens."""

    engine: Engine
    order: Order
    heads: int = 6
    groups: int = 3
    window: int | None = None
    documents: bool = True
    length: int = 48
    dtype: torch.dtype = torch.float64


@dataclass(kw_only=True)
class Found:
    """A rank's tokens, by place, of out, dq, dk and dv (B, T, heads, h), and its bill."""

    places: np.ndarray
    tensors: dict[str, np.ndarray]
    bills: dict[tuple[str, str], float] = field(default_factory=dict)


def drawn(rows: Rows) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and the gradient of the result, all (2, S, heads, h); documents of uneven lengths, some come twice."""
    generator = torch.Generator().manual_seed(7)
    heads = (rows.heads, rows.groups, rows.groups, rows.heads)
    tensors = [torch.randn(2, rows.length, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in heads]
    lengths = torch.rand(2, rows.length, generator=generator) < 4 / rows.length
    return [x.to(rows.dtype) for x in tensors], lengths.cumsum(1) % 3 if rows.documents else None


def dense(rows: Rows) -> dict[str, np.ndarray]:
    """The same on one process by torch's own attention, in float64."""
    (q, k, v, dout), documents = drawn(rows)
    leaves = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    mask = boolean_mask(rows.length, rows.length, rows.window, documents, torch.device("cpu"))
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    return named(out, torch.autograd.grad(out, leaves, dout.double().transpose(1, 2)))


def attended(rank: int, ranks: int, cases: list[Rows]) -> list[Found]:
    """Several cases as one of the ranks, which are connected."""
    return [_attended(rank, ranks, rows) for rows in cases]


def _attended(rank: int, ranks: int, rows: Rows) -> Found:
    layout = Layout(dp_shard=1, cp=ranks, context=rows.engine, order=rows.order)
    context = Context(world.wire(layout, world.Seat(rank=rank, world=ranks)))
    places = context.places(rows.length, rank)
    (q, k, v, dout), documents = drawn(rows)
    reach = context(
        batch=2,
        new=len(places),
        cached=0,
        window=rows.window,
        documents_BK=None if documents is None else documents[:, places],
        device=torch.device("cpu"),
        dtype=rows.dtype,
    )
    leaves = [x[:, places].requires_grad_() for x in (q, k, v)]
    assert reach.by is not None
    out = reach.by(leaves[0], leaves[1].transpose(1, 2), leaves[2].transpose(1, 2))
    assert out.dtype == rows.dtype
    gradients = torch.autograd.grad(out, leaves, dout[:, places])
    found = named(out.transpose(1, 2), [x.transpose(1, 2) for x in gradients])
    bills = {key: bill.bytes for key, bill in context.wire.bills.items()}
    return Found(places=places.numpy(), tensors=found, bills=bills)


def named(out: Tensor, gradients: Any) -> dict[str, np.ndarray]:
    """(B, heads, T, h) as arrays of (B, T, heads, h)."""
    tensors = (out, *gradients)
    return {
        name: x.detach().transpose(1, 2).double().numpy()
        for name, x in zip(("out", "dq", "dk", "dv"), tensors, strict=True)
    }
