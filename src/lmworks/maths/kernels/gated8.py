"""SwiGLU between codes by group: what is read and what is kept has eight bits, the arithmetic is float32.

    silu        gate codes -> silu codes
    product     silu codes x up codes -> y, and its maxima for `quantise.by_tensor(y, E4M3, maxima.amax())`
    backward    the gradient of y -> those of gate and up, with their maxima for E5M2

Codes are E4M3 with a bf16 scale for each 16 values along the last dim; F is a multiple of 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.float8 import E4M3, Scaled
from lmworks.maths.kernels.codes import bits as bits_of
from lmworks.maths.kernels.codes import empty, largest, load_by_group, native, store_by_group
from lmworks.maths.kernels.grid import launch, rounded, sigmoid

GROUPS = 128
"""Groups of 16 in a program; one maximum comes from each."""


def silu(gate: Scaled) -> Scaled:
    """x sigmoid(x) of the decoded values, encoded again: as `float8.by_group(silu(gate.decode()), E4M3)`."""
    codes, scale = bits_of(gate)
    out, out_scale = empty(codes.shape, codes.device)
    groups = scale.numel()
    programs = triton.cdiv(groups, GROUPS)
    launch(_silu, programs, codes, scale, out, out_scale, groups, GROUPS=GROUPS, NATIVE=native(codes))
    return Scaled(codes=out.view(E4M3.dtype), scale=out_scale)


def product(silu: Scaled, up: Scaled, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """The product of the decoded values, rounded to `dtype`, and its maxima (float32, one for each program)."""
    codes, scale = bits_of(silu)
    up_codes, up_scale = bits_of(up)
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    groups = scale.numel()
    programs = triton.cdiv(groups, GROUPS)
    maxima = torch.empty(programs, dtype=torch.float32, device=codes.device)
    launch(
        _product,
        programs,
        codes,
        scale,
        up_codes,
        up_scale,
        y,
        maxima,
        groups,
        GROUPS=GROUPS,
        NATIVE=native(codes),
    )
    return y, maxima


def backward(grad: Tensor, gate: Scaled, silu: Scaled, up: Scaled) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up in the dtype of `grad`, and their maxima (2, programs) float32, gate's first.

    d up = grad silu and d gate = grad up silu'(gate), of the decoded values.
    """
    words = [word for x in (gate, silu, up) for word in bits_of(x)]
    d_gate, d_up = (torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for _ in range(2))
    groups = gate.scale.numel()
    programs = triton.cdiv(groups, GROUPS)
    maxima = torch.empty(2, programs, dtype=torch.float32, device=grad.device)
    launch(
        _backward,
        programs,
        grad.contiguous(),
        *words,
        d_gate,
        d_up,
        maxima,
        groups,
        GROUPS=GROUPS,
        NATIVE=native(grad),
    )
    return d_gate, d_up, maxima


@triton.jit
def _silu(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_codes_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    x = load_by_group(codes_ptr, scale_ptr, group, groups, NATIVE)
    store_by_group(x * sigmoid(x), out_codes_ptr, out_scale_ptr, group, groups, NATIVE)


@triton.jit
def _product(
    silu_codes_ptr: tl.tensor,
    silu_scale_ptr: tl.tensor,
    up_codes_ptr: tl.tensor,
    up_scale_ptr: tl.tensor,
    y_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups; the maximum is of y as it was rounded."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    opened = load_by_group(silu_codes_ptr, silu_scale_ptr, group, groups, NATIVE)
    y = rounded(opened * load_by_group(up_codes_ptr, up_scale_ptr, group, groups, NATIVE), y_ptr)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y_ptr + at, y, mask=(group < groups)[:, None])
    tl.store(maxima_ptr + tl.program_id(0), largest(largest(y.to(tl.float32))))


@triton.jit
def _backward(
    grad_ptr: tl.tensor,
    gate_codes_ptr: tl.tensor,
    gate_scale_ptr: tl.tensor,
    silu_codes_ptr: tl.tensor,
    silu_scale_ptr: tl.tensor,
    up_codes_ptr: tl.tensor,
    up_scale_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups; silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x)."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (group < groups)[:, None]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = load_by_group(gate_codes_ptr, gate_scale_ptr, group, groups, NATIVE)
    s = sigmoid(gate)
    up = load_by_group(up_codes_ptr, up_scale_ptr, group, groups, NATIVE)
    d_gate = rounded(grad * up * s * (1.0 + gate * (1.0 - s)), d_gate_ptr)
    tl.store(d_gate_ptr + at, d_gate, mask=inside)
    d_up = rounded(grad * load_by_group(silu_codes_ptr, silu_scale_ptr, group, groups, NATIVE), d_up_ptr)
    tl.store(d_up_ptr + at, d_up, mask=inside)
    tl.store(maxima_ptr + tl.program_id(0), largest(largest(d_gate.to(tl.float32))))
    tl.store(maxima_ptr + tl.num_programs(0) + tl.program_id(0), largest(largest(d_up.to(tl.float32))))
