"""PAGE"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lmworks.mix.advise import Asked, advise
from lmworks.mix.asking import Recommendation, Searching
from lmworks.mix.problem import MixtureProblem
from lmworks.mix.runs import Purpose, RunTable, Trial
from lmworks.mix.sample import Sampler, draw
from lmworks.mix.search import on_grid

PER_COEFFICIENT = 3
"""Proxies for each source and one more, when a recipe does not say how many."""


@final
@dataclass(frozen=True, kw_only=True)
class RegMix(Searching):
    """Many small runs on random mixtures, a regression of their losses, and the best of many drawn mixtures."""

    proxies: PositiveInt | None = None
    """Small runs to learn from. Left out: 3 (sources + 1), enough for log-linear; the paper has 512 for 17 sources."""
    unseen: NonNegativeInt = 8
    """Further small runs, to judge by. Fewer than 3: nothing is judged."""
    repeats: NonNegativeInt = 3
    """Runs of the natural mixture with as many seeds: what seeds alone change. Fewer than 2: it is not known."""
    surrogate: Literal["auto", "lightgbm", "log-linear", "ols", "gp"] = "auto"
    """What is fitted. 'auto': for each column the one that errs least on proxies left out; the paper has 'lightgbm'."""
    temperature: Fraction = 0.5
    """Mixtures are drawn around the natural shares to this power."""
    strengths: tuple[PositiveFloat, PositiveFloat] = (0.1, 5.0)
    """Between which strengths of the Dirichlet distribution."""
    epochs: PositiveFloat = 15.0
    """No proxy has more than so many times a source's natural share; inf: as much as is drawn."""
    step: PositiveFloat = 2e-4
    """Shares of proxies are multiples of it."""
    simulated: PositiveInt = 100_000
    """Mixtures that the surrogate is asked about."""
    top: PositiveInt = 128
    """How many of the best are averaged."""
    pull: NonNegativeFloat = 0.0
    """Weight of KL(mixture || natural) beside the target: how strongly the answer keeps to the natural mixture."""
    resamples: NonNegativeInt = 20
    """Refits to resampled proxies, for the spread of every share."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that contradict each other."""
        if self.strengths[0] > self.strengths[1]:
            yield Problem(path="strengths", text=f"must rise, got {list(self.strengths)}")
        if self.top > self.simulated:
            yield Problem(path="top", text=f"{self.top} is more than the {self.simulated} that are drawn")
        if abs(round(1 / self.step) * self.step - 1) > 1e-9:
            yield Problem(path="step", text=f"1 is not a multiple of {self.step:g}. Legal: 0.0002, 0.001, 0.01")

    def at_once(self) -> int:
        """All of them: no run hangs on another."""
        return 1_000_000

    def ask(self, problem: MixtureProblem, table: RunTable, *, seed: int, count: int) -> Sequence[Trial]:
        """Repeats, proxies and unseen runs that are not there yet."""
        return [trial for trial in self.trials(problem, seed=seed) if not table.has(trial)][:count]

    def trials(self, problem: MixtureProblem, *, seed: int) -> list[Trial]:
        """All runs, of the cheapest size: the natural mixture with several seeds, then drawn ones."""
        if len(problem.sources) == 1:
            return []
        size = problem.fidelities[0].name
        natural = tuple(on_grid(problem.nearest(problem.natural), problem).tolist())
        found = [
            Trial(mixture=natural, fidelity=size, seed=seed + i, purpose="noise", label="natural")
            for i in range(self.repeats)
        ]
        proxies = self.proxies or PER_COEFFICIENT * (len(problem.sources) + 1)
        sampler = Sampler(
            temperature=self.temperature,
            strengths=self.strengths,
            epochs=self.epochs if math.isfinite(self.epochs) else None,
            step=self.step,
        )
        for i, mixture in enumerate(draw(problem, proxies + self.unseen, seed=seed, sampler=sampler).tolist()):
            purpose: Purpose = "proxy" if i < proxies else "unseen"
            found.append(Trial(mixture=tuple(mixture), fidelity=size, seed=seed, purpose=purpose))
        return list({trial.key: trial for trial in reversed(found)}.values())[::-1]

    def recommend(self, problem: MixtureProblem, table: RunTable, *, seed: int) -> Recommendation:
        """The mean of the drawn mixtures that are predicted to be best; all of it, where there is one source."""
        if len(problem.sources) == 1:
            return Recommendation(mixture=(1.0,), rule="there is one source", predicted=None, sd=None)
        asked = Asked(
            surrogate=self.surrogate,
            simulated=self.simulated,
            top=self.top,
            pull=self.pull,
            resamples=self.resamples,
            seed=seed,
        )
        return advise(table, problem.fidelities[0].name, asked)
