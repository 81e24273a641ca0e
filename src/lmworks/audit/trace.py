"""The spans of all ranks of a run on one clock, and the heat map that names a slow rank.

Clocks of ranks are brought onto the first rank's by the offsets that the run measured, a straight line between two
measurements. A step that was made again after a kill counts as it was made last.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import DataError, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.core.spans import Span, Sum
from lmworks.parallel.layout import AXES

Seconds = NDArray[np.float64]
SLOW = 1.1
"""A rank is slow where it works this many times as long as its peers."""
CHANCE = 1e-3
"""How likely it may be that it came last so often by chance."""
SURE = 4.0
"""How many standard errors its work must be above its peers'."""


@dataclass(kw_only=True)
class Rank:
    """What one rank told."""

    number: int
    axes: Mapping[str, int]
    """Where it stands along the axes of more than one rank."""
    spans: list[tuple[int, Span]] = field(default_factory=list)
    """(step, span), on the first rank's clock."""
    sums: dict[int, dict[str, Sum]] = field(default_factory=dict)
    """By step and name."""
    error: float = 0.0
    """Seconds by which its clock may be off."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A run's ranks."""

    run: str
    ranks: Sequence[Rank]

    @property
    def steps(self) -> list[int]:
        """Steps of which every rank told its sums."""
        found = set(self.ranks[0].sums)
        for rank in self.ranks[1:]:
            found &= set(rank.sums)
        return sorted(found)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Names of work, and of exchanges, the longest first."""
        seconds: dict[str, float] = defaultdict(float)
        exchange: dict[str, bool] = {}
        for rank in self.ranks:
            for table in rank.sums.values():
                for name, entry in table.items():
                    seconds[name] += entry.seconds
                    exchange[name] = entry.exchange
        ordered = sorted(seconds, key=lambda name: -seconds[name])
        return [n for n in ordered if not exchange[n]], [n for n in ordered if exchange[n]]


def read(path: Path, *, first: int | None = None, last: int | None = None) -> Trace:
    """The trace of a run folder, of the steps `first` to `last`, both included.

    Raises UsageError for a folder that holds no run, DataError for a run that told no spans.
    """
    run = RunFolder(path)
    if not run.events.is_file():
        raise UsageError(
            "no run is here", where=str(path), next_step="name a run folder: lmworks trace runs/quickstart"
        )
    others = sorted((path / "ranks").glob("*/events.jsonl"))
    span = range(first or 0, (last or 2**62) + 1)
    ranks = [_rank(events, span) for events in (run.events, *others)]
    found = Trace(run=run.name, ranks=sorted(ranks, key=lambda rank: rank.number))
    if not found.steps:
        text = "no step was traced" + ("" if first is None and last is None else " between these steps")
        raise DataError(text, where=str(path), next_step="train with trace.on = true, which is the default")
    return found


def _rank(path: Path, steps: range) -> Rank:
    """One rank's events, attempt by attempt: each has a clock of its own."""
    rank: Rank | None = None
    attempt: list[tuple[int, Span]] = []
    clocks: list[tuple[float, float, float]] = []
    for row in rows(path):
        if rank is None:
            rank = Rank(number=int(row["rank"]), axes=row["axes"])
        if row["name"] == "start":
            _settle(rank, attempt, clocks)
            rank.spans = [(step, span) for step, span in rank.spans if step <= row["step"]]
            rank.sums = {step: table for step, table in rank.sums.items() if step <= row["step"]}
        elif row["name"] == "clock":
            clocks.append((row["start"], row["attrs"]["offset"], row["attrs"]["error"]))
        elif row["step"] in steps and row["name"] == "sums":
            told = row["attrs"]["spans"].items()
            rank.sums[row["step"]] = {
                name: Sum(calls=calls, seconds=seconds, bytes=nbytes, exchange=bool(exchange))
                for name, (calls, seconds, nbytes, exchange) in told
            }
        elif row["step"] in steps and row["end"] > row["start"]:
            attempt.append((row["step"], _span(row)))
    if rank is None:
        raise DataError("no event was written", where=str(path), next_step="let the run make a step first")
    _settle(rank, attempt, clocks)
    return rank


def _span(row: Mapping[str, Any]) -> Span:
    attrs = row["attrs"]
    told = row["start"], row["end"], row["bytes"], attrs.get("exchange", False), attrs.get("number")
    return Span(row["name"], row["stream"], *told)


def _settle(rank: Rank, attempt: list[tuple[int, Span]], clocks: list[tuple[float, float, float]]) -> None:
    """Bring an attempt's spans onto the first rank's clock and add them to the rank's; empties both lists."""
    if clocks and attempt:
        at, offset, error = (np.array(column) for column in zip(*clocks, strict=True))
        shift = np.interp([(span.start, span.end) for _, span in attempt], at, offset)
        moved = zip(attempt, shift, strict=True)
        attempt[:] = [
            (step, span._replace(start=span.start + float(a), end=span.end + float(b)))
            for (step, span), (a, b) in moved
        ]
        rank.error = max(rank.error, float(error.max()))
    rank.spans += attempt
    attempt.clear()
    clocks.clear()


# --- the heat map -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A rank that works longer than its peers."""

    rank: int
    ratio: float
    """Of its work in a step to the median of its peers'; median over steps."""
    z: float
    """Standard errors above 1, from the median absolute deviation over steps."""
    last: int
    """Steps in which it worked longest of all its peers."""
    steps: int
    peers: int
    segment: str
    """Where most of the excess is."""
    waits: float
    """Seconds a step that it waits in exchanges; a rank that is late waits least."""
    others_wait: float

    def text(self) -> str:
        """A sentence."""
        return (
            f"rank {self.rank} is slow: its work takes {self.ratio:.2f} times its {self.peers} peers' (median over "
            f"{self.steps} steps, z = {self.z:.0f}, longest in {self.last} of them), most of it in {self.segment}; it "
            f"waits {1e3 * self.waits:.3g} ms a step, they wait {1e3 * self.others_wait:.3g} ms"
        )


def heat(trace: Trace) -> dict[str, list[float]]:
    """Median seconds a step by name, one value a rank: work first, then exchanges."""
    steps, (work, exchanges) = trace.steps, trace.names
    return {
        name: [median(_of(rank, step, name) for step in steps) for rank in trace.ranks] for name in work + exchanges
    }


def _of(rank: Rank, step: int, name: str) -> float:
    entry = rank.sums[step].get(name)
    return 0.0 if entry is None else entry.seconds


def work_of(trace: Trace) -> Seconds:
    """Seconds that each rank worked in each step, without exchanges (ranks, steps)."""
    names, _ = trace.names
    return np.array([[sum(_of(rank, step, name) for name in names) for step in trace.steps] for rank in trace.ranks])


def peers_of(trace: Trace) -> list[list[int]]:
    """For each rank the indices of the others that do the same work: those of its pipeline stage."""
    stages = [rank.axes.get("pp", 0) for rank in trace.ranks]
    return [[i for i, s in enumerate(stages) if s == stage and i != own] for own, stage in enumerate(stages)]


def slow_ranks(trace: Trace) -> list[Slow]:
    """Ranks whose work takes at least SLOW times their peers', surely; the slowest first.

    In a step that ranks make together all take as long as the slowest, so steps' seconds tell nothing: what a rank
    worked without exchanges does. Each step is a comparison of its own, so that what slows all ranks at once does not
    matter.
    """
    work_RS, peers = work_of(trace), peers_of(trace)
    n = work_RS.shape[1]
    waits = [sum(_of(rank, step, name) for step in trace.steps for name in trace.names[1]) / n for rank in trace.ranks]
    found = []
    for own, others in enumerate(peers):
        if not others:
            continue
        ratio_S = _ratios(work_RS, own, others)
        ratio = float(np.median(ratio_S))
        deviation = 1.4826 * float(np.median(np.abs(ratio_S - ratio)))
        z = (ratio - 1) / max(deviation / math.sqrt(n), 1e-6)
        last = int((work_RS[own] >= work_RS[others].max(axis=0)).sum())
        if ratio >= SLOW and z >= SURE and by_chance(last, n, 1 / (len(others) + 1)) < CHANCE:
            found.append(
                Slow(
                    rank=trace.ranks[own].number,
                    ratio=ratio,
                    z=z,
                    last=last,
                    steps=n,
                    peers=len(others),
                    segment=_excess(trace, own, others),
                    waits=waits[own],
                    others_wait=median(waits[i] for i in others),
                )
            )
    return sorted(found, key=lambda slow: -slow.ratio)


def _ratios(work_RS: Seconds, own: int, others: Sequence[int]) -> Seconds:
    """A rank's work over the median of its peers', step by step."""
    found: Seconds = work_RS[own] / np.maximum(np.median(work_RS[others], axis=0), 1e-9)
    return found


def by_chance(hits: int, tries: int, chance: float) -> float:
    """How likely it is to hit at least so often."""
    return sum(math.comb(tries, k) * chance**k * (1 - chance) ** (tries - k) for k in range(hits, tries + 1))


def _excess(trace: Trace, own: int, others: Sequence[int]) -> str:
    """The work in which a rank loses most against its peers."""
    table, names = heat(trace), trace.names[0]
    return max(names, key=lambda name: table[name][own] - median(table[name][i] for i in others))


# --- places -----------------------------------------------------------------------------------------------------------


def places(axes: Sequence[Mapping[str, int]]) -> list[tuple[int, int, int]]:
    """(dp, pp, tp) of each rank; dp numbers, without gaps, what divides rows or tokens."""
    parts = [tuple(at.get(axis, 0) for axis in AXES if axis not in ("pp", "tp")) for at in axes]
    order = {part: i for i, part in enumerate(sorted(set(parts)))}
    return [(order[part], at.get("pp", 0), at.get("tp", 0)) for part, at in zip(parts, axes, strict=True)]


def grid(trace: Trace) -> list[dict[str, Any]]:
    """Each rank's place and its work over its peers', median over steps (None without peers)."""
    work_RS, peers = work_of(trace), peers_of(trace)
    cells = []
    for own, (rank, place) in enumerate(zip(trace.ranks, places([r.axes for r in trace.ranks]), strict=True)):
        ratio = float(np.median(_ratios(work_RS, own, peers[own]))) if peers[own] else None
        cells.append({"rank": rank.number, **dict(zip(("dp", "pp", "tp"), place, strict=True)), "ratio": ratio})
    return cells


def lanes(rank: Rank) -> Iterator[tuple[str, int, list[tuple[int, Span, int]]]]:
    """The streams of a rank: name, rows that it takes, and (step, span, row). Spans that nest lie below each other;
    those of another stream that overlap lie beside each other."""
    by_stream: dict[str, list[tuple[int, Span]]] = defaultdict(list)
    for step, span in rank.spans:
        by_stream[span.stream].append((step, span))
    for stream, found in sorted(by_stream.items(), key=lambda item: (item[0] != "main", item[0])):
        ends: list[float] = []
        placed = []
        for step, span in sorted(found, key=lambda item: (item[1].start, -item[1].end)):
            if stream == "main":
                while ends and ends[-1] <= span.start:
                    ends.pop()
                row = len(ends)
                ends.append(span.end)
            else:
                row = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
                ends[row : row + 1] = [span.end]
            placed.append((step, span, row))
        yield stream, 1 + max(row for _, _, row in placed), placed
