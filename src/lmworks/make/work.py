"""What the jobs of `lmworks data` do: read files into shards, run stages over one, survey, settle, hand on.

Every job names its recipe and its input by path and hash, and leaves a unit. Where and when it runs changes nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError
from lmworks.data.code import code_id
from lmworks.data.fingerprint import digest
from lmworks.data.read import Reader, SourceFile
from lmworks.data.record import MENDED, Dropped, Record, content_hash
from lmworks.data.stage import Context, Settling, Stage, Surveyed, guarded, text_of
from lmworks.data.units import (
    DROPPED,
    FORMAT,
    PIECE,
    LineFile,
    Piece,
    is_whole,
    make_unit,
    manifest_of,
    pieces_of,
    read_records,
    row_of,
)
from lmworks.make.recipe import Data, stage_name

SAMPLES = 3
"""Documents shown of each shard for each reason, and of those whose text was changed."""
SHOWN = 400
"""Characters of a sample."""


def stage_key(stage: Stage, piece: Piece, seed: int, verdict: str = "") -> str:
    """The name of the unit that a stage makes of a shard: a hash of input, settings, code and verdict."""
    inputs = [files.sha256_of(path) for path in stage.inputs()]
    drawn = seed if stage.seeded else None
    code = code_id(stage, *stage.built_on())
    return digest([FORMAT, piece.sha256, stage.settings(), inputs, code, drawn, verdict])[:32]


def verdict_digest(stage: Settling, folder: Path, shard: int) -> str:
    """A hash over the part of a verdict that a shard depends on: others may change without touching it."""
    found = manifest_of(folder)["files"]
    return digest([[name, found[name]["sha256"]] for name in stage.parts(folder, shard)])


def context_of(stage: Stage, seed: int, shard: int = 0, verdict: Path | None = None) -> Context:
    """Where a stage runs; the seed reaches only those that say they use it."""
    return Context(seed=seed if stage.seeded else 0, shard=shard, verdict=verdict)


# --- jobs ----------------------------------------------------------------------------------------------------------


def read(recipe: str, stage: int | None, reader: int, sources: list[list[str]], folder: str) -> None:
    """Read files of one reader (of the recipe, or of a stage's references) into shards."""
    decoded: Data = recipes.load(recipe, verb="data")
    part = decoded.readers[reader] if stage is None else _references(decoded, stage)[reader]
    chosen = [SourceFile(name, Path(path)) for name, path in sources]
    make_unit(Path(folder), lambda temporary: _read(part, chosen, temporary, decoded.shard_bytes))


def advance(
    recipe: str, work: str, first: int, last: int, piece: dict[str, Any], shard: int, verdict: str | None
) -> None:
    """Run a segment of stages over one shard, each into a unit of its own."""
    decoded: Data = recipes.load(recipe, verb="data")
    settled = Path(verdict) if verdict is not None else None
    current = Piece.from_json(piece)
    for number in range(first, last + 1):
        stage = decoded.stages[number]
        given = settled if number == first else None
        folder = unit_folder(Path(work), stage, current, decoded.seed, shard, given)
        current = _advance_one(stage, current, folder, context_of(stage, decoded.seed, shard, given))


def survey(recipe: str, stage: int, piece: dict[str, Any], folder: str) -> None:
    """Let a settling stage look at one shard."""
    decoded: Data = recipes.load(recipe, verb="data")
    part = decoded.stages[stage]
    assert isinstance(part, Settling), "only a settling stage is asked to survey"
    source = Piece.from_json(piece)

    def build(temporary: Path) -> dict[str, Any]:
        begun = time.monotonic()
        part.survey(checked(source), temporary, context_of(part, decoded.seed))
        return {"seconds": time.monotonic() - begun, "documents": source.documents, "source": source.source}

    make_unit(Path(folder), build)


def settle(recipe: str, stage: int, surveys: list[list[str]], references: list[list[str]], folder: str) -> None:
    """Let a settling stage decide from its surveys, each with the documents that it is of."""
    decoded: Data = recipes.load(recipe, verb="data")
    part = decoded.stages[stage]
    assert isinstance(part, Settling), "only a settling stage is asked to settle"

    def build(temporary: Path) -> dict[str, Any]:
        begun = time.monotonic()
        seen, others = (
            [Surveyed(folder=Path(unit), records=Path(records)) for unit, records in found]
            for found in (surveys, references)
        )
        part.settle(seen, others, temporary, context_of(part, decoded.seed))
        return {"seconds": time.monotonic() - begun}

    make_unit(Path(folder), build)


def hand_on(recipe: str, piece: dict[str, Any], folder: str) -> None:
    """Write the documents of a finished shard in the form that was asked for, one file a split."""
    decoded: Data = recipes.load(recipe, verb="data")
    source = Piece.from_json(piece)

    def build(temporary: Path) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        licences: Counter[str] = Counter()
        writers: dict[str, Any] = {}
        for record in checked(source):
            split = str(record.facts.get("split", "all"))
            if split not in writers:
                writers[split] = _writer(decoded, temporary, split)
            writers[split].write(row_of(record))
            counts[split] += 1
            licences[record.licence or "unknown"] += 1
        for writer in writers.values():
            writer.close()
        ordered = {name: dict(sorted(found.items())) for name, found in (("splits", counts), ("licences", licences))}
        return {"source": source.source, **ordered}

    make_unit(Path(folder), build)


# --- reading ---------------------------------------------------------------------------------------------------------


@final
class _Cut:
    """Writes documents into files of about so many bytes."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._file: LineFile | None = None
        self.pieces: dict[str, dict[str, int]] = {}

    def write(self, record: Record, size: int) -> None:
        if self._file is None:
            name = f"records-{len(self.pieces):05d}.jsonl.zst"
            self._file = LineFile(self._folder / name)
            self.pieces[name] = {"documents": 0, "bytes": 0}
        counts = self.pieces[self._file.path.name]
        self._file.write(row_of(record))
        counts["documents"] += 1
        counts["bytes"] += size
        if counts["bytes"] >= self._limit:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read(reader: Reader, sources: Sequence[SourceFile], folder: Path, shard_bytes: int) -> dict[str, Any]:
    begun = time.monotonic()
    tally = Account()
    cut, dropped = _Cut(folder, shard_bytes), LineFile(folder / DROPPED)
    for item in reader.read(sources):
        if isinstance(item, Dropped):
            tally.drop(item, None)
            dropped.write({"reason": item.reason, "detail": item.detail, "id": item.id, "source": reader.label})
        else:
            cut.write(item, tally.keep(item))
    cut.close()
    dropped.close()
    return {**tally.to_json(), "source": reader.label, "pieces": cut.pieces, "seconds": time.monotonic() - begun}


def _references(decoded: Data, stage: int) -> tuple[Reader, ...]:
    part = decoded.stages[stage]
    assert isinstance(part, Settling), "only a settling stage has references"
    return part.references


# --- stages ----------------------------------------------------------------------------------------------------------


def unit_folder(work: Path, stage: Stage, piece: Piece, seed: int, shard: int, verdict: Path | None) -> Path:
    """Where the unit lies that a stage makes of a shard."""
    part = verdict_digest(stage, verdict, shard) if verdict is not None and isinstance(stage, Settling) else ""
    return work / stage_name(stage) / stage_key(stage, piece, seed, part)


def checked(piece: Piece) -> Iterator[Record]:
    """The documents of a shard. Raises DataError when its bytes are not those that were written."""
    if not piece.path.is_file() or files.sha256_of(piece.path) != piece.sha256:
        raise DataError(
            "is missing or was written to (SHA-256 differs)",
            where=str(piece.path),
            next_step="run the same command again: what is damaged is made anew",
        )
    return read_records(piece.path)


def _advance_one(stage: Stage, piece: Piece, folder: Path, context: Context) -> Piece:
    if not is_whole(folder):
        make_unit(folder, lambda temporary: run_stage(stage, piece, temporary, context))
    (made,) = pieces_of(folder)
    return made


def run_stage(stage: Stage, piece: Piece, folder: Path, context: Context) -> dict[str, Any]:
    """Run one stage over one shard into an empty folder; the unit's manifest."""
    begun = time.monotonic()
    tally = Account()
    kept, dropped = LineFile(folder / PIECE), LineFile(folder / DROPPED)
    for before, answer in guarded(stage, checked(piece), context):
        if isinstance(answer, Dropped):
            tally.drop(answer, before)
            dropped.write({"reason": answer.reason, "detail": answer.detail, **row_of(before)})
        else:
            tally.keep(answer, before)
            kept.write(row_of(answer))
    kept.close()
    dropped.close()
    assert tally.seen == piece.documents, f"{stage_name(stage)} saw {tally.seen} of {piece.documents} documents"
    pieces = {PIECE: {"documents": tally.kept, "bytes": tally.bytes_out}}
    return {**tally.to_json(), "source": piece.source, "pieces": pieces, "seconds": time.monotonic() - begun}


@final
class Account:
    """What happened to every document of a shard: kept + dropped = seen; and a few of them to look at."""

    def __init__(self) -> None:
        self.kept = self.changed = self.bytes_in = self.bytes_out = 0
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        """Documents whose bytes a reader had to mend, by what they were taken for."""
        self._samples: dict[str, list[tuple[int, dict[str, str]]]] = {}

    @property
    def seen(self) -> int:
        """Documents so far."""
        return self.kept + sum(self.dropped.values())

    def keep(self, record: Record, before: Record | None = None) -> int:
        """Count a document that was kept; its UTF-8 bytes."""
        text = text_of(record)
        size = n_bytes(text)
        self.kept += 1
        self.bytes_out += size
        if before is None and MENDED in record.facts:
            self.mended[str(record.facts[MENDED])] += 1
        was = text if before is None else text_of(before)
        if was is text or was == text:
            self.bytes_in += size
        else:
            self.bytes_in += n_bytes(was)
            self.changed += 1
            self._show("changed", content_hash(record), {"id": record.id, **_around_the_change(was, text)})
        return size

    def drop(self, item: Dropped, before: Record | None) -> None:
        """Count a document that was left out."""
        self.dropped[item.reason] += 1
        text = text_of(before) if before is not None else ""
        self.bytes_in += n_bytes(text)
        order = content_hash(before) if before is not None else 0
        sample = {"id": item.id, "detail": item.detail, "before": text[:SHOWN]}
        self._show(item.reason, order, sample)

    def _show(self, name: str, order: int, sample: dict[str, str]) -> None:
        """Keep the samples with the lowest hashes: the same ones in whatever order documents come."""
        shown = self._samples.setdefault(name, [])
        if len(shown) == SAMPLES and order > shown[-1][0]:
            return
        shown.append((order, sample))
        shown.sort(key=lambda pair: (pair[0], pair[1]["id"]))
        del shown[SAMPLES:]

    def to_json(self) -> dict[str, Any]:
        """Counts and samples, for a manifest."""
        samples = {
            name: [{"order": order, **sample} for order, sample in shown]
            for name, shown in sorted(self._samples.items())
        }
        counts = {"seen": self.seen, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}
        sizes = {"changed": self.changed, "bytes_in": self.bytes_in, "bytes_out": self.bytes_out}
        mended = {"mended": dict(sorted(self.mended.items()))} if self.mended else {}
        return {**counts, **sizes, **mended, "samples": samples}


def n_bytes(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _around_the_change(before: str, after: str) -> dict[str, str]:
    """The same stretch of both texts, from a little before their first difference."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - SHOWN // 4)
    return {"before": before[start : start + SHOWN], "after": after[start : start + SHOWN]}


def _writer(decoded: Data, folder: Path, split: str) -> Any:
    if decoded.output == "jsonl":
        return LineFile(folder / f"{split}.jsonl.zst")
    from lmworks.data.columns import ParquetFile  # noqa: PLC0415  (only where it is asked for)

    return ParquetFile(folder / f"{split}.parquet", facts(decoded.stages))


def facts(stages: Iterable[Stage]) -> dict[str, type]:
    """All facts that stages add, in order, with their kinds."""
    return {name: kind for stage in stages for name, kind in stage.adds.items()}
