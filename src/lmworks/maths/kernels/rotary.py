"""Rotary embedding: each value is read and written once, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths.kernels.grid import launch, rounded, warps


def rotate(x_BTNh: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Turn each pair (i, i + r/2) of the first r values of a head by its angle. Differentiable once, for x.

    cos, sin: (B or 1, T, r) float32, each angle twice, the first sine negated (`model.ops.rotate`). Values beyond r
    pass through.
    """
    result: Tensor = _Rotate.apply(x_BTNh, cos_BTr, sin_BTr)  # type: ignore[no-untyped-call]
    return result


def turned(x_BTNh: Tensor, cos_BTr: Tensor, sin_BTr: Tensor, *, back: bool) -> Tensor:
    """x turned by the angles, or by the negative ones; contiguous, in the dtype of x."""
    batch, length, heads, size = x_BTNh.shape
    half = cos_BTr.shape[-1] // 2
    x_BTNh = x_BTNh if x_BTNh.stride(-1) == 1 else x_BTNh.contiguous()
    out_BTNh = torch.empty(x_BTNh.shape, dtype=x_BTNh.dtype, device=x_BTNh.device)
    HEADS, HALF = (int(triton.next_power_of_2(n)) for n in (heads, half))
    rest = size - 2 * half
    launch(
        _rotate,
        batch * length,
        x_BTNh,
        cos_BTr.contiguous(),
        sin_BTr.contiguous(),
        out_BTNh,
        length,
        heads,
        size,
        half,
        *x_BTNh.stride()[:3],
        0 if cos_BTr.shape[0] == 1 else length,
        BACK=back,
        HEADS=HEADS,
        HALF=HALF,
        REST=int(triton.next_power_of_2(rest)) if rest else 0,
        num_warps=warps(HEADS * HALF),
    )
    return out_BTNh


class _Rotate(torch.autograd.Function):
    """Keeps the tables only."""

    @staticmethod
    def forward(ctx: Any, x_BTNh: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTr, sin_BTr)
        return turned(x_BTNh, cos_BTr, sin_BTr, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNh: Tensor) -> tuple[Tensor, None, None]:
        return turned(grad_BTNh, *ctx.saved_tensors, back=True), None, None


@triton.jit
def _rotate(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    size: tl.tensor,
    half: tl.tensor,
    batch_stride: tl.tensor,
    time_stride: tl.tensor,
    head_stride: tl.tensor,
    table_rows: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """All heads of one token. Of the tables the second halves are read, where sines have their own sign."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    n, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (n < heads) & (i < half)
    table = (b * table_rows + t) * 2 * half + half + i
    cos = tl.load(cos_ptr + table, mask=i < half, other=0.0)
    sin = tl.load(sin_ptr + table, mask=i < half, other=0.0)
    if BACK:
        sin = -sin
    x_ptr += b * batch_stride + t * time_stride
    out_ptr += token * heads * size
    first = tl.load(x_ptr + n * head_stride + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + n * head_stride + half + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * size + i, rounded(first * cos - second * sin, out_ptr), mask=inside)
    tl.store(out_ptr + n * size + half + i, rounded(second * cos + first * sin, out_ptr), mask=inside)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)[None, :]
        passed = tl.load(x_ptr + n * head_stride + j, mask=(n < heads) & (j < size))
        tl.store(out_ptr + n * size + j, passed, mask=(n < heads) & (j < size))
