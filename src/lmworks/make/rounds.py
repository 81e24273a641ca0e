"""`lmworks data`: plan what is missing, have it made round by round, hand the documents on.

A round is a list of jobs that do not depend on each other. What a round makes is found by the hash of what goes into
it, so a run that was killed goes on where it was, and changed settings run again only what they touch.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from lmworks.core import catalogue, files
from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError
from lmworks.core.run import RunFolder, record_of
from lmworks.data.cache import MANIFEST, cache_folder
from lmworks.data.code import code_id, sources_id
from lmworks.data.fingerprint import FileFacts, Fingerprint, digest, scan
from lmworks.data.read import Progress, Reader
from lmworks.data.stage import Settling, Surveyed
from lmworks.data.units import DROPPED, FORMAT, Piece, is_whole, manifest_of, pieces_of
from lmworks.jobs.job import Job, JobFolder
from lmworks.jobs.local import Local
from lmworks.make import work
from lmworks.make.recipe import Data, stage_name

SMALL = 16_000_000
"""Bytes of a round below which it is done in this process: starting another takes longer."""


class Telling(Protocol):
    """What a person is told while the rounds go on."""

    def stage(self, name: str, jobs: int) -> None:
        """A round begins."""
        ...

    def job(self, name: str, event: str) -> None:
        """One of its jobs begins or ends."""
        ...


@final
class DataFolder:
    """Where everything of one data run lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.record = path / "record.json"
        self.account = path / "account.json"
        self.work = path / "work"
        self.documents = path / "documents"
        self.dropped = path / "dropped"
        self.tables = path / "tables"


@final
@dataclass
class Trail:
    """The units that a run is made of, in order."""

    reads: list[Path] = field(default_factory=list)
    stages: list[list[Path]] = field(default_factory=list)
    """For each stage the unit of each shard."""
    verdicts: dict[int, Path] = field(default_factory=dict)
    """What settling stages decided, by the number of the stage."""
    handed: list[Path] = field(default_factory=list)
    made: int = 0
    """Jobs that were run; what was there already is not counted."""


def clean(recipe: Data, path: Path, told: Telling, progress: Progress | None = None) -> Trail:
    """Run a data recipe in a folder; the units it came to. Raises DataError, in which case the same call goes on."""
    folder = DataFolder(path)
    with RunFolder(path).alone("works"):
        folder.work.mkdir(parents=True, exist_ok=True)
        files.write_text(folder.recipe, recipes.dump(recipe))
        files.write_json(folder.record, record_of(recipe))
        return _Rounds(recipe, folder, told).run(progress)


def groups(reader: Reader, found: Fingerprint, shard_bytes: int) -> list[list[FileFacts]]:
    """Files that are read by one job: as many as fill a shard. A reader that stops by a count is read by one."""
    if reader.max_bytes is not None:
        return [list(found.files)]
    cut: list[list[FileFacts]] = []
    size = shard_bytes
    for file in found.files:
        if size >= shard_bytes:
            cut.append([])
            size = 0
        cut[-1].append(file)
        size += file.size
    return cut


@final
class _Rounds:
    def __init__(self, recipe: Data, folder: DataFolder, told: Telling) -> None:
        self._recipe, self._folder, self._told = recipe, folder, told
        self._path = str(folder.recipe.resolve())
        self._work = folder.work.resolve()
        self._trail = Trail()

    def run(self, progress: Progress | None) -> Trail:
        pieces = self._read(None, self._recipe.readers, progress)
        for first, last in self._recipe.segments:
            stage = self._recipe.stages[first]
            verdict = self._settle(first, stage, pieces, progress) if isinstance(stage, Settling) else None
            pieces = self._advance(first, last, pieces, verdict)
        self._hand_on(pieces)
        return self._trail

    # --- rounds

    def _read(self, stage: int | None, readers: Sequence[Reader], progress: Progress | None) -> list[Piece]:
        """The shards of readers: of the recipe's, or of those that a stage holds documents against."""
        units: list[Path] = []
        jobs: list[tuple[Job, int]] = []
        found = [scan(reader, cache_folder(None), progress) for reader in readers]
        for number, (reader, source) in enumerate(zip(readers, found, strict=True)):
            for group in groups(reader, source, self._recipe.shard_bytes):
                names = [[file.name, file.sha256] for file in group]
                inputs = [reader.label, reader.settings(), names, self._recipe.shard_bytes, code_id(reader)]
                unit = self._work / "read" / digest([FORMAT, inputs])[:32]
                units.append(unit)
                arguments = {"stage": stage, "reader": number, "sources": [[f.name, f.path] for f in group]}
                jobs += self._missing(unit, "read", sum(file.size for file in group), arguments)
        name = "reading" if stage is None else f"reading what {stage_name(self._recipe.stages[stage])} is held against"
        self._round(name, jobs)
        for source in found:
            source.must_be_unchanged()
        if stage is None:
            self._trail.reads = units
        return [piece for unit in units for piece in pieces_of(unit)]

    def _settle(self, number: int, stage: Settling, pieces: list[Piece], progress: Progress | None) -> Path:
        others = self._read(number, stage.references, progress) if stage.references else []
        surveys: list[Surveyed] = []
        jobs: list[tuple[Job, int]] = []
        code = code_id(stage, *stage.built_on())
        seed = self._recipe.seed if stage.seeded else None
        home = self._work / stage_name(stage)
        for piece in [*pieces, *others] if stage.surveys else []:
            unit = home / f"survey-{digest([FORMAT, piece.sha256, stage.survey_settings(), code, seed])[:32]}"
            surveys.append(Surveyed(folder=unit, records=piece.path))
            arguments = {"stage": number, "piece": piece.to_json()}
            jobs += self._missing(unit, "survey", piece.bytes, arguments)
        self._round(f"{stage_name(stage)}: surveying", jobs)
        inputs = [files.sha256_of(path) for path in stage.inputs()]
        # the folder's name stands for the documents, the files for what was seen of them
        marks = [[survey.folder.name, manifest_of(survey.folder)["files"]] for survey in surveys]
        cut = len(pieces) if stage.surveys else 0
        key = digest([FORMAT, stage.settings(), inputs, code, seed, marks, cut])[:32]
        verdict = home / f"verdict-{key}"
        paths = [[str(survey.folder), str(survey.records)] for survey in surveys]
        arguments = {"stage": number, "surveys": paths[:cut], "references": paths[cut:]}
        self._round(f"{stage_name(stage)}: settling", self._missing(verdict, "settle", 0, arguments))
        self._trail.verdicts[number] = verdict
        return verdict

    def _advance(self, first: int, last: int, pieces: list[Piece], verdict: Path | None) -> list[Piece]:
        jobs: list[tuple[Job, int]] = []
        for shard, piece in enumerate(pieces):
            if len(self._steps(first, last, piece, shard, verdict, is_whole)) <= last - first:
                given = str(verdict) if verdict is not None else None
                arguments = {"first": first, "last": last, "piece": piece.to_json(), "shard": shard, "verdict": given}
                job = Job(name=f"{len(jobs):05d}", call="make.work:advance", arguments=self._with_paths(arguments))
                jobs.append((job, piece.bytes))
        self._round(" > ".join(stage_name(stage) for stage in self._recipe.stages[first : last + 1]), jobs)
        steps = [self._steps(first, last, piece, shard, verdict, _is_there) for shard, piece in enumerate(pieces)]
        self._trail.stages += [[step[i] for step in steps] for i in range(last - first + 1)]
        return [pieces_of(step[-1])[0] for step in steps]

    def _steps(
        self, first: int, last: int, piece: Piece, shard: int, verdict: Path | None, ready: Callable[[Path], bool]
    ) -> list[Path]:
        """The units of a shard from stage to stage, up to the first that is not ready."""
        steps: list[Path] = []
        for number in range(first, last + 1):
            stage, given = self._recipe.stages[number], verdict if number == first else None
            unit = work.unit_folder(self._work, stage, piece, self._recipe.seed, shard, given)
            if not ready(unit):
                break
            steps.append(unit)
            (piece,) = pieces_of(unit)
        return steps

    def _hand_on(self, pieces: list[Piece]) -> None:
        jobs: list[tuple[Job, int]] = []
        names = list(work.facts(self._recipe.stages))
        for piece in pieces:
            key = digest([FORMAT, piece.sha256, self._recipe.output, names, sources_id("lmworks.data.columns")])[:32]
            unit = self._work / "documents" / key
            self._trail.handed.append(unit)
            jobs += self._missing(unit, "hand_on", piece.bytes, {"piece": piece.to_json()})
        self._round("writing documents", jobs)

    # --- jobs

    def _missing(self, unit: Path, call: str, size: int, arguments: dict[str, Any]) -> list[tuple[Job, int]]:
        """A job for a unit that is not there, with the bytes it reads; none when it is."""
        if is_whole(unit):
            return []
        made = {**self._with_paths(arguments, work=False), "folder": str(unit)}
        return [(Job(name=unit.name, call=f"make.work:{call}", arguments=made), size)]

    def _with_paths(self, arguments: dict[str, Any], *, work: bool = True) -> dict[str, Any]:
        return {"recipe": self._path, **({"work": str(self._work)} if work else {}), **arguments}

    def _round(self, name: str, jobs: list[tuple[Job, int]]) -> None:
        unique = {job.arguments.get("folder", job.name): job for job, _ in jobs}  # equal shards are one unit
        numbered = [
            dataclasses.replace(job, name=f"{job.call.rpartition(':')[2]}-{number:05d}")
            for number, job in enumerate(unique.values(), start=1)
        ]
        self._trail.made += len(numbered)
        self._told.stage(name, len(numbered))
        executor = self._recipe.executor
        if isinstance(executor, Local) and (len(numbered) == 1 or sum(size for _, size in jobs) < SMALL):
            for job in numbered:
                catalogue.resolve(job.call)(**job.arguments)
                self._told.job(job.name, "done")
        elif numbered:
            folder = JobFolder(self._folder.path / "jobs" / name.replace(" ", "-").replace(":", "").replace(">", "to"))
            shutil.rmtree(folder.path, ignore_errors=True)  # results of units that are gone do not count
            folder.add(numbered)
            executor.run(folder, [job.name for job in numbered], self._told.job)


def _is_there(unit: Path) -> bool:
    return (unit / MANIFEST).is_file()


def publish(recipe: Data, path: Path, trail: Trail) -> None:
    """Put what was handed on and what was left out where a person finds it, in one step each; old files go.

    documents/[SPLIT/]SOURCE-00000.jsonl.zst    dropped/00-reading/SOURCE-00000.jsonl.zst    dropped/01-STAGE/...
    """
    folder = DataFolder(path)
    documents: dict[str, Path] = {}
    for shard, unit in enumerate(trail.handed):
        manifest = manifest_of(unit)
        for split in manifest["splits"]:
            below = "" if split == "all" else f"{split}/"
            for name in manifest["files"]:
                if name.partition(".")[0] == split:
                    ending = name.partition(".")[2]
                    documents[f"{below}{manifest['source']}-{shard:05d}.{ending}"] = unit / name
    if not documents:
        raise DataError(
            "no document is left",
            where=str(path),
            next_step="the report tells which stage dropped how many, and why; dropped/ holds them",
        )
    _replace(folder.documents, documents)


def publish_dropped(recipe: Data, path: Path, trail: Trail) -> None:
    """Put the documents that were left out beside the others, a folder for reading and one for each stage."""
    names = ["00-reading", *(f"{i:02d}-{stage_name(stage)}" for i, stage in enumerate(recipe.stages, start=1))]
    dropped: dict[str, Path] = {}
    for name, units in zip(names, [trail.reads, *trail.stages], strict=True):
        for shard, unit in enumerate(units):
            manifest = manifest_of(unit)
            if manifest["dropped"]:
                dropped[f"{name}/{manifest['source']}-{shard:05d}.jsonl.zst"] = unit / DROPPED
    _replace(DataFolder(path).dropped, dropped)


def publish_tables(recipe: Data, path: Path, trail: Trail) -> None:
    """Put what settling stages leave for people to read into tables/, a folder for each stage."""
    tables: dict[str, Path] = {}
    for number, verdict in trail.verdicts.items():
        stage = recipe.stages[number]
        assert isinstance(stage, Settling), "only settling stages have verdicts"
        for name in stage.tables(verdict):
            tables[f"{number + 1:02d}-{stage_name(stage)}/{name}"] = verdict / name
    _replace(DataFolder(path).tables, tables)


def _replace(folder: Path, found: dict[str, Path]) -> None:
    """A folder that holds these files and no others; links where the file system has them, copies elsewhere."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, source in found.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, new / name)
        except OSError:
            shutil.copyfile(source, new / name)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    files.sync(folder.parent)
