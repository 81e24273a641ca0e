"""The budget of a data run, told before it starts: about a hundredth of the documents is taken through all stages."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lmworks.core import files
from lmworks.data.cache import cache_folder
from lmworks.data.fingerprint import Fingerprint, scan
from lmworks.data.read import Reader
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Settling, Stage, Surveyed, text_of
from lmworks.data.units import PIECE, LineFile, Piece, make_unit, pieces_of, row_of
from lmworks.jobs.local import Local, cores
from lmworks.make import work
from lmworks.make.recipe import Data

SHARE = 0.01
LEAST, MOST = 1_000_000, 64_000_000
"""Bytes of text that a trial reads at least and at most of each reader."""


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run will take, judged from a part of its documents."""

    documents: int
    text_bytes: int
    disk_bytes: int
    """Of all units that the run leaves in its folder."""
    memory_bytes: int
    """Of all processes of this machine together, at their worst."""
    minutes: float
    tried: int
    """Documents of the trial."""
    processes: int

    def line(self) -> str:
        """For a person."""
        return (
            f"budget: {self.documents:,} documents, {self.text_bytes / 1e6:,.1f} MB of text; "
            f"{self.memory_bytes / 1e6:,.0f} MB of memory, {self.disk_bytes / 1e6:,.1f} MB of disk, "
            f"{self.minutes:.1f} minutes on {self.processes} processes (from a trial of {self.tried:,} documents)"
        )


def budget(recipe: Data) -> Budget:
    """Read some documents of each reader, and run all stages over them in a folder that goes away."""
    cache = cache_folder(None)
    taken: list[tuple[float, _Tried]] = []
    with tempfile.TemporaryDirectory(prefix="lmworks-trial-") as folder:
        for number, reader in enumerate(recipe.readers):
            found = scan(reader, cache)
            tried = _try(recipe, reader, found, Path(folder) / str(number))
            scale = found.size / tried.file_bytes if tried.file_bytes else 1.0
            if reader.max_bytes is not None and tried.text_bytes:
                scale = min(scale, reader.max_bytes / tried.text_bytes)
            taken.append((max(1.0, scale), tried))
    documents = round(sum(scale * tried.documents for scale, tried in taken))
    text = round(sum(scale * tried.text_bytes for scale, tried in taken))
    width = _width(recipe)
    seconds = sum(scale * tried.seconds for scale, tried in taken)
    rest = max((stage.memory(documents) for stage in recipe.stages), default=0)
    return Budget(
        documents=documents,
        text_bytes=text,
        disk_bytes=round(sum(scale * tried.disk_bytes for scale, tried in taken)),
        memory_bytes=width * _resident() + rest,
        minutes=seconds / width / 60,
        tried=sum(tried.documents for _, tried in taken),
        processes=width,
    )


@final
@dataclass(kw_only=True)
class _Tried:
    documents: int = 0
    text_bytes: int = 0
    file_bytes: float = 0.0
    disk_bytes: int = 0
    seconds: float = 0.0


def _try(recipe: Data, reader: Reader, found: Fingerprint, folder: Path) -> _Tried:
    tried = _Tried()
    begun = time.monotonic()
    folder.mkdir()
    records = list(_some(reader, found, tried))
    out = LineFile(folder / PIECE)
    for record in records:
        out.write(row_of(record))
    out.close()
    tried.documents = len(records)
    tried.text_bytes = sum(work.n_bytes(text_of(record)) for record in records)
    piece = Piece(
        path=folder / PIECE,
        sha256=files.sha256_of(folder / PIECE),
        documents=tried.documents,
        bytes=tried.text_bytes,
        source=reader.label,
    )
    for number, stage in enumerate(recipe.stages):
        piece = _stage(stage, piece, folder / f"{number}", recipe.seed)
    tried.seconds = time.monotonic() - begun
    tried.disk_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return tried


def _some(reader: Reader, found: Fingerprint, tried: _Tried) -> Iterator[Record]:
    """Documents of files spread evenly over all, until a hundredth of the bytes is read."""
    wanted = min(max(found.size * SHARE, LEAST), MOST, reader.max_bytes or MOST)
    sources = found.source_files()
    order = sorted(range(len(sources)), key=lambda i: (_reversed_bits(i), i))
    read = 0.0
    for i in order:
        size, before = found.files[i].size, read
        for item in reader.records(sources[i]):
            if not isinstance(item, Dropped):
                yield item
                read += work.n_bytes(text_of(item))
            if read >= wanted:
                # of a file that is left in the middle, as much as came out of it; a packed one holds more than its size
                tried.file_bytes += min(size, read - before)
                return
        tried.file_bytes += size


def _reversed_bits(number: int) -> int:
    """Numbers in this order are spread evenly over any range, however far one goes."""
    return int(f"{number:032b}"[::-1], 2)


def _stage(stage: Stage, piece: Piece, folder: Path, seed: int) -> Piece:
    verdict = None
    if isinstance(stage, Settling):
        surveys: Sequence[Surveyed] = ()
        if stage.surveys:
            surveys = [Surveyed(folder=folder / "survey", records=piece.path)]
            surveys[0].folder.mkdir(parents=True)
            stage.survey(work.checked(piece), surveys[0].folder, work.context_of(stage, seed))
        verdict = folder / "verdict"
        verdict.mkdir(parents=True)
        stage.settle(surveys, (), verdict, work.context_of(stage, seed))
    context = work.context_of(stage, seed, 0, verdict)
    make_unit(folder / "unit", lambda temporary: work.run_stage(stage, piece, temporary, context))
    return pieces_of(folder / "unit")[0]


def _width(recipe: Data) -> int:
    """How many processes work at a time, as far as the executor knows."""
    if isinstance(recipe.executor, Local):
        return recipe.executor.processes or cores()
    return 1


def _resident() -> int:
    import psutil  # noqa: PLC0415  (only for this figure)

    return int(psutil.Process().memory_info().rss)
