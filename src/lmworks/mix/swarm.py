"""Live runs: trials become training runs, as jobs in one folder; what is done is not done again.

FOLDER/mix.toml            the recipe
FOLDER/tokenizer/          one for all sizes, where it is trained on the run's text
FOLDER/jobs/               calls, results, logs
FOLDER/runs/SIZE-KEY/      run folders
FOLDER/runs.parquet        the table of runs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError
from lmworks.core.recipe import Table
from lmworks.jobs.job import Job, JobFolder
from lmworks.mix import tables
from lmworks.mix.problem import TOP, Fidelity, Mixture, MixtureProblem, Source
from lmworks.mix.recipe import Mix
from lmworks.mix.runs import Run, RunTable, Trial
from lmworks.train.arm import Measured
from lmworks.train.build import fit_vocabulary

TRAIN = "train.arm:train_arm"


class Told(Protocol):
    """Who hears how far a search is."""

    def stage(self, name: str, jobs: int) -> None:
        """A stage with so many jobs begins."""
        ...

    def job(self, name: str, event: str) -> None:
        """A job was 'started', 'done' or 'failed'."""
        ...


@final
class Swarm:
    """Trains mixtures of one recipe, in a folder."""

    def __init__(self, mix: Mix, folder: Path, told: Told, progress: Callable[..., None] | None = None) -> None:
        """Tokenise the documents and count them. Raises DataError and RecipeError as training would."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "mix.toml", recipes.dump(mix))
        self.mix, self.folder, self._told = mix, folder, told
        self._jobs = JobFolder(folder / "jobs")
        decoded = recipes.decode(mix.table(), verb="train", source=str(folder))
        if decoded.data.tokenizer.sample_limit:
            decoded.data.make_tokenizer(progress=progress).save(folder / "tokenizer")
            self._fixed: Table = {"data.tokenizer": {"use": "file", "path": str((folder / "tokenizer").resolve())}}
            decoded = recipes.decode(mix.table(self._fixed), verb="train", source=str(folder))
        else:
            self._fixed = {}
        prepared = decoded.data.prepare(seed=decoded.seed, progress=progress)
        self._tokenizer = prepared.tokenizer
        self.problem = self._problem(decoded, prepared.manifest["sources"])

    def _problem(self, decoded: Any, found: Table) -> MixtureProblem:
        names = list(decoded.data.shares)
        whole = self._flops(decoded)
        costs = [
            size.cost or self._flops(recipes.decode(self._table(size.set), verb="train")) / whole
            for size in self.mix.sizes
        ]
        sizes = [Fidelity(name=size.name, cost=cost) for size, cost in zip(self.mix.sizes, costs, strict=True)]
        tokens = [int(found[name]["splits"]["training"]["tokens"]) for name in names]
        return MixtureProblem(
            sources=tuple(Source(name=name, tokens=count) for name, count in zip(names, tokens, strict=True)),
            target=self.mix.target or dict.fromkeys(names, 1 / len(names)),
            fidelities=(*sizes, Fidelity(name=TOP, cost=1.0)),
            budget=_tokens(decoded),
            max_epochs=self.mix.max_epochs,
            bounds={name: (pair[0], pair[1]) for name, pair in self.mix.bounds.items()},
        )

    def _flops(self, decoded: Any) -> float:
        """Of a whole run, forward and backward."""
        cost = fit_vocabulary(decoded.model, self._tokenizer).cost(sequence=decoded.data.sequence_length)
        return float(cost.train_flops_per_token) * _tokens(decoded)

    def _table(self, sets: Table) -> Table:
        return self.mix.table({**self._fixed, **sets})

    def recipe(self, mixture: Mixture, sets: Table | None = None) -> Table:
        """The training recipe of a mixture as a table: readers with weights, one tokenizer for all."""
        table = self._table(sets or {})
        readers = [{**reader, "weight": share} for reader, share in zip(table["data"]["readers"], mixture, strict=True)]
        return recipes.with_values(table, {"data.readers": readers})

    def make(self, trials: Sequence[Trial]) -> list[Run]:
        """Train each trial that has no run yet, and read what all of them left.

        A run whose loss exploded is a failed one. Raises LmworksError when a process broke: the same call goes on.
        """
        sizes = {size.name: size.set for size in self.mix.sizes} | {TOP: {}}
        jobs = []
        for trial in trials:
            name = f"{trial.fidelity}-{trial.key}"
            quiet = {"samples": {}, "sinks": [], "seed": trial.seed}
            recipe = self.recipe(trial.mixture, {**sizes[trial.fidelity], **quiet})
            arguments = {"recipe": recipe, "folder": str(self.folder / "runs" / name)}
            jobs.append(Job(name=name, call=TRAIN, arguments=arguments))
        self._jobs.add(jobs)
        names = [job.name for job in jobs]
        self._told.stage(_stage(trials), sum(not self._jobs.is_done(name) for name in names))
        self.mix.executor.run(self._jobs, names, self._told.job)
        return [self._read(trial, job) for trial, job in zip(trials, jobs, strict=True)]

    def _read(self, trial: Trial, job: Job) -> Run:
        measured = Measured.of(Path(job.arguments["folder"]), self._jobs.result(job.name)["failed"])
        names = self.problem.names
        columns = {name: f"val_loss/{name}" if len(names) > 1 else "val_loss" for name in names}
        losses = {name: measured.take(column, "last") for name, column in columns.items()}
        if measured.failed is None and not all(name in losses and losses[name] == losses[name] for name in names):
            raise LmworksError(
                "no held-out document of some sources was read, so their losses are not known",
                where=job.arguments["folder"],
                next_step="raise data.validation or validation.rows of the recipe",
            )
        return Run(
            trial=trial,
            losses={} if measured.failed is not None else losses,
            failed=measured.failed,
            cost=self.problem.fidelity(trial.fidelity).cost,
            seconds=measured.spent("seconds"),
            tokenizer=self._tokenizer.id,
        )

    def keep(self, table: RunTable) -> None:
        """Write the table of runs."""
        tables.write(table, self.folder / "runs.parquet")


def _tokens(decoded: Any) -> int:
    """That a run trains on."""
    return int(decoded.steps * decoded.batch_size * decoded.data.sequence_length)


def _stage(trials: Sequence[Trial]) -> str:
    """'proxy runs of proxy-2l', for people."""
    kinds = dict.fromkeys(f"{trial.purpose} runs of size {trial.fidelity}" for trial in trials)
    return ", ".join(kinds)
