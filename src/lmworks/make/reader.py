"""The reader `cleaned`: documents as a data recipe leaves them. What is not made yet is made when it is first read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError, Problem, RecipeError, did_you_mean
from lmworks.data.cache import MANIFEST, cache_folder, locked, speaking
from lmworks.data.code import code_id
from lmworks.data.fingerprint import digest, scan
from lmworks.data.read import Progress, Reader, SourceFile
from lmworks.data.record import NO_FACTS, Dropped, Record
from lmworks.data.stage import Settling
from lmworks.data.units import manifest_of, read_records
from lmworks.make import account, rounds
from lmworks.make.recipe import Data

ENDING = ".jsonl.zst"


@final
@dataclass(frozen=True, kw_only=True)
class Cleaned(Reader):
    """The documents of one source of a data recipe, after all of its stages. They lie in $LMWORKS_HOME, or ~/.cache/
    lmworks; documents, settings or code that have changed make anew what they touch, and nothing else."""

    recipe: str
    """A data recipe: a file, or the name of a shipped one."""
    source: str
    """The name of one of its readers."""
    side: str = "train"
    """Which side of its stage `split`: train, validation or test; 'all' where it has no such stage."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted settings written over the recipe, as in { "stages.2.scope" = "per-source" }."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A recipe that cannot be read, that reads itself, or that has no such source."""
        try:
            circle = _circle(self.recipe)
            if circle is not None:
                yield Problem(path="recipe", text=f"is read to make itself: {' > '.join(circle)}")
                return
            decoded = self.decoded
        except RecipeError as error:
            yield Problem(path="recipe", text=str(error))
            return
        names = [reader.label for reader in decoded.readers]
        if self.source not in names:
            text = f"{self.recipe} has no reader '{self.source}'{did_you_mean(self.source, names)}"
            yield Problem(path="source", text=f"{text} It has {', '.join(names)}")

    @property
    def decoded(self) -> Data:
        """The data recipe with `set` in it. Raises RecipeError."""
        path = recipes.find(self.recipe, "data")
        table = recipes.with_values(recipes.read(path), self.set, source=str(path))
        found: Data = recipes.decode(table, verb="data", source=str(path))
        return dataclasses.replace(found, output="jsonl")

    def settings(self) -> dict[str, Any]:
        """Those of the recipe, wherever it lies, with what is taken of it."""
        return {**super().settings(), "recipe": _content(self.decoded), "set": {}}

    @property
    def _folder(self) -> Path:
        return cache_folder(None) / "documents" / digest(_content(self.decoded))[:32]

    def ready(self, progress: Progress | None = None) -> None:
        """Run the recipe as far as it is not done. Raises DataError when nothing is left of a source."""
        folder = self._folder
        with speaking(folder):
            folder.mkdir(parents=True, exist_ok=True)

        def waiting() -> None:
            if progress is not None:
                progress(stage=f"waiting for another process that runs {self.recipe}", done=0, total=None, unit="jobs")

        decoded = self.decoded
        state = _state(decoded, progress)
        if self._handed(state) is not None:
            return
        with locked(folder / "handed.json", waiting):
            if self._handed(state) is not None:
                return
            trail = rounds.clean(decoded, folder, _Told(self.recipe, progress), progress)
            content = account.account(decoded, trail)
            for source, step in account.gone_sources(content).items():
                what = f"nothing is left of the source '{source}': '{step}' dropped its last documents"
                raise DataError(what, where=self.recipe, next_step="change the stage, or leave the source out")
            units = [[str(unit), manifest_of(unit)["source"]] for unit in trail.handed]
            files.write_json(folder / "account.json", content)
            files.write_json(folder / "handed.json", {"state": state, "units": units})

    def _handed(self, state: str | None = None) -> list[tuple[int, Path, str]] | None:
        """Number, folder and source of each unit that was handed on; None where that is not done, or of other files."""
        try:
            found = json.loads((self._folder / "handed.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or cut: then it is made
            return None
        units = [(i, Path(unit), str(source)) for i, (unit, source) in enumerate(found["units"])]
        whole = all((unit / MANIFEST).is_file() for _, unit, _ in units)
        return units if whole and state in (None, found["state"]) else None

    def files(self) -> list[SourceFile]:
        """The file of each shard that holds documents of this source and side."""
        if self._handed() is None:
            self.ready()
        units = [(i, unit) for i, unit, source in self._handed() or () if source == self.source]
        found = [
            SourceFile(f"{self.source}-{i:05d}{ENDING}", unit / f"{self.side}{ENDING}")
            for i, unit in units
            if (unit / f"{self.side}{ENDING}").is_file()
        ]
        if not found:
            sides = {entry.name.removesuffix(ENDING) for _, unit in units for entry in unit.glob(f"*{ENDING}")}
            raise DataError(
                f"'{self.source}' has no documents on the side '{self.side}'",
                where=self.recipe,
                legal=f"side = {', '.join(sorted(sides))}",
                next_step="take another side, or larger shares in the stage `split`",
            )
        return found

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """The documents, under this reader's name and without what the stages noted."""
        for record in read_records(file.path):
            yield dataclasses.replace(record, source=self.label, facts=NO_FACTS)


@final
class _Told:
    """Hands rounds on as progress."""

    def __init__(self, name: str, progress: Progress | None) -> None:
        self._name, self._progress = name, progress
        self._jobs = self._done = 0
        self._round = ""

    def stage(self, name: str, jobs: int) -> None:
        """A round begins."""
        self._round, self._jobs, self._done = name, jobs, 0

    def job(self, name: str, event: str) -> None:
        """One of its jobs begins or ends."""
        self._done += event != "started"
        if self._progress is not None:
            self._progress(stage=f"{self._name}: {self._round}", done=self._done, total=self._jobs, unit="jobs")


def _circle(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Data recipes that read what each other leaves until the first comes again; None where none does."""
    if name in above:
        return (*above, name)
    inner = _named(recipes.read(recipes.find(name, "data")))
    return next((circle for one in inner if (circle := _circle(one, (*above, name))) is not None), None)


def _named(value: Any) -> Iterator[str]:
    """The recipes that the readers in a table name, however deep."""
    if isinstance(value, dict) and value.get("use") == "cleaned" and isinstance(value.get("recipe"), str):
        yield value["recipe"]
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in below:
        yield from _named(item)


def _state(decoded: Data, progress: Progress | None) -> str:
    """A hash of everything that decides what is handed on: settings, code, and the files as they are now."""
    readers = [*decoded.readers]
    for stage in decoded.stages:
        readers += stage.references if isinstance(stage, Settling) else ()
    code = [code_id(stage, *stage.built_on()) for stage in decoded.stages]
    inputs = [files.sha256_of(path) for stage in decoded.stages for path in stage.inputs()]
    found = [[code_id(reader), scan(reader, cache_folder(None), progress).id] for reader in readers]
    return digest([_content(decoded), decoded.shard_mb, code, inputs, found])


def _content(decoded: Data) -> dict[str, Any]:
    """What decides the documents: where they are worked on does not."""
    table = recipes.table_of(decoded)
    return {name: value for name, value in table.items() if name not in ("executor", "shard_mb")}
