"""The one event schema: what happened, when, on which rank, with how many bytes. Written by everything.

An event is one JSON line: {run, step, rank, axes, stream, name, start, end, bytes, attrs}. Times are seconds since the
epoch. Timelines, heat maps, energy, planner feedback and the board read it; nothing else is logged in another shape.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmworks.core.journal import Journal


class Events:
    """Writes events of one rank of one run."""

    def __init__(self, path: Path, *, run: str, rank: int = 0, axes: dict[str, int] | None = None) -> None:
        self._journal = Journal(path)
        self._fixed = {"run": run, "rank": rank, "axes": axes or {}}
        self.step = 0
        self.last = ""
        """The name of the last event; empty before the first one."""

    def write(
        self,
        name: str,
        *,
        start: float | None = None,
        end: float | None = None,
        stream: str = "main",
        bytes: int = 0,
        **attrs: Any,
    ) -> None:
        """Write one event; without times it is a point in time, now."""
        self.last = name
        now = time.time()
        begun = now if start is None else start
        times = {"start": begun, "end": begun if end is None and start is None else (end or now)}
        run, rank, axes = self._fixed["run"], self._fixed["rank"], self._fixed["axes"]
        row = {"run": run, "step": self.step, "rank": rank, "axes": axes, "stream": stream, "name": name, **times}
        self._journal.append({**row, "bytes": bytes, "attrs": attrs})

    @contextmanager
    def span(self, name: str, *, stream: str = "main", **attrs: Any) -> Iterator[dict[str, Any]]:
        """Write an event that lasts as long as the block; the block may add attributes to the dict it gets."""
        start = time.time()
        try:
            yield attrs
        finally:
            self.write(name, start=start, end=time.time(), stream=stream, **attrs)

    def flush(self) -> None:
        """Hand all waiting events to the operating system."""
        self._journal.flush()
