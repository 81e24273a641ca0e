"""Readers: where documents come from.

A reader lists its files and turns each into records, in an order that depends on the files alone. What it leaves out
it hands on as `Dropped`, with a reason: kept + dropped = seen, always.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, final

from lmworks.core import catalogue
from lmworks.core.errors import DataError, Problem
from lmworks.core.need import need
from lmworks.core.recipe import NonNegativeFloat, PositiveInt
from lmworks.data.opening import open_lines
from lmworks.data.record import Dropped, Ids, Record, Text

NOT_UTF8 = "not utf-8"
EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a reader: the name that documents and error messages carry, and where it lies."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """What every reader has. `files` and `records` are pure: same files, same records, same order."""

    weight: NonNegativeFloat = 1.0
    """Share of this reader in the mixture, relative to the other readers'. 0: only what is held out of it is read."""
    name: str = ""
    """Name in manifests, metrics and seeds; empty: the reader's name in the catalogue."""
    max_bytes: PositiveInt | None = None
    """Stop reading once this many UTF-8 bytes of documents are kept; none: read everything. Not for token ids."""

    @property
    def label(self) -> str:
        """The name under which this reader is reported."""
        return self.name or catalogue.name_of(self) or type(self).__name__

    def settings(self) -> dict[str, Any]:
        """The settings that decide which documents come out, as JSON values (not the weight, not the name)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("weight", "name")}
        return {"use": catalogue.name_of(self) or type(self).__qualname__, **fields}

    @abstractmethod
    def files(self) -> list[SourceFile]:
        """The files that are read, in reading order. Raises DataError when there are none or one is missing."""

    @abstractmethod
    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """The documents of one file, in order."""

    def read(self, files: Sequence[SourceFile] | None = None) -> Iterator[Record | Dropped]:
        """The documents of all files, in order, until `max_bytes` are kept."""
        left = self.max_bytes
        for file in self.files() if files is None else files:
            for item in self.records(file):
                yield item
                if left is not None and isinstance(item, Record):
                    if any(isinstance(part, Ids) for part in item.content):
                        raise DataError(
                            "max_bytes counts bytes of text, and this document is token ids",
                            where=item.id,
                            next_step=f"leave max_bytes out of the reader '{self.label}'",
                        )
                    left -= sum(len(part.text.encode()) for part in item.content if isinstance(part, Text))
                    if left <= 0:
                        return

    def document(self, id: str, value: Any, licence: str | None = None) -> Record | Dropped:
        """A record of a text or of a list of token ids, or the reason why it is none."""
        if isinstance(value, str):
            if not value.strip():
                return Dropped(id, EMPTY)
            if not _encodes(value):
                return Dropped(id, NOT_UTF8)
            return Record(id=id, content=(Text(value),), source=self.label, licence=licence)
        if isinstance(value, list) and all(type(i) is int for i in value):
            if not value:
                return Dropped(id, EMPTY)
            return Record(id=id, content=(Ids(tuple(value)),), source=self.label, licence=licence)
        return Dropped(id, "no text" if value is None else f"text is of type {type(value).__name__}")


@final
@dataclass(frozen=True, kw_only=True)
class PythonStdlib(Reader):
    """Sources and documentation texts of the Python that runs this: real text that lies on every machine."""

    suffixes: tuple[str, ...] = (".py", ".txt", ".rst")
    """Endings of the files that are read."""
    tests: bool = False
    """Also read the standard library's own tests, which are more than half of its sources."""
    include: tuple[str, ...] = ("*",)
    """Patterns of names below the library's folder, as in "encodings/*"; `*` also matches `/`."""
    exclude: tuple[str, ...] = ()
    """Patterns of names that are left out again."""
    split: Literal["file", "block"] = "file"
    """One document per file, or one per block of lines between blank lines."""

    def files(self) -> list[SourceFile]:
        """Files below the standard library's folder, sorted by name; installed packages are left out."""
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"__pycache__", "site-packages", "dist-packages", "lib-dynload"}
        if not self.tests:
            skipped |= {"test", "tests", "idle_test"}
        found = []
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in skipped]
            found += [Path(folder, name) for name in names if name.endswith(self.suffixes)]
        chosen = [file for file in (SourceFile(p.relative_to(root).as_posix(), p) for p in found) if self._takes(file)]
        if not chosen:
            raise DataError(
                f"no {', '.join(self.suffixes)} files of {', '.join(self.include)} in the standard library",
                where=str(root),
                next_step="use the reader 'text' with files of your own; this Python may live in a zip file",
            )
        return sorted(chosen, key=lambda file: file.name)

    def _takes(self, file: SourceFile) -> bool:
        taken, left_out = (any(fnmatchcase(file.name, p) for p in ps) for ps in (self.include, self.exclude))
        return taken and not left_out

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """The file as one document, or its blocks."""
        yield from _text_documents(self, file, self.split, "PSF-2.0")


@dataclass(frozen=True, kw_only=True)
class PathReader(Reader):
    """What readers of files by path have in common."""

    paths: tuple[str, ...]
    """Files or globs (`**` for all folders below), from the current folder."""
    licence: str | None = None
    """Licence of every document here (an SPDX name), kept in the manifest."""

    def files(self) -> list[SourceFile]:
        """The files that the paths name, each once, sorted by name."""
        return find_files(self.paths)


@final
@dataclass(frozen=True, kw_only=True)
class TextFiles(PathReader):
    """Plain text files."""

    split: Literal["file", "block"] = "file"
    """One document per file, or one per block of lines between blank lines."""

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """The file as one document, or its blocks."""
        yield from _text_documents(self, file, self.split, self.licence)


@final
@dataclass(frozen=True, kw_only=True)
class Jsonl(PathReader):
    """JSON Lines, plain or compressed (.gz, .bz2, .xz, .zst)."""

    field: str = "text"
    """Key of the document: a string, or a list of token ids that are taken over as they are."""
    id_field: str | None = None
    """Key of the document's name; none: the file's name and the line's number."""
    licence_field: str | None = None
    """Key of the document's licence; none: `licence`."""

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """One document a line; blank lines are no documents."""
        for number, line in enumerate(open_lines(file.path), start=1):
            if line.strip():
                yield self._record(f"{file.name}#{number}", line)

    def _record(self, id: str, line: bytes) -> Record | Dropped:
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Dropped(id, NOT_UTF8)
        except json.JSONDecodeError:
            return Dropped(id, "not json")
        if not isinstance(row, dict):
            return Dropped(id, "not a json object")
        named = row.get(self.id_field) if self.id_field is not None else None
        licence = row.get(self.licence_field) if self.licence_field is not None else None
        return self.document(str(named) if named is not None else id, row.get(self.field), licence or self.licence)


@final
@dataclass(frozen=True, kw_only=True)
class Parquet(PathReader):
    """A column of Parquet files."""

    column: str = "text"
    """Column of the document: strings, or lists of token ids that are taken over as they are."""
    licence_column: str | None = None
    """Column of the document's licence; none: `licence`."""

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """One document a row."""
        import pyarrow.parquet as pq  # noqa: PLC0415  (0.2 s that other readers must not pay)
        from pyarrow import ArrowException  # noqa: PLC0415

        wanted = [self.column] + ([self.licence_column] if self.licence_column is not None else [])
        try:
            with pq.ParquetFile(file.path) as table:
                missing = [name for name in wanted if name not in table.schema_arrow.names]
                if missing:
                    raise DataError(
                        f"no column '{missing[0]}'",
                        where=str(file.path),
                        legal=", ".join(table.schema_arrow.names),
                        next_step="set `column` of this reader",
                    )
                yield from self._rows(file, table.iter_batches(columns=wanted, batch_size=1024))
        except ArrowException as error:
            raise DataError(f"is not a Parquet file that can be read: {error}", where=str(file.path)) from error

    def _rows(self, file: SourceFile, batches: Iterator[Any]) -> Iterator[Record | Dropped]:
        number = 0
        for batch in batches:
            values = batch.column(self.column).to_pylist()
            named = self.licence_column
            licences = batch.column(named).to_pylist() if named is not None else [None] * len(values)
            for value, licence in zip(values, licences, strict=True):
                yield self.document(f"{file.name}#{number}", value, licence or self.licence)
                number += 1


@final
@dataclass(frozen=True, kw_only=True)
class HuggingFace(Reader):
    """A data set of the `datasets` library: a folder that lies here, or a name on the Hugging Face hub."""

    path: str
    """Folder or hub name ('owner/name')."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Which of the data set's own splits is read, by its plain name; lmworks makes its validation split from it."""
    column: str = "text"
    """Column of the document."""
    revision: str | None = None
    """Commit or tag on the hub; none: the newest."""
    licence: str | None = None
    """Licence of every document here (an SPDX name), kept in the manifest."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A part of a split, or several: the files of whole splits are read, so either would be ignored."""
        if set(self.split) & set("[+"):
            text = (
                f"'{self.split}' is not the name of one split; for a part of a split set max_bytes, for several give"
                " each a reader of its own"
            )
            yield Problem(path="split", text=text)

    def files(self) -> list[SourceFile]:
        """The Arrow files that `datasets` made of the data set."""
        files = [Path(entry["filename"]) for entry in self._load().cache_files]
        if not files:
            raise DataError(f"the split '{self.split}' has no files", where=self.path)
        return [SourceFile(f"{self.path}/{path.name}", path) for path in files]

    def records(self, file: SourceFile) -> Iterator[Record | Dropped]:
        """One document a row of one Arrow file."""
        datasets = need("datasets", extra="hf", why="the reader 'huggingface'")
        rows = datasets.Dataset.from_file(str(file.path))
        for number, value in enumerate(rows[self.column]):
            yield self.document(f"{file.name}#{number}", value, self.licence)

    def _load(self) -> Any:
        datasets = need("datasets", extra="hf", why="the reader 'huggingface'")
        try:
            found = datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision)
        except (ValueError, OSError) as error:
            raise DataError(
                f"cannot be loaded: {error}",
                where=self.path,
                next_step="check path, subset and split; without a network give a local folder",
            ) from error
        if self.column not in found.column_names:
            raise DataError(
                f"no column '{self.column}'",
                where=self.path,
                legal=", ".join(found.column_names),
                next_step="set `column` of this reader",
            )
        return found


def find_files(paths: Sequence[str]) -> list[SourceFile]:
    """Files by path or glob, each once, sorted by name. Raises DataError for what is missing, or is a folder."""
    found: dict[str, Path] = {}
    for entry in paths:
        path = Path(entry).expanduser()
        names = [path] if path.exists() else [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [name for name in names if name.is_file()]
        if not files:
            raise _nothing_at(entry, path)
        found |= {name.as_posix(): name for name in files}
    if not found:
        raise DataError("no paths are given", next_step="set `paths` of the reader, as in paths = ['books/*.txt']")
    return [SourceFile(name, found[name]) for name in sorted(found)]


def _nothing_at(entry: str, path: Path) -> DataError:
    if path.is_dir():
        inside = f"{entry.rstrip('/')}/**/*"
        return DataError("is a folder", where=entry, next_step=f"name its files with a glob: '{inside}'")
    what = "matches no file" if glob.has_magic(entry) else "no such file"
    return DataError(what, where=entry, next_step=f"paths start at the current folder, {Path.cwd()}")


def read_utf8(path: Path) -> str | None:
    """The text of a file, or None when its bytes are not UTF-8. A byte order mark is not text and is left out."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _text_documents(
    reader: Reader, file: SourceFile, split: Literal["file", "block"], licence: str | None
) -> Iterator[Record | Dropped]:
    """A text file as one document, or its blocks."""
    text = read_utf8(file.path)
    if text is None:
        yield Dropped(file.name, NOT_UTF8)
    elif split == "file":
        yield reader.document(file.name, text, licence)
    else:
        for i, block in enumerate(_blocks(text)):
            yield reader.document(f"{file.name}#{i}", block, licence)


def _encodes(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _blocks(text: str) -> Iterator[str]:
    """Runs of lines without a blank line in between."""
    lines: list[str] = []
    for line in [*text.splitlines(keepends=True), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
