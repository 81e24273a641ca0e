"""The one event schema: what happened, when, on which rank, with how many bytes. Written by everything.

An event is one JSON line: {run, step, rank, axes, stream, name, start, end, bytes, attrs}. Times are seconds since the
epoch. Timelines, heat maps, energy, planner feedback and the board read it; nothing else is logged in another shape.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lmworks.core.journal import Journal
from lmworks.core.spans import Span


class Events:
    """Writes events of one rank of one run. `clock` tells seconds since the epoch."""

    def __init__(
        self,
        path: Path,
        *,
        run: str,
        rank: int = 0,
        axes: dict[str, int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = Journal(path)
        self._clock = clock
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
        now = self._clock()
        begun = now if start is None else start
        times = {"start": begun, "end": begun if end is None and start is None else (end or now)}
        run, rank, axes = self._fixed["run"], self._fixed["rank"], self._fixed["axes"]
        row = {"run": run, "step": self.step, "rank": rank, "axes": axes, "stream": stream, "name": name, **times}
        self._journal.append({**row, "bytes": bytes, "attrs": attrs})

    @contextmanager
    def span(self, name: str, *, stream: str = "main", **attrs: Any) -> Iterator[dict[str, Any]]:
        """Write an event that lasts as long as the block; the block may add attributes to the dict it gets."""
        start = self._clock()
        try:
            yield attrs
        finally:
            self.write(name, start=start, end=self._clock(), stream=stream, **attrs)

    def spans(self, found: Iterable[Span], *, step: int) -> None:
        """Write many spans of a step. They are as many as everything else together: what lines share is made once."""
        run, rank, axes = (json.dumps(self._fixed[name]) for name in ("run", "rank", "axes"))
        front, middle = f'{{"run": {run}, "step": {step}, "rank": {rank}, "axes": {axes}, "stream": ', '"start": '
        self._journal.extend(
            f'{front}{_quoted(stream)}, "name": {_quoted(name)}, {middle}{start!r}, "end": {end!r}, "bytes": {size}, '
            f'"attrs": {_attrs(exchange, number)}}}\n'
            for name, stream, start, end, size, exchange, number in found
        )

    def flush(self) -> None:
        """Hand all waiting events to the operating system."""
        self._journal.flush()


@cache
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _attrs(exchange: bool, number: int | None) -> str:
    told = {"exchange": "true"} if exchange else {}
    if number is not None:
        told["number"] = str(number)
    return "{" + ", ".join(f'"{name}": {value}' for name, value in told.items()) + "}"
