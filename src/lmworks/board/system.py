"""What the events of a run say: where its time went, which rank is slow, what failed, what its memory holds.

Events are those of `core.events`, of all ranks: events.jsonl and events-*.jsonl in the run folder and below ranks/.
"""

from __future__ import annotations

import statistics
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmworks.board.reading import Tail, list_of, number, table_of, text

KEPT = 20_000
"""Spans of a rank that the timeline can go back to."""
SHOWN = 3000
"""Spans that one picture takes."""
BUCKETS = 100
"""Columns of the heat map."""
NAMES = 64
"""Kinds of spans that are told apart."""
TOLD = 200
"""Failures, notes and changes that are kept, the newest."""
TELLING = ("note", "change", "alert", "failed", "stopped")
"""Events that a person reads as they are."""
ALONE = ("step", "validate", "save", "sample")
"""Spans of a rank's main stream that do not lie inside each other: they add up to its time."""


@dataclass(kw_only=True)
class Attempt:
    """What the first rank did from one start to its end."""

    start: float
    end: float
    step: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALONE, 0.0))
    steps: dict[int, float] = field(default_factory=dict)
    """Seconds of each step."""


@dataclass(frozen=True)
class Lengths:
    """Seconds by step."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))


class Rank:
    """The spans of one rank."""

    def __init__(self) -> None:
        self.recent: deque[tuple[str, str, int, float, float]] = deque(maxlen=KEPT)
        """(stream, name, step, start, end) in seconds since the epoch."""
        self.lengths: dict[str, Lengths] = {}
        """Of single spans, by name."""
        self.sums: dict[str, Lengths] = {}
        """Of all spans of a name in a step, where the run told them: not every span of every step is written."""
        self.offset = 0.0
        """Seconds that bring this rank's clock onto the first rank's, as measured last."""

    def add(self, stream: str, name: str, step: int, start: float, end: float) -> None:
        """Keep a span for the timeline, and its length for the heat map."""
        self.recent.append((stream, name, step, start, end))
        _add(self.lengths, name, step, end - start)

    def add_sums(self, step: int, told: dict[str, Any]) -> None:
        """Keep what a step took by name: name -> (calls, seconds, ...)."""
        for name, facts in told.items():
            values = list_of(facts)
            seconds = number(values[1]) if len(values) > 1 else None
            if seconds is not None:
                _add(self.sums, text(name, 80), step, seconds)

    def of(self, name: str) -> Lengths | None:
        """Seconds of a name by step: of whole steps where they are known."""
        return self.sums.get(name) or self.lengths.get(name)


class System:
    """The events of one run, read as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tails: dict[Path, Tail] = {}
        self._forget()

    def look(self) -> None:
        """Read what is new in the files of all ranks; files that appear are taken up."""
        for path in _files(self._path):
            if path not in self._tails:
                self._tails[path] = Tail(path, take=self._take, forget=self._again)
        for tail in list(self._tails.values()):
            tail.look()

    def _again(self) -> None:
        """A journal of events was rewritten, which none of our programs does: read all of them again."""
        self._forget()
        self._tails.clear()

    def _forget(self) -> None:
        self.ranks: dict[int, Rank] = {}
        self.attempts: list[Attempt] = []
        self.told: deque[dict[str, Any]] = deque(maxlen=TOLD)
        self.memory: dict[int, dict[str, Any]] = {}
        self.sent: deque[dict[str, Any]] = deque(maxlen=TOLD)
        self.energy: dict[str, Any] = {}

    def _take(self, event: dict[str, Any]) -> None:
        start, end, step, rank = (number(event.get(name)) for name in ("start", "end", "step", "rank"))
        if start is None or end is None or step is None or rank is None or not 0 <= rank < 1e6 or abs(step) > 2**62:
            return
        name, attrs, at = text(event.get("name"), 80), table_of(event.get("attrs")), int(rank)
        if name == "sums":
            self._rank(at).add_sums(int(step), table_of(attrs.get("spans")))
        elif name == "clock":
            self._rank(at).offset = number(attrs.get("offset")) or 0.0
        elif end > start:
            self._rank(at).add(text(event.get("stream"), 40), name, int(step), start, end)
        if at == 0:
            self._of_first(name, int(step), start, end)
        self._point(name, at, int(step), start, attrs, event)

    def _rank(self, rank: int) -> Rank:
        return self.ranks.setdefault(rank, Rank())

    def _of_first(self, name: str, step: int, start: float, end: float) -> None:
        if name == "start" or not self.attempts:
            self.attempts.append(Attempt(start=start, end=end, step=step))
        attempt = self.attempts[-1]
        attempt.end = max(attempt.end, end)
        if name in attempt.seconds:
            attempt.seconds[name] += end - start
        if name == "step":
            attempt.steps[step] = end - start

    def _point(self, name: str, rank: int, step: int, at: float, attrs: dict[str, Any], event: dict[str, Any]) -> None:
        if name == "memory":
            self.memory[rank] = {side: table_of(attrs.get(side)) for side in ("predicted", "measured")}
        elif name == "energy":
            self.energy = table_of(attrs.get("account"))
        elif name == "sent":
            facts = {key: text(attrs.get(key), 80) for key in ("axis", "operation")}
            sizes = {"calls": number(attrs.get("calls")), "bytes": number(event.get("bytes"))}
            self.sent.append({"rank": rank, **facts, **sizes})
        elif name in TELLING or name.endswith(" failed") or (name == "start" and rank == 0):
            said = next((attrs[key] for key in ("text", "reason", "resumed_from") if attrs.get(key)), "")
            self.told.append({"at": at, "step": step, "rank": rank, "name": name, "text": text(said, 2000)})

    # --- answers -----------------------------------------------------------------------------------------------------

    def time(self) -> dict[str, Any]:
        """Where the first rank's time went, in seconds, from its first start to its last event.

        `effective`: the share that went into steps that count. A step that was made again after a resume counts once,
        the last time; `again` is what went into it before. `down`: between two attempts. `other`: the rest, such as
        making ready and work between steps.
        """
        if not self.attempts:
            return {}
        wall = self.attempts[-1].end - self.attempts[0].start
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        down = sum(max(0.0, after.start - before.end) for before, after in pairs)
        parts = {name: sum(attempt.seconds[name] for attempt in self.attempts) for name in ALONE}
        last: dict[int, float] = {}
        for attempt in self.attempts:
            last |= attempt.steps
        kept = sum(last.values())
        again = max(0.0, parts.pop("step") - kept)
        spent = {"steps": kept, "again": again, **parts, "down": down}
        spent["other"] = max(0.0, wall - sum(spent.values()))
        return {
            "wall": wall,
            "spent": spent,
            "effective": kept / wall if wall > 0 else None,
            "attempts": [
                {"start": one.start, "end": one.end, "step": one.step, "steps": len(one.steps)} for one in self.attempts
            ],
        }

    def names(self) -> list[str]:
        """Kinds of spans, the most frequent first."""
        counts: dict[str, int] = {}
        for rank in self.ranks.values():
            for name, found in [*rank.lengths.items(), *rank.sums.items()]:
                counts[name] = counts.get(name, 0) + len(found.steps)
        return sorted(counts, key=lambda name: -counts[name])

    def heat(self, name: str) -> dict[str, Any]:
        """Seconds of a kind of span by rank and bucket of steps, medians; and each rank's excess over the others.

        `cells`: (bucket, place of the rank in `ranks`, seconds). `excess`: median over buckets of a rank's seconds over
        the median rank's, where there are several ranks.
        """
        found = {rank: spans for rank in sorted(self.ranks) if (spans := self.ranks[rank].of(name)) is not None}
        if not found:
            return {"ranks": [], "buckets": [], "cells": [], "excess": []}
        steps = [step for spans in found.values() for step in (min(spans.steps), max(spans.steps))]
        first, size = min(steps), max(1, -(-(max(steps) - min(steps) + 1) // BUCKETS))
        table: dict[int, dict[int, float]] = {}
        for rank, spans in found.items():
            sums: dict[int, list[float]] = {}
            for step, seconds in zip(spans.steps, spans.seconds, strict=True):
                sums.setdefault((step - first) // size, []).append(seconds)
            table[rank] = {bucket: statistics.median(values) for bucket, values in sums.items()}
        buckets = sorted({bucket for row in table.values() for bucket in row})
        places = {bucket: i for i, bucket in enumerate(buckets)}
        cells = [[places[b], i, table[rank][b]] for i, rank in enumerate(table) for b in sorted(table[rank])]
        return {
            "ranks": list(table),
            "buckets": [first + bucket * size for bucket in buckets],
            "steps_a_bucket": size,
            "cells": cells,
            "excess": _excess(table),
        }

    def timeline(self, steps: int) -> dict[str, Any]:
        """The spans of the last `steps` steps, in seconds since the first of them, on the first rank's clock.

        `spans`: (lane, name, step, start, end, depth); the depth counts the spans of its lane that it lies in.
        """
        newest = max((span[2] for rank in self.ranks.values() for span in rank.recent), default=0)
        chosen = [
            (rank, stream, name, step, start + ours.offset, end + ours.offset)
            for rank, ours in sorted(self.ranks.items())
            for stream, name, step, start, end in ours.recent
            if step > newest - steps
        ]
        left_out = max(0, len(chosen) - SHOWN)
        chosen = sorted(chosen, key=lambda span: (span[4], -span[5]))[left_out:]
        lanes = sorted({(rank, stream) for rank, stream, *_ in chosen})
        there = {name for _, _, name, *_ in chosen}
        names = list(dict.fromkeys([name for name in self.names() if name in there] + sorted(there)))
        zero = min((span[4] for span in chosen), default=0.0)
        return {
            "zero": zero,
            "lanes": [f"rank {rank}" + (f", {stream}" if stream != "main" else "") for rank, stream in lanes],
            "names": names,
            "left_out": left_out,
            "spans": _nested(
                [lanes.index((rank, stream)), names.index(name), step, round(start - zero, 6), round(end - zero, 6)]
                for rank, stream, name, step, start, end in chosen
            ),
        }


def _nested(spans: Iterable[list[Any]]) -> list[list[Any]]:
    """Spans in the order of their starts, each with how many of its lane it lies in."""
    around: dict[int, list[float]] = {}
    found = []
    for lane, name, step, start, end in spans:
        ends = around.setdefault(lane, [])
        while ends and ends[-1] <= start:
            ends.pop()
        found.append([lane, name, step, start, end, len(ends)])
        ends.append(end)
    return found


def _add(lengths: dict[str, Lengths], name: str, step: int, seconds: float) -> None:
    if name not in lengths:
        if len(lengths) >= NAMES:
            return
        lengths[name] = Lengths()
    lengths[name].steps.append(step)
    lengths[name].seconds.append(seconds)


def _excess(table: dict[int, dict[int, float]]) -> list[float]:
    if len(table) < 2:
        return []
    buckets = {bucket for row in table.values() for bucket in row}
    middle = {bucket: statistics.median([row[bucket] for row in table.values() if bucket in row]) for bucket in buckets}
    ratios = [[row[b] / middle[b] for b in row if middle[b] > 0] for row in table.values()]
    return [statistics.median(found) if found else 1.0 for found in ratios]


def _files(path: Path) -> Iterable[Path]:
    patterns = ("events.jsonl", "events-*.jsonl", "ranks/*/events.jsonl", "ranks/*/events-*.jsonl")
    return [found for pattern in patterns for found in sorted(path.glob(pattern))]
