"""Eight-bit codes of a float32 tensor by groups, with dynamic range expansion (COAT, arXiv 2410.19313).

Values are taken in flattened order, `group` at a time; the last group may be short. Within a group each is stretched,

    y = sign(x) (|x| / c)^k,     code = cast(y / s),     x is about sign(code) |code s|^(1/k) c

so that the group fills the range of the format. c is the geometric mean of its largest and least non-zero |x|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmworks.maths.float8 import E4M3, Format, cast

STEPS = 16
"""Exponents are multiples of one over this."""
MOST = 16.0
"""The largest exponent."""
ALIKE = 1 + 1e-6
"""Groups whose largest |x| is less than this times the least are scaled and not stretched."""


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """Codes of the shape of x, and of each group of G the scale, exponent and centre: float32 (ceil(n / G))."""

    codes: Tensor
    scale: Tensor
    exponent: Tensor
    centre: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all four."""
        return self.codes.nbytes + self.scale.nbytes + self.exponent.nbytes + self.centre.nbytes

    def decode(self, group: int = 128) -> Tensor:
        """The values, float32, in the shape of the codes."""
        flat = grouped(self.codes.float(), group)
        wide = decoded(flat, self.scale[:, None], self.exponent[:, None], self.centre[:, None])
        return wide.flatten()[: self.codes.numel()].view(self.codes.shape)


def decoded(codes: Tensor, scale: Tensor, exponent: Tensor, centre: Tensor) -> Tensor:
    """sign(code) |code scale|^(1/exponent) centre, float32, any shapes that broadcast."""
    return (codes * scale).abs().pow(1 / exponent) * centre * codes.sign()


def encode(
    x: Tensor, form: Format = E4M3, *, group: int = 128, expand: bool = True, floor: float | None = None
) -> Expanded:
    """Codes of x (any shape). `expand` false: a scale alone. `floor`: the least exponent, None for none."""
    x_KG = grouped(x.detach().float(), group)
    size_KG = x_KG.abs()
    largest_K = size_KG.amax(1) if size_KG.numel() else size_KG.new_zeros(0)
    least_K = size_KG.masked_fill(size_KG == 0, torch.inf).amin(1) if size_KG.numel() else largest_K
    exponent_K, centre_K = torch.ones_like(largest_K), torch.ones_like(largest_K)
    if expand:
        ratio_K = largest_K.double() / least_K.double()
        stretches_K = (largest_K > 0) & (ratio_K >= ALIKE)
        room = torch.tensor(form.largest / form.smallest * _SPARE[form.name], dtype=torch.float64).log2()
        k_K = (room / ratio_K.log2() * STEPS).floor().div(STEPS).clamp(min=max(floor or 0.0, 1 / STEPS), max=MOST)
        exponent_K = torch.where(stretches_K, k_K, 1.0).float()
        centre_K = torch.where(stretches_K, largest_K.sqrt() * least_K.sqrt(), 1.0)
    top_K = (largest_K / centre_K).pow(exponent_K)
    scale_K = torch.where(largest_K > 0, top_K / form.largest, 1.0)
    scale_K = torch.where(scale_K > 0, scale_K, torch.finfo(torch.float32).tiny)
    y_KG = (size_KG / centre_K[:, None]).pow(exponent_K[:, None]) * x_KG.sign()
    codes = cast(y_KG / scale_K[:, None], form).flatten()[: x.numel()].view(x.shape)
    return Expanded(codes=codes.clone(), scale=scale_K, exponent=exponent_K, centre=centre_K)


_SPARE = {"e4m3": 448 * 448 / 2 / (448.0 * 2**9), "e5m2": 448 * 448 / 2 / (448.0 * 2**9)}
"""The share of a format's range that groups are stretched over: COAT's 448^2 / 2 for E4M3, as much for E5M2."""


def grouped(x: Tensor, group: int) -> Tensor:
    """x flattened in rows of `group`, (K, G); the last row is filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % group)).view(-1, group)
