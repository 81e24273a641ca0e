"""What is believed of mixtures after some results."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor

from lmworks.methods.admire_bayesopt.kernel import Belief, Points

JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
"""What is added to the diagonal, times its mean, until the matrix can be factored."""


class Unfit(Exception):
    """The results cannot be fitted so: another surrogate has to do."""


def factor(matrix_NN: Tensor) -> Tensor:
    """The lower Cholesky factor, with as little on the diagonal as it takes. Raises Unfit where that is too much."""
    mean = matrix_NN.detach().diagonal().mean()
    for jitter in JITTERS:
        eye_NN = torch.eye(len(matrix_NN), dtype=matrix_NN.dtype)
        lower_NN, failed = torch.linalg.cholesky_ex(matrix_NN + jitter * mean * eye_NN)
        if not failed and bool(torch.isfinite(lower_NN).all()):
            return cast(Tensor, lower_NN)
    raise Unfit(f"the covariance of {len(matrix_NN)} results is not positive, or not finite")


@final
class Posterior:
    """Means and covariances at any points, given results; the levels of sizes are in the means alone."""

    def __init__(self, belief: Belief, runs: Points, value_N: Tensor) -> None:
        """`value_N`: results, scaled, the larger the better. Raises Unfit."""
        self.belief, self.runs, self.value_N = belief, runs, value_N
        total_NN = belief.covariance(runs, runs) + belief.levels(runs.size_N, runs.size_N)
        self._lower_NN = factor(total_NN + belief.noise_S[runs.size_N].diag())
        self._solved_N = torch.cholesky_solve(value_N[:, None], self._lower_NN)[:, 0]
        if not bool(torch.isfinite(self._solved_N).all()):
            raise Unfit("the results have no finite fit")

    def mean(self, at: Points) -> Tensor:
        """What is expected of the points, with the level of their size: (N,)."""
        known_AN = self.belief.covariance(at, self.runs) + self.belief.levels(at.size_N, self.runs.size_N)
        return known_AN @ self._solved_N

    def spread(self, a: Points, b: Points) -> Tensor:
        """Covariance between points, levels and noise apart: (A, B)."""
        return self.belief.covariance(a, b) - self._known(a).T @ self._known(b)

    def pairs(self, at: Points, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Variance of each point, variance of its mixture at the size `top`, and their covariance: (N,) each."""
        above = Points(at.x_NM, torch.full_like(at.size_N, top))
        a_NA, b_NA = self._known(at), self._known(above)
        own_A = self.belief.paired(at.size_N, at.size_N) - (a_NA * a_NA).sum(0)
        top_A = self.belief.paired(above.size_N, above.size_N) - (b_NA * b_NA).sum(0)
        both_A = self.belief.paired(at.size_N, above.size_N) - (a_NA * b_NA).sum(0)
        return own_A.clamp(min=0), top_A.clamp(min=0), both_A

    def variance(self, at: Points) -> Tensor:
        """Of each point, levels and noise apart: (N,)."""
        known_NA = self._known(at)
        return (self.belief.paired(at.size_N, at.size_N) - (known_NA * known_NA).sum(0)).clamp(min=0)

    def expecting(self, pending: Points) -> Posterior:
        """As if the pending runs were done and had given what is expected of them: means stay, spreads shrink."""
        if not len(pending):
            return self
        value_N = torch.cat([self.value_N, self.mean(pending)])
        return Posterior(self.belief, self.runs.join(pending), value_N)

    def draws(self, at: Points, count: int, generator: torch.Generator) -> Tensor:
        """Of all points together, levels and noise apart: (count, N)."""
        shift_N = self.mean(at)
        lower_NN = factor(self.spread(at, at) + 1e-9 * torch.eye(len(at), dtype=shift_N.dtype))
        normal_CN = torch.randn(count, len(at), generator=generator, dtype=shift_N.dtype)
        return shift_N + normal_CN @ lower_NN.T

    def _known(self, at: Points) -> Tensor:
        """L^-1 times the covariance between runs and points: (N, A)."""
        return cast(
            Tensor, torch.linalg.solve_triangular(self._lower_NN, self.belief.covariance(self.runs, at), upper=False)
        )


def agreement(belief: Posterior, x_NM: Tensor, size: int, top: int, seed: int, draws: int = 128) -> tuple[float, float]:
    """Correlation of results of a size with what the largest would give, over mixtures, and its standard deviation.

    In draws of what is believed. `x_NM`: mixtures as the kernel sees them. Results that rank them as the largest size
    does have 1; results that are noise have 0, whatever the link of their size may be.
    """
    rows = len(x_NM)
    sizes_N = torch.cat([torch.full((rows,), size), torch.full((rows,), top)])
    generator = torch.Generator().manual_seed(seed)
    both_CN = belief.draws(Points(torch.cat([x_NM, x_NM]), sizes_N), draws, generator)
    noise_CN = torch.randn(draws, rows, generator=generator, dtype=both_CN.dtype)
    below_CN, above_CN = both_CN[:, :rows] + belief.belief.noise_S[size].sqrt() * noise_CN, both_CN[:, rows:]
    below_CN = below_CN - below_CN.mean(1, keepdim=True)
    above_CN = above_CN - above_CN.mean(1, keepdim=True)
    length_C = below_CN.norm(dim=1) * above_CN.norm(dim=1)
    found_C = (below_CN * above_CN).sum(1) / length_C.clamp(min=1e-30)
    return float(found_C.mean()), float(found_C.std())
