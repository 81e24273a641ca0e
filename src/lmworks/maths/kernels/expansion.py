"""Codes with dynamic range expansion, a group to a row: all of a group's numbers are found, and used, in one program.

In plain PyTorch coding a moment takes some fifteen passes over it; here it is read once and its codes are written once.
G values to a group, a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.float8 import Format
from lmworks.maths.kernels.codes import decode, encode, is_e5m2, native
from lmworks.maths.kernels.grid import launch

GROUPS = 16
"""Groups of a program."""


def encoded(
    x: Tensor, form: Format, group: int, *, expand: bool, bounds: tuple[float, float], steps: int, alike: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes in the shape of x, and of each group scale, exponent and centre: float32 (ceil(n / G)).

    Exponents lie within `bounds`, in steps of 1 / `steps`; groups whose ratio is below `alike` are not stretched.
    """
    values = x.numel()
    groups = triton.cdiv(values, group)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale, exponent, centre = (torch.empty(groups, dtype=torch.float32, device=x.device) for _ in range(3))
    launch(
        _encode,
        triton.cdiv(groups, GROUPS),
        x.contiguous(),
        codes,
        scale,
        exponent,
        centre,
        values,
        groups,
        *bounds,
        steps,
        alike,
        G=group,
        GROUPS=GROUPS,
        EXPAND=expand,
        WIDE=is_e5m2(form),
        NATIVE=native(x),
    )
    return codes.view(form.dtype), scale, exponent, centre


def decoded(codes: Tensor, scale: Tensor, exponent: Tensor, centre: Tensor, group: int) -> Tensor:
    """float32 values in the shape of the codes."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    bits = codes.contiguous().view(torch.uint8)
    launch(
        _decode,
        triton.cdiv(scale.numel(), GROUPS),
        bits,
        scale,
        exponent,
        centre,
        out,
        codes.numel(),
        scale.numel(),
        G=group,
        GROUPS=GROUPS,
        WIDE=codes.dtype == torch.float8_e5m2,
        NATIVE=native(codes),
    )
    return out


@triton.jit
def _encode(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    exponent_ptr: tl.tensor,
    centre_ptr: tl.tensor,
    values: tl.tensor,
    groups: tl.tensor,
    floor: tl.tensor,
    most: tl.tensor,
    steps: tl.tensor,
    alike: tl.tensor,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPAND: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(x_ptr + at, mask=at < values, other=0.0).to(tl.float32)
    size = tl.abs(x)
    largest = tl.max(size, axis=1)
    biggest: tl.constexpr = 57344.0 if WIDE else 448.0
    exponent = tl.full((GROUPS,), 1.0, tl.float32)
    centre = tl.full((GROUPS,), 1.0, tl.float32)
    if EXPAND:
        least = tl.min(tl.where(size > 0, size, float("inf")), axis=1)
        ratio = largest.to(tl.float64) / least.to(tl.float64)
        stretches = (largest > 0) & (ratio >= alike)
        room: tl.constexpr = 30.614709844115207 if WIDE else 16.614709844115207  # log2 of half the largest squared
        k = tl.floor(room / tl.log2(tl.where(stretches, ratio, 2.0)) * steps) / steps
        k = tl.minimum(tl.maximum(k, floor), most).to(tl.float32)
        exponent = tl.where(stretches, k, 1.0)
        centre = tl.where(stretches, tl.sqrt_rn(largest) * tl.sqrt_rn(tl.where(stretches, least, 1.0)), 1.0)
    top = _power(largest / centre, exponent)
    scale = tl.where(largest > 0, tl.maximum(top / biggest, 1.1754943508222875e-38), 1.0)
    y = _power(size / centre[:, None], exponent[:, None] + tl.zeros_like(size))
    y = tl.where(x < 0, -y, y) / scale[:, None]
    tl.store(codes_ptr + at, encode(y, WIDE, NATIVE), mask=at < values)
    tl.store(scale_ptr + group, scale, mask=group < groups)
    tl.store(exponent_ptr + group, exponent, mask=group < groups)
    tl.store(centre_ptr + group, centre, mask=group < groups)


@triton.jit
def _decode(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    exponent_ptr: tl.tensor,
    centre_ptr: tl.tensor,
    out_ptr: tl.tensor,
    values: tl.tensor,
    groups: tl.tensor,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    x = decode(tl.load(codes_ptr + at, mask=at < values, other=0), WIDE, NATIVE)
    scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
    exponent = tl.load(exponent_ptr + group, mask=inside, other=1.0)
    centre = tl.load(centre_ptr + group, mask=inside, other=1.0)
    size = _power(tl.abs(x) * scale[:, None], (1.0 / exponent)[:, None] + tl.zeros_like(x)) * centre[:, None]
    tl.store(out_ptr + at, tl.where(x < 0, -size, size), mask=at < values)


@triton.jit
def _power(x: tl.tensor, k: tl.tensor) -> tl.tensor:
    """x^k for x >= 0 and k > 0. As it is where k is 1: there every bit counts."""
    power = tl.exp2(k * tl.log2(tl.where(x > 0, x, 1.0)))
    return tl.where(x > 0, tl.where(k == 1.0, x, power), 0.0)
