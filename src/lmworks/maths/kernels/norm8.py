"""RMSNorm of codes by group: x is read and kept in eight bits, decoded on the way, and normalised in float32.

A scale by tensor asks for the maximum of all of y first. So y is written in bf16 with the maxima of its rows beside it,
and `quantise.by_tensor_both(y, E4M3, maxima.amax())` casts and transposes it in the next pass.
R rows, W columns, a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.float8 import Scaled
from lmworks.maths.kernels.codes import bits as bits_of
from lmworks.maths.kernels.codes import decode, largest, native
from lmworks.maths.kernels.grid import launch, rounded, rows_of, tile, warps
from lmworks.maths.kernels.norm import PARTS


def forward(
    x: Scaled, weight_W: Tensor, eps: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the shape of x; 1 / rms of each row (R,) float32; maxima of |y|, float32, one for each program."""
    codes, x_scale = bits_of(x)
    width = codes.shape[-1]
    rows = codes.numel() // width
    ROWS, WIDTH = tile(width)
    programs = triton.cdiv(rows, ROWS)
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=codes.device)
    maxima = torch.empty(programs, dtype=torch.float32, device=codes.device)
    launch(
        _forward,
        programs,
        codes,
        x_scale,
        weight_W.contiguous(),
        y,
        scale_R,
        maxima,
        rows,
        width,
        eps,
        ROWS=ROWS,
        WIDTH=WIDTH,
        NATIVE=native(codes),
        num_warps=warps(ROWS * WIDTH),
    )
    return y, scale_R, maxima


def backward(grad: Tensor, x: Scaled, weight_W: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the decoded x, in the dtype of `grad`, and of the weight (W,), in its dtype."""
    codes, x_scale = bits_of(x)
    grad_RW = rows_of(grad)
    rows, width = grad_RW.shape
    ROWS, WIDTH = tile(width)
    parts = min(PARTS, triton.cdiv(rows, ROWS))
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    partial_PW = torch.empty(parts, width, dtype=torch.float32, device=grad.device)
    launch(
        _backward,
        parts,
        grad_RW,
        codes,
        x_scale,
        weight_W.contiguous(),
        scale_R,
        dx,
        partial_PW,
        rows,
        width,
        grad_RW.stride(0),
        ROWS=ROWS,
        WIDTH=WIDTH,
        NATIVE=native(grad),
        num_warps=warps(ROWS * WIDTH),
    )
    return dx, partial_PW.sum(0).to(weight_W.dtype)


@triton.jit
def _load(
    codes_ptr: tl.tensor, scale_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor, NATIVE: tl.constexpr
) -> tl.tensor:
    """The float32 values at these places."""
    codes = tl.load(codes_ptr + at, mask=inside, other=0)
    return decode(codes, False, NATIVE) * tl.load(scale_ptr + at // 16, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    codes_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """One tile of whole rows; the maximum is of y as it was rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = _load(codes_ptr, x_scale_ptr, at, inside, NATIVE)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    y = rounded(x * scale[:, None] * weight[None, :], y_ptr)
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(inverse_ptr + row, scale, mask=row < rows)
    tl.store(maxima_ptr + tl.program_id(0), largest(largest(y.to(tl.float32))))


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Every PARTS-th tile, as in `norm`."""
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = _load(codes_ptr, x_scale_ptr, at, inside, NATIVE) * scale
        weighted = grad * weight[None, :]
        mean = tl.sum(weighted * normed, axis=1) / width
        tl.store(dx_ptr + at, rounded(scale * (weighted - normed * mean[:, None]), dx_ptr), mask=inside)
        total += tl.sum(grad * normed, axis=0)
        first += tl.num_programs(0) * ROWS
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)
