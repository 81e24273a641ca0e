"""ADMIRE-BayesOpt in NumPy, slowly: the kernel entry by entry, what a result says of the maximum by sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matern(a_M: Array, b_M: Array, lengths_M: Array) -> float:
    """Matern 5/2 between two mixtures."""
    r = math.sqrt(sum(((a - b) / length) ** 2 for a, b, length in zip(a_M, b_M, lengths_M, strict=True)))
    return (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)


def truncated(
    p: Sequence[Array], s: Sequence[float], lengths_M: Array, own_lengths_M: Array, power: float, variance: float
) -> Array:
    """k_u + (1 - s)(1 - s')(1 + s s')^w k_b between all pairs."""
    n = len(p)
    found = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            own = (1 - s[i]) * (1 - s[j]) * (1 + s[i] * s[j]) ** power
            found[i, j] = matern(p[i], p[j], lengths_M) + own * matern(p[i], p[j], own_lengths_M)
    return variance * found


def posterior(prior_NN: Array, across_AN: Array, at_AA: Array, value_N: Array, noise: float) -> tuple[Array, Array]:
    """Mean and covariance by the inverse of the whole matrix."""
    inverse_NN = np.linalg.inv(prior_NN + noise * np.eye(len(value_N)))
    return across_AN @ inverse_NN @ value_N, at_AA - across_AN @ inverse_NN @ across_AN.T


def entropy_of_normal() -> float:
    """Of the standard normal, in nats."""
    return math.log(2 * math.pi * math.e) / 2


def left_by_sampling(gap: float, draws: int, rng: np.random.Generator) -> float:
    """Entropy of a standard normal that is known to be below `gap`: mean of -log density over draws of it."""
    found: list[Array] = []
    total = kept = 0
    while kept < draws:
        z = rng.standard_normal(draws)
        below = z[z < gap]
        found.append(below)
        kept, total = kept + len(below), total + draws
    z = np.concatenate(found)[:draws]
    share = kept / total
    return float(np.mean(z * z / 2 + math.log(math.sqrt(2 * math.pi) * share)))


def left_by_summing(gap: float, link: float, nodes: int = 4001) -> float:
    """Entropy of a result whose correlation with a normal below `gap` is `link`, by sums over both of them."""
    t_K = np.linspace(max(-9.0, gap - 18.0), gap, nodes)
    weight_K = np.exp(-t_K * t_K / 2)
    weight_K[[0, -1]] /= 2
    weight_K /= weight_K.sum()
    rest = math.sqrt(1 - link * link)
    y_J = np.linspace(-10, 10, 2001)
    density_J = np.zeros_like(y_J)
    for t, weight in zip(t_K, weight_K, strict=True):
        density_J += weight * np.exp(-(((y_J - link * t) / rest) ** 2) / 2) / (rest * math.sqrt(2 * math.pi))
    safe_J = np.maximum(density_J, 1e-300)
    return float(-(density_J * np.log(safe_J)).sum() * (y_J[1] - y_J[0]))


def improvement(mean: float, sd: float, best: float, nodes: int = 200_001) -> float:
    """E[max(0, f - best)] by a sum."""
    f = np.linspace(best, mean + 12 * sd, nodes)
    density = np.exp(-(((f - mean) / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))
    return float(np.trapezoid((f - best) * density, f))
