"""One training run as a job, and what is read from its folder: an arm of a comparison, a proxy of a mixture."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import NonFinite, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.parallel.launch import Launch, launch
from lmworks.train.loop import run

AXES = ("step", "tokens", "flops", "seconds", "joules")
"""Columns that can be a budget; 'seconds' and 'joules' are summed up, the others stand in the rows as they are."""


class Quiet:
    """A reporter for a job's log: notes and validations, a line each."""

    def note(self, text: str) -> None:
        """A sentence."""
        print(text, flush=True)  # noqa: T201  (the log of the job)

    def preparing(self, **facts: Any) -> None:
        """Nothing: tokens are made once for all runs."""

    def begin(self, step: int, steps: int) -> None:
        """Where the run begins."""
        self.note(f"step {step} of {steps}")

    def row(self, row: dict[str, Any]) -> None:
        """Only validations."""
        if "val_loss" in row:
            self.note(f"step {row['step']}: val_loss {row['val_loss']:.4f}")

    def end(self) -> None:
        """Nothing more to say."""


def train_arm(recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train, or go on with what is there. A loss that explodes is an answer too: {'failed': why}.

    A layout that names several ranks gets them, on the machine of the job.
    """
    decoded = recipes.decode(recipe, verb="train", source=folder)
    try:
        if decoded.layout.asked == 1:
            run(decoded, Path(folder), resume="auto", report=Quiet())
        else:
            _on_ranks(decoded, Path(folder))
    except NonFinite as error:
        return {"failed": error.what}
    return {"failed": None}


def _on_ranks(decoded: Any, folder: Path) -> None:
    """The same, as `lmworks launch --local` does it; the ranks share the threads of the job."""
    ranks = decoded.layout.asked
    if ranks is None:
        raise UsageError("an arm's layout must say how many ranks it has", legal="layout.use = 'ranks'")
    path = folder.with_name(f"{folder.name}.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, recipes.dump(decoded))
    words = [sys.executable, "-m", "lmworks", "train", str(path), "--run", str(folder)]
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // ranks)
    launch(lambda _: words, Launch(ranks=ranks, logs=folder / "logs", threads=threads), Quiet().note)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run left: its rows, with every axis summed up."""

    folder: Path
    failed: str | None
    """Why it has no end; None when it has."""
    rows: Sequence[dict[str, Any]]

    @staticmethod
    def of(folder: Path, failed: str | None = None) -> Measured:
        """Read a run folder's metrics. Rows of a validation get the axes of their step."""
        found: list[dict[str, Any]] = []
        at = dict.fromkeys(AXES, 0.0)
        for row in rows(RunFolder(folder).metrics):
            at["step"] = row["step"]
            for axis in ("tokens", "flops"):
                at[axis] = row.get(axis, at[axis])
            for axis in ("seconds", "joules"):
                at[axis] += row.get(axis, 0.0)
            found.append({**row, **{f"at/{axis}": value for axis, value in at.items()}})
        return Measured(folder=folder, failed=failed, rows=found)

    def values(self, column: str) -> list[float]:
        """Every value of a column, in order."""
        return [float(row[column]) for row in self.rows if column in row]

    def curve(self, column: str, axis: str) -> list[tuple[float, float]]:
        """(place on the axis, value) for every row that has the column."""
        return [(float(row[_place(axis)]), float(row[column])) for row in self.rows if column in row]

    def spent(self, axis: str) -> float:
        """The whole run's steps, tokens, FLOPs, seconds or joules."""
        return float(self.rows[-1][_place(axis)]) if self.rows else 0.0

    def take(self, column: str, what: str) -> float:
        """The last, mean, least or greatest value of a column; infinite when the run exploded, nan without values."""
        values = self.values(column)
        if self.failed is not None and what == "last":
            return math.inf
        if not values:
            return math.nan
        return {"last": values[-1], "mean": sum(values) / len(values), "min": min(values), "max": max(values)}[what]


def _place(axis: str) -> str:
    """The column that holds a row's place on an axis."""
    return f"at/{'step' if axis == 'steps' else axis}"


def reach(curve: Sequence[tuple[float, float]], target: float, budget: float) -> float:
    """The share of `budget` at which a curve first comes down to `target`, by straight lines; inf: never."""
    before: tuple[float, float] | None = None
    for place, value in curve:
        if value <= target:
            if before is None or before[1] == value:
                return place / budget
            share = (before[1] - target) / (before[1] - value)
            return (before[0] + share * (place - before[0])) / budget
        before = (place, value)
    return math.inf
