"""Parts of a block whose products work on eight-bit codes, and which keep nothing wider than codes for their gradient.

Each is one autograd function with the residual stream's precision at its borders. Where a tensor is rounded to codes,
its gradient passes through as if it had not been. Letters: M tokens, D hidden, F feed-forward width, O outputs.

    E4M3 by group of 16     what a norm or an elementwise function reads: x, gate, silu(gate), up
    E4M3 by tensor          what a product reads: a norm's output, the attention's output, silu(gate) * up, weights
    E5M2 by tensor          the gradient of a product's output

Of what a product reads the transpose is kept: that of the weight's gradient reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths import coded
from lmworks.maths.float8 import E4M3, E5M2, Scaled


class NormProducts(torch.autograd.Function):
    """RMSNorm, then one or several products of its output: (M, D) -> (M, O) each. The norm's codes are kept once."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, norm_D: Tensor, eps: float, *matrices: Tensor) -> tuple[Tensor, ...]:
        x8 = coded.by_group(x_MD)
        y_MD, scale_M, largest = coded.norm(x8, norm_D, eps, x_MD.dtype)
        y8, y8_T = coded.both(y_MD, E4M3, largest)
        outs = tuple(coded.product(y8, coded.by_tensor(w_OD, E4M3), x_MD.dtype) for w_OD in matrices)
        ctx.save_for_backward(*x8.tensors, *y8_T.tensors, scale_M, norm_D, *matrices)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, scale_M, norm_D = ctx.saved_tensors[:6]
        x8, y8_T = _pairs(kept)
        dy_MD, d_matrices = products_back(y8_T, ctx.saved_tensors[6:], grads)
        dx_MD, d_norm = coded.norm_back(dy_MD, x8, norm_D, scale_M)
        return dx_MD, d_norm, None, *d_matrices


class Product(torch.autograd.Function):
    """x W^T: (M, E) -> (M, O). Keeps x as it is, which the attention keeps as well, and rounds it again for dW."""

    @staticmethod
    def forward(ctx: Any, x_ME: Tensor, w_OE: Tensor) -> Tensor:
        largest = x_ME.abs().amax().float()
        x8, _ = coded.both(x_ME, E4M3, largest)
        ctx.save_for_backward(x_ME, largest, w_OE)
        return coded.product(x8, coded.by_tensor(w_OE, E4M3), x_ME.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ME, largest, w_OE = ctx.saved_tensors
        _, x8_T = coded.both(x_ME, E4M3, largest)
        dx_ME, (dw_OE,) = products_back(x8_T, [w_OE], [grad_MO])
        return dx_ME, dw_OE


class FeedForward(torch.autograd.Function):
    """RMSNorm, gate and up, silu(gate) * up, down: (M, D) -> (M, D)."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, norm_D: Tensor, eps: float, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor
    ) -> Tensor:
        kind = x_MD.dtype
        x8 = coded.by_group(x_MD)
        y_MD, scale_M, largest = coded.norm(x8, norm_D, eps, kind)
        y8, y8_T = coded.both(y_MD, E4M3, largest)
        gate8, up8 = (coded.by_group(coded.product(y8, coded.by_tensor(w, E4M3), kind)) for w in (gate_FD, up_FD))
        silu8 = coded.silu(gate8)
        z_MF, largest = coded.multiplied(silu8, up8, kind)
        z8, z8_T = coded.both(z_MF, E4M3, largest)
        kept = [t for scaled in (x8, y8_T, gate8, silu8, up8, z8_T) for t in scaled.tensors]
        ctx.save_for_backward(*kept, scale_M, norm_D, gate_FD, up_FD, down_DF)
        return coded.product(z8, coded.by_tensor(down_DF, E4M3), kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        *kept, scale_M, norm_D, gate_FD, up_FD, down_DF = ctx.saved_tensors
        x8, y8_T, gate8, silu8, up8, z8_T = _pairs(kept)
        dz_MF, (d_down,) = products_back(z8_T, [down_DF], [grad_MD])
        *grads, largest_2 = coded.gate_back(dz_MF, gate8, silu8, up8)
        dy_MD, (d_gate, d_up) = products_back(y8_T, [gate_FD, up_FD], grads, largest_2.unbind())
        dx_MD, d_norm = coded.norm_back(dy_MD, x8, norm_D, scale_M)
        return dx_MD, d_norm, None, d_gate, d_up, d_down


def _pairs(kept: Sequence[Tensor]) -> list[Scaled]:
    """Codes and scales again, from the tensors that were kept."""
    return [Scaled(codes=codes, scale=scale) for codes, scale in zip(kept[::2], kept[1::2], strict=True)]


def products_back(
    x8_T: Scaled, matrices: Sequence[Tensor], grads: Sequence[Tensor], largest: Sequence[Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of the input of one or several products and of their matrices (O, I), from the input's codes (I, M).

    `grads`: (M, O) each, rounded to E5M2 here; `largest`: their max |x|, where it is known. Weights are rounded again:
    only the master waited in between.
    """
    kind = grads[0].dtype
    parts, weights = [], []
    tops: Sequence[Tensor | None] = largest or [None] * len(grads)
    for grad_MO, w_OI, top in zip(grads, matrices, tops, strict=True):
        g8, g8_T = coded.both(grad_MO, E5M2, top)
        _, w8_T = coded.both(w_OI, E4M3)
        parts.append(coded.product(g8, w8_T, kind))
        weights.append(coded.product(g8_T, x8_T, kind).to(w_OI.dtype))
    return sum(parts[1:], start=parts[0]), tuple(weights)
