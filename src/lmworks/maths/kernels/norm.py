"""RMSNorm: one pass over x forward, one over x and the gradient backward; statistics and sums in float32.

R rows, W columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths.kernels.grid import launch, rounded, rows_of, tile, warps

PARTS = 512
"""Programs of a backward pass, each with a partial sum of the weight's gradient: the same on every device, and so are
the sums."""


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in the dtype of x. Differentiable once."""
    result: Tensor = _RMSNorm.apply(x, weight_W, eps)  # type: ignore[no-untyped-call]
    return result


def forward(x: Tensor, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in the shape of x, and 1 / rms of each row (R,) float32."""
    x_RW = rows_of(x)
    rows, width = x_RW.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=x.device)
    ROWS, WIDTH = tile(width)
    launch(
        _forward,
        triton.cdiv(rows, ROWS),
        x_RW,
        weight_W.contiguous(),
        y,
        scale_R,
        rows,
        width,
        x_RW.stride(0),
        eps,
        ROWS=ROWS,
        WIDTH=WIDTH,
        num_warps=warps(ROWS * WIDTH),
    )
    return y, scale_R


def backward(grad: Tensor, x: Tensor, weight_W: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its shape and dtype, and of the weight (W,), in its dtype."""
    grad_RW, x_RW = rows_of(grad), rows_of(x)
    rows, width = x_RW.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ROWS, WIDTH = tile(width)
    parts = min(PARTS, triton.cdiv(rows, ROWS))
    partial_PW = torch.empty(parts, width, dtype=torch.float32, device=x.device)
    launch(
        _backward,
        parts,
        grad_RW,
        x_RW,
        weight_W.contiguous(),
        scale_R,
        dx,
        partial_PW,
        rows,
        width,
        grad_RW.stride(0),
        x_RW.stride(0),
        ROWS=ROWS,
        WIDTH=WIDTH,
        num_warps=warps(ROWS * WIDTH),
    )
    return dx, partial_PW.sum(0).to(weight_W.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        y, scale_R = forward(x, weight_W, eps)
        ctx.save_for_backward(x, weight_W, scale_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *backward(grad, *ctx.saved_tensors), None


@triton.jit
def _forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One tile of whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], rounded(y, y_ptr), mask=inside)
    tl.store(inverse_ptr + row, scale, mask=row < rows)


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Every PARTS-th tile: dx = scale (g w - n mean(g w n)) with n = x scale; the sum of g n over its rows."""
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x * scale
        weighted = grad * weight[None, :]
        mean = tl.sum(weighted * normed, axis=1) / width
        dx = scale * (weighted - normed * mean[:, None])
        tl.store(dx_ptr + row[:, None] * width + column[None, :], rounded(dx, dx_ptr), mask=inside)
        total += tl.sum(grad * normed, axis=0)
        first += tl.num_programs(0) * ROWS
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)
