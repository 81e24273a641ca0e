"""Where the time of one rank goes: named spans that nest, cheap enough to be on in every step.

A span is two marks of a clock and a line in a list; nothing is formatted, written or waited for until somebody takes
what was recorded. On a GPU a mark is an event on a stream, which is read a step later.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

MAIN = "main"
"""The stream on which a rank computes: its spans nest."""
BESIDE = "beside"
"""Exchanges that go on while a rank computes: their spans may overlap."""


class Clock(Protocol):
    """What marks moments."""

    behind: int
    """Steps after which a mark can be read without waiting for it."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def at(self, mark: Any) -> float:
        """When that was, in seconds since the epoch."""
        ...

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another. On a GPU it waits for the second one."""
        ...

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def stream(self) -> str:
        """The name of the stream that work is put on."""
        ...


@final
class HostClock:
    """The host's clock: seconds since the epoch as they were when it was made, counted on by the monotonic clock, so
    that no span is ever shorter than nothing. `skew` seconds are added, for tests."""

    behind = 0

    def __init__(self, *, skew: float = 0.0) -> None:
        self._epoch = time.time() - time.perf_counter() + skew

    def mark(self) -> float:
        """This moment."""
        return time.perf_counter()

    def at(self, mark: float) -> float:
        """When that was."""
        return self._epoch + mark

    def between(self, start: float, end: float) -> float:
        """Seconds from one mark to another."""
        return end - start

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._epoch + time.perf_counter()

    def stream(self) -> str:
        """A host has one."""
        return MAIN


class Span(NamedTuple):
    """A finished span; seconds since the epoch."""

    name: str
    stream: str
    start: float
    end: float
    bytes: int = 0
    exchange: bool = False
    """Whether ranks wait for each other in it."""
    number: int | None = None
    """Which one it is of its kind: the count of an exchange on its axis, or a micro-batch."""


@final
class Open:
    """A span that is being recorded; a context manager, or `begin` and `finish` by hand."""

    __slots__ = ("_clock", "bytes", "end", "exchange", "name", "number", "start", "stream")

    def __init__(self, clock: Clock, name: str, stream: str, nbytes: int, exchange: bool, number: int | None) -> None:
        self._clock, self.name, self.stream = clock, name, stream
        self.bytes, self.exchange, self.number = nbytes, exchange, number
        self.start: Any = None
        self.end: Any = None

    def __enter__(self) -> Open:
        self.start = self._clock.mark()
        return self

    def __exit__(self, *unused: object) -> None:
        self.end = self._clock.mark()

    def read(self) -> Span:
        """The span as numbers. On a GPU it waits for its end."""
        at = self._clock.at
        return Span(self.name, self.stream, at(self.start), at(self.end), self.bytes, self.exchange, self.number)


@dataclass(frozen=True, kw_only=True)
class Sum:
    """All spans of one name in a step."""

    calls: int
    seconds: float
    """On the main stream without the spans inside."""
    bytes: int
    exchange: bool


Recorded = Sequence[Open]
"""Spans that have ended, in the order in which they began."""


@final
class Spans:
    """Records the spans of one rank. Off until `on` is set: nobody would take them."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or HostClock()
        self.on = False
        self.moved = time.monotonic()
        """When a span began here last, by the monotonic clock."""
        self._recorded: list[Open] = []

    def span(
        self,
        name: str,
        *,
        stream: str | None = None,
        bytes: float = 0,
        exchange: bool = False,
        number: int | None = None,
    ) -> AbstractContextManager[Any]:
        """Record the block. `stream`: left out, the one that work is put on now."""
        if not self.on:
            return nullcontext()
        self.moved = time.monotonic()
        found = Open(self.clock, name, stream or self.clock.stream(), int(bytes), exchange, number)
        self._recorded.append(found)
        return found

    def take(self) -> Recorded:
        """What has ended since it was asked last; what goes on stays."""
        found, self._recorded = self._recorded, []
        self._recorded = [span for span in found if span.end is None]
        return [span for span in found if span.end is not None]

    def doing(self) -> list[str]:
        """The names of the spans that go on now, the outermost first."""
        return [
            span.name if span.number is None else f"{span.name} {span.number}"
            for span in list(self._recorded)
            if span.end is None
        ]


def sums(spans: Iterable[Span]) -> dict[str, Sum]:
    """Calls, seconds and bytes by name. On the main stream a span's seconds are its own, without those of the spans
    inside it, so that they add up to the time that is covered."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])
    exchange: dict[str, bool] = {}
    around: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        seconds = span.end - span.start
        entry = found[span.name]
        entry[0] += 1
        entry[1] += seconds
        entry[2] += span.bytes
        exchange[span.name] = span.exchange
        if span.stream != MAIN:
            continue
        while around and around[-1].end <= span.start:
            around.pop()
        if around:
            found[around[-1].name][1] -= min(span.end, around[-1].end) - span.start
        around.append(span)
    return {
        name: Sum(calls=int(calls), seconds=max(seconds, 0.0), bytes=int(nbytes), exchange=exchange[name])
        for name, (calls, seconds, nbytes) in found.items()
    }
