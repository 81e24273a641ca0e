"""LAMB written out in NumPy float64, one tensor and one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def lamb(
    theta: NDArray[Any],
    gradients: Sequence[NDArray[Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    adapts: bool = True,
    bounds: tuple[float, float] | None = None,
) -> tuple[Array, list[float]]:
    """theta after all gradients, and the trust ratio of every step (1 where the tensor has none)."""
    theta = np.array(theta, dtype=np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    ratios: list[float] = []
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, dtype=np.float64)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        r = m_hat / (np.sqrt(v_hat) + eps) + decay * theta
        length, step = float(np.sqrt((theta * theta).sum())), float(np.sqrt((r * r).sum()))
        ratio = 1.0
        if adapts and length > 0 and step > 0:
            phi = length if bounds is None else min(max(length, bounds[0]), bounds[1])
            ratio = phi / step
        ratios.append(ratio)
        theta = theta - lr * ratio * r
    return theta, ratios
