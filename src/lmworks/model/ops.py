"""The arithmetic under the layers: one function per formula, exact against `tests/oracles`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) x (out, in) -> (..., out), computed in the precision of x."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = bias.to(x.dtype) if bias is not None else None
    return F.linear(x, weight, bias)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32 (float64 stays as it is, for exact tests)."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim."""
    return F.layer_norm(_wide(x), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def rotate(x_BTNh: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Rotary embedding: turns each pair (i, i + r/2) of the first r values of a head by its angle.

    cos, sin: (B or 1, T, r/2) float32. Values beyond r pass through (partial rotary of GPT-NeoX).
    """
    half = cos_BTr.shape[-1]
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    first, second = _wide(x_BTNh[..., :half]), _wide(x_BTNh[..., half : 2 * half])
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BTNh.dtype)
    return turned if 2 * half == x_BTNh.shape[-1] else torch.cat((turned, x_BTNh[..., 2 * half :]), -1)
