"""What runs taught about a cluster, kept for the next plan: how much longer its devices compute than they were told to.

`lmworks plan --score RUN` finds the factor on what devices do by themselves that makes the told step as long as the
measured one, and adds it to `plan/CLUSTER.jsonl` in lmworks' home, a line for each run. A plan on the same cluster
takes the median of the runs with its precision, so that one run on a busy machine moves it little, and says so. A line
counts for the figures of the cluster, the fit and the lmworks that it was found with, and for no others. A file that
cannot be read is named and not used; nothing is added to it either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, RecipeError
from lmworks.core.home import home
from lmworks.core.journal import Journal
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.plan.cluster import Cluster

UNTIMED = ("source", "checked", "points", "price", "carbon", "watts", "idle_watts", "memory_bytes")
"""Settings of a cluster and of a fit on which no time hangs."""


@final
@dataclass(frozen=True, kw_only=True)
class Residual:
    """What one run said of a cluster."""

    run: str
    """The run's own id: scored again, it takes the place of its earlier line."""
    folder: str
    """Where it was; for people."""
    cluster: str
    """Name of the cluster."""
    figures: str
    """A hash of the cluster's figures, its fit, and the version of lmworks."""
    precision: str
    """Of the run."""
    devices: PositiveInt
    """Ranks of the run."""
    steps: PositiveInt
    """Of which the measured time is the median."""
    predicted_seconds: PositiveFloat
    """Of a step, uncorrected."""
    measured_seconds: PositiveFloat
    """Of a step."""
    factor: PositiveFloat
    """On what devices do by themselves."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.predicted_seconds, self.measured_seconds, self.factor))):
            raise ValueError("holds a number that is not finite")


@final
@dataclass(frozen=True, kw_only=True)
class Correction:
    """What a plan makes of them."""

    factor: float = 1.0
    """On what devices do by themselves: the median of the runs."""
    runs: int = 0
    lowest: float = 1.0
    """Of the runs."""
    highest: float = 1.0
    file: str | None = None
    """Where the runs are kept; None where nothing is."""
    left_out: tuple[str, ...] = ()
    """What stands in the file and is not used, and why: sentences."""

    def in_words(self) -> list[str]:
        """Lines for people; none where no run was scored."""
        lines = list(self.left_out)
        if self.runs:
            many = f"{self.runs} run" + ("s" if self.runs > 1 else "")
            spread = f" ({self.lowest:.3g} to {self.highest:.3g})" if self.runs > 1 else ""
            lines.insert(0, f"corrected by {many}: x{self.factor:.3g}{spread} on what devices do by themselves")
        return lines

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return dataclasses.asdict(self)


def file_of(cluster: Cluster) -> Path:
    """Where runs of a cluster are kept, by its name."""
    plain = re.sub(r"[^a-z0-9]+", "-", cluster.name.lower()).strip("-")
    return home() / "plan" / f"{plain or 'cluster'}.jsonl"


def figures_of(cluster: Cluster) -> str:
    """A hash of all that told times hang on beside the recipe."""
    known = {"cluster": dataclasses.asdict(cluster), "fit": dataclasses.asdict(cluster.efficiency)}
    text = json.dumps([_timed(known), metadata.version("lmworks")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _timed(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _timed(value) for key, value in node.items() if key not in UNTIMED}
    return [_timed(value) for value in node] if isinstance(node, list | tuple) else node


def kept(cluster: Cluster) -> list[Residual]:
    """The runs of a cluster, each once, the last word of each. Raises LmworksError for a file that is damaged, or that
    holds something else."""
    path, found = file_of(cluster), {}
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, f"cannot be read: {error}") from error
    if text and not text.endswith("\n"):
        raise _unusable(path, "its last line is cut short")
    for number, line in enumerate(text.splitlines(), start=1):
        entry = _decoded(path, number, line)
        if entry.cluster != cluster.name:
            raise _unusable(path, f"line {number} is of the cluster '{entry.cluster}', not of '{cluster.name}'")
        found[entry.run] = entry
    return list(found.values())


def _decoded(path: Path, number: int, line: str) -> Residual:
    try:
        found = recipes.decode_as(Residual, json.loads(line), source=f"line {number}")
    except json.JSONDecodeError as error:
        raise _unusable(path, f"line {number} is not JSON: {error.msg}") from error
    except RecipeError as error:
        raise _unusable(path, f"line {number} holds no scored run: {error.problems[0]}") from error
    assert isinstance(found, Residual)
    return found


def keep(cluster: Cluster, residual: Residual) -> Path:
    """Add a run to the file; gives its path. Raises LmworksError for a file that `kept` refuses, or no place to write
    to."""
    kept(cluster)
    path = file_of(cluster)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(path)
        journal.append(dataclasses.asdict(residual))
        journal.sync()
    except OSError as error:
        step = "set LMWORKS_HOME to a folder that can be written to"
        raise LmworksError(f"cannot be written: {error.strerror}", where=str(path), next_step=step) from error
    return path


def correction(cluster: Cluster, precision: str, *, without: str | None = None) -> Correction:
    """What plans of a precision on a cluster are corrected by; `without`: the id of a run that has no say. A file that
    cannot be used corrects nothing, and the answer says why."""
    path = file_of(cluster)
    try:
        entries = [entry for entry in kept(cluster) if entry.run != without]
    except LmworksError as error:
        return Correction(file=str(path), left_out=(f"not corrected by runs: {error.where}: {error.what}",))
    if not entries:
        return Correction()
    figures = figures_of(cluster)
    current = [entry for entry in entries if entry.figures == figures]
    used = [entry.factor for entry in current if entry.precision == precision]
    left_out = []
    if old := len(entries) - len(current):
        why = "the cluster's figures or lmworks were others then; score them again"
        left_out.append(f"not used: {old} of the runs in {path}; {why}")
    if other := len(current) - len(used):
        left_out.append(f"not used: {other} of the runs in {path}, of another precision than {precision}")
    if not used:
        return Correction(file=str(path), left_out=tuple(left_out))
    return Correction(
        factor=statistics.median(used),
        runs=len(used),
        lowest=min(used),
        highest=max(used),
        file=str(path),
        left_out=tuple(left_out),
    )


def _unusable(path: Path, why: str) -> LmworksError:
    return LmworksError(why, where=str(path), next_step="move the file away or delete it, and score the runs again")
