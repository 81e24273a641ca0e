"""Products of several matrices, each with a run of rows of its own, and the reordering that makes the runs.

Letters: E matrices, M rows in all, I in, O out; N tokens, K rows per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.model import ops


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """(M, I) x (E, O, I) -> (M, O): the first counts[0] rows times weight[0], the next counts[1] times weight[1], ...

    Computed in the precision of x. A matrix without rows gets a gradient of zeros, also when there are no rows at all.
    """
    if x_MI.dtype == torch.bfloat16 and x_MI.device.type == "cuda" and _aligned(weight_EOI):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        weight_EIO = weight_EOI.to(x_MI.dtype).transpose(1, 2)
        return F.grouped_mm(x_MI, weight_EIO, offs=ends_E)
    counts: list[int] = counts_E.tolist()
    if x_MI.dtype == weight_EOI.dtype == torch.float32 and ops.on_cpu(x_MI) and torch.is_grad_enabled():
        result: Tensor = _GroupedLinear.apply(x_MI, weight_EOI, counts)  # type: ignore[no-untyped-call]
        return result
    parts = zip(torch.split(x_MI, counts), weight_EOI.unbind(), strict=True)
    return torch.cat([F.linear(rows, weight_OI.to(x_MI.dtype)) for rows, weight_OI in parts])


def _aligned(weight_EOI: Tensor) -> bool:
    """Whether rows of these matrices begin at multiples of 16 bytes in bfloat16, as the fused kernel wants them."""
    return weight_EOI.shape[1] % 8 == 0 and weight_EOI.shape[2] % 8 == 0


class _GroupedLinear(torch.autograd.Function):
    """In float32 on a CPU. The gradient of all matrices is written into one tensor, each once."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.counts = counts
        out_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])
        for at, weight_OI in zip(_runs(counts), weight_EOI, strict=True):
            if at.stop > at.start:
                out_MO[at] = ops.product(x_MI[at], weight_OI)
        return out_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MI, weight_EOI = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_MI = torch.empty_like(x_MI) if needs_x else None
        grad_EOI = torch.empty_like(weight_EOI) if needs_weight else None
        for e, at in enumerate(_runs(ctx.counts)):
            if grad_EOI is not None:
                torch.mm(grad_MO[at].t(), x_MI[at], out=grad_EOI[e])  # zeros for a run of no rows
            if grad_MI is not None and at.stop > at.start:
                grad_MI[at] = ops.product(grad_MO[at], weight_EOI[e].t())
        return grad_MI, grad_EOI, None


def _runs(counts: list[int]) -> list[slice]:
    """The rows of each matrix."""
    runs, start = [], 0
    for count in counts:
        runs.append(slice(start, start + count))
        start += count
    return runs


def sorted_rows(x_ND: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    """(N, D) -> (N K, D): row m is the token order[m] // K. `order` is a permutation of N K, `inverse` undoes it."""
    copies = order_M.shape[0] // x_ND.shape[0]
    result: Tensor = _Rows.apply(x_ND, order_M // copies, inverse_M, copies)  # type: ignore[no-untyped-call]
    return result


def unsorted_rows(y_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    """(N K, D) in the order of `sorted_rows` -> (N K, D) token by token."""
    result: Tensor = _Rows.apply(y_MD, inverse_M, order_M, 1)  # type: ignore[no-untyped-call]
    return result


class _Rows(torch.autograd.Function):
    """x[take]. The gradient gathers too: it adds a row's copies in a fixed order, where index_add on a GPU does not."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, take_M: Tensor, back_M: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back_M)
        ctx.copies = copies
        return x_ND.index_select(0, take_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back_M,) = ctx.saved_tensors
        grad_MD = grads[0].index_select(0, back_M)
        if ctx.copies == 1:
            return grad_MD, None, None, None
        return grad_MD.view(-1, ctx.copies, grad_MD.shape[1]).sum(1), None, None, None
