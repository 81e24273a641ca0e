"""A journal: a file of JSON lines that is only appended to, and that survives a kill in the middle of a line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmworks.core.files import sync, write_text


class Journal:
    """Appends JSON objects to a file, one a line. Lines reach the file at least every `seconds`, or on `flush`."""

    def __init__(self, path: Path, *, seconds: float = 1.0) -> None:
        self.path = path
        self._seconds = seconds
        self._waiting: list[str] = []
        self._last = time.monotonic()
        _mend(path)

    def append(self, row: dict[str, Any]) -> None:
        """Add one object. NaN and infinity are written as null-safe strings, since JSON has no word for them."""
        self.extend((_line(row),))

    def extend(self, lines: Iterable[str]) -> None:
        """Add objects that are JSON already, each on a line that ends."""
        self._waiting.extend(lines)
        if time.monotonic() - self._last >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Hand all waiting lines to the operating system.

        Raises OSError when it does not take them all: the file then ends where it ended before, and the lines wait on.
        """
        if self._waiting:
            data = "".join(self._waiting).encode()
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(before)
                    raise
            self._waiting.clear()
        self._last = time.monotonic()

    def sync(self) -> None:
        """Make all lines durable: they are there after a power cut."""
        self.flush()
        if self.path.exists():
            sync(self.path)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete objects of a journal; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:  # bytes: the cut may lie inside a character
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a journal with only the rows that `keep` accepts, in one step."""
    if path.exists():
        write_text(path, "".join(_line(row) for row in rows(path) if keep(row)))


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError:
        safe = {
            k: str(v) if isinstance(v, float) and (v != v or v in (float("inf"), -float("inf"))) else v
            for k, v in row.items()
        }
        return json.dumps(safe, ensure_ascii=False) + "\n"


def _mend(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, so that the next append starts a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with path.open("rb+") as file:
            file.truncate(end)
