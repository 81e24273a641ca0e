"""What a reader's files were: names, sizes, hashes. Tells which of them changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from lmworks.core import files
from lmworks.core.errors import DataError
from lmworks.data.cache import speaking
from lmworks.data.read import Progress, Reader, SourceFile

SHOWN = 10
"""Names in an error message; the rest is counted."""


@final
@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file as it was when it was read."""

    name: str
    path: str
    size: int
    mtime_ns: int
    sha256: str


@final
@dataclass(frozen=True)
class Fingerprint:
    """All files of a reader as they were, in reading order."""

    files: tuple[FileFacts, ...]

    @property
    def id(self) -> str:
        """SHA-256 over names and contents; where the files lie and when they were written does not matter."""
        return digest([[file.name, file.sha256] for file in self.files])

    @property
    def size(self) -> int:
        """Bytes of all files, as they lie on the disk."""
        return sum(file.size for file in self.files)

    def source_files(self) -> list[SourceFile]:
        """The files, for `Reader.read`."""
        return [SourceFile(file.name, Path(file.path)) for file in self.files]

    def must_be_unchanged(self) -> None:
        """Raise DataError when a file was written to or removed since it was looked at."""
        changed = [file.name for file in self.files if _stat(Path(file.path)) != (file.size, file.mtime_ns)]
        if changed:
            raise DataError(
                f"changed while it was read: {listed(changed)}",
                next_step="start again when nothing writes to these files",
            )

    def to_json(self) -> list[dict[str, Any]]:
        """One object a file, for manifests."""
        return [asdict(file) for file in self.files]

    @staticmethod
    def from_json(rows: Sequence[dict[str, Any]]) -> Fingerprint:
        """What `to_json` gave."""
        return Fingerprint(tuple(FileFacts(**row) for row in rows))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in one fixed spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def scan(reader: Reader, cache: Path, progress: Progress | None = None) -> Fingerprint:
    """The fingerprint of a reader's files. A file is hashed only when its size or time differs from the last scan."""
    reader.ready(progress)
    memory = cache / "sources" / f"{digest(reader.settings())[:32]}.json"
    known = {file.path: file for file in _remembered(memory)}
    found: list[FileFacts] = []
    sources = reader.files()
    for number, source in enumerate(sources, start=1):
        stat = _stat(source.path)
        if stat is None:
            raise DataError(
                "cannot be read", where=str(source.path), next_step="check that it exists and who may read it"
            )
        path = str(source.path.absolute())
        last = known.get(path)
        same = last is not None and (last.size, last.mtime_ns) == stat
        found.append(FileFacts(source.name, path, *stat, last.sha256 if last and same else _sha256(source.path)))
        if progress is not None and not same:
            progress(stage=f"hashing {reader.label}", done=number, total=len(sources), unit="files")
    result = Fingerprint(tuple(found))
    if set(found) != set(known.values()):
        with speaking(memory):
            memory.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(memory, result.to_json())
    return result


def changes(old: Fingerprint, new: Fingerprint) -> str:
    """A sentence that names which files were added, removed, changed. '' when none were."""
    before, after = ({file.name: file.sha256 for file in files.files} for files in (old, new))
    kinds = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and before[name] != after[name]],
    }
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _remembered(memory: Path) -> tuple[FileFacts, ...]:
    """What the last scan wrote. It only saves time, so a damaged file counts as none."""
    try:
        return Fingerprint.from_json(json.loads(memory.read_text(encoding="utf-8"))).files
    except (OSError, ValueError, TypeError):
        return ()


def _sha256(path: Path) -> str:
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
