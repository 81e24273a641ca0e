"""The best mixture of a surrogate, within caps: many are drawn, and the best of them averaged.

Averaging is the paper's rule. It keeps the answer away from the single draw on which the surrogate happens to err most
in its favour, and inside the caps, since these bound a convex set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from lmworks.mix.problem import Floats, MixtureProblem
from lmworks.mix.sample import Sampler, candidates, caps_in_units, to_units
from lmworks.mix.surrogate import Fitted

GRID = 10_000
"""A recommended share is a whole number of these parts, where the caps leave room for that."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a search found."""

    mixture_M: Floats
    mean: float
    sd: float
    rule: str
    worst_M: Floats
    """The drawn mixture with the worst prediction."""


def search(predicts: Fitted, problem: MixtureProblem, drawn_NM: Floats, *, top: int, pull: float = 0.0) -> Found:
    """The average of the `top` drawn mixtures with the least (target + pull x KL(mixture || natural)).

    Where the surrogate's own prediction of that average is worse than of the single best draw (its good mixtures are no
    convex set), that draw is taken.
    """
    cost_N = predicts.predict(drawn_NM).mean_N + pull * divergence(drawn_NM, problem.natural)
    order = np.argsort(cost_N, kind="stable")
    best = drawn_NM[order[:top]]
    pair = np.stack([on_grid(best.mean(axis=0), problem), on_grid(best[0], problem)])
    told = predicts.predict(pair)
    cost = told.mean_N + pull * divergence(pair, problem.natural)
    at = int(cost[1] < cost[0])
    rules = (
        f"mean of the best {len(best)} of {len(drawn_NM):,} drawn mixtures",
        f"best of {len(drawn_NM):,} drawn mixtures",
    )
    return Found(
        mixture_M=pair[at],
        mean=float(told.mean_N[at]),
        sd=float(told.sd_N[at]),
        rule=rules[at],
        worst_M=on_grid(drawn_NM[order[-1]], problem),
    )


def draw_for(problem: MixtureProblem, count: int, *, seed: int) -> Floats:
    """Mixtures within the caps for `search` to look at, (count, M)."""
    return candidates(problem, count, seed=seed, sampler=Sampler(epochs=None))


def on_grid(p_M: Floats, problem: MixtureProblem) -> Floats:
    """The mixture in parts of a ten-thousandth, within the caps; as it is where the caps leave no room for that."""
    least, most = caps_in_units(problem.lower, problem.upper, GRID)
    if (least > most).any() or least.sum() > GRID or most.sum() < GRID:
        return p_M
    rounded: Floats = to_units(p_M[None], GRID, least, most)[0] / GRID
    return rounded


def divergence(p_NM: Floats, natural_M: Floats) -> Floats:
    """KL(p || natural) of each row, in nats; infinite where a source has a share and no tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p_NM > 0, p_NM * np.log(p_NM / natural_M), 0.0)
    found: Floats = terms.sum(axis=1)
    return found
