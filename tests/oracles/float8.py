"""A product in float8, slowly: round both factors to codes, multiply what the codes stand for in float64."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def rounded(x: Tensor, kind: torch.dtype, scales: str, dim: int) -> Tensor:
    """The values that codes of x stand for, float64. `rowwise`: one power of two for all values along dim."""
    wide = x.detach().double()
    top = wide.abs().amax() if scales == "tensorwise" else wide.abs().amax(dim, keepdim=True)
    scale = LARGEST[kind] / top
    if scales == "rowwise":
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    codes = (wide * scale).clamp(-LARGEST[kind], LARGEST[kind]).to(kind)
    return codes.double() / scale


def linear(x_MI: Tensor, weight_OI: Tensor, grad_MO: Tensor, scales: str) -> tuple[Tensor, Tensor, Tensor]:
    """x W^T, and the gradients of x and W when the result's is grad: float64, each factor rounded along its own sum."""
    of_grad = torch.float8_e5m2 if scales == "tensorwise" else torch.float8_e4m3fn
    e4m3 = torch.float8_e4m3fn
    out_MO = rounded(x_MI, e4m3, scales, 1) @ rounded(weight_OI, e4m3, scales, 1).T
    grad_x_MI = rounded(grad_MO, of_grad, scales, 1) @ rounded(weight_OI, e4m3, scales, 0)
    grad_weight_OI = rounded(grad_MO, of_grad, scales, 0).T @ rounded(x_MI, e4m3, scales, 0)
    return out_MO, grad_x_MI, grad_weight_OI
