"""Schedules: pure functions from (step, total steps) to a factor on the learning rate, and to one on weight decay.

Steps count from 0. Warm-up is linear and its first step is already above zero: factor (step + 1) / warmup.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction, NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """How the learning rate moves over the run, and whether weight decay does."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step` (from 0) of a run of `steps`, between 0 and 1."""

    def weight_decay(self, step: int, steps: int) -> float | None:
        """The factor on the optimizer's weight decay at that step; None: it stays as it is."""
        return None


@dataclass(frozen=True, kw_only=True)
class Rate(Schedule):
    """A schedule of the learning rate alone: warm-up, and what follows."""

    warmup: NonNegativeInt = 0
    """Steps of linear warm-up."""

    def factor(self, step: int, steps: int) -> float:
        """The factor on the learning rate at `step` (from 0) of a run of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(step - self.warmup, max(1, steps - self.warmup))

    @abstractmethod
    def after(self, step: int, steps: int) -> float:
        """The factor `step` steps after warm-up, of `steps` that follow it."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A warm-up that never ends is refused."""
        if self.warmup >= recipe.steps:
            yield Problem(
                path="warmup", text=f"{self.warmup} steps of warm-up do not end before the run's {recipe.steps} steps"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Constant(Rate):
    """Warm-up, then the full rate to the end."""

    def after(self, step: int, steps: int) -> float:
        """Always 1."""
        return 1.0


@final
@dataclass(frozen=True, kw_only=True)
class Cosine(Rate):
    """Warm-up, then half a cosine down to `floor` at the last step."""

    floor: Fraction = 0.1
    """Where the factor ends."""

    def after(self, step: int, steps: int) -> float:
        """From 1 at the first step to `floor` at the last."""
        share = min(1.0, step / max(1, steps - 1))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


@final
@dataclass(frozen=True, kw_only=True)
class Linear(Rate):
    """Warm-up, then a straight line down to `floor` at the last step."""

    floor: Fraction = 0.0
    """Where the factor ends."""

    def after(self, step: int, steps: int) -> float:
        """From 1 at the first step to `floor` at the last."""
        return 1 - (1 - self.floor) * min(1.0, step / max(1, steps - 1))


@final
@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Rate):
    """Warm-up, constant, then a decay over the last part of the run (WSD; Hu et al., 2024)."""

    decay: Fraction = 0.2
    """The part of the run, at its end, in which the rate falls."""
    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """How it falls: a line, 1 - sqrt(x) (Haegele et al., 2024), or half a cosine."""
    floor: Fraction = 0.0
    """Where the factor ends."""

    def after(self, step: int, steps: int) -> float:
        """1, and from the start of the decay down to `floor` at the last step."""
        length = round(self.decay * (steps + self.warmup))
        into = step - (steps - length)
        if length == 0 or into < 0:
            return 1.0
        share = min(1.0, (into + 1) / length)
        fall = {"linear": share, "sqrt": math.sqrt(share), "cosine": 0.5 * (1 - math.cos(math.pi * share))}[self.shape]
        return 1 - (1 - self.floor) * fall

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Warm-up and decay must fit into the run together."""
        yield from super().check(recipe)
        if self.warmup + round(self.decay * recipe.steps) > recipe.steps:
            text = (
                f"a decay over {self.decay:.0%} of {recipe.steps} steps begins before the warm-up of {self.warmup} ends"
            )
            yield Problem(path="decay", text=text)
