"""How tensors are cut into the tiles that programs work on."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels of this process run in Triton's interpreter."""
CUTS = tl.constexpr(INTERPRETED)
"""Triton's interpreter cuts a float32 off to bfloat16 where a GPU rounds it."""
TILE = 2048
"""Values that a program holds at a time, where one row is not longer."""


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, width) with neighbours along the last dim; copied only where its strides allow no such view."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile that holds whole rows of `width`: powers of two."""
    columns = int(triton.next_power_of_2(width))
    return max(1, TILE // columns), columns


def warps(values: int) -> int:
    """Warps of a program over so many values: 16 values a thread, 4 to 16 warps."""
    return min(max(values // 512, 4), 16)


def launch(kernel: Any, programs: int, x: Tensor, *words: Any, **settings: Any) -> None:
    """Run the kernel's programs on the device of x, its first argument. None for no programs: CUDA refuses them."""
    if programs:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # torch leaves it without types
            kernel[(programs,)](x, *words, **settings)


@triton.jit
def rounded(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """float32 x in the type that the pointer `like` points to, to the nearest, ties to even."""
    if CUTS and like.dtype.element_ty == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        up = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, up.to(tl.float32, bitcast=True))
    return x.to(like.dtype.element_ty)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)
