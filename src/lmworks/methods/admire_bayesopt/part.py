"""The part `admire-bayesopt` of the slot `mixture`: its settings, what it asks for, and what it recommends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

from annotated_types import Ge, Interval

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat, PositiveInt
from lmworks.methods.admire_bayesopt import advice
from lmworks.methods.admire_bayesopt.evidence import Inputs, Standardise
from lmworks.methods.admire_bayesopt.fit import Kernel
from lmworks.methods.admire_bayesopt.learn import Engine
from lmworks.methods.admire_bayesopt.rounds import Round
from lmworks.mix.asking import Recommendation, Searching
from lmworks.mix.problem import MixtureProblem
from lmworks.mix.runs import RunTable, Trial


@final
@dataclass(frozen=True, kw_only=True)
class AdmireBayesOpt(Searching):
    """One run after another, each a mixture at a size, by what it says of the best mixture per unit of cost."""

    budget: PositiveFloat
    """What may be spent, in runs of the target's size; failed runs count, the recipe's `verify` does not."""
    by: Literal["entropy", "improvement"] = "entropy"
    """Runs of all sizes by information on the best result per cost, or of the largest size by expected improvement."""
    kernel: Kernel = "linked"
    """linked: each smaller size has a correlation with the largest one, which is learnt. truncated: the paper's, in
    which it follows from the cost."""
    inputs: Inputs = "root"
    """What the kernel sees: square roots of shares, or the shares, as in the paper."""
    standardise: Standardise = "size"
    """Whether each size's results are taken from a mean of their own, or all from one, as BoTorch does."""
    engine: Engine = "own"
    """What finds the kernel's numbers: PyTorch alone, or BoTorch (extra `mix`), for the truncated kernel."""
    starts: PositiveInt = 4
    """Random runs before anything is learnt: of the smallest size, or of the largest with by = "improvement"."""
    large_every: PositiveFloat | None = 0.5
    """A run of the largest size is due when smaller ones have cost this much, in its runs. Left out: never."""
    large_after: PositiveInt | None = 8
    """A run of the largest size is due after so many smaller ones. Left out: never."""
    least_agreement: Annotated[float, Interval(ge=-1, le=1)] = 0.3
    """A size whose results correlate less than this with the largest one's is no longer asked for."""
    maxima: PositiveInt = 10
    """Draws of the best result that information is averaged over."""
    candidates: Annotated[int, Ge(16)] = 2000
    """Mixtures that are looked at for each run."""
    least_gain: NonNegativeFloat = 0.0
    """The search ends when one more run of the largest size is expected to better the target by less than this."""
    noise: PositiveFloat | None = None
    """Standard deviation of the target between seeds of one mixture. Left out: as repeated runs show it, if any."""
    together: PositiveInt = 1
    """Runs that are asked for at a time; each counts on the others giving what is expected of them."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that have no effect, or that do not go together."""
        if self.engine == "botorch" and self.kernel != "truncated":
            yield Problem(path="engine", text='botorch has the kernel of the paper only. Take kernel = "truncated"')
        if self.kernel == "linked" and self.standardise != "size":
            yield Problem(path="standardise", text='kernel = "linked" has a level for each size. Take "size"')
        if self.by == "improvement":
            for name in ("large_every", "large_after", "maxima", "least_agreement"):
                if getattr(self, name) != getattr(type(self), name):
                    yield Problem(path=name, text='has no effect with by = "improvement"')

    def ask(
        self,
        problem: MixtureProblem,
        table: RunTable,
        *,
        seed: int,
        count: int,
        pool: Sequence[Trial] | None = None,
        pending: Sequence[Trial] = (),
    ) -> list[Trial]:
        """The next runs, best first; none when the search is done.

        `pool`: the only runs that can be made, for a search among finished ones. `pending`: runs that are under way.
        """
        round_ = Round(self, problem, table, seed=seed, pool=pool)
        asked: list[Trial] = []
        while len(asked) < count:
            trial = round_.next([*pending, *asked])
            if trial is None:
                break
            asked.append(trial)
        return asked

    def at_once(self) -> int:
        """How many runs it is asked for at a time."""
        return self.together

    def recommend(
        self, problem: MixtureProblem, table: RunTable, *, seed: int, pool: Sequence[Trial] | None = None
    ) -> Recommendation:
        """The mixture with the best expected target at the largest size, whether it was tried or not."""
        return advice.recommend(Round(self, problem, table, seed=seed, pool=pool))
