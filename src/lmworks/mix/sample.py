"""Random mixtures: those that small runs are made with, and those that a search looks at.

RegMix draws from Dirichlet distributions around the natural shares, flattened, with strengths from hardly mixed (one or
two sources have all) to nearly the natural shares. Shares are multiples of a step, so a source has none or enough to
be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lmworks.core.errors import UsageError
from lmworks.core.seeds import seed_for
from lmworks.mix.problem import Floats, MixtureProblem, nearest_within

TRIES = 100
"""Draws for each mixture that is wanted."""
ALIKE = 1e-9
"""Slack in counting steps, against rounding."""

Units = NDArray[np.int64]


@final
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How random mixtures are drawn; the paper's settings."""

    temperature: float = 0.5
    """Natural shares to this power, normalised, are what is drawn around. 1: as they are, 0: all alike."""
    strengths: tuple[float, float] = (0.1, 5.0)
    """From how little to how much mixtures keep to them."""
    kinds: int = 15
    """So many strengths, evenly spread in their logarithm, each as likely."""
    epochs: float | None = 15.0
    """No source has more than so many times its natural share; None: as much as comes."""
    step: float = 2e-4
    """Shares are multiples of it. Less than one step is none."""


def draw(problem: MixtureProblem, count: int, *, seed: int, sampler: Sampler) -> Floats:
    """`count` distinct mixtures, (count, M), the same for the same seed; one when there is one source.

    They keep the problem's bounds and the sampler's epochs, not the problem's `max_epochs`: small runs may repeat more
    than the large one. Raises UsageError, with the caps, when no mixture or too few of them are left.
    """
    if len(problem.sources) == 1:
        return np.ones((1, 1))
    rng = np.random.default_rng(seed_for(seed, "mixtures"))
    least_M, most_M = _caps(problem, sampler)
    raw_NM = _dirichlet(problem.natural**sampler.temperature, TRIES * count, sampler, rng)
    raw_NM = np.where(raw_NM < sampler.step, 0.0, raw_NM)
    raw_NM /= raw_NM.sum(axis=1, keepdims=True)
    units = round(1 / sampler.step)
    inside_N = ((raw_NM * units <= most_M) & (raw_NM * units >= least_M)).all(axis=1)
    found = np.unique(to_units(raw_NM[inside_N], units, least_M, most_M), axis=0)
    if len(found) < count:
        near_NM = nearest_within(raw_NM[~inside_N], least_M / units, most_M / units)
        more = to_units(near_NM, units, least_M, most_M)
        found = np.unique(np.vstack([found, more]), axis=0)
    if len(found) < count:
        text = f"{len(found)} different mixtures are within the bounds, {count} are wanted"
        raise UsageError(text, next_step="widen bounds, raise `epochs`, or ask for fewer runs")
    chosen = rng.choice(len(found), size=count, replace=False)
    return found[chosen] / units


def candidates(problem: MixtureProblem, count: int, *, seed: int, sampler: Sampler) -> Floats:
    """Mixtures for a search to look at, (count, M): half from Dirichlet(natural), as the paper does, half as runs are
    drawn. All are within the problem's bounds and caps; a draw outside is moved to the nearest that is inside."""
    rng = np.random.default_rng(seed_for(seed, "candidates"))
    plain = rng.dirichlet(np.maximum(problem.natural, 1e-6), count // 2)
    flat = _dirichlet(problem.natural**sampler.temperature, count - count // 2, sampler, rng)
    drawn = np.vstack([plain, flat])
    out_N = ((drawn > problem.upper) | (drawn < problem.lower)).any(axis=1)
    if out_N.any():
        drawn[out_N] = nearest_within(drawn[out_N], problem.lower, problem.upper)
    return drawn


def to_units(p_NM: Floats, units: int, least_M: Units, most_M: Units) -> Units:
    """Whole steps that sum to `units` and keep the caps: rounded down, then one each to the largest remainders.

    The caps must leave room: sum(least) <= units <= sum(most).
    """
    scaled = p_NM * units
    whole = np.clip(np.floor(scaled + ALIKE).astype(np.int64), least_M, most_M)
    rows = np.arange(len(whole))
    while (left_N := units - whole.sum(axis=1)).any():
        rest_NM = scaled - whole
        up = np.where(whole < most_M, rest_NM, -np.inf).argmax(axis=1)
        down = np.where(whole > least_M, rest_NM, np.inf).argmin(axis=1)
        whole[rows, np.where(left_N > 0, up, down)] += np.sign(left_N)
    return whole


def caps_in_units(lower_M: Floats, upper_M: Floats, units: int) -> tuple[Units, Units]:
    """Bounds in whole steps, inside the given ones."""
    least = np.ceil(lower_M * units - ALIKE).astype(np.int64)
    most = np.floor(np.minimum(upper_M, 1.0) * units + ALIKE).astype(np.int64)
    return least, most


def _caps(problem: MixtureProblem, sampler: Sampler) -> tuple[Units, Units]:
    lower = np.array([problem.bounds.get(name, (0.0, 1.0))[0] for name in problem.names])
    upper = np.array([problem.bounds.get(name, (0.0, 1.0))[1] for name in problem.names])
    if sampler.epochs is not None:
        upper = np.maximum(lower, np.minimum(upper, sampler.epochs * problem.natural))
    least, most = caps_in_units(lower, upper, round(1 / sampler.step))
    units = round(1 / sampler.step)
    if (least > most).any() or most.sum() < units or least.sum() > units:
        named = ", ".join(
            f"{n} {a / units:.4g} to {b / units:.4g}" for n, a, b in zip(problem.names, least, most, strict=True)
        )
        raise UsageError(f"no mixture is within the caps: {named}", next_step="widen bounds, or raise `epochs`")
    return least, most


def _dirichlet(centre_M: Floats, count: int, sampler: Sampler, rng: Generator) -> Floats:
    """Draws around a centre, (count, M), each with a strength of its own."""
    centre = np.maximum(centre_M / centre_M.sum(), 1e-6)
    kind_N = rng.integers(sampler.kinds, size=count)
    drawn = np.empty((count, len(centre)))
    for kind, strength in enumerate(np.geomspace(*sampler.strengths, sampler.kinds)):
        here = kind_N == kind
        drawn[here] = rng.dirichlet(centre * strength, int(here.sum()))
    return drawn
