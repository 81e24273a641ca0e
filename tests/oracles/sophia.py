"""Sophia in NumPy, float64: the update, both estimators, and the network they are tried on, with its own gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


def sophia(
    weights: Weights,
    gradient: Callable[[Weights], Weights],
    estimate: Callable[[Weights, int], Weights],
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    gamma: float,
    eps: float,
    wd: float,
    every: int,
) -> tuple[Weights, Weights]:
    """Weights and curvature after `steps` steps; `estimate` gets the weights and how many estimates came before."""
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    h = {name: np.zeros_like(w) for name, w in weights.items()}
    for t in range(1, steps + 1):
        g = gradient(weights)
        if t % every == 1 % every:
            found = estimate(weights, (t - 1) // every)
            h = {name: betas[1] * h[name] + (1 - betas[1]) * found[name] for name in h}
        m = {name: betas[0] * m[name] + (1 - betas[0]) * g[name] for name in m}
        for name, w in weights.items():
            decayed = w - lr * wd * w if w.ndim >= 2 else w
            weights = {**weights, name: decayed - lr * np.clip(m[name] / np.maximum(gamma * h[name], eps), -1, 1)}
    return weights, h


def mlp_gradient(weights: Weights, x_ND: Array, y_N: NDArray[np.int64]) -> Weights:
    """Of the mean cross-entropy over targets that are not negative; three layers, tanh. Complex weights are allowed."""
    x_ND, y_N = x_ND[y_N >= 0], y_N[y_N >= 0]
    a1 = np.tanh(x_ND @ weights["one.weight"].T + weights["one.bias"])
    a2 = np.tanh(a1 @ weights["two.weight"].T + weights["two.bias"])
    z = np.exp(a2 @ weights["three.weight"].T + weights["three.bias"])
    d3 = z / z.sum(1, keepdims=True)
    d3[np.arange(len(y_N)), y_N] -= 1
    d3 /= len(y_N)
    d2 = d3 @ weights["three.weight"] * (1 - a2 * a2)
    d1 = d2 @ weights["two.weight"] * (1 - a1 * a1)
    sides = {"one": (d1, x_ND), "two": (d2, a1), "three": (d3, a2)}
    return {
        **{f"{name}.weight": d.T @ a for name, (d, a) in sides.items()},
        **{f"{name}.bias": d.sum(0) for name, (d, _) in sides.items()},
    }


def gauss_newton(weights: Weights, x_ND: Array, drawn_N: NDArray[np.int64]) -> Weights:
    """B times the squared gradient against drawn targets, B the targets that count."""
    return {name: (drawn_N >= 0).sum() * g * g for name, g in mlp_gradient(weights, x_ND, drawn_N).items()}


def hutchinson(weights: Weights, x_ND: Array, y_N: NDArray[np.int64], u: Weights) -> Weights:
    """u * (Hessian u); the product is the complex-step derivative of the gradient along u, exact to rounding."""
    tiny = 1e-30
    moved = {name: w + 1j * tiny * u[name] for name, w in weights.items()}
    return {name: u[name] * g.imag / tiny for name, g in mlp_gradient(moved, x_ND, y_N).items()}  # type: ignore[arg-type]
