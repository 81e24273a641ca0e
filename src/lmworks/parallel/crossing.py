"""Collectives that gradients flow through. Each one's backward pass is the next one's forward pass:

forward                  backward                 used
copy                     sum                      into the products of tp, tokens repeated
sum                      copy                     out of them
gather tokens            scatter the sum          into them, tokens divided (sequence parallel); keys of cp
scatter the sum          gather                   out of them
gather, repeated after   this rank's own part     into what every rank computes alike
exchange                 exchange back            tokens to their experts, and home again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmworks.parallel.wire import Wire

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep a function out of compiled graphs: the bill is kept in Python."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


@eager
def copy(x: Tensor, wire: Wire, axis: str) -> Tensor:
    """x as it is; its gradient is summed over the axis."""
    result: Tensor = _Copy.apply(x, wire, axis)  # type: ignore[no-untyped-call]
    return result


@eager
def sum_over(x: Tensor, wire: Wire, axis: str) -> Tensor:
    """The sum over the axis; its gradient goes to every rank."""
    result: Tensor = _Sum.apply(x, wire, axis)  # type: ignore[no-untyped-call]
    return result


@eager
def gather(x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
    """The ranks' parts behind each other; every rank then computes something else, so gradients are summed."""
    result: Tensor = _Gather.apply(x, wire, axis, dim)  # type: ignore[no-untyped-call]
    return result


@eager
def scatter_sum(x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
    """This rank's part of the sum over the axis."""
    result: Tensor = _ScatterSum.apply(x, wire, axis, dim)  # type: ignore[no-untyped-call]
    return result


@eager
def gather_alike(x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
    """The ranks' parts behind each other; every rank then computes the same, so each keeps its own gradient."""
    result: Tensor = _GatherAlike.apply(x, wire, axis, dim)  # type: ignore[no-untyped-call]
    return result


@eager
def exchange(x: Tensor, sent: list[int], received: list[int], wire: Wire, axis: str) -> Tensor:
    """All-to-all of rows, in runs of `sent` by rank, for runs of `received`; gradients go back the same way."""
    result: Tensor = _Exchange.apply(x, sent, received, wire, axis)  # type: ignore[no-untyped-call]
    return result


def own_part(x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
    """This rank's equal part of x along `dim`; a view."""
    length = x.shape[dim] // wire.size(axis)
    return x.narrow(dim, wire.place(axis) * length, length)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, axis: str) -> Tensor:
        ctx.over = (wire, axis)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_over(grad, *ctx.over), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, axis: str) -> Tensor:
        ctx.over = (wire, axis)
        return wire.sum(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return copy(grad, *ctx.over), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
        ctx.over = (wire, axis, dim)
        return wire.gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return scatter_sum(grad, *ctx.over), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
        ctx.over = (wire, axis, dim)
        return wire.scatter_sum(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return gather(grad, *ctx.over), None, None, None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, axis: str, dim: int) -> Tensor:
        ctx.over = (wire, axis, dim)
        return wire.gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return own_part(grad, *ctx.over), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], wire: Wire, axis: str) -> Tensor:
        ctx.over = (received, sent, wire, axis)
        return wire.exchange(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return exchange(grad, *ctx.over), None, None, None, None
