"""Curves of a run: the columns of metrics.jsonl, read as the file grows, thinned for a picture."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

from lmworks.board.reading import Tail

MOST_POINTS = 1500
"""Buckets of a long run; each gives up to three rows: its first, its lowest, its highest loss."""
MOST_COLUMNS = 400
"""Columns that are kept; a file that has more is not one of ours."""
NAN = math.nan
SHOWN = 100
"""Steps without a finite loss that are listed."""


class Columns:
    """Rows of one kind as columns of numbers; NaN where a row has none."""

    def __init__(self) -> None:
        self.names: dict[str, array[float]] = {}
        self.rows = 0

    def add(self, row: dict[str, float]) -> None:
        """Append a row; a new column is NaN in the rows before."""
        for name in row:
            if name not in self.names and len(self.names) < MOST_COLUMNS:
                self.names[name] = array("d", [NAN]) * self.rows
        for name, column in self.names.items():
            column.append(row.get(name, NAN))
        self.rows += 1

    def last(self, name: str) -> float:
        """The newest value of a column; NaN when there is none."""
        column = self.names.get(name)
        return column[-1] if column else NAN

    def picture(self, name: str, most: int = MOST_POINTS) -> dict[str, list[float | None]]:
        """The columns as JSON values, thinned to what a picture of column `name` needs."""
        chosen = list(range(self.rows)) if self.rows <= 3 * most else self._chosen(name, most)
        return {key: [_short(column[i]) for i in chosen] for key, column in self.names.items()}

    def _chosen(self, name: str, most: int) -> list[int]:
        """Of each bucket of rows the first, and those with the lowest and the highest value: peaks stay."""
        column = self.names.get(name) or array("d", [NAN]) * self.rows
        size = math.ceil(self.rows / most)
        chosen = {self.rows - 1}
        for start in range(0, self.rows, size):
            bucket = range(start, min(start + size, self.rows))
            finite = [i for i in bucket if math.isfinite(column[i])]
            extremes = (min(finite, key=column.__getitem__), max(finite, key=column.__getitem__)) if finite else ()
            chosen |= {start, *extremes}
        return sorted(chosen)


class Curves:
    """Everything that metrics.jsonl of one run holds."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path, take=self._take, forget=self._forget)
        self._picture: dict[str, Any] | None = None
        self._forget()

    def picture(self) -> dict[str, Any]:
        """Columns of steps and of validations. `elapsed` and `joules_so_far` are sums of `seconds` and of energy."""
        if self._tail.look() or self._picture is None:
            self._picture = {
                "steps": self._steps.picture("loss"),
                "checks": self._checks.picture("val_loss"),
                "rows": self._steps.rows,
                "not_finite": self._not_finite[:SHOWN],
                "damaged": self._tail.damaged,
                "skipped_bytes": self._tail.skipped,
            }
        return self._picture

    def _forget(self) -> None:
        self._steps, self._checks = Columns(), Columns()
        self._elapsed = self._joules = 0.0
        self._not_finite: list[float] = []

    def _take(self, row: dict[str, Any]) -> None:
        numbers = {name: value for name, given in row.items() if (value := _number(given)) is not None}
        if "step" not in numbers:
            return
        if "loss" in numbers:
            self._elapsed += _finite(numbers.get("seconds"))
            self._joules += _finite(numbers.get("joules")) + _finite(numbers.get("joules_modelled"))
            if not math.isfinite(numbers["loss"]):
                self._not_finite.append(numbers["step"])
        extra = {"elapsed": self._elapsed} | ({"joules_so_far": self._joules} if self._joules else {})
        if "loss" in numbers:
            self._steps.add(numbers | extra)
        else:
            flops = self._steps.last("flops")
            self._checks.add({"flops": flops} | numbers | extra)


def _number(value: Any) -> float | None:
    """A number, also one that is not finite, which a journal writes as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if not isinstance(value, str) or not math.isfinite(found) else None


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _short(value: float) -> float | None:
    """Seven figures are more than a picture shows; None where there is no finite number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
