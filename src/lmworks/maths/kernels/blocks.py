"""Whole-number codes of rows by blocks: the codes that travel between ranks, some blocks to a program.

The same bits as `maths.blockwise`. In plain PyTorch coding takes some ten passes over the values; here they are read
once. R rows of N values, cut in runs and those in K blocks of at most `block` values; two codes of four bits are packed
in a byte, the first one low.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.kernels.grid import CUTS, TILE, launch, rounded

SPAN = 1024
"""Bytes of a program that packs codes, or unpacks them."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 x 2^23: a small float32 added to it is rounded to a whole number, ties to even."""
LEAST = tl.constexpr(1.1754943508222875e-38)


@functools.lru_cache(maxsize=4096)
def _cut(lengths: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each run, and behind the last one: how many blocks, and how many values, lie before it. int64."""
    blocks, values = [0], [0]
    for length in lengths:
        blocks.append(blocks[-1] - (-length // block))
        values.append(values[-1] + length)
    return torch.tensor(blocks, device=device), torch.tensor(values, device=device)


def _tile(lengths: tuple[int, ...], block: int) -> dict[str, int]:
    """Sizes that kernels are compiled for: values and blocks of a program, and steps of a search among the runs."""
    wide = int(triton.next_power_of_2(block))
    return {"WIDTH": wide, "GROUPS": max(1, TILE // wide), "STEPS": len(lengths).bit_length()}


def encoded(x_RN: Tensor, lengths: tuple[int, ...], block: int, top: int) -> tuple[Tensor, Tensor]:
    """Codes from -top to top, int8 (R, N), and scales, float32 (R, K). x: any float dtype."""
    rows, values = x_RN.shape
    before, starts = _cut(lengths, block, x_RN.device)
    count, tile = sum(-(-length // block) for length in lengths), _tile(lengths, block)
    codes_RN = torch.empty(rows, values, dtype=torch.uint8, device=x_RN.device)
    scale_RK = torch.empty(rows, count, dtype=torch.float32, device=x_RN.device)
    programs = triton.cdiv(rows * count, tile["GROUPS"])
    launch(
        _encode,
        programs,
        x_RN.contiguous(),
        codes_RN,
        scale_RK,
        before,
        starts,
        rows,
        count,
        len(lengths),
        values,
        block,
        TOP=top,
        **tile,
    )
    return codes_RN.view(torch.int8), scale_RK


def decoded(codes_RN: Tensor, scale_RK: Tensor, lengths: tuple[int, ...], block: int, dtype: torch.dtype) -> Tensor:
    """Codes times scales in float32, rounded once to the dtype: (R, N)."""
    rows, values = codes_RN.shape
    before, starts = _cut(lengths, block, codes_RN.device)
    count, tile = scale_RK.shape[1], _tile(lengths, block)
    out_RN = torch.empty(rows, values, dtype=dtype, device=codes_RN.device)
    launch(
        _decode,
        triton.cdiv(rows * count, tile["GROUPS"]),
        codes_RN.contiguous().view(torch.uint8),
        scale_RK.contiguous(),
        out_RN,
        before,
        starts,
        rows,
        count,
        len(lengths),
        values,
        block,
        **tile,
    )
    return out_RN


def packed(codes_RN: Tensor) -> Tensor:
    """Codes of four bits, int8 (R, N), two to a byte: uint8 (R, ceil(N / 2)). The last byte of an odd N ends in 0."""
    rows, values = codes_RN.shape
    out = torch.empty(rows, -(-values // 2), dtype=torch.uint8, device=codes_RN.device)
    programs = triton.cdiv(out.numel(), SPAN)
    launch(_pack, programs, codes_RN.contiguous().view(torch.uint8), out, rows, values, out.shape[1], SPAN=SPAN)
    return out


def unpacked(packed_RS: Tensor, values: int) -> Tensor:
    """The codes again, int8 (R, N); rows of bytes may be parts of longer ones."""
    rows, size = packed_RS.shape
    bytes_RS = packed_RS if packed_RS.stride(1) == 1 else packed_RS.contiguous()
    codes_RN = torch.empty(rows, values, dtype=torch.uint8, device=packed_RS.device)
    programs = triton.cdiv(rows * size, SPAN)
    launch(_unpack, programs, bytes_RS, codes_RN, rows, values, size, bytes_RS.stride(0), SPAN=SPAN)
    return codes_RN.view(torch.int8)


@triton.jit
def _find(
    before_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    block_at: tl.tensor,
    runs: tl.tensor,
    block: tl.tensor,
    STEPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where blocks of a row begin and end; the last run that does not begin behind one is searched for by halves."""
    low = tl.zeros_like(block_at)
    high = low + runs
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        behind = tl.load(before_ptr + middle) <= block_at
        low = tl.where(behind, middle, low)
        high = tl.where(behind, high, middle)
    start = tl.load(starts_ptr + low) + (block_at - tl.load(before_ptr + low)) * block
    return start, tl.minimum(start + block, tl.load(starts_ptr + low + 1))


@triton.jit
def _wide(x: tl.tensor) -> tl.tensor:
    """x in float32. Triton's interpreter would take the smallest numbers of bfloat16 for zeros."""
    if CUTS and x.dtype == tl.bfloat16:
        found = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        found = x.to(tl.float32)
    return found


@triton.jit
def _encode(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    before_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    runs: tl.tensor,
    values: tl.tensor,
    block: tl.tensor,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Some blocks."""
    at = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = at // count < rows
    row = tl.where(there, at // count, 0)
    start, stop = _find(before_ptr, starts_ptr, tl.where(there, at % count, 0), runs, block, STEPS)
    place = start[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (place < stop[:, None])
    place += row[:, None] * values
    x = _wide(tl.load(x_ptr + place, mask=inside, other=0.0))
    size = tl.abs(x)
    finite = size < float("inf")
    largest = tl.max(tl.where(finite, size, 0.0), axis=1)
    whole = tl.max(tl.where(finite, 0, 1), axis=1) == 0
    scale = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + TOP), LEAST)
    scale = tl.where(largest > 0, scale, 0.0)
    divisor = tl.where(whole & (scale > 0), scale, 1.0)
    y = tl.div_rn(x, divisor[:, None] + tl.zeros_like(x))
    y = tl.where(y > TOP, TOP * 1.0, y)
    y = tl.where(y < -TOP, -TOP * 1.0, y)
    y = tl.where(y != y, 0.0, (y + MAGIC) - MAGIC)
    codes = y.to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True)
    tl.store(codes_ptr + place, codes, mask=inside)
    tl.store(scale_ptr + at, tl.where(whole, scale, float("nan")), mask=there)


@triton.jit
def _decode(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    before_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    runs: tl.tensor,
    values: tl.tensor,
    block: tl.tensor,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Some blocks."""
    at = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    there = at // count < rows
    row = tl.where(there, at // count, 0)
    start, stop = _find(before_ptr, starts_ptr, tl.where(there, at % count, 0), runs, block, STEPS)
    place = start[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (place < stop[:, None])
    place += row[:, None] * values
    codes = tl.load(codes_ptr + place, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    scale = tl.load(scale_ptr + at, mask=there, other=0.0)
    tl.store(out_ptr + place, rounded(codes * scale[:, None], out_ptr), mask=inside)


@triton.jit
def _pack(
    codes_ptr: tl.tensor,
    packed_codes_ptr: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    size: tl.tensor,
    SPAN: tl.constexpr,
) -> None:
    """Some bytes."""
    at = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    there = at // size < rows
    first = at % size * 2
    place = at // size * values + first
    low = tl.load(codes_ptr + place, mask=there, other=0)
    high = tl.load(codes_ptr + place + 1, mask=there & (first + 1 < values), other=0)
    tl.store(packed_codes_ptr + at, (low & 15) | ((high & 15) << 4), mask=there)


@triton.jit
def _unpack(
    packed_codes_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    SPAN: tl.constexpr,
) -> None:
    """Some bytes. The sign of four bits: below zero a byte wraps, as int8 reads it."""
    at = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    there = at // size < rows
    row, first = at // size, at % size * 2
    pair = tl.load(packed_codes_ptr + row * stride + at % size, mask=there, other=0).to(tl.int32)
    place = row * values + first
    tl.store(codes_ptr + place, (((pair & 15) ^ 8) - 8).to(tl.uint8), mask=there)
    tl.store(codes_ptr + place + 1, (((pair >> 4) ^ 8) - 8).to(tl.uint8), mask=there & (first + 1 < values))
