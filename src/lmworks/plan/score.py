"""A plan held against a run that was made: its step, its rate, its memory by class, its energy.

What is told is the run's own layout on a cluster, as `lmworks plan` tells it without corrections. What is measured is
in the run's folder: the median of its steady steps (the first `FIRST` of each attempt make what is kept from step to
step), and the memory of the rank that took most. The factor is the one on what devices do by themselves
(`Cluster.slowed`) with which the simulated step takes the measured time: whatever the model leaves out, slow links too,
is booked on computing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import SHAPE
from lmworks.parallel.footprint import CLASSES, WORDS, Footprint, in_words, vocabulary_of
from lmworks.parallel.layout import Layout
from lmworks.plan import bill, simulate
from lmworks.plan.bill import KWH
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.report import duration, number_in_words
from lmworks.plan.residuals import Correction, Residual, correction, figures_of
from lmworks.plan.shape import Ground
from lmworks.plan.time import Seconds
from lmworks.plan.work import Work

FIRST = 3
"""Steps of each attempt that do not count."""
ENOUGH = 5
"""Steady steps of which a median is worth keeping."""
FARTHEST = 1e4
"""Factors from one over this to this are looked at."""
CLOSE = 1e-7
"""How near to the true factor the search ends, relative."""
EXTRA = 0.01
"""Share of passes beyond a plain step's that still is a plain step."""


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder says."""

    id: str
    folder: Path
    recipe: Any
    """Settled."""
    choice: Choice
    on: str
    """The hardware, in words."""
    seconds: tuple[float, ...]
    """Of the steady steps."""
    passes: float
    """FLOPs of a step, the probe's passes included."""
    memory: tuple[int, Footprint] | None
    """The rank that took most, and what it took; None where nothing was measured."""
    joules: float | None
    """Of a training step, all machines; None where it was not measured."""


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """A figure told and measured."""

    name: str
    unit: str
    """s, tokens/s, bytes, J."""
    predicted: float | None
    """None where nobody can tell."""
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """A plan beside a run."""

    run: Run
    seconds: Seconds
    """Of a step as told, uncorrected."""
    parts: tuple[Part, ...]
    factor: float | None
    """On what devices do by themselves; None where no factor explains the step."""
    earlier: Correction
    """What other runs say of the cluster."""
    corrected_seconds: float
    """Of a step as told with that."""
    doubts: tuple[str, ...]
    """Why the factor is not worth keeping; empty where it is."""
    residual: Residual | None
    """To be kept; None where there are doubts."""


def score(folder: Path, cluster: Cluster) -> Score:
    """Hold a run against what a plan says of it. Raises UsageError for a folder without a run, a run that plans do not
    model, or a cluster of other devices; LmworksError for damaged files."""
    run = read(folder)
    ground = Ground(run.recipe, cluster)
    if ground.device != run.recipe.device:
        raise UsageError(
            f"the run was on {run.recipe.device}, and {cluster.name} is a cluster of {cluster.kind}s",
            where=str(folder),
            next_step="--cluster NAME of the machine that it ran on, or a .toml file of your own",
        )
    step = simulate.of_choice(Work(ground), run.choice)
    measured = statistics.median(run.seconds)

    def told(factor: float) -> float:
        slowed = Work(Ground(run.recipe, cluster.slowed(factor)))
        return simulate.of_choice(slowed, run.choice).seconds.total

    factor = solve(told, measured)
    earlier = correction(cluster, ground.precision, without=run.id)
    doubts = tuple(_doubts(run, ground, factor))
    residual = None
    if factor is not None and not doubts:
        residual = Residual(
            run=run.id,
            folder=str(folder.resolve()),
            cluster=cluster.name,
            figures=figures_of(cluster),
            precision=ground.precision,
            devices=run.choice.layout.ranks,
            steps=len(run.seconds),
            predicted_seconds=step.seconds.total,
            measured_seconds=measured,
            factor=factor,
        )
    return Score(
        run=run,
        seconds=step.seconds,
        parts=tuple(_parts(run, ground, step.seconds, measured)),
        factor=factor,
        earlier=earlier,
        corrected_seconds=told(earlier.factor),
        doubts=doubts,
        residual=residual,
    )


def solve(told: Callable[[float], float], measured: float) -> float | None:
    """The factor at which `told`, which grows with it, gives `measured`; None where none between 1 / FARTHEST and
    FARTHEST does."""
    low, high = 1 / FARTHEST, FARTHEST
    if not told(low) <= measured <= told(high):
        return None
    while high / low > 1 + CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if told(middle) < measured else (low, middle)
    return math.sqrt(low * high)


def _doubts(run: Run, ground: Ground, factor: float | None) -> list[str]:
    found = []
    if len(run.seconds) < ENOUGH:
        found.append(f"steady steps: {len(run.seconds)}, and {ENOUGH} are needed, behind the first {FIRST}")
    each = 3 * ground.shape.cost(sequence=ground.sequence).forward_flops_per_token
    plain = each * run.recipe.batch_size * ground.sequence
    if run.passes > (1 + EXTRA) * plain:
        more = 100 * (run.passes / plain - 1)
        found.append(f"its parts make {more:.0f} % more passes than a plain step, and plans do not count them")
    if run.recipe.compile:
        found.append("its blocks were compiled, and plans tell the time of plain ones")
    if factor is None:
        found.append("no factor on computing explains the step: look at the cluster's links and figures")
    return found


def _parts(run: Run, ground: Ground, seconds: Seconds, measured: float) -> list[Part]:
    tokens = run.recipe.batch_size * ground.sequence
    found = [
        Part(name="step", unit="s", predicted=seconds.total, measured=measured),
        Part(name="tokens/s", unit="tokens/s", predicted=tokens / seconds.total, measured=tokens / measured),
    ]
    if run.memory is not None:
        rank, seen = run.memory
        told = ground.footprint(run.choice, run.choice.layout.place(rank, "pp"))
        sizes = [(WORDS[name], getattr(told, name), getattr(seen, name)) for name in CLASSES]
        for name, one, other in [*sizes, ("memory in all", told.total, seen.total)]:
            found.append(Part(name=name, unit="bytes", predicted=one, measured=other))
    if run.joules is not None:
        told_kwh = bill.of_run(ground.cluster, seconds, devices=run.choice.layout.ranks, steps=1, region=None).kwh
        found.append(Part(name="energy of a step", unit="J", predicted=told_kwh * KWH, measured=run.joules))
    return found


# --- what a run's folder says -----------------------------------------------------------------------------------------


def read(path: Path) -> Run:
    """A run's folder. Raises as `score` does."""
    folder = RunFolder(path)
    if not folder.exists():
        text = "is no run's folder: there is no recipe.toml in it"
        raise UsageError(text, where=str(path), legal="a folder that lmworks train made, such as runs/quickstart")
    recipe = recipes.load(folder.recipe, verb="train")
    layout = recipe.layout
    if not isinstance(layout, Layout) or layout.servers is not None:
        text = "its layout is a rule that a run settles, or has servers of attention: plans do not model those"
        raise UsageError(text, where=str(folder.recipe))
    try:
        recipe = _with_vocabulary(recipe, path)
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        attempts = [int(attempt["step"]) for attempt in record["attempts"]]
        seconds, passes = _steps(folder, attempts)
        memory, joules = _memory(folder, layout), _joules(folder)
        hardware = record["hardware"]
        on = str(hardware.get("gpu") or hardware.get("processor") or hardware["device"])
        run_id = str(record["id"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"its files do not say what a run's files say: {type(error).__name__}: {error}"
        raise LmworksError(text, where=str(path), next_step="is the run complete, and of this lmworks?") from error
    if not seconds:
        text = f"has no steps behind the first {FIRST} of an attempt"
        raise UsageError(text, where=str(path), next_step=f"train at least {FIRST + ENOUGH} steps")
    own = recipe.batch_size // layout.size("batch")
    rows_at_once = min(recipe.micro_batch_size or own, own)
    return Run(
        id=run_id,
        folder=path,
        recipe=recipe,
        choice=Choice(layout=layout, rows=rows_at_once, micro_batches=own // rows_at_once, saved=recipe.saved),
        on=on,
        seconds=seconds,
        passes=passes,
        memory=memory,
        joules=joules,
    )


def _with_vocabulary(recipe: Any, path: Path) -> Any:
    """The recipe with the size of the token table, which the run knew and the recipe may leave to a tokenizer."""
    if vocabulary_of(recipe) is not None:
        return recipe
    size = tomllib.loads((path / SHAPE).read_text(encoding="utf-8"))["model"]["vocab_size"]
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=int(size)))


def _steps(folder: RunFolder, attempts: list[int]) -> tuple[tuple[float, ...], float]:
    """Seconds of the steady steps; FLOPs of a step."""
    steps = [row for row in rows(folder.metrics) if "seconds" in row]
    first = {at + i for at in attempts for i in range(1, FIRST + 1)}
    steady = tuple(float(row["seconds"]) for row in steps if row["step"] not in first)
    if not all(math.isfinite(value) and value > 0 for value in steady):
        raise ValueError("metrics.jsonl has steps that took no time")
    return steady, float(steps[-1]["flops"]) / steps[-1]["step"] if steps else 0.0


def _memory(folder: RunFolder, layout: Layout) -> tuple[int, Footprint] | None:
    """The rank that took most, by what each measured last."""
    found: list[tuple[int, Footprint]] = []
    for rank in range(layout.ranks):
        events = folder.events if rank == 0 else folder.path / "ranks" / f"{rank:05d}" / "events.jsonl"
        seen = [row["attrs"]["measured"] for row in rows(events) if row["name"] == "memory"]
        if seen:
            found.append((rank, Footprint(**seen[-1])))
    return max(found, key=lambda entry: entry[1].total) if found else None


def _joules(folder: RunFolder) -> float | None:
    """Of a step, where counters gave at least nine tenths of the run's energy: what models give is no measurement."""
    if not folder.is_done():
        return None
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    energy = summary["energy"]
    if energy is None or energy["measured_share"] < 0.9:
        return None
    return float(energy["phases_kwh"]["train"]) * KWH / int(summary["steps"])


# --- for people and scripts -------------------------------------------------------------------------------------------

HEADER = ["", "predicted", "measured", "measured/predicted"]


def table_rows(found: Score) -> list[list[str]]:
    """A row for each part, under `HEADER`."""
    rows_of = []
    for part in found.parts:
        ratio = "-" if part.ratio is None else f"{part.ratio:.3g}"
        rows_of.append([part.name, _in_words(part.predicted, part.unit), _in_words(part.measured, part.unit), ratio])
    return rows_of


def _in_words(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit == "bytes":
        return in_words(int(value))
    return duration(value) if unit == "s" else f"{number_in_words(value)} J" if unit == "J" else number_in_words(value)


def as_json(found: Score, cluster: Cluster, kept: Path | None) -> dict[str, Any]:
    """Everything, for scripts. `kept`: the file that the factor was added to."""
    run = found.run
    return {
        "run": run.id,
        "folder": str(run.folder),
        "on": run.on,
        "cluster": cluster.name,
        "devices": run.choice.layout.ranks,
        "steady_steps": len(run.seconds),
        "parts": [dataclasses.asdict(part) | {"ratio": part.ratio} for part in found.parts],
        "predicted_seconds_by_class": found.seconds.by_class(),
        "factor": found.factor,
        "doubts": list(found.doubts),
        "kept": None if kept is None else str(kept),
        "earlier": found.earlier.as_json(),
        "corrected_step_seconds": found.corrected_seconds,
    }
