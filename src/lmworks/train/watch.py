"""Plain watchers: they look at finished steps and may ask for a change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveInt
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, State, StepRecord, Watcher, Watching


@final
@dataclass(frozen=True, kw_only=True)
class EarlyStop(Watching):
    """End the run when the validation loss has not fallen for `patience` validations."""

    patience: PositiveInt = 3
    """Validations without improvement that are borne."""
    least: NonNegativeFloat = 0.0
    """What counts as an improvement, in nats per token."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """It counts validations, so there must be some."""
        if not recipe.data.validates:
            yield Problem(path="", text="has no effect: data.validation is 0, no documents are held out")
        elif recipe.validation.every is None:
            yield Problem(path="", text="has no effect without validation.every: validations come only at the end")

    def start(self) -> Watcher:
        """A watcher that has seen no validation yet."""
        return _EarlyStop(self)


class _EarlyStop(Watcher):
    def __init__(self, settings: EarlyStop) -> None:
        self._settings = settings
        self._best = math.inf
        self._since = 0

    def look(self, record: StepRecord, probe: Probe) -> Change | None:
        """Counts validations since the best one."""
        if record.validation is None:
            return None
        loss = record.validation["val_loss"]
        if loss < self._best - self._settings.least:
            self._best, self._since = loss, 0
            return None
        self._since += 1
        if self._since < self._settings.patience:
            return None
        return Change(
            reason=f"validation loss has not fallen below {self._best:.4f} for {self._since} validations", stop=True
        )

    def state(self) -> State:
        """The best loss (as text when it is still infinite) and the count since."""
        return {"best": str(self._best), "since": self._since}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""
        self._best, self._since = float(state["best"]), int(state["since"])
