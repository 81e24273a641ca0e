"""A slice of the simplex, to be drawn: the predicted target where three sources share what they have together."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmworks.mix.problem import Floats, MixtureProblem
from lmworks.mix.surrogate import Fitted

FINE = 24
"""Steps along an edge of the triangle."""


def triangle() -> Floats:
    """Points of a triangle, (N, 3), rows that sum to 1."""
    grid = [(i, j, FINE - i - j) for i in range(FINE + 1) for j in range(FINE + 1 - i)]
    return np.array(grid, dtype=np.float64) / FINE


def slice_of(predicts: Fitted, problem: MixtureProblem, p_M: Floats, runs_NM: Floats) -> dict[str, Any] | None:
    """Of the three sources with most: predicted targets at `triangle()`, where the mixture is, and the runs that have
    half of their tokens or more there; the other sources keep what they have. None for fewer than three sources."""
    if len(p_M) < 3:
        return None
    corners = np.argsort(-p_M, kind="stable")[:3]
    whole = float(p_M[corners].sum())
    asked = np.repeat(p_M[None], len(triangle()), axis=0)
    asked[:, corners] = triangle() * whole
    sums_N = runs_NM[:, corners].sum(axis=1)
    near_N = sums_N >= 0.5
    return {
        "sources": [problem.names[j] for j in corners],
        "whole": whole,
        "values": predicts.predict(asked).mean_N.tolist(),
        "chosen": (p_M[corners] / whole).tolist(),
        "runs": (runs_NM[near_N][:, corners] / sums_N[near_N, None]).tolist(),
    }
