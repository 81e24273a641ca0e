"""What a search for a mixture is about: sources and their tokens, bounds, sizes of runs with what they cost, a target.

A mixture is a vector p_M on the simplex, in the order of the sources: shares of the training tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import UsageError, did_you_mean

Floats = NDArray[np.float64]
Mixture = tuple[float, ...]
"""Shares in the order of the sources; they sum to 1."""

EXACT = 1e-9
"""How far a sum may be from 1, and a share beyond its bound."""
TOP = "target"
"""Name of the size that the mixture is for."""


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents."""

    name: str
    """As in the runs' losses and readers."""
    tokens: int | None = None
    """Tokens there are; None where nobody knows: then nothing bounds how often they are read."""


@final
@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A size of run: a model and so many tokens."""

    name: str
    cost: float
    """Of one run, in runs of the target's size, whose cost is 1."""


@final
@dataclass(frozen=True, kw_only=True)
class MixtureProblem:
    """Sources, bounds, sizes and target. Raises UsageError when it is made of what contradicts itself."""

    sources: tuple[Source, ...]
    target: Mapping[str, float]
    """What is to be small: columns of losses, and the weight of each."""
    fidelities: tuple[Fidelity, ...] = (Fidelity(name=TOP, cost=1.0),)
    """Sizes of runs, cheapest first; the last one is what the mixture is for."""
    budget: int | None = None
    """Training tokens of the run that the mixture is for."""
    max_epochs: float | None = None
    """How often a source may be read in that run; None: as often as it comes."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest share of sources, by name."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("a mixture needs at least one source")
        _once("source", self.names)
        _once("size of run", [one.name for one in self.fidelities])
        for name in self.bounds:
            if name not in self.names:
                raise UsageError(f"no source is called '{name}'{did_you_mean(name, self.names)}", where="bounds")
        if not self.target or not all(math.isfinite(w) for w in self.target.values()) or not any(self.target.values()):
            raise UsageError("a target needs a weight other than 0", legal="column = weight, as in { docs = 1.0 }")
        self._check_costs()
        self._check_bounds()

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names, in order."""
        return tuple(source.name for source in self.sources)

    @property
    def top(self) -> Fidelity:
        """The size that the mixture is for."""
        return self.fidelities[-1]

    def fidelity(self, name: str) -> Fidelity:
        """The size of that name. Raises UsageError with the nearest name."""
        known = [one.name for one in self.fidelities]
        if name not in known:
            raise UsageError(f"no size of run is called '{name}'{did_you_mean(name, known)}", legal=", ".join(known))
        return self.fidelities[known.index(name)]

    @property
    def natural(self) -> Floats:
        """Shares_M of the available tokens; all alike where they are not known."""
        tokens = [source.tokens for source in self.sources]
        if any(count is None for count in tokens):
            return np.full(len(tokens), 1 / len(tokens))
        counts = np.array(tokens, dtype=np.float64)
        shares: Floats = counts / counts.sum()
        return shares

    @property
    def lower(self) -> Floats:
        """lower_M: the least share of each source."""
        return np.array([self.bounds.get(name, (0.0, 1.0))[0] for name in self.names])

    @property
    def upper(self) -> Floats:
        """upper_M: the greatest share of each source, by its bound and by `max_epochs` of its tokens."""
        upper = np.array([self.bounds.get(name, (0.0, 1.0))[1] for name in self.names])
        if self.max_epochs is None or self.budget is None:
            return upper
        most = [math.inf if s.tokens is None else self.max_epochs * s.tokens / self.budget for s in self.sources]
        capped: Floats = np.minimum(upper, most)
        return capped

    def epochs(self, p_M: Sequence[float] | Floats) -> dict[str, float]:
        """How often each source is read in the run that the mixture is for; those whose tokens are known."""
        if self.budget is None:
            return {}
        known = zip(self.sources, p_M, strict=True)
        return {s.name: float(p) * self.budget / s.tokens for s, p in known if s.tokens is not None}

    def nearest(self, p_M: Sequence[float] | Floats) -> Floats:
        """The feasible mixture that is nearest to a vector (Euclid): shares shifted alike, and cut at the bounds."""
        near: Floats = nearest_within(np.asarray(p_M, dtype=np.float64)[None], self.lower, self.upper)[0]
        return near

    def why_not(self, p_M: Sequence[float] | Floats) -> str | None:
        """What keeps a vector from being a mixture within the bounds; None when nothing does."""
        p = np.asarray(p_M, dtype=np.float64)
        if p.shape != (len(self.sources),) or not np.isfinite(p).all():
            return f"is not {len(self.sources)} finite shares"
        if abs(p.sum() - 1) > EXACT or p.min() < 0:
            return f"is not on the simplex: shares from {p.min():.4g} that sum to {p.sum():.9g}"
        over = np.maximum(p - self.upper, self.lower - p)
        worst = int(over.argmax())
        if over[worst] > EXACT:
            low, high = self.lower[worst], self.upper[worst]
            return f"gives '{self.names[worst]}' {p[worst]:.4g}, which may have {low:.4g} to {high:.4g}"
        return None

    def must_be_feasible(self, p_M: Sequence[float] | Floats) -> None:
        """Raise UsageError, with the nearest feasible mixture, for a vector that is none."""
        why = self.why_not(p_M)
        if why is None:
            return
        p = np.asarray(p_M, dtype=np.float64)
        near = self.nearest(p).round(4).tolist() if p.shape == (len(self.sources),) and np.isfinite(p).all() else None
        raise UsageError(f"the mixture {why}", next_step=None if near is None else f"the nearest that is: {near}")

    def value(self, losses: Mapping[str, float]) -> float:
        """The target: the weighted sum of a run's losses. nan when one of them is missing."""
        return sum(weight * losses.get(column, math.nan) for column, weight in self.target.items())

    def _check_costs(self) -> None:
        costs = [one.cost for one in self.fidelities]
        if not costs or not all(math.isfinite(cost) and cost > 0 for cost in costs):
            raise UsageError("every size of run has a cost above 0", where="fidelities")
        if any(a >= b for a, b in itertools.pairwise(costs)):
            text = ", ".join(f"{one.name} {one.cost:g}" for one in self.fidelities)
            raise UsageError(f"costs must rise from size to size, got {text}", where="fidelities")

    def _check_bounds(self) -> None:
        for name, low, high in zip(self.names, self.lower, self.upper, strict=True):
            if not 0 <= low <= high:
                raise UsageError(f"'{name}' may have from {low:.4g} to {high:.4g}: there is nothing in between")
        if (most := float(self.upper.sum())) < 1 - EXACT:
            caps = ", ".join(f"{n} {u:.4g}" for n, u in zip(self.names, self.upper, strict=True))
            raise UsageError(
                f"no mixture is within the caps, which sum to {most:.4g}: {caps}",
                next_step="raise max_epochs or the bounds, train on fewer tokens, or add a source",
            )
        if (least := float(self.lower.sum())) > 1 + EXACT:
            raise UsageError(f"no mixture is within the bounds: the least shares sum to {least:.4g}")


def nearest_within(p_NM: Floats, lower_M: Floats, upper_M: Floats) -> Floats:
    """Each row's nearest point of {lower <= p <= upper, sum p = 1}: clip(p - shift, lower, upper), shift by bisection.

    The set must not be empty. Sums are 1 to rounding.
    """
    low = (p_NM - np.minimum(upper_M, 1.0)).min(axis=1) - 1.0
    high = (p_NM - lower_M).max(axis=1) + 1.0
    for _ in range(80):
        middle = (low + high) / 2
        much = np.clip(p_NM - middle[:, None], lower_M, upper_M).sum(axis=1) > 1
        low, high = np.where(much, middle, low), np.where(much, high, middle)
    near = np.clip(p_NM - high[:, None], lower_M, upper_M)
    return _filled(near, upper_M)


def _filled(p_NM: Floats, upper_M: Floats) -> Floats:
    """What rounding left short of 1, given to the source with the most room."""
    room_N = (np.minimum(upper_M, 1.0) - p_NM).argmax(axis=1)
    rows = np.arange(len(p_NM))
    p_NM[rows, room_N] += 1 - p_NM.sum(axis=1)
    return p_NM


def _once(what: str, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise UsageError(f"two have the name '{name}'", where=what)
