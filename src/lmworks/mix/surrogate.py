"""What is fitted to runs: a surrogate takes rows of (mixture, value) and answers with mean and spread for any mixture.

A surrogate is a frozen record of settings; `fit` gives a `Fitted`, which knows nothing of the runs any more. Rows that
are held out are refused by `Rows.to_fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows


@final
@dataclass(frozen=True, eq=False)
class Prediction:
    """Of N mixtures: the mean, and the standard deviation of what the surrogate does not know."""

    mean_N: Floats
    sd_N: Floats


class Fitted(Protocol):
    """What a fit gave."""

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Values of N mixtures."""
        ...


class Surrogate(Protocol):
    """A kind of function, with its settings."""

    @property
    def name(self) -> str:
        """As in recipes and reports."""
        ...

    def least(self, sources: int) -> int:
        """How many rows a fit needs at least."""
        ...

    def settle(self, rows: Rows) -> Surrogate:
        """The same, with what costs time to find found, so that fits to resampled rows are quick."""
        ...

    def fit(self, rows: Rows) -> Fitted:
        """Learn from rows. Raises LmworksError when they are held out, or fewer than `least`."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Joint:
    """A target of several columns: the weighted sum of what is predicted for each."""

    parts: Mapping[str, Fitted]
    weights: Mapping[str, float]

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Means add; so do the spreads, as if all columns erred together, which is the cautious side."""
        mean, sd = np.zeros(len(mixtures_NM)), np.zeros(len(mixtures_NM))
        for column, weight in self.weights.items():
            one = self.parts[column].predict(mixtures_NM)
            mean += weight * one.mean_N
            sd += abs(weight) * one.sd_N
        return Prediction(mean, sd)
