"""Rotary position tables, with the frequency scaling of Llama 3.1 and later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 scaling: slow frequencies are divided by `factor`, fast ones kept, those between are blended."""

    factor: Annotated[float, Gt(0)] = 8.0
    """How many times longer the context becomes."""
    low_freq_factor: Annotated[float, Gt(0)] = 1.0
    """Wavelengths above original_max_position / low_freq_factor are stretched in full."""
    high_freq_factor: Annotated[float, Gt(0)] = 4.0
    """Wavelengths below original_max_position / high_freq_factor are kept."""
    original_max_position: Annotated[int, Gt(0)] = 8192
    """The context length the model was first trained at."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How positions become angles: base, number of rotated values per head, scaling."""

    theta: float
    width: int
    """Rotated values per head (even); the rest of a head is left alone."""
    scaling: RopeScaling | None = None

    def frequencies(self, device: torch.device) -> Tensor:
        """(width / 2,) angle per position in radians, float32."""
        exponent = torch.arange(0, self.width, 2, device=device, dtype=torch.float32) / self.width
        frequency = 1.0 / (self.theta**exponent)
        if self.scaling is None:
            return frequency
        return _stretch(frequency, self.scaling)

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `ops.rotate`: two (B, T, width) float32 tensors.

        Every angle stands twice, in both halves; the sines of the first half are negated.
        """
        angles = positions_BT[..., None].float() * self.frequencies(positions_BT.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _stretch(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama-3 scaling of frequencies; see RopeScaling."""
    wavelength = 2 * math.pi / frequency
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = blend.clamp(0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / scaling.factor)
