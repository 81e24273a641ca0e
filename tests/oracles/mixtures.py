"""Slow and plain forms of what a search for mixtures computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman: Pearson's correlation of mean ranks, each rank by counting."""

    def rank(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2
            for value in values
        ]

    return float(np.corrcoef(rank(a), rank(b))[0, 1])


def nearest_by_search(p: Floats, lower: Floats, upper: Floats, rounds: int = 4_000) -> Floats:
    """The nearest feasible point: mass moved between two sources in turn as long as that helps."""
    x = lower + (1 - lower.sum()) * (upper - lower) / max(1e-300, float((upper - lower).sum()))
    m = len(p)
    for k in range(rounds):
        i, j = k % m, (k // m) % m
        if i == j:
            continue
        best = ((p[i] - x[i]) - (p[j] - x[j])) / 2
        best = min(best, upper[i] - x[i], x[j] - lower[j])
        best = max(best, lower[i] - x[i], x[j] - upper[j])
        x[i] += best
        x[j] -= best
    return x


def exponential(c: float, a: Floats, mixtures: Floats) -> Floats:
    """c + exp(a.p), share by share."""
    return np.array([c + np.prod([np.exp(a[j] * row[j]) for j in range(len(a))]) for row in mixtures])


def divergence(p: Floats, q: Floats) -> float:
    """KL(p || q), term by term."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def proxies_one_by_one(
    natural: Floats, count: int, temperature: float, strengths: Floats, epochs: float, step: float, seed: int
) -> Floats:
    """RegMix's sampler as its script goes: draw, reject, cut, normalise, round, drop what is there, choose."""
    rng = np.random.default_rng(seed)
    centre = natural**temperature / (natural**temperature).sum()
    found: set[tuple[int, ...]] = set()
    for _ in range(100 * count):
        p = rng.dirichlet(centre * rng.choice(strengths))
        p = np.where(p < step, 0.0, p)
        p = p / p.sum()
        if (p <= np.minimum(epochs * natural, 1)).all():
            found.add(tuple(np.round(p / step).astype(int).tolist()))
    chosen = rng.choice(np.array(sorted(found)), size=count, replace=False)
    return np.asarray(chosen * step)
