"""Verdicts: paired differences, their interval, how small an effect could have been seen, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lmworks.maths.stats import bootstrap_interval, centre, smallest_effect
from lmworks.prove.recipe import Test
from lmworks.train.arm import Measured, reach

Verdict = Literal["holds", "not seen", "contrary", "refused", "confounded"]
Runs = Mapping[str, Mapping[int, Measured]]
"""Arm -> seed -> run."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One test's outcome."""

    test: Test
    values: tuple[float, ...]
    """arm against the other, seed by seed."""
    mean: float
    interval: tuple[float, float]
    """95 % bootstrap interval of the mean over seeds."""
    bound: float
    """Where the interval had to lie, as a number."""
    could_see: float
    """The smallest mean effect that this many seeds of this spread tell from none in four runs of five."""
    verdict: Verdict
    why: str

    def to_json(self) -> dict[str, Any]:
        """For evidence and --json."""
        return {**asdict(self), "test": asdict(self.test)}


def judge(test: Test, runs: Runs, seeds: Sequence[int], axis: str, confounders: Sequence[str] = ()) -> Finding:
    """Hold one arm against another over all seeds."""
    pairs = [quantity(test, runs[test.arm][seed], runs[test.against][seed], axis) for seed in seeds]
    neutral = 1.0 if test.compare == "ratio" or test.take == "reach" else 0.0
    bound = _bound(test, runs, seeds, neutral)
    interval = bootstrap_interval(pairs) if not any(map(math.isnan, pairs)) else (math.nan, math.nan)
    verdict, why = _verdict(test, pairs, interval, bound, neutral, confounders)
    return Finding(
        test=test,
        values=tuple(pairs),
        mean=centre(pairs),
        interval=interval,
        bound=bound,
        could_see=smallest_effect(pairs),
        verdict=verdict,
        why=why,
    )


def quantity(test: Test, arm: Measured, against: Measured, axis: str) -> float:
    """One seed's difference, ratio, or share of the budget."""
    if test.take == "reach":
        target = against.take(test.column, "last")
        return reach(arm.curve(test.column, axis), target, against.spent(axis)) if math.isfinite(target) else math.nan
    a, b = arm.take(test.column, test.take), against.take(test.column, test.take)
    if test.compare == "ratio":
        return a / b if b else math.nan
    return a - b if not (math.isinf(a) and math.isinf(b)) else math.nan


def _bound(test: Test, runs: Runs, seeds: Sequence[int], neutral: float) -> float:
    if test.bound == "spread":
        take = "last" if test.take == "reach" else test.take
        values = [runs[test.against][seed].take(test.column, take) for seed in seeds]
        spread = max(values) - min(values)
        return spread / centre(values) if test.compare == "ratio" else spread
    if test.bound is None:
        return neutral if test.want != "same" else 0.0
    return float(test.bound)


def _verdict(
    test: Test,
    pairs: Sequence[float],
    interval: tuple[float, float],
    bound: float,
    neutral: float,
    confounders: Sequence[str],
) -> tuple[Verdict, str]:
    if any(map(math.isnan, pairs)):
        return "refused", f"the column '{test.column}' is missing in a run"
    if confounders:
        return "confounded", f"the arms differ in {', '.join(confounders)} as well"
    if len(pairs) < 2:
        return "refused", "one seed has no spread: a verdict needs two or more"
    low, high = interval
    if test.want == "same":
        return _same(low - neutral, high - neutral, bound)
    if test.want == "more":  # mirror, so that less is better below
        low, high, bound, neutral = -high, -low, -bound, -neutral
    if high < bound:
        return "holds", "the whole interval is on the claimed side of the bound"
    if low > neutral:
        return "contrary", "the whole interval is on the other side of no effect"
    if high < neutral:
        return "not seen", "an effect in the claimed direction, but not as large as claimed"
    return "not seen", "the interval contains no effect"


def _same(low: float, high: float, bound: float) -> tuple[Verdict, str]:
    if max(abs(low), abs(high)) <= bound:
        return "holds", "the whole interval is within the allowed distance of no effect"
    if low > bound or high < -bound:
        return "contrary", "the whole interval is farther from no effect than allowed"
    return "not seen", "the interval reaches beyond the allowed distance"
