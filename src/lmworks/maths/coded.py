"""Norms, gates and products on eight-bit codes: what a block computes when it keeps nothing wider (COAT).

Letters: M tokens, D or F width, O outputs. `Scaled` by group has a scale for each 16 values of a row, and is read by
norms and elementwise functions; by tensor it has one, and is read by products.

Each stands here in plain PyTorch. In eager mode on a GPU the kernels of `maths.kernels` make the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmworks.maths import float8, kernels
from lmworks.maths.float8 import E4M3, Format, Scaled

GROUP = 16
"""Values of a row that share a scale where norms and elementwise functions read codes."""


def by_group(x_MD: Tensor) -> Scaled:
    """E4M3 codes with a bf16 scale for each 16 values of a row. Raises ValueError when they do not fit."""
    if kernels.take(x_MD):
        return kernels.quantise.by_group(x_MD)
    return float8.by_group(x_MD, E4M3, GROUP)


def by_tensor(x: Tensor, form: Format) -> Scaled:
    """Codes with one float32 scale."""
    if kernels.take(x):
        return kernels.quantise.by_tensor(x, form)
    return float8.by_tensor(x, form)


def both(x_MD: Tensor, form: Format, largest: Tensor | None = None) -> tuple[Scaled, Scaled]:
    """Codes of x (M, D) and of its transpose (D, M), with one scale. `largest`: max |x| where it is known.

    On a GPU the second is a copy, since products there want one order of values; elsewhere it is a view.
    """
    if kernels.take(x_MD):
        return kernels.quantise.by_tensor_both(x_MD, form, largest)
    x8 = float8.by_tensor(x_MD, form, largest)
    turned = x8.codes.t()
    return x8, Scaled(codes=turned.contiguous() if turned.is_cuda else turned, scale=x8.scale)


def product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T for codes (M, K) and (N, K) with a scale each: sums in float32, times both scales, then rounded to dtype.

    On a GPU with products of eight-bit floats it is theirs. Elsewhere the codes, which are whole numbers times a power
    of two, are multiplied in float32: the same but for the order of additions.
    """
    if a.codes.is_cuda:
        return torch._scaled_mm(a.codes, b.codes.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype)
    return (a.codes.float() @ b.codes.float().t()).mul_(a.scale * b.scale).to(dtype)


def norm(x8: Scaled, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of codes by group: y (M, D) in dtype, 1 / rms of each row (M) float32, max |y| (scalar, float32)."""
    if kernels.take(x8.codes) and x8.codes.shape[-1] <= kernels.MOST_COLUMNS:
        y_MD, scale_M, maxima = kernels.norm8.forward(x8, weight_D, eps, dtype)
        return y_MD, scale_M, maxima.amax()
    x_MD = x8.decode()
    scale_M = torch.rsqrt(x_MD.square().mean(-1) + eps)
    y_MD = (x_MD * scale_M[:, None] * weight_D.float()).to(dtype)
    return y_MD, scale_M, y_MD.abs().amax().float()


def norm_back(dy_MD: Tensor, x8: Scaled, weight_D: Tensor, scale_M: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in the dtype of dy, and of the weight, in its own."""
    if kernels.take(dy_MD) and dy_MD.shape[-1] <= kernels.MOST_COLUMNS:
        return kernels.norm8.backward(dy_MD, x8, weight_D, scale_M)
    n_MD, dy = x8.decode() * scale_M[:, None], dy_MD.float()
    g_MD = dy * weight_D.float()
    dx_MD = scale_M[:, None] * (g_MD - n_MD * (g_MD * n_MD).mean(-1, keepdim=True))
    return dx_MD.to(dy_MD.dtype), (dy * n_MD).sum(0).to(weight_D.dtype)


def silu(gate8: Scaled) -> Scaled:
    """Codes by group of x sigmoid(x) of codes by group."""
    if kernels.take(gate8.codes):
        return kernels.gated8.silu(gate8)
    return by_group(torch.nn.functional.silu(gate8.decode()))


def multiplied(silu8: Scaled, up8: Scaled, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product of decoded values (M, F), rounded to dtype, and its largest absolute value (scalar, float32)."""
    if kernels.take(silu8.codes):
        y_MF, maxima = kernels.gated8.product(silu8, up8, dtype)
        return y_MF, maxima.amax()
    y_MF = (silu8.decode() * up8.decode()).to(dtype)
    return y_MF, y_MF.abs().amax().float()


def gate_back(dy_MF: Tensor, gate8: Scaled, silu8: Scaled, up8: Scaled) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up of silu(gate) * up, from their codes, in the dtype of dy; and max |x| of each (2)."""
    if kernels.take(dy_MF):
        d_gate, d_up, maxima = kernels.gated8.backward(dy_MF, gate8, silu8, up8)
        return d_gate, d_up, maxima.amax(1)
    dy, gate = dy_MF.float(), gate8.decode()
    share = torch.sigmoid(gate)
    d_gate = dy * up8.decode() * (share * (1 + gate * (1 - share)))
    d_gate, d_up = d_gate.to(dy_MF.dtype), (dy * silu8.decode()).to(dy_MF.dtype)
    return d_gate, d_up, torch.stack([d_gate.abs().amax(), d_up.abs().amax()]).float()
