"""Whole-number codes of tensors by blocks: what travels between ranks in place of weights and gradients (ZeRO++).

A row of N values is cut in runs, one for each tensor that lies in it, and a run in blocks of so many values, the last
of which may be short. A block has a float32 scale s = max |x| / top, where top is 127 (int8) or 7 (int4), and

    code = round(x / s), ties to even,     x is about s code,     |x - s code| <= s / 2 but for rounding in float32

A block of zeros has s = 0. A block with a NaN or an infinity has s = NaN, and all of it comes back as NaN: nothing that
is not finite gets lost on its way. Where max |x| / top is no normal number of float32, s is the smallest of them.

It stands here in plain PyTorch. In eager mode on a GPU kernels do it in one pass, to the bit (`maths.kernels.blocks`).

Letters: R rows, N values of a row, K blocks of a row, B values of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmworks.maths import kernels


@dataclass(frozen=True, kw_only=True)
class Code:
    """Whole numbers of so many bits, from -top to top."""

    name: str
    bits: int
    top: int


INT8 = Code(name="int8", bits=8, top=127)
"""For weights: 0.7 to 1.0 % of root mean square on normal values."""
INT4 = Code(name="int4", bits=4, top=7)
"""Two to a byte, for gradients: 13 to 16 %."""
CODES = {code.name: code for code in (INT8, INT4)}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How the values of a row, one or more, are cut in blocks. Each run begins a new one, so that no tensor's values
    share a scale with those of another, which may be a hundred times as large."""

    lengths: tuple[int, ...]
    block: int

    @property
    def values(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def blocks(self) -> int:
        """K."""
        return sum(-(-length // self.block) for length in self.lengths)

    def times(self, rows: int) -> Runs:
        """So many rows as one."""
        return Runs(lengths=self.lengths * rows, block=self.block)

    def between(self, start: int, stop: int) -> Runs:
        """Those of a part of the row."""
        found, at = [], 0
        for length in self.lengths:
            found.append(min(at + length, stop) - max(at, start))
            at += length
        return Runs(lengths=tuple(length for length in found if length > 0), block=self.block)

    def nbytes(self, code: Code) -> int:
        """Bytes of a row's packet: four for each scale, one or half a one for each value."""
        return 4 * self.blocks + -(-self.values * code.bits // 8)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Codes and their scales."""

    codes_RN: Tensor
    """int8, whatever the bits."""
    scale_RK: Tensor
    """float32."""
    runs: Runs

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values (R, N): codes times scales in float32, rounded once to the dtype."""
        if _by_kernel(self.codes_RN, self.runs):
            runs = self.runs
            return kernels.blocks.decoded(self.codes_RN, self.scale_RK, runs.lengths, runs.block, dtype)
        wide_RKB = _in_blocks(self.codes_RN.float(), self.runs) * self.scale_RK[:, :, None]
        return _out_of_blocks(wide_RKB, self.runs).to(dtype)

    def packet(self, code: Code) -> Tensor:
        """uint8 (R, bytes): of each row its scales, then its codes. The codes have been made for `code`."""
        scales_RS = self.scale_RK.contiguous().view(torch.uint8)
        codes_RN = self.codes_RN.view(torch.uint8)
        if code.bits == 4 and kernels.take(codes_RN):
            codes_RN = kernels.blocks.packed(codes_RN)
        elif code.bits == 4:
            codes_RN = torch.nn.functional.pad(codes_RN, (0, codes_RN.shape[1] % 2))
            codes_RN = (codes_RN[:, ::2] & 15) | (codes_RN[:, 1::2] << 4)
        return torch.cat([scales_RS, codes_RN], dim=1)


def quantise(x_RN: Tensor, code: Code, runs: Runs) -> Blocks:
    """Codes of x, of any float dtype. Raises ValueError where the runs are not those of a row."""
    if x_RN.ndim != 2 or x_RN.shape[1] != runs.values:
        raise ValueError(f"rows of {runs.values} values are asked for, here is {tuple(x_RN.shape)}")
    if _by_kernel(x_RN, runs):
        codes_RN, scale_RK = kernels.blocks.encoded(x_RN.detach(), runs.lengths, runs.block, code.top)
        return Blocks(codes_RN=codes_RN, scale_RK=scale_RK, runs=runs)
    x_RKB = _in_blocks(x_RN.detach().float(), runs)
    largest_RK = x_RKB.abs().amax(-1)
    least = torch.finfo(torch.float32).tiny
    scale_RK = torch.where(largest_RK > 0, (largest_RK / code.top).clamp(min=least), 0.0)
    scale_RK = torch.where(largest_RK.isfinite(), scale_RK, torch.nan)
    divisor_RK = torch.where(scale_RK > 0, scale_RK, 1.0)
    codes_RKB = (x_RKB / divisor_RK[:, :, None]).round_().clamp_(-code.top, code.top).nan_to_num_(0.0)
    return Blocks(codes_RN=_out_of_blocks(codes_RKB, runs).to(torch.int8), scale_RK=scale_RK, runs=runs)


def unpacked(packet_RS: Tensor, code: Code, runs: Runs) -> Blocks:
    """The codes and scales of packets, uint8 (R, bytes). Raises ValueError where they have another size."""
    if packet_RS.shape[1] != runs.nbytes(code):
        raise ValueError(f"packets of {runs.nbytes(code)} bytes are asked for, here is {tuple(packet_RS.shape)}")
    cut = 4 * runs.blocks
    scale_RK = packet_RS[:, :cut].clone(memory_format=torch.contiguous_format).view(torch.float32)
    codes_RN = packet_RS[:, cut:]
    if code.bits == 4 and kernels.take(packet_RS):
        codes_RN = kernels.blocks.unpacked(codes_RN, runs.values)
    elif code.bits == 4:
        pairs_RN2 = torch.stack([codes_RN & 15, codes_RN >> 4], dim=-1).flatten(1)[:, : runs.values]
        codes_RN = (pairs_RN2 ^ 8) - 8  # the sign of four bits; below zero it wraps, as int8 reads it
    return Blocks(codes_RN=codes_RN.contiguous().view(torch.int8), scale_RK=scale_RK, runs=runs)


def _by_kernel(x_RN: Tensor, runs: Runs) -> bool:
    """Whether the kernel takes it: a program holds a whole block."""
    return kernels.take(x_RN) and runs.block <= kernels.MOST_COLUMNS


def _in_blocks(x_RN: Tensor, runs: Runs) -> Tensor:
    """(R, N) -> (R, K, B), short blocks filled up with zeros."""
    rows, block = x_RN.shape[0], runs.block
    if all(length % block == 0 for length in runs.lengths):
        return x_RN.reshape(rows, runs.blocks, block)
    wide = x_RN.new_zeros(rows, runs.blocks * block)
    torch._foreach_copy_(_places(wide, runs), list(torch.split(x_RN, list(runs.lengths), dim=1)))
    return wide.view(rows, runs.blocks, block)


def _out_of_blocks(x_RKB: Tensor, runs: Runs) -> Tensor:
    """(R, K, B) -> (R, N), what fills blocks up left out."""
    flat = x_RKB.flatten(1)
    return flat if flat.shape[1] == runs.values else torch.cat(_places(flat, runs), dim=1)


def _places(flat: Tensor, runs: Runs) -> list[Tensor]:
    """Where each run lies among blocks that are filled up, as views."""
    found, at = [], 0
    for length in runs.lengths:
        found.append(flat[:, at : at + length])
        at += -(-length // runs.block) * runs.block
    return found
