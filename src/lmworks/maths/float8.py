"""Eight-bit floats: two formats, a cast that saturates, and scales by tensor or by group.

A scale maps the largest |x| of its values to the format's largest number. Zeros stay zeros, NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-10
"""Added to a maximum before it is divided, so that values that are all zero get a scale (COAT's choice)."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """An eight-bit float of torch."""

    name: str
    dtype: torch.dtype
    largest: float
    """The largest finite number."""
    smallest: float
    """The smallest positive (subnormal) number."""


E4M3 = Format(name="e4m3", dtype=torch.float8_e4m3fn, largest=448.0, smallest=2.0**-9)
"""Three bits of mantissa: weights, activations, moments."""
E5M2 = Format(name="e5m2", dtype=torch.float8_e5m2, largest=57344.0, smallest=2.0**-16)
"""Two bits of mantissa, more range: gradients."""
FORMATS = {form.name: form for form in (E4M3, E5M2)}


def cast(x: Tensor, form: Format) -> Tensor:
    """x rounded to the nearest number of the format; what is too large becomes its largest number.

    torch's own cast may give NaN above 448 (E4M3) and infinity above 57344 (E5M2), by version and device.
    """
    return x.clamp(-form.largest, form.largest).to(form.dtype)


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Codes and the factors that give them their size: x is about codes * scale."""

    codes: Tensor
    """The shape of x, one byte a value."""
    scale: Tensor
    """A float32 scalar for the whole tensor; bf16 (..., width / group) for groups along the last dim."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both, to be kept for a backward pass."""
        return self.codes, self.scale

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.codes.nbytes + self.scale.nbytes

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in the shape of the codes."""
        wide = self.codes.float()
        if self.scale.ndim == 0:
            return (wide * self.scale).to(dtype)
        grouped = _grouped(wide, wide.shape[-1] // self.scale.shape[-1]) * self.scale.float()[..., None]
        return grouped.flatten(-2).to(dtype)


def by_tensor(x: Tensor, form: Format, largest: Tensor | None = None) -> Scaled:
    """One scale for all values. `largest`: the maximum of |x| where it is known already (a float32 scalar)."""
    top = x.abs().amax().float() if largest is None else largest
    scale = (top + TINY) / form.largest
    return Scaled(codes=cast(x.float() / scale, form), scale=scale)


def by_group(x: Tensor, form: Format, group: int = 16) -> Scaled:
    """One bf16 scale for each run of `group` values along the last dim. Raises ValueError when they do not fit."""
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} values in a row are no whole groups of {group}")
    grouped = _grouped(x.float(), group)
    scale = ((grouped.abs().amax(-1) + TINY) / form.largest).bfloat16()
    codes = cast(grouped / scale.float()[..., None], form)
    return Scaled(codes=codes.flatten(-2), scale=scale)


def group_maxima(x: Tensor, group: int = 16) -> Tensor:
    """The largest |x| of each run of `group` values along the last dim, float32: the first stage of `by_tensor`.

    The maximum over these is exactly the maximum over x, and reads `group` times less (COAT's group scaling).
    """
    return _grouped(x, group).abs().amax(-1).float()


def _grouped(x: Tensor, group: int) -> Tensor:
    """(..., width) -> (..., width / group, group)."""
    return x.reshape(*x.shape[:-1], -1, group)
