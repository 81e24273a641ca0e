"""What a recipe with `do = "data"` holds: readers, stages, and how the work is divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lmworks.core import catalogue
from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeInt, PositiveFloat, Slot
from lmworks.data.read import Reader
from lmworks.data.stage import Settling, Stage
from lmworks.jobs.executor import Executor
from lmworks.jobs.local import Local


@dataclass(frozen=True, kw_only=True)
class Data:
    """Documents from readers, through stages, to files that a training recipe reads."""

    do: Literal["data"]
    """The verb."""
    readers: Annotated[tuple[Reader, ...], Slot("reader")]
    """Where the documents come from. Their weights belong to training and have no effect here."""
    stages: Annotated[tuple[Stage, ...], Slot("stage")]
    """What is done with them, in this order."""
    seed: NonNegativeInt = 0
    """Of the stages that draw or hash: the same seed gives the same documents."""
    shard_mb: PositiveFloat = 64.0
    """Megabytes of text in one unit of work. Memory of a process grows with it."""
    output: Literal["jsonl", "parquet"] = "jsonl"
    """Form of the documents that are handed on: JSON lines packed by zstd, or Parquet."""
    executor: Annotated[Executor, Slot("executor")] = Local()
    """Where the units are worked on."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Readers that are missing or alike, weights without effect, facts that nobody adds."""
        if not self.readers:
            yield Problem(path="readers", text="needs at least one reader, as in readers = [{ use = 'python-stdlib' }]")
        if not self.stages:
            yield Problem(path="stages", text="needs at least one stage, as in stages = [{ use = 'dedup' }]")
        labels = Counter(reader.label for reader in self.readers)
        for i, reader in enumerate(self.readers):
            if labels[reader.label] > 1:
                text = f"{labels[reader.label]} readers are called '{reader.label}'; give each a name of its own"
                yield Problem(path=f"readers.{i}.name", text=text)
            if "/" in reader.label:
                yield Problem(path=f"readers.{i}.name", text="becomes part of a file's name: leave '/' out")
            if reader.weight != 1.0:
                text = "has no effect here: documents are mixed when a model is trained on them"
                yield Problem(path=f"readers.{i}.weight", text=text)
        yield from self._check_facts()

    def _check_facts(self) -> Iterator[Problem]:
        known: dict[str, str] = {}
        for i, stage in enumerate(self.stages):
            name = stage_name(stage)
            for fact in stage.reads:
                if fact not in known:
                    yield Problem(path=f"stages.{i}", text=f"'{name}' reads '{fact}', which no stage before it adds")
            for fact in stage.adds:
                if fact in known:
                    yield Problem(path=f"stages.{i}", text=f"'{known[fact]}' has added '{fact}' before")
                known[fact] = name

    @property
    def shard_bytes(self) -> int:
        """UTF-8 bytes of text after which a shard is closed."""
        return int(self.shard_mb * 1e6)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Stretches [first, last] of stages that one job does for one shard: a settling stage begins a new one."""
        starts = [i for i, stage in enumerate(self.stages) if i == 0 or isinstance(stage, Settling)]
        return [(a, b - 1) for a, b in zip(starts, [*starts[1:], len(self.stages)], strict=True)]


def stage_name(stage: Stage) -> str:
    """A stage's name in the catalogue, for tables and folders."""
    return catalogue.name_of(stage) or type(stage).__name__.lower()
