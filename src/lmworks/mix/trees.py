"""Boosted trees: the regressor of the RegMix paper, with LightGBM (extra `mix`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.need import need
from lmworks.mix.folds import folds_of
from lmworks.mix.linear import enough
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Prediction

PER_LEAF = 20
"""LightGBM's own least number of rows in a leaf; with few rows it would leave one leaf, and one answer for all."""


@final
@dataclass(frozen=True, kw_only=True)
class Trees:
    """LightGBM on shares: squared error, rate 0.01, at most 1000 trees.

    How many trees is found by leaving out a fifth of the rows in turn, and stopping when 3 more trees do not help; then
    the mean of these numbers are grown on all rows.
    """

    name: str = "lightgbm"
    rate: float = 0.01
    most: int = 1000
    patience: int = 3
    folds: int = 5
    seed: int = 42
    trees: int | None = None
    """How many; None: found before the fit."""
    noise: float | None = None
    """Standard deviation of what left-out rows were missed by; None: found with the trees."""

    def least(self, sources: int) -> int:
        """Twenty: with fewer a tree has hardly a place to cut."""
        return 20

    def settle(self, rows: Rows) -> Trees:
        """With the number of trees that these rows want."""
        p_NM, y_N = enough(rows, self.least(rows.mixtures_NM.shape[1]), self.name)
        p_NM = p_NM[:, order_of(p_NM)]
        counts, missed = [], []
        for left_N in folds_of(len(y_N), self.folds, self.seed):
            booster = self._grow(p_NM[~left_N], y_N[~left_N], self.most, (p_NM[left_N], y_N[left_N]))
            counts.append(max(1, booster.best_iteration))
            missed.append(y_N[left_N] - booster.predict(p_NM[left_N], num_iteration=counts[-1]))
        noise = float(np.sqrt(np.mean(np.concatenate(missed) ** 2)))
        return dataclasses.replace(self, trees=round(float(np.mean(counts))), noise=noise)

    def fit(self, rows: Rows) -> Forest:
        """Grow the trees on all rows."""
        settled = self if self.trees is not None else self.settle(rows)
        p_NM, y_N = enough(rows, self.least(rows.mixtures_NM.shape[1]), self.name)
        order_M = order_of(p_NM)
        booster = settled._grow(p_NM[:, order_M], y_N, settled.trees or 1)
        return Forest(booster=booster, order_M=order_M, noise=settled.noise or 0.0)

    def _grow(self, p_NM: Floats, y_N: Floats, trees: int, judge: tuple[Floats, Floats] | None = None) -> Any:
        lightgbm = need("lightgbm", extra="mix", why="the surrogate 'lightgbm'")
        settings = {
            "objective": "regression",
            "metric": "l2",
            "learning_rate": self.rate,
            "min_data_in_leaf": min(PER_LEAF, max(2, len(y_N) // 10)),
            "seed": self.seed,
            "num_threads": 1,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        data = lightgbm.Dataset(p_NM, label=y_N, params={"verbosity": -1})
        if judge is None:
            return lightgbm.train(settings, data, num_boost_round=trees)
        stop = lightgbm.early_stopping(self.patience, verbose=False)
        valid = lightgbm.Dataset(judge[0], label=judge[1], reference=data)
        return lightgbm.train(settings, data, num_boost_round=trees, valid_sets=[valid], callbacks=[stop])


def order_of(p_NM: Floats) -> NDArray[np.intp]:
    """Sources by their mean share. Of two cuts that are as good a tree takes that of the first source, so the order in
    which somebody lists them would be in the answer."""
    return np.argsort(p_NM.mean(axis=0), kind="stable")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """Trees that were grown."""

    booster: Any
    order_M: NDArray[np.intp]
    """In which order it takes the sources."""
    noise: float

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Values of N mixtures; the spread is that of rows that were left out, alike for all."""
        mean = np.asarray(self.booster.predict(mixtures_NM[:, self.order_M], num_threads=1), dtype=np.float64)
        return Prediction(mean, np.full(len(mean), self.noise))
