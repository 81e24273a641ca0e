"""Optimizers written out, one parameter and one step at a time, in plain float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw(
    w: Tensor, grads: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, wd: float
) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * wd * w - lr * m_hat / (v_hat.sqrt() + eps)
    return w


def lion(w: Tensor, grads: Sequence[Tensor], *, lr: float, betas: tuple[float, float], wd: float) -> Tensor:
    m = torch.zeros_like(w)
    for g in grads:
        update = torch.sign(betas[0] * m + (1 - betas[0]) * g)
        w = w - lr * wd * w - lr * update
        m = betas[1] * m + (1 - betas[1]) * g
    return w


def sgd(w: Tensor, grads: Sequence[Tensor], *, lr: float, momentum: float, wd: float) -> Tensor:
    m = torch.zeros_like(w)
    for t, g in enumerate(grads):
        g = g + wd * w
        m = g if t == 0 else momentum * m + g
        w = w - lr * m
    return w
