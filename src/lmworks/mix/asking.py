"""The slot `mixture`: what decides which runs are made next, and which mixture is recommended in the end.

A search holds no state. What it asks for follows from its settings, the seed and the table of runs, so a search that
was killed asks for the same again, and it does not matter in which order runs came back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from lmworks.mix.problem import Mixture, MixtureProblem
from lmworks.mix.runs import Run, RunTable, Trial


@final
@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A mixture, what is expected of it, and how sure that is."""

    mixture: Mixture
    rule: str
    """How it was found, in a sentence."""
    predicted: float | None
    """The target's value at the size that was learnt from; None where nothing was learnt."""
    sd: float | None
    """Standard deviation of that prediction."""
    spread: tuple[tuple[float, float], ...] = ()
    """Of each share: the 5th and 95th percentile over refits to resampled runs; empty where nobody did."""
    gain: tuple[float, float] | None = None
    """Predicted target of the natural mixture minus that of this one, and the standard deviation of the difference."""
    verified: bool = False
    """Whether a run of the target's size was made with it."""
    warnings: tuple[str, ...] = ()
    """What a person must know before they believe it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values for the report: which surrogates, how they did, what each source is worth."""


class Searching(ABC):
    """A way to search for a mixture: a part, whose dataclass is its configuration."""

    @abstractmethod
    def ask(self, problem: MixtureProblem, table: RunTable, *, seed: int, count: int) -> Sequence[Trial]:
        """Up to `count` runs to make next that the table does not hold, in order; none when the search is done.

        A run of the table that failed is not asked for again.
        """

    def at_once(self) -> int:
        """How many runs it is asked for at a time: what came back of them is known to the next question only."""
        return 1

    @abstractmethod
    def recommend(self, problem: MixtureProblem, table: RunTable, *, seed: int) -> Recommendation:
        """The best mixture as far as the table tells. Raises LmworksError when it tells too little."""


Make = Callable[[Sequence[Trial]], Sequence[Run]]
"""Makes runs: trains them, or looks them up in a table of runs that were made before."""


def drive(searching: Searching, table: RunTable, make: Make, *, seed: int) -> Recommendation:
    """Ask, make and tell until the search asks for nothing more; then its recommendation."""
    while trials := searching.ask(table.problem, table, seed=seed, count=searching.at_once()):
        for run in make(trials):
            table.tell(run)
    return searching.recommend(table.problem, table, seed=seed)
