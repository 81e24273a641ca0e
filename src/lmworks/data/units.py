"""Units of work on disk: a folder that is made whole or not at all, named by a hash of all that went into it.

    <key>/   records.jsonl.zst     the documents that were kept, in order (records-00001 ... where a reader cut them)
             dropped.jsonl.zst     the documents that were left out, each with its reason
             manifest.json         counts, samples, and size and SHA-256 of every file; written last

So an equal unit is never made twice, another input, setting or code never meets an old one, and a kill at any moment
leaves whole units or none.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmworks.core import files
from lmworks.core.errors import DataError
from lmworks.data.cache import MANIFEST, make_once
from lmworks.data.opening import open_lines
from lmworks.data.record import Record, Text
from lmworks.data.stage import text_of

FORMAT = 1
PIECE = "records.jsonl.zst"
DROPPED = "dropped.jsonl.zst"
_ROOM = "give a folder with room: --out DIR"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A file of documents, with what tells whether it is whole."""

    path: Path
    sha256: str
    documents: int
    bytes: int
    """UTF-8 bytes of the texts."""
    source: str

    def to_json(self) -> dict[str, Any]:
        """For the arguments of a job."""
        facts = {"sha256": self.sha256, "documents": self.documents, "bytes": self.bytes, "source": self.source}
        return {"path": str(self.path), **facts}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Piece:
        """What `to_json` gave."""
        return Piece(**{**row, "path": Path(row["path"])})


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class LineFile:
    """A zstd file of JSON lines, made durable when it is closed."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # noqa: PLC0415  (0.2 s that verbs without documents must not pay)

        self.path = path
        self._file = pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd")
        self._waiting = io.BytesIO()

    def write(self, row: dict[str, Any]) -> None:
        """Append one object. Halves of surrogate pairs, as names of files may hold them, come back as they are."""
        self._waiting.write(ENCODER.encode(row).encode("utf-8", "surrogatepass"))
        self._waiting.write(b"\n")
        if self._waiting.tell() > 1 << 20:
            self._hand_on()

    def close(self) -> None:
        """Write what waits, and make the file durable."""
        self._hand_on()
        self._file.close()
        files.sync(self.path)

    def _hand_on(self) -> None:
        self._file.write(self._waiting.getvalue())
        self._waiting = io.BytesIO()


def row_of(record: Record) -> dict[str, Any]:
    """A document as a JSON object."""
    row: dict[str, Any] = {"id": record.id, "text": text_of(record), "source": record.source}
    if record.licence is not None:
        row["licence"] = record.licence
    return {**row, "facts": dict(record.facts)} if record.facts else row


def record_of(row: dict[str, Any]) -> Record:
    """What `row_of` gave."""
    facts = row.get("facts", {})
    return Record(
        id=row["id"], content=(Text(row["text"]),), source=row["source"], licence=row.get("licence"), facts=facts
    )


def read_records(path: Path) -> Iterator[Record]:
    """The documents of a file, in order."""
    for line in open_lines(path):
        yield record_of(json.loads(line.decode("utf-8", "surrogatepass")))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, in order."""
    for line in open_lines(path):
        yield json.loads(line)


def make_unit(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Let `build` fill a folder and answer with its manifest; nothing when a whole one is there.

    A damaged one is made anew.
    """
    if folder.is_dir() and not is_whole(folder):
        shutil.rmtree(folder)

    def whole(temporary: Path) -> None:
        manifest = build(temporary)
        found = {}
        for path in sorted(temporary.iterdir()):
            files.sync(path)
            found[path.name] = {"size": path.stat().st_size, "sha256": files.sha256_of(path)}
        files.write_json(temporary / MANIFEST, {"format": FORMAT, **manifest, "files": found})

    make_once(folder, whole, elsewhere=_ROOM)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a unit. Raises DataError when there is none that can be read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("no whole unit here", where=str(folder), next_step="run the same command again") from error
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether a unit is there with every byte that was written: one that was cut or written to counts as none."""
    try:
        manifest = manifest_of(folder)
    except DataError:
        return False
    return manifest.get("format") == FORMAT and all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == facts["size"]
        and files.sha256_of(folder / name) == facts["sha256"]
        for name, facts in manifest["files"].items()
    )


def pieces_of(folder: Path) -> list[Piece]:
    """The files of documents in a unit, in order."""
    manifest = manifest_of(folder)
    return [
        Piece(path=folder / name, sha256=manifest["files"][name]["sha256"], source=manifest["source"], **counts)
        for name, counts in manifest["pieces"].items()
    ]
