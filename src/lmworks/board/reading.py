"""Reading files that somebody else writes, now: journals that grow or are rewritten, tables that may be damaged.

A run folder may come from another person. So a file is read only when it is a regular one, only as JSON or TOML, only
up to a size, and what does not parse is counted, not raised.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

MOST = 64 << 20
"""Bytes of a journal that are read at its first look; of a longer one its end. Tables must be shorter."""
DAMAGED = (ValueError, RecursionError)
"""What the readers of JSON and TOML raise for what is neither."""


def opened(path: Path) -> IO[bytes] | None:
    """A regular file, open for reading; None when there is none. A pipe or a device is never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return os.fdopen(handle, "rb")


def table(path: Path) -> dict[str, Any]:
    """The object in a .json or .toml file; empty when it is missing, damaged, too large or something else."""
    file = opened(path)
    if file is None:
        return {}
    with file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        return {}
    try:
        text = data.decode()
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except DAMAGED:
        return {}
    return value if isinstance(value, dict) else {}


def version(path: Path) -> tuple[int, int]:
    """Changes when the file does: its inode and size; (0, 0) when there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_size


def row(line: bytes) -> dict[str, Any] | None:
    """The object of a journal's line; None when it is none."""
    try:
        value = json.loads(line)
    except DAMAGED:
        return None
    return value if isinstance(value, dict) else None


class Tail:
    """A journal read as it grows: each look gives what is new to `take`."""

    def __init__(self, path: Path, *, take: Callable[[dict[str, Any]], None], forget: Callable[[], None]) -> None:
        self.path = path
        self.damaged = 0
        """Complete lines that are no JSON object."""
        self.skipped = 0
        """Bytes at the start of a long journal that were not read."""
        self._take, self._forget = take, forget
        self._inode = self._offset = 0

    def look(self) -> bool:
        """Read the complete lines since the last look; from the start when the file was rewritten (a run that was
        resumed cuts its rows). Whether anything changed."""
        file = opened(self.path)
        if file is None:
            return self._again(0)
        with file:
            found = os.fstat(file.fileno())
            changed = found.st_ino != self._inode or found.st_size < self._offset
            if changed:
                self._again(found.st_ino)
                self._start(file, found.st_size)
            file.seek(self._offset)
            before = self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                value = row(line)
                if value is None:
                    self.damaged += 1
                else:
                    self._take(value)
        return changed or self._offset > before

    def _again(self, inode: int) -> bool:
        known = self._inode != 0
        self._inode, self._offset, self.damaged, self.skipped = inode, 0, 0, 0
        if known:
            self._forget()
        return known

    def _start(self, file: IO[bytes], size: int) -> None:
        if size > MOST:
            file.seek(size - MOST)
            self._offset = self.skipped = size - MOST + len(file.readline())


def ends(path: Path, most: int = 1 << 16) -> list[dict[str, Any]]:
    """The last complete rows of a journal, as many as lie in its last `most` bytes."""
    file = opened(path)
    if file is None:
        return []
    with file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - most))
        lines = file.read(most).splitlines(keepends=True)
    whole = [line for line in lines[1 if size > most else 0 :] if line.endswith(b"\n")]
    return [value for line in whole if (value := row(line)) is not None]


def spread(path: Path, points: int) -> Iterator[dict[str, Any]]:
    """About `points` rows, evenly spread over a journal's bytes: a picture of a long file from a few reads."""
    file = opened(path)
    if file is None:
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        last = -1
        for i in range(points):
            file.seek(size * i // points)
            if i:
                file.readline(MOST)  # the rest of a line that began before
            place, line = file.tell(), file.readline(MOST)
            if place > last and line.endswith(b"\n") and (value := row(line)) is not None:
                last = place
                yield value


# --- values ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, or None: for whatever stands where a number should."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: Any, most: int = 10_000) -> str:
    """A text of limited length, for whatever stands where a text should."""
    found = value if isinstance(value, str) else "" if value is None else str(value)
    return found if len(found) <= most else f"{found[:most]} ..."


def plain(value: Any) -> Any:
    """JSON values only: numbers that are not finite, dates and whatever else TOML knows as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def table_of(value: Any) -> dict[str, Any]:
    """The value when it is a table, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """The value when it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []
