"""Least squares on shares: a plane, and an exponential of one.

    ols          y = b.p              a mixture's loss as the mean of what each source alone would give
    log-linear   y = c + exp(a.p)     c: what no mixture gets below; each source divides what is above c by a factor

There is no constant beside b or a: shares sum to 1. Spreads are those of least squares: what the rows leave open of the
coefficients, and the residuals' variance on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lmworks.core.errors import LmworksError
from lmworks.core.need import need
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Prediction


@final
@dataclass(frozen=True, kw_only=True)
class Ols:
    """Ordinary least squares."""

    name: str = "ols"

    def least(self, sources: int) -> int:
        """One row more than there are coefficients."""
        return sources + 1

    def settle(self, rows: Rows) -> Ols:
        """Nothing is to be found before a fit."""
        return self

    def fit(self, rows: Rows) -> Plane:
        """b_M by numpy's lstsq: the shortest of several where rows leave b open."""
        p_NM, y_N = enough(rows, self.least(rows.mixtures_NM.shape[1]), self.name)
        found, _, rank, _ = np.linalg.lstsq(p_NM, y_N, rcond=None)
        b_M = np.asarray(found, dtype=np.float64)
        variance = float(((y_N - p_NM @ b_M) ** 2).sum()) / max(1, len(y_N) - int(rank))
        cov_MM = np.asarray(variance * np.linalg.pinv(p_NM.T @ p_NM), dtype=np.float64)
        return Plane(b_M=b_M, cov_MM=cov_MM, variance=variance)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Plane:
    """y = b.p."""

    b_M: Floats
    cov_MM: Floats
    """Of b."""
    variance: float
    """Of the residuals."""

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Values of N mixtures."""
        return Prediction(mixtures_NM @ self.b_M, _sd(mixtures_NM, self.cov_MM, self.variance))


@final
@dataclass(frozen=True, kw_only=True)
class LogLinear:
    """An exponential of a plane above a floor, by Gauss and Newton from several floors."""

    name: str = "log-linear"
    prior_sd: float = 1.5
    """How far the a of sources lie apart, before anything is seen: a ridge of (residual variance) / prior_sd^2 pulls
    them together. It vanishes with the noise."""
    floors: tuple[float, ...] = (0.05, 0.5, 2.0)
    """Where c starts: below the least value, in units of the values' range."""

    def least(self, sources: int) -> int:
        """One row more than there are coefficients."""
        return sources + 2

    def settle(self, rows: Rows) -> LogLinear:
        """Nothing is to be found before a fit."""
        return self

    def fit(self, rows: Rows) -> Exponential:
        """c and a_M that leave the least squares."""
        p_NM, y_N = enough(rows, self.least(rows.mixtures_NM.shape[1]), self.name)
        scale = float(np.ptp(y_N)) or 1.0
        ends = [self._descend(p_NM, y_N, float(y_N.min()) - floor * scale, 0.0) for floor in self.floors]
        first = min(ends, key=lambda end: float(end.cost))
        free = max(1, len(y_N) - p_NM.shape[1] - 1)
        ridge = 2 * float(first.cost) / free / self.prior_sd**2
        end = self._descend(p_NM, y_N, float(first.x[0]), ridge, first.x[1:])
        c, a_M = float(end.x[0]), np.asarray(end.x[1:], dtype=np.float64)
        model = c + np.exp(p_NM @ a_M)
        variance = float(((y_N - model) ** 2).sum()) / free
        jacobian = np.asarray(end.jac, dtype=np.float64)
        return Exponential(c=c, a_M=a_M, cov=variance * np.linalg.pinv(jacobian.T @ jacobian), variance=variance)

    def _descend(self, p_NM: Floats, y_N: Floats, c: float, ridge: float, a_M: Floats | None = None) -> Any:
        optimize = need("scipy.optimize", extra="mix", why="the surrogate 'log-linear'")
        m = p_NM.shape[1]
        if a_M is None:
            logs_N = np.log(np.maximum(y_N - c, 1e-12))
            a_M = np.asarray(np.linalg.lstsq(p_NM, logs_N, rcond=None)[0], dtype=np.float64)
        pull_MM = np.sqrt(ridge) * (np.eye(m) - 1 / m)

        def residuals(x: Floats) -> Floats:
            return np.concatenate([x[0] + _exp(p_NM @ x[1:]) - y_N, pull_MM @ x[1:]])

        def jacobian(x: Floats) -> Floats:
            top = np.column_stack([np.ones(len(y_N)), _exp(p_NM @ x[1:])[:, None] * p_NM])
            return np.vstack([top, np.column_stack([np.zeros(m), pull_MM])])

        start = np.concatenate([[c], a_M])
        return optimize.least_squares(
            residuals, start, jacobian, method="trf", x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=200
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Exponential:
    """y = c + exp(a.p)."""

    c: float
    a_M: Floats
    cov: Floats
    """Of (c, a), M + 1 by M + 1."""
    variance: float
    """Of the residuals."""

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Values of N mixtures."""
        above_N = _exp(mixtures_NM @ self.a_M)
        slopes = np.column_stack([np.ones(len(above_N)), above_N[:, None] * mixtures_NM])
        return Prediction(self.c + above_N, _sd(slopes, self.cov, self.variance))


def enough(rows: Rows, least: int, name: str) -> tuple[Floats, Floats]:
    """The rows to learn from. Raises LmworksError when they are too few, or when one has no value."""
    p_NM, y_N = rows.to_fit()
    if len(y_N) < least:
        raise LmworksError(f"'{name}' needs {least} runs for {p_NM.shape[1]} sources, there are {len(y_N)}")
    if not np.isfinite(y_N).all():
        raise LmworksError(f"{int((~np.isfinite(y_N)).sum())} of {len(y_N)} runs have no finite value to learn from")
    return p_NM, y_N


def _exp(x_N: Floats) -> Floats:
    """exp, for a step of the descent that went too far cut where squares of it still are numbers."""
    cut: Floats = np.exp(np.minimum(x_N, 300.0))
    return cut


def _sd(slopes: Floats, cov: Floats, variance: float) -> Floats:
    """Of predictions whose slopes in the coefficients are the rows."""
    open_N = np.einsum("ni,ij,nj->n", slopes, cov, slopes)
    sd: Floats = np.sqrt(np.maximum(open_N, 0.0) + variance)
    return sd
