"""Eight-bit numbers inside kernels: float32 to codes and back, and maxima that keep NaN.

GPUs of compute capability 8.9 and newer convert in one instruction (`NATIVE`). On older ones, and in Triton's
interpreter, which flushes small numbers to zero, the same bits are made by integer arithmetic. Codes are uint8 in
kernels; `maths.float8` views them as torch's types.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.float8 import E5M2, TINY, Format, Scaled
from lmworks.maths.kernels.grid import rounded

GROUP = 16
"""Values along the last dim that share a scale."""
SPAN = tl.constexpr(GROUP)
NEXT_TO_NOTHING = tl.constexpr(TINY)


def native(x: Tensor) -> bool:
    """Whether the device of x has instructions for eight-bit floats."""
    return x.is_cuda and _converts(x.device)


@functools.cache
def _converts(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def bits(x: Scaled) -> tuple[Tensor, Tensor]:
    """Codes as uint8 and scales, as kernels read them: contiguous, so that group i is values 16 i to 16 i + 15."""
    return x.codes.contiguous().view(torch.uint8), x.scale.contiguous()


def empty(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for codes (uint8, in this shape) and their scales by group (bf16). ValueError where groups do not fit."""
    if not shape or shape[-1] % GROUP:
        raise ValueError(f"{shape[-1] if shape else 0} values in a row are no whole groups of {GROUP}")
    scale = torch.empty(*shape[:-1], shape[-1] // GROUP, dtype=torch.bfloat16, device=device)
    return torch.empty(shape, dtype=torch.uint8, device=device), scale


def is_e5m2(form: Format) -> bool:
    """The kernels' name of a format."""
    return form is E5M2


@triton.jit
def encode(x: tl.tensor, WIDE: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Codes (uint8) of float32 x: E5M2 if WIDE, else E4M3; nearest, ties to even, saturating; NaN stays NaN."""
    largest: tl.constexpr = 57344.0 if WIDE else 448.0
    x = tl.where(x > largest, largest, x)
    x = tl.where(x < -largest, -largest, x)
    if NATIVE:
        if WIDE:
            return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        cut: tl.constexpr = 21 if WIDE else 20  # mantissa bits of float32 that go
        least: tl.constexpr = 2.0**-14 if WIDE else 2.0**-6  # the smallest normal number
        bias: tl.constexpr = (127 - 15) << 2 if WIDE else (127 - 7) << 3
        step: tl.constexpr = 128.0 if WIDE else 16384.0  # its last place is the smallest subnormal number
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        size = tl.abs(x)
        word = size.to(tl.uint32, bitcast=True)
        normal = ((word + ((1 << (cut - 1)) - 1) + ((word >> cut) & 1)) >> cut) - bias
        small = (size + step).to(tl.uint32, bitcast=True) - tl.full((), step, tl.float32).to(tl.uint32, bitcast=True)
        code = tl.where(size < least, small, normal)
        code = tl.where(x != x, 0x7F, code)
        return (code | sign).to(tl.uint8)


@triton.jit
def decode(code: tl.tensor, WIDE: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """float32 values of codes (uint8): E5M2 if WIDE, else E4M3."""
    if NATIVE:
        if WIDE:
            return code.to(tl.float8e5, bitcast=True).to(tl.float32)
        else:
            return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        shift: tl.constexpr = 21 if WIDE else 20
        far: tl.constexpr = 2.0**112 if WIDE else 2.0**120
        top: tl.constexpr = 0x7D if WIDE else 0x7F  # the first that is no number
        word = code.to(tl.uint32)
        # as float32's own bits the number is 1 / far of itself, subnormal or not
        size = ((word & 0x7F) << shift).to(tl.float32, bitcast=True) * far
        if WIDE:
            size = tl.where((word & 0x7F) == 0x7C, float("inf"), size)
        size = tl.where((word & 0x7F) >= top, float("nan"), size)
        return tl.where(word >= 0x80, -size, size)


@triton.jit
def largest(x: tl.tensor) -> tl.tensor:
    """max |x| over the last axis of float32 x. NaN wins: bits of |x| are ordered as the numbers are, NaN above all."""
    word = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(word, axis=len(x.shape) - 1).to(tl.float32, bitcast=True)


@triton.jit
def load_by_group(
    codes_ptr: tl.tensor, scale_ptr: tl.tensor, group: tl.tensor, groups: tl.tensor, NATIVE: tl.constexpr
) -> tl.tensor:
    """The float32 values of some groups, as rows of 16. The product is exact: 4 bits by 8."""
    inside = group < groups
    at = group[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    codes = tl.load(codes_ptr + at, mask=inside[:, None], other=0)
    scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
    return decode(codes, False, NATIVE) * scale[:, None]


@triton.jit
def store_by_group(
    x: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    group: tl.tensor,
    groups: tl.tensor,
    NATIVE: tl.constexpr,
) -> None:
    """E4M3 codes and bf16 scales of float32 x, rows of 16: as `float8.by_group` makes them, to the bit."""
    inside = group < groups
    scale = tl.div_rn(largest(x) + NEXT_TO_NOTHING, 448.0)
    narrow = rounded(scale, scale_ptr)
    codes = encode(tl.div_rn(x, narrow.to(tl.float32)[:, None] + tl.zeros_like(x)), False, NATIVE)
    tl.store(scale_ptr + group, narrow, mask=inside)
    tl.store(codes_ptr + group[:, None] * SPAN + tl.arange(0, SPAN)[None, :], codes, mask=inside[:, None])
