"""SwiGLU's product silu(gate) * up: one pass forward, one backward, and only gate and up are kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths.kernels.grid import launch, rounded, rows_of, sigmoid

BLOCK = 2048
"""Values of a program."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors of one shape and dtype. Differentiable once."""
    result: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """The product, contiguous."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width, gate_RF, up_RF = _pair(gate, up)
    programs = rows * triton.cdiv(width, BLOCK)
    launch(_forward, programs, gate_RF, up_RF, out, width, gate_RF.stride(0), up_RF.stride(0), BLOCK=BLOCK)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, contiguous."""
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    rows, width, grad_RF, gate_RF, up_RF = _pair(grad, gate, up)
    strides = (grad_RF.stride(0), gate_RF.stride(0), up_RF.stride(0))
    programs = rows * triton.cdiv(width, BLOCK)
    launch(_backward, programs, grad_RF, gate_RF, up_RF, d_gate, d_up, width, *strides, BLOCK=BLOCK)
    return d_gate, d_up


def _pair(*tensors: Tensor) -> tuple[Any, ...]:
    """Rows, width and the tensors as (rows, width): one long row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        flat = [x.view(1, -1) for x in tensors]
    else:
        flat = [rows_of(x) for x in tensors]
    return *flat[0].shape, *flat


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return backward(grad, *ctx.saved_tensors)


@triton.jit
def _forward(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A run of values in one row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, rounded(gate * sigmoid(gate) * up, out_ptr), mask=inside)


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A run of values in one row; silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x)."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    d_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    at = row * width + column
    tl.store(d_gate_ptr + at, rounded(d_gate, d_gate_ptr), mask=inside)
    tl.store(d_up_ptr + at, rounded(grad * gate * s, d_up_ptr), mask=inside)
