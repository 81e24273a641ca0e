"""What runs teach: a surrogate for each column of the target, chosen by rows that it did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import LmworksError, UsageError, did_you_mean
from lmworks.core.seeds import seed_for
from lmworks.maths.ranks import spearman
from lmworks.mix.folds import Score, choose
from lmworks.mix.gaussian import GaussianProcess
from lmworks.mix.linear import LogLinear, Ols
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows, RunTable
from lmworks.mix.surrogate import Joint, Surrogate
from lmworks.mix.trees import Trees

KINDS: dict[str, Surrogate] = {
    "lightgbm": Trees(),
    "log-linear": LogLinear(),
    "ols": Ols(),
    "gp": GaussianProcess(),
    "log-gp": GaussianProcess(name="log-gp", logs=True),
}
"""Surrogates by name."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Learnt:
    """What the runs of a size teach."""

    joint: Joint
    """Predicts the target."""
    surrogates: Mapping[str, Surrogate]
    """The chosen one of each column, settled."""
    scores: Mapping[str, Sequence[Score]]
    """How all of them did on rows left out, by column."""
    rows: Mapping[str, Rows]
    """What was learnt from, by column; the mixtures are the same for all."""

    @property
    def mixtures(self) -> Floats:
        """Of the runs, (N, M)."""
        return next(iter(self.rows.values())).mixtures_NM

    def as_json(self) -> dict[str, Any]:
        """By column: the surrogate that was chosen, and every score."""
        return {
            column: {
                "surrogate": self.surrogates[column].name,
                "runs": len(self.rows[column]),
                "cross_validation": [score.as_json() for score in self.scores[column]],
            }
            for column in self.surrogates
        }


def kinds_of(name: str) -> list[Surrogate]:
    """The surrogates that a setting means, all of them for 'auto'. Raises UsageError for another name."""
    if name == "auto":
        return list(KINDS.values())
    if name not in KINDS:
        known = ["auto", *KINDS]
        raise UsageError(f"no surrogate is called '{name}'{did_you_mean(name, known)}", legal=", ".join(known))
    return [KINDS[name]]


def learn(table: RunTable, fidelity: str, *, surrogate: str = "auto", seed: int = 0) -> Learnt:
    """Fit the target's columns to the runs of a size.

    Raises LmworksError when fewer than M + 2 runs are left, with what was excluded.
    """
    weights = {column: weight for column, weight in table.problem.target.items() if weight}
    rows = {column: table.to_learn(fidelity, column) for column in weights}
    count, sources = len(next(iter(rows.values()))), len(table.problem.sources)
    if count < sources + 2:
        lost = "; ".join(f"{n} excluded: {why}" for why, n in table.excluded().items())
        raise LmworksError(
            f"{count} runs of size '{fidelity}' are left to learn from; {sources} sources need {sources + 2}"
            + (f" ({lost})" if lost else ""),
            next_step="make more proxies: 3 (sources + 1) is a good number",
        )
    chosen, scores = {}, {}
    for column, one in rows.items():
        found, scores[column] = choose(kinds_of(surrogate), one, seed=seed)
        chosen[column] = found.settle(one)
    joint = Joint({column: chosen[column].fit(one) for column, one in rows.items()}, weights)
    return Learnt(joint=joint, surrogates=chosen, scores=scores, rows=rows)


def resampled(learnt: Learnt, times: int, *, seed: int) -> list[Joint]:
    """Refits to runs drawn with replacement, the same runs for all columns: how much hangs on which runs were made."""
    rng = np.random.default_rng(seed_for(seed, "resamples"))
    count = len(learnt.mixtures)
    least = max(one.least(learnt.mixtures.shape[1]) for one in learnt.surrogates.values())
    return [_refit(learnt, _picks(rng, count, min(least, count))) for _ in range(times)]


def rank_of_unseen(learnt: Learnt, table: RunTable, fidelity: str) -> tuple[int, float]:
    """(runs, Spearman of predicted and true target) on runs of the size that are held out; nan for fewer than three."""
    rows = table.to_judge(fidelity)
    if len(rows) < 3:
        return len(rows), float("nan")
    return len(rows), spearman(learnt.joint.predict(rows.mixtures_NM).mean_N, rows.values_N)


def _picks(rng: np.random.Generator, count: int, least: int) -> NDArray[np.int64]:
    """Rows with replacement; at least `least` different ones, or a fit would be a matter of the prior only."""
    for _ in range(100):
        picks = rng.integers(count, size=count)
        if len(np.unique(picks)) >= least:
            return picks
    return np.arange(count)


def _refit(learnt: Learnt, picks: NDArray[np.int64]) -> Joint:
    parts = {column: one.fit(learnt.rows[column].take(picks)) for column, one in learnt.surrogates.items()}
    return Joint(parts, learnt.joint.weights)
