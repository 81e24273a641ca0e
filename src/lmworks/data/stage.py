"""The slot `stage`: one pass over documents. A pure function of the documents, its settings and the seed.

A stage answers each document with the document, changed or not, or with `Dropped` and the reason. It says which facts
it reads and which it adds; it sees no others. A stage that must know more than one document at a time (`Settling`)
first surveys every shard, then settles what all surveys say together, and is then run like any other.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError
from lmworks.data.cache import MANIFEST
from lmworks.data.read import Reader
from lmworks.data.record import Dropped, Fact, Record, Text

KINDS: dict[type, tuple[type, ...]] = {str: (str,), int: (int,), float: (float, int), bool: (bool,)}
"""What may stand for each kind of fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where a stage is run."""

    seed: int
    """The recipe's seed."""
    shard: int = 0
    """Number of the shard among all of the stage."""
    verdict: Path | None = None
    """The folder that the stage's `settle` filled; none for a stage that does not settle."""


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """What every stage has."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Facts that earlier stages must have added."""
    adds: ClassVar[Mapping[str, type]] = {}
    """Facts that this stage adds to every document it keeps, with their kinds."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages that decide the outcome: another version of one counts as other code."""

    seeded: ClassVar[bool] = False
    """Whether the outcome hangs on the recipe's seed. Others are not told it, and another seed does not run them."""

    def built_on(self) -> Sequence[object]:
        """Parts inside this one whose code and libraries decide the outcome as well."""
        return ()

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return recipes.table_of(self)

    def inputs(self) -> Sequence[Path]:
        """Files besides the documents that decide the outcome: rules, test sets."""
        return ()

    @abstractmethod
    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """Answer every document, in order."""

    def memory(self, documents: int) -> int:
        """Bytes that a process of this stage holds at most, besides one shard's documents."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A shard that a settling stage has looked at."""

    folder: Path
    """What its `survey` wrote."""
    records: Path
    """The documents themselves, for a second look."""


@dataclass(frozen=True, kw_only=True)
class Settling(Stage):
    """A stage that looks at all documents, or at other files, before it judges one."""

    surveys: ClassVar[bool] = True
    """Whether it looks at the documents; False for one that only looks at `inputs`."""

    @property
    def references(self) -> tuple[Reader, ...]:
        """Readers of documents that are surveyed after all others, and never handed on."""
        return ()

    def survey_settings(self) -> dict[str, Any]:
        """Those settings that a survey depends on, as JSON values: another value of the others surveys nothing anew."""
        return self.settings()

    def survey(self, records: Iterable[Record], folder: Path, context: Context) -> None:
        """Write what `settle` must know of one shard into an empty folder."""

    @abstractmethod
    def settle(
        self, surveys: Sequence[Surveyed], references: Sequence[Surveyed], folder: Path, context: Context
    ) -> None:
        """Decide from all surveys in the order of the shards; write the verdict into an empty folder."""

    def parts(self, verdict: Path, shard: int) -> Sequence[str]:
        """Names of the verdict's files that the run over this shard depends on."""
        return sorted(path.name for path in verdict.iterdir() if path.name != MANIFEST)

    def tables(self, verdict: Path) -> Sequence[str]:
        """Names of the verdict's files that a person may want to read."""
        return ()

    def findings(self, verdict: Path) -> dict[str, Any]:
        """What a report tells of the verdict, as JSON values."""
        return {}


def batches(records: Iterable[Record], characters: int = 1_000_000) -> Iterator[list[Record]]:
    """The documents in lists of about so many characters: enough for array operations, little enough for memory."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(text_of(record))
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_of(record: Record) -> str:
    """The text of a document. Raises DataError for one that is not one text."""
    if len(record.content) != 1 or not isinstance(record.content[0], Text):
        raise DataError(
            "is not one text, and stages work on text",
            where=f"{record.source}: {record.id}",
            next_step="name the field or column of the text in the reader",
        )
    return record.content[0].text


def with_text(record: Record, text: str) -> Record:
    """The document with another text. Raises DataError where spans would then point at other characters."""
    if text == text_of(record):
        return record
    if record.spans:
        raise DataError(
            "has spans, and a stage changes its text",
            where=f"{record.source}: {record.id}",
            next_step="put stages that change text before those that mark spans",
        )
    return dataclasses.replace(record, content=(Text(text),))


def with_facts(record: Record, **facts: Fact) -> Record:
    """The document with more facts."""
    return dataclasses.replace(record, facts={**record.facts, **facts})


def guarded(stage: Stage, records: Iterable[Record], context: Context) -> Iterator[tuple[Record, Record | Dropped]]:
    """Run a stage over documents of which it sees the declared facts only, and pair each with its answer.

    A stage that answers another document, too few or too many, or adds facts that it did not declare, is our bug.
    """
    waiting: deque[Record] = deque()

    def shown() -> Iterator[Record]:
        for record in records:
            waiting.append(record)
            yield dataclasses.replace(record, facts={name: record.facts[name] for name in stage.reads})

    name = type(stage).__name__
    for answer in stage.run(shown(), context):
        assert waiting, f"{name} answers more documents than it was given"
        record = waiting.popleft()
        assert answer.id == record.id, f"{name} answers '{answer.id}' where '{record.id}' was next"
        yield record, answer if isinstance(answer, Dropped) else _merged(stage, record, answer)
    assert not waiting, f"{name} leaves {len(waiting)} documents without an answer"


def _merged(stage: Stage, before: Record, after: Record) -> Record:
    extra = set(after.facts) - set(stage.adds) - set(stage.reads)
    assert not extra, f"{type(stage).__name__} adds facts that it does not declare: {', '.join(sorted(extra))}"
    for name, kind in stage.adds.items():
        assert isinstance(after.facts.get(name), KINDS[kind]), f"{type(stage).__name__} does not add '{name}'"
    return dataclasses.replace(after, facts={**before.facts, **after.facts})
