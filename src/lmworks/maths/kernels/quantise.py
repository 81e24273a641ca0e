"""Eight-bit codes: by group in one pass; by tensor in two, the maxima of pieces first and then the cast.

The same bits as `maths.float8`: `by_group(x)` = `float8.by_group(x, E4M3)`, `by_tensor(x, form)` = `float8.by_tensor`.
M rows, N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.float8 import E4M3, TINY, Format, Scaled
from lmworks.maths.kernels.codes import bits as bits_of
from lmworks.maths.kernels.codes import empty, encode, is_e5m2, largest, load_by_group, native, store_by_group
from lmworks.maths.kernels.grid import launch, rounded

GROUPS = 128
"""Groups of 16 in a program."""
BLOCK = 4096
"""Values of a program that looks for a maximum."""
SIDE = 64
"""Rows and columns of a tile that is cast and transposed."""


def by_group(x: Tensor) -> Scaled:
    """E4M3 codes and a bf16 scale for each 16 values along the last dim. ValueError where groups do not fit."""
    codes, scale = empty(x.shape, x.device)
    groups = scale.numel()
    programs = triton.cdiv(groups, GROUPS)
    launch(_by_group, programs, x.contiguous(), codes, scale, groups, GROUPS=GROUPS, NATIVE=native(x))
    return Scaled(codes=codes.view(E4M3.dtype), scale=scale)


def add(a: Tensor, b: Tensor) -> tuple[Tensor, Scaled]:
    """a + b in their dtype, and its codes by group: the residual stream and the copy that is kept."""
    codes, scale = empty(a.shape, a.device)
    total = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    groups = scale.numel()
    launch(
        _add,
        triton.cdiv(groups, GROUPS),
        a.contiguous(),
        b.contiguous(),
        total,
        codes,
        scale,
        groups,
        GROUPS=GROUPS,
        NATIVE=native(a),
    )
    return total, Scaled(codes=codes.view(E4M3.dtype), scale=scale)


def decoded(x: Scaled, dtype: torch.dtype) -> Tensor:
    """The values of codes by group."""
    codes, scale = bits_of(x)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    groups = scale.numel()
    launch(_decode, triton.cdiv(groups, GROUPS), codes, scale, out, groups, GROUPS=GROUPS, NATIVE=native(codes))
    return out


def maxima(x: Tensor) -> Tensor:
    """max |x| of each run of BLOCK values, float32: the first pass of `by_tensor` where no kernel made x."""
    programs = triton.cdiv(x.numel(), BLOCK)
    found = torch.empty(programs, dtype=torch.float32, device=x.device)
    launch(_maxima, programs, x.contiguous(), found, x.numel(), BLOCK=BLOCK)
    return found


def by_tensor(x: Tensor, form: Format, largest: Tensor | None = None) -> Scaled:
    """Codes with one float32 scale. `largest`: max |x| where it is known, as `maxima(...).amax()` from its maker."""
    return _cast(x, form, largest, transposed=False)[0]


def by_tensor_both(x: Tensor, form: Format, largest: Tensor | None = None) -> tuple[Scaled, Scaled]:
    """The same, and the codes of its transpose (N, M) from the same pass: x is (..., N), its rows M taken together."""
    plain, transposed = _cast(x, form, largest, transposed=True)
    assert transposed is not None
    return plain, transposed


def _cast(x: Tensor, form: Format, largest: Tensor | None, *, transposed: bool) -> tuple[Scaled, Scaled | None]:
    top = maxima(x).amax() if largest is None else largest
    scale = (top + TINY) / form.largest
    columns = x.shape[-1]
    rows = x.numel() // columns
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    turned = torch.empty(columns, rows, dtype=torch.uint8, device=x.device) if transposed else codes
    launch(
        _cast_tile,
        triton.cdiv(rows, SIDE) * triton.cdiv(columns, SIDE),
        x.contiguous(),
        scale,
        codes,
        turned,
        rows,
        columns,
        SIDE=SIDE,
        WIDE=is_e5m2(form),
        TRANSPOSED=transposed,
        NATIVE=native(x),
        num_warps=8,
    )
    plain = Scaled(codes=codes.view(form.dtype), scale=scale)
    return plain, Scaled(codes=turned.view(form.dtype), scale=scale) if transposed else None


@triton.jit
def _by_group(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups, as rows of 16."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at, mask=(group < groups)[:, None], other=0.0).to(tl.float32)
    store_by_group(x, codes_ptr, scale_ptr, group, groups, NATIVE)


@triton.jit
def _add(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    total_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups; the codes are of the sum as it was rounded."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (group < groups)[:, None]
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = rounded(a + b, total_ptr)
    tl.store(total_ptr + at, total, mask=inside)
    store_by_group(total.to(tl.float32), codes_ptr, scale_ptr, group, groups, NATIVE)


@triton.jit
def _decode(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """Some groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    x = load_by_group(codes_ptr, scale_ptr, group, groups, NATIVE)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, rounded(x, out_ptr), mask=(group < groups)[:, None])


@triton.jit
def _maxima(x_ptr: tl.tensor, found_ptr: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """A run of values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(found_ptr + tl.program_id(0), largest(x))


@triton.jit
def _cast_tile(
    x_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    turned_codes_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SIDE: tl.constexpr,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NATIVE: tl.constexpr,
) -> None:
    """A square of the matrix."""
    across = tl.cdiv(columns, SIDE)
    row = (tl.program_id(0) // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    codes = encode(tl.div_rn(x, tl.load(factor_ptr) + tl.zeros_like(x)), WIDE, NATIVE)
    tl.store(codes_ptr + at, codes, mask=inside)
    if TRANSPOSED:
        back = column[:, None] * rows + row[None, :]
        tl.store(turned_codes_ptr + back, tl.trans(codes), mask=(column < columns)[:, None] & (row < rows)[None, :])
