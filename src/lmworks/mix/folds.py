"""Which surrogate: each predicts rows that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import LmworksError
from lmworks.maths.ranks import spearman
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Surrogate

FOLDS = 5


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """How a surrogate did on rows that it was not fitted to."""

    surrogate: str
    spearman: float
    """Of predicted and true values; nan where predictions are all alike."""
    rmse: float
    """Root of the mean squared error."""

    def as_json(self) -> dict[str, Any]:
        """JSON values: None for what is not a number."""
        rank = self.spearman if math.isfinite(self.spearman) else None
        return {"surrogate": self.surrogate, "spearman": rank, "rmse": self.rmse}


def folds_of(rows: int, folds: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Masks_N of the rows that are left out in turn: every row once, shuffled by the seed."""
    place_N = np.random.default_rng(seed).permutation(rows) % min(folds, rows)
    for fold in range(min(folds, rows)):
        yield place_N == fold


def cross_validate(surrogate: Surrogate, rows: Rows, *, seed: int = 0, folds: int = FOLDS) -> Score:
    """Predict every row by a fit to the other folds."""
    p_NM, y_N = rows.to_fit()
    guess_N = np.full(len(y_N), math.nan)
    for left_N in folds_of(len(y_N), folds, seed):
        guess_N[left_N] = surrogate.fit(rows.take(~left_N)).predict(p_NM[left_N]).mean_N
    return Score(
        surrogate=surrogate.name,
        spearman=spearman(guess_N, y_N),
        rmse=float(np.sqrt(np.mean((guess_N - y_N) ** 2))),
    )


def choose(candidates: Sequence[Surrogate], rows: Rows, *, seed: int = 0) -> tuple[Surrogate, list[Score]]:
    """The surrogate with the least error on rows left out, and the scores of all that the rows are enough for.

    Raises LmworksError when they are enough for none.
    """
    sources = rows.mixtures_NM.shape[1]
    fold = math.ceil(len(rows) / min(FOLDS, max(1, len(rows))))
    able = [one for one in candidates if len(rows) - fold >= one.least(sources)]
    if not able:
        least = min(one.least(sources) for one in candidates)
        names = ", ".join(one.name for one in candidates)
        raise LmworksError(
            f"{len(rows)} runs are too few for {names}: the least is {least} and a fold", next_step="more proxies"
        )
    if len(able) == 1 and len(candidates) == 1:
        return able[0], [cross_validate(able[0], rows, seed=seed)]
    scores = [cross_validate(one, rows, seed=seed) for one in able]
    best = min(range(len(able)), key=lambda i: scores[i].rmse)
    return able[best], scores
