"""Runs of a search: what was asked for, what came back, what it cost, and which of it may be learnt from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

import numpy as np

from lmworks.core.errors import LmworksError, UsageError
from lmworks.mix.problem import Floats, Mixture, MixtureProblem

Purpose = Literal["proxy", "unseen", "noise", "verify"]
"""proxy: to learn from. unseen: to judge what was learnt. noise: one mixture again, with other seeds. verify: a
recommendation, or what it is held against, at the target's size."""
HELD_OUT: tuple[Purpose, ...] = ("unseen", "verify")
"""Runs that no surrogate is fitted to."""


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is asked for: a mixture at a size."""

    mixture: Mixture
    fidelity: str
    seed: int = 0
    purpose: Purpose = "proxy"
    label: str = ""
    """What a person calls the mixture: 'natural', 'chosen'; empty for one that was drawn."""

    @property
    def key(self) -> str:
        """Equal for trials that are the same run: mixture, size and seed."""
        text = json.dumps([list(self.mixture), self.fidelity, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a trial."""

    trial: Trial
    losses: Mapping[str, float] = field(default_factory=dict)
    """By column; empty for a run that failed."""
    failed: str | None = None
    """Why it has no losses."""
    cost: float = 0.0
    """In runs of the target's size. A failed run is paid for too."""
    seconds: float = 0.0
    """Measured; 0 where nobody did."""
    tokenizer: str = ""
    """Id of the tokenizer: losses per token of two tokenizers are not comparable. Empty: not known."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Run:
        """What `to_json` gave."""
        trial = {**value["trial"], "mixture": tuple(value["trial"]["mixture"])}
        return Run(**{**value, "trial": Trial(**trial)})


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Mixtures and one value of each, with a mark on those that are held out.

    It is the only thing that a surrogate is fitted to: rows that are held out are refused, so no search can learn from
    what it is judged by.
    """

    mixtures_NM: Floats
    values_N: Floats
    held_out: bool = False

    def to_fit(self) -> tuple[Floats, Floats]:
        """(mixtures_NM, values_N) to learn from. Raises LmworksError when they are held out."""
        if self.held_out:
            raise LmworksError(
                f"{len(self.values_N)} held-out runs were given to learn from",
                next_step="they are kept to judge by: fit to runs of purpose 'proxy' or 'noise'",
            )
        return self.mixtures_NM, self.values_N

    def __len__(self) -> int:
        return len(self.values_N)

    def take(self, chosen_N: Any) -> Rows:
        """Some of the rows; the mark stays."""
        return Rows(self.mixtures_NM[chosen_N], self.values_N[chosen_N], self.held_out)


@final
class RunTable:
    """All runs of a problem. The order in which they were told changes nothing: they stand sorted by trial."""

    def __init__(self, problem: MixtureProblem, runs: Iterable[Run] = ()) -> None:
        self.problem = problem
        self._runs: dict[str, Run] = {}
        for run in runs:
            self.tell(run)

    def tell(self, run: Run) -> None:
        """Add a run. A second one of the same trial replaces the first.

        Raises UsageError for a mixture off the simplex, a size that is not the problem's, or another tokenizer.
        """
        p = np.asarray(run.trial.mixture, dtype=np.float64)
        if p.shape != (len(self.problem.sources),) or abs(p.sum() - 1) > 1e-6 or p.min() < 0:
            raise UsageError(
                f"a mixture of {len(p)} shares that sum to {p.sum():.6g}",
                legal=f"{len(self.problem.sources)} shares, none below 0, that sum to 1",
                next_step=f"in the order {', '.join(self.problem.names)}",
            )
        self.problem.fidelity(run.trial.fidelity)
        if run.tokenizer and (others := {one.tokenizer for one in self if one.tokenizer} - {run.tokenizer}):
            raise UsageError(
                f"runs with tokenizers {run.tokenizer[:12]} and {min(others)[:12]}: their losses do not compare",
                next_step="use one tokenizer for all sizes: use = 'file', or use = 'bytes'",
            )
        self._runs[run.trial.key] = run

    def __iter__(self) -> Iterator[Run]:
        order = sorted(self._runs.values(), key=lambda run: (run.trial.fidelity, run.trial.mixture, run.trial.seed))
        return iter(order)

    def __len__(self) -> int:
        return len(self._runs)

    def has(self, trial: Trial) -> bool:
        """Whether this very run is there."""
        return trial.key in self._runs

    def get(self, trial: Trial) -> Run | None:
        """This very run, if it is there."""
        return self._runs.get(trial.key)

    def chosen(self, wanted: Callable[[Run], bool]) -> list[Run]:
        """Runs with losses that a condition takes."""
        return [run for run in self if run.failed is None and wanted(run)]

    def to_learn(self, fidelity: str, value: str | None = None) -> Rows:
        """Mixtures of a size that may be learnt from, and a column of their losses; None: the target."""
        return self._rows([r for r in self._of(fidelity) if r.trial.purpose not in HELD_OUT], value, held_out=False)

    def to_judge(self, fidelity: str, value: str | None = None) -> Rows:
        """Those that are held out."""
        return self._rows([r for r in self._of(fidelity) if r.trial.purpose in HELD_OUT], value, held_out=True)

    def excluded(self) -> dict[str, int]:
        """Runs that count for nothing, by reason: those that failed, and those without the target's losses."""
        reasons = [run.failed or "no loss of the target" for run in self if not self._usable(run)]
        return dict(Counter(reasons))

    def spent(self, *purposes: Purpose) -> float:
        """Cost of all runs, or of those of some purposes, in runs of the target's size."""
        return math.fsum(run.cost for run in self if not purposes or run.trial.purpose in purposes)

    def ledger(self) -> list[dict[str, Any]]:
        """What was spent, by size and purpose: runs, failed ones, cost, seconds."""
        pairs = sorted({(run.trial.fidelity, run.trial.purpose) for run in self})
        found = []
        for fidelity, purpose in pairs:
            runs = [run for run in self if (run.trial.fidelity, run.trial.purpose) == (fidelity, purpose)]
            sums = {name: math.fsum(getattr(run, name) for run in runs) for name in ("cost", "seconds")}
            failed = sum(run.failed is not None for run in runs)
            found.append({"fidelity": fidelity, "purpose": purpose, "runs": len(runs), "failed": failed, **sums})
        return found

    def _usable(self, run: Run) -> bool:
        return run.failed is None and math.isfinite(self.problem.value(run.losses))

    def _of(self, fidelity: str) -> list[Run]:
        return [run for run in self if run.trial.fidelity == fidelity and self._usable(run)]

    def _rows(self, runs: list[Run], column: str | None, *, held_out: bool) -> Rows:
        mixtures = np.array([run.trial.mixture for run in runs]).reshape(len(runs), len(self.problem.sources))
        values = [self.problem.value(r.losses) if column is None else r.losses.get(column, math.nan) for r in runs]
        return Rows(mixtures, np.array(values, dtype=np.float64), held_out)
