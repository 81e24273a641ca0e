"""Eight-bit codes of a tensor by groups, with dynamic range expansion (COAT, arXiv 2410.19313).

Values are taken in flattened order, `group` at a time; the last group may be short. Within a group each is stretched,

    y = sign(x) (|x| / c)^k,     code = cast(y / s),     x is about sign(code) |code s|^(1/k) c

so that the group fills the range of the format. c is the geometric mean of its largest and its least non-zero |x|.

Each stands here in plain PyTorch. In eager mode on a GPU a kernel does it in one pass (`maths.kernels.expansion`); its
powers differ in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmworks.maths import kernels
from lmworks.maths.float8 import E4M3, Format, cast

STEPS = 16
"""Exponents are multiples of one over this."""
MOST = 16.0
"""The largest exponent."""
ALIKE = 1 + 1e-6
"""Groups whose largest |x| is less than this times the least are not stretched: the exponent would be infinite."""


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
        if _by_kernel(self.codes, group):
            return kernels.expansion.decoded(self.codes, self.scale, self.exponent, self.centre, group)
        flat = grouped(self.codes.float(), group)
        wide = decoded(flat, self.scale[:, None], self.exponent[:, None], self.centre[:, None])
        return wide.flatten()[: self.codes.numel()].view(self.codes.shape)


def decoded(codes: Tensor, scale: Tensor, exponent: Tensor, centre: Tensor) -> Tensor:
    """sign(code) |code scale|^(1/exponent) centre, float32, any shapes that broadcast. Zeros stay zeros."""
    return (codes * scale).abs().pow(exponent.reciprocal()) * centre * codes.sign()


def encode(
    x: Tensor, form: Format = E4M3, *, group: int = 128, expand: bool = True, floor: float | None = None
) -> Expanded:
    """Codes of x (any shape, finite). `expand` false: a scale alone. `floor`: the least exponent, None for none.

    Zeros do not count as the least |x| of a group; a group of zeros has scale, exponent and centre 1.
    """
    if _by_kernel(x, group):
        bounds = (max(floor or 0.0, 1 / STEPS), MOST)
        found = kernels.expansion.encoded(
            x.detach(), form, group, expand=expand, bounds=bounds, steps=STEPS, alike=ALIKE
        )
        return Expanded(codes=found[0], scale=found[1], exponent=found[2], centre=found[3])
    x_KG = grouped(x.detach().float(), group)
    size_KG = x_KG.abs()
    largest_K = size_KG.amax(1) if size_KG.numel() else size_KG.new_zeros(0)
    exponent_K, centre_K = torch.ones_like(largest_K), torch.ones_like(largest_K)
    if expand and size_KG.numel():
        least_K = size_KG.masked_fill(size_KG == 0, torch.inf).amin(1)
        exponent_K, centre_K = _stretch(largest_K, least_K, form, floor)
    top_K = (largest_K / centre_K).pow(exponent_K)
    scale_K = torch.where(largest_K > 0, (top_K / form.largest).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    y_KG = (size_KG / centre_K[:, None]).pow(exponent_K[:, None]).copysign(x_KG)
    codes = cast(y_KG / scale_K[:, None], form).flatten()[: x.numel()].view(x.shape)
    return Expanded(codes=codes.clone(), scale=scale_K, exponent=exponent_K, centre=centre_K)


def _by_kernel(x: Tensor, group: int) -> bool:
    """Whether the kernel takes it: a group is a row of a tile."""
    return kernels.take(x) and group & (group - 1) == 0 and x.dtype != torch.float64


def _stretch(largest_K: Tensor, least_K: Tensor, form: Format, floor: float | None) -> tuple[Tensor, Tensor]:
    """Exponent and centre of each group from its largest and its least |x|.

    A group's ratio is stretched to half the square of the format's largest number (COAT): for E4M3 that leaves the
    least value 2.3 times above the smallest number of the format. log2 is taken in float64: rounding in float32 could
    move an exponent by one step.
    """
    ratio_K = largest_K.double() / least_K.double()
    room = torch.tensor(form.largest**2 / 2, dtype=torch.float64).log2()
    k_K = (room / ratio_K.log2() * STEPS).floor().div(STEPS).clamp(min=max(floor or 0.0, 1 / STEPS), max=MOST)
    stretches_K = (largest_K > 0) & (ratio_K >= ALIKE)
    centre_K = largest_K.sqrt() * least_K.sqrt()  # two roots: the product of both underflows for second moments
    return torch.where(stretches_K, k_K, 1.0).float(), torch.where(stretches_K, centre_K, 1.0)


def grouped(x: Tensor, group: int) -> Tensor:
    """x flattened in rows of `group`, (K, G); the last row is filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % group)).view(-1, group)
