"""A Gaussian process on the square roots of shares, of losses or of their logarithms (scikit-learn, extra `mix`).

Roots, because a source's first per cent changes more than its fiftieth. Logarithms of what is above a floor, because a
source divides that by a factor, as in 'log-linear', whose floor is taken.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lmworks.core.need import need
from lmworks.mix.linear import LogLinear, enough
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Prediction


@final
@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """Matern 5/2 with a length for each source and noise, both by the marginal likelihood; values standardised."""

    name: str = "gp"
    logs: bool = False
    """Of log(y - c), not of y; predictions are medians."""
    starts: int = 1
    """Starts of the search for lengths besides the first."""
    searched: int = 128
    """Rows by which lengths are sought; with more, by as many of them."""
    seed: int = 0
    kernel: Any = None
    """One whose lengths and noise are found; None: they are found in the fit."""

    def least(self, sources: int) -> int:
        """One row more than there are lengths and variances."""
        return sources + 3

    def settle(self, rows: Rows) -> GaussianProcess:
        """With the kernel that these rows want."""
        return dataclasses.replace(self, kernel=self.fit(rows).process.kernel_)

    def fit(self, rows: Rows) -> Process:
        """The posterior after the rows."""
        p_NM, y_N = enough(rows, self.least(rows.mixtures_NM.shape[1]), self.name)
        floor = _floor(rows) if self.logs else None
        values_N = y_N if floor is None else np.log(y_N - floor)
        kernel = self.kernel
        if kernel is None and len(y_N) > self.searched:
            some = np.random.default_rng(self.seed).choice(len(y_N), self.searched, replace=False)
            kernel = self._conditioned(p_NM[some], values_N[some], None).kernel_
        return Process(process=self._conditioned(p_NM, values_N, kernel), floor=floor)

    def _conditioned(self, p_NM: Floats, values_N: Floats, kernel: Any) -> Any:
        process = self._process(p_NM.shape[1], kernel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lengths at their ends are sources that do not matter
            process.fit(np.sqrt(p_NM), values_N)
        return process

    def _process(self, sources: int, kernel: Any) -> Any:
        why = "the surrogate 'gp'"
        gaussian = need("sklearn.gaussian_process", extra="mix", why=why)
        kernels = need("sklearn.gaussian_process.kernels", extra="mix", why=why)
        if kernel is not None:
            return gaussian.GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True)
        matern = kernels.Matern(length_scale=np.ones(sources), length_scale_bounds=(0.05, 50.0), nu=2.5)
        noise = kernels.WhiteKernel(0.01, (1e-8, 1.0))
        kernel = kernels.ConstantKernel(1.0, (0.01, 100.0)) * matern + noise
        return gaussian.GaussianProcessRegressor(
            kernel, n_restarts_optimizer=self.starts, normalize_y=True, random_state=self.seed
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Process:
    """A posterior."""

    process: Any
    floor: float | None
    """c, where the process is of log(y - c)."""

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Values of N mixtures, the noise of a run in the spread."""
        means, spreads = [], []
        for first in range(0, len(mixtures_NM), 4096):  # a covariance with all rows each
            mean, sd = self.process.predict(np.sqrt(mixtures_NM[first : first + 4096]), return_std=True)
            means.append(mean)
            spreads.append(sd)
        mean_N, sd_N = np.concatenate(means), np.concatenate(spreads)
        if self.floor is None:
            return Prediction(mean_N, sd_N)
        above_N = np.exp(mean_N)
        return Prediction(self.floor + above_N, above_N * sd_N)


def _floor(rows: Rows) -> float:
    """What no mixture is taken to get below: log-linear's c, and below the least value by a fiftieth of their range."""
    y_N = rows.values_N
    least = float(y_N.min()) - 0.02 * (float(np.ptp(y_N)) or 1.0)
    if len(rows) < LogLinear().least(rows.mixtures_NM.shape[1]):
        return least
    return min(LogLinear().fit(rows).c, least)
