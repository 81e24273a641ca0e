"""A comparison, from arms to findings: trials for equal budgets, tuning, one run per arm and seed, verdicts.

All runs are jobs in one folder. What is done is not done again, so a killed comparison goes on where it was:

    FOLDER/proof.toml         what is compared
    FOLDER/jobs/              calls, results, logs
    FOLDER/runs/NAME-KEY/     run folders
    FOLDER/comparison.json    arms, values, findings
    FOLDER/curves.png         report.html
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError
from lmworks.core.recipe import Table
from lmworks.jobs.job import Job, JobFolder
from lmworks.prove.budget import cost_of_step, equal_steps, needs_trial, trial_table
from lmworks.prove.judge import Finding, judge
from lmworks.prove.recipe import Arm, Proof, Test, arm_table
from lmworks.train.arm import Measured

TRAIN = "train.arm:train_arm"


class Told(Protocol):
    """Who hears how far a comparison is."""

    def stage(self, name: str, jobs: int) -> None:
        """A stage with so many jobs begins."""
        ...

    def job(self, name: str, event: str) -> None:
        """A job was 'started', 'done' or 'failed'."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One point of an arm's grid, and what it gave."""

    point: Table
    value: float


@dataclass(kw_only=True)
class ArmResult:
    """What became of one arm."""

    arm: Arm
    table: Table
    """Its recipe with the chosen values and steps, seed left open."""
    steps: int
    tried: list[Tried] = field(default_factory=list)
    chosen: Table = field(default_factory=dict)
    runs: dict[int, Measured] = field(default_factory=dict)

    def at_edge(self) -> list[str]:
        """Tuned settings whose best value is the first or last of three or more tried ones."""
        ends = {path: (values[0], values[-1]) for path, values in self.arm.grid.items() if len(values) > 2}
        return [path for path, pair in ends.items() if self.chosen.get(path) in pair]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms with their runs, and the findings."""

    proof: Proof
    arms: dict[str, ArmResult]
    findings: tuple[Finding, ...]
    confounded: dict[str, tuple[str, ...]]
    """Arm -> settings, beyond the named ones, in which it differs from one that it is held against."""


def compare(proof: Proof, folder: Path, told: Told) -> Comparison:
    """Do what is not done yet, and judge. Raises RecipeError before anything runs when an arm is no recipe."""
    tables = {arm.name: arm_table(proof, arm) for arm in proof.arms}
    decoded = {name: recipes.decode(table, verb="train", source=f"arm '{name}'") for name, table in tables.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "proof.toml", recipes.dump(proof))
    work = _Work(proof, folder, told)
    if proof.axis == "steps":
        steps = {name: one.steps for name, one in decoded.items()}
    else:
        steps = equal_steps(work.costs(tables, decoded), proof.baseline, decoded[proof.baseline].steps)
    arms = {
        arm.name: ArmResult(arm=arm, table={**tables[arm.name], "steps": steps[arm.name]}, steps=steps[arm.name])
        for arm in proof.arms
    }
    work.tune(arms)
    work.train(arms)
    tests = proof.tests or default_tests(proof)
    pairs = {(test.arm, test.against) for test in tests}
    apart = {pair: confounders(proof, decoded[pair[0]], decoded[pair[1]]) for pair in pairs}
    runs = {name: result.runs for name, result in arms.items()}
    found = tuple(judge(test, runs, proof.seeds, proof.axis, apart[test.arm, test.against]) for test in tests)
    return Comparison(proof=proof, arms=arms, findings=found, confounded=confounded_arms(proof, decoded))


def default_tests(proof: Proof) -> tuple[Test, ...]:
    """Every other arm's last metric against the baseline's."""
    others = [arm.name for arm in proof.arms if arm.name != proof.baseline]
    return tuple(Test(claim="", arm=name, against=proof.baseline, column=proof.metric, want="less") for name in others)


def confounders(proof: Proof, ours: Any, theirs: Any) -> tuple[str, ...]:
    """Settings in which two arms differ though the proof does not name them.

    A proof that names none may differ in one slot: with more, all of them are returned.
    """
    differ = recipes.differences(recipes.table_of(ours), recipes.table_of(theirs))
    free = {"seed"} | ({"steps"} if proof.axis != "steps" else set())
    paths = [path for path in differ if path not in free]
    if not proof.may_differ:
        slots = sorted({path.partition(".")[0] for path in paths})
        return tuple(slots) if len(slots) > 1 else ()
    named = proof.may_differ
    return tuple(p for p in paths if not any(p == name or p.startswith(f"{name}.") for name in named))


def confounded_arms(proof: Proof, decoded: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Arms that differ in more than they should from an arm that they are held against, with what it is.

    An arm that no test names is held against the baseline.
    """
    pairs = [(test.arm, test.against) for test in proof.tests or default_tests(proof)]
    named = {name for pair in pairs for name in pair}
    pairs += [(name, proof.baseline) for name in decoded if name not in named]
    found: dict[str, tuple[str, ...]] = {}
    for arm, against in pairs:
        found[arm] = tuple(dict.fromkeys([*found.get(arm, ()), *confounders(proof, decoded[arm], decoded[against])]))
    return {arm: what for arm, what in found.items() if what}


class _Work:
    """The jobs of one comparison."""

    def __init__(self, proof: Proof, folder: Path, told: Told) -> None:
        self.proof, self.told = proof, told
        self.jobs = JobFolder(folder / "jobs")
        self.folder = folder

    def costs(self, tables: Mapping[str, Table], decoded: Mapping[str, Any]) -> dict[str, float]:
        """What a step of each arm costs on the proof's axis."""
        trials: dict[str, Measured] = {}
        if needs_trial(self.proof.axis):
            asked = {f"trial-{name}": trial_table(table) for name, table in tables.items()}
            runs = self._run("trials", asked)
            trials = {name: runs[f"trial-{name}"] for name in tables}
            for name, run in trials.items():
                if run.failed is not None:
                    raise LmworksError(f"the trial of arm '{name}' failed: {run.failed}", where=str(run.folder))
        return {name: cost_of_step(self.proof.axis, decoded[name], trials.get(name)) for name in tables}

    def tune(self, arms: Mapping[str, ArmResult]) -> None:
        """Search the arms' grids, each round of all arms together."""
        search = self.proof.tuning.search
        longest = max(len(result.arm.grid) for result in arms.values())
        for rounds in range(longest if search == "in-turn" else min(longest, 1)):
            asked: dict[str, tuple[ArmResult, Table]] = {}
            for name, result in arms.items():
                for i, point in enumerate(grid_points(result.arm, search, rounds, result.tried)):
                    asked[f"tune-{name}-{rounds}-{i}"] = (result, point)
            base = arms[self.proof.baseline].steps
            runs = self._run("tuning", {job: self._tuning_table(*pair, base) for job, pair in asked.items()})
            for job, (result, point) in asked.items():
                result.tried.append(Tried(point=point, value=_metric(runs[job], self.proof.metric)))
            for name, result in arms.items():
                self._choose(name, result)
        for result in arms.values():
            result.table = recipes.with_values(result.table, result.chosen)

    def _choose(self, name: str, result: ArmResult) -> None:
        """Take the best point so far. Raises LmworksError when every point exploded."""
        if not result.tried:
            return
        best = best_of(result.tried)
        if math.isinf(best.value):
            raise LmworksError(f"every point of arm '{name}' exploded", next_step="give its grid smaller rates")
        result.chosen = dict(best.point)

    def _tuning_table(self, result: ArmResult, point: Table, base: int) -> Table:
        """The arm's recipe at a point of its grid; as long, beside a tuning run of `base` steps, as its budget says."""
        tuning = self.proof.tuning
        steps = result.steps if tuning.steps is None else max(1, round(tuning.steps * result.steps / base))
        table = {**result.table, "checkpoints": {}, "samples": {}, "sinks": [], "steps": steps, "seed": tuning.seed}
        validation = {key: value for key, value in result.table.get("validation", {}).items() if key != "every"}
        return recipes.with_values({**table, "validation": validation}, point)

    def train(self, arms: Mapping[str, ArmResult]) -> None:
        """One run for each arm and seed, seeds outermost: a comparison cut short has whole pairs."""
        asked = {
            f"run-{name}-{seed}": {**result.table, "seed": seed}
            for seed in self.proof.seeds
            for name, result in arms.items()
        }
        runs = self._run("runs", asked)
        for name, result in arms.items():
            result.runs = {seed: runs[f"run-{name}-{seed}"] for seed in self.proof.seeds}

    def _run(self, stage: str, tables: Mapping[str, Table]) -> dict[str, Measured]:
        """Train each table as a job, those without an answer, and read what all of them left."""
        jobs = []
        for name, table in tables.items():
            key = Job(name=name, call=TRAIN, arguments=table).key[:10]
            arguments = {"recipe": table, "folder": str(self.folder / "runs" / f"{name}-{key}")}
            jobs.append(Job(name=name, call=TRAIN, arguments=arguments))
        self.jobs.add(jobs)
        names = [job.name for job in jobs]
        self.told.stage(stage, sum(not self.jobs.is_done(name) for name in names))
        self.proof.executor.run(self.jobs, names, self.told.job)
        return {
            job.name: Measured.of(Path(job.arguments["folder"]), self.jobs.result(job.name)["failed"]) for job in jobs
        }


def best_of(tried: Sequence[Tried]) -> Tried:
    """The point with the lowest metric, the first of several."""
    return min(tried, key=lambda one: one.value)


def grid_points(arm: Arm, search: str, rounds: int, tried: Sequence[Tried]) -> list[Table]:
    """The points of an arm's grid that a round of the search tries: those it has not tried before."""
    grid = arm.grid
    if search == "product":
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    if rounds >= len(grid):
        return []
    path = list(grid)[rounds]
    base = best_of(tried).point if tried else {name: arm.set.get(name, values[0]) for name, values in grid.items()}
    known = [one.point for one in tried]
    return [point for value in grid[path] if (point := {**base, path: value}) not in known]


def _metric(run: Measured, column: str) -> float:
    value = run.take(column, "last")
    return math.inf if math.isnan(value) else value


def seeds_of(proof: Proof, count: int | None) -> Sequence[int]:
    """The first `count` seeds of a proof; more than it has are counted on."""
    if count is None:
        return proof.seeds
    more = itertools.count(max(proof.seeds) + 1)
    return [*proof.seeds[:count], *itertools.islice(more, max(0, count - len(proof.seeds)))]
