"""Who did not arrive: the flight records of a run's ranks held against each other.

Ranks of a group make the same exchanges in the same order, each with its number. So of a group some ranks stand at the
highest number, and those below it have not arrived: the former wait for the latter. A message waits for its sender. A
rank that waits for nobody, or that left no record at all, is a suspect.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.audit.trace import places
from lmworks.core.run import RunFolder
from lmworks.parallel.flight import records
from lmworks.parallel.layout import AXES

MOST_FRAMES = 12
"""Of a stack, the innermost ones are told."""


@dataclass(frozen=True, kw_only=True)
class Waits:
    """One rank waits for another."""

    rank: int
    on: int
    exchange: str
    """Axis, operation and number."""
    seconds: float
    """So far; 0 where the exchange is in a GPU's hands."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What the records say together."""

    folder: Path
    world: int
    silent: Sequence[int]
    """Ranks that left no record."""
    waits: Sequence[Waits]
    suspects: Sequence[int]
    """Those that left none first; then those that wait for nobody while others wait for them, or that all wait for."""
    paths: Sequence[Sequence[Waits]]
    """To each suspect, from the rank that is furthest away from it."""
    differ: Sequence[str]
    """Exchanges of one number that are not the same on all ranks of a group."""
    records: Mapping[int, dict[str, Any]]

    def place(self, rank: int) -> str:
        """'rank 3 (pp 1, dp_shard 1)'."""
        axes = self.records.get(rank, {}).get("axes", {})
        told = ", ".join(f"{axis} {axes[axis]}" for axis in AXES if axis in axes and self._several(axis))
        return f"rank {rank}" + (f" ({told})" if told else "")

    def _several(self, axis: str) -> bool:
        return any(record["axes"].get(axis, 0) > 0 for record in self.records.values())

    def stack(self, rank: int) -> list[str]:
        """Where a rank's main thread stands, innermost last."""
        found: list[str] = self.records.get(rank, {}).get("stacks", {}).get("MainThread", [])
        return found[-MOST_FRAMES:]


def newest(run: Path) -> Path | None:
    """The folder of the last attempt that left records; None where none did."""
    found = [folder for folder in sorted(RunFolder(run).flight.glob("*")) if records(folder)]
    return found[-1] if found else None


def read(folder: Path) -> Hang:
    """What the records of one attempt say."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in records(folder)]
    found: dict[int, dict[str, Any]] = {record["rank"]: record for record in told}
    world = max(record["world"] for record in found.values())
    silent = [rank for rank in range(world) if rank not in found]
    waits, differ = _waits(found)
    suspects = _suspects(world, silent, waits)
    paths = [found_path for suspect in suspects if (found_path := _path(suspect, waits))]
    return Hang(
        folder=folder,
        world=world,
        silent=silent,
        waits=waits,
        suspects=suspects,
        paths=paths,
        differ=differ,
        records=found,
    )


def _waits(found: Mapping[int, dict[str, Any]]) -> tuple[list[Waits], list[str]]:
    waits: list[Waits] = []
    differ: dict[str, None] = {}
    groups: dict[tuple[str, tuple[int, ...]], None] = {}
    for record in found.values():
        for axis, members in record["groups"].items():
            groups[axis, tuple(members)] = None
    for axis, members in groups:
        numbers = {rank: _number(found.get(rank), axis) for rank in members}
        top = max(numbers.values())
        late = [rank for rank, number in numbers.items() if number < top]
        there = {rank: entry for rank in members if (entry := _entry(found.get(rank), axis, top)) is not None}
        differ |= dict.fromkeys(_different(axis, list(there.values())))
        for rank, entry in there.items():
            if _in(entry, found[rank]):
                waits += [_wait(rank, other, entry) for other in late]
    for rank, record in found.items():
        waits += _messages(rank, record, found)
    return waits, list(differ)


def _in(entry: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a rank waits in an exchange: it has not left it, or it is in no other; a GPU's are left at once."""
    return entry["left"] is None or all(other["left"] is not None for other in record["entries"])


def _number(record: Mapping[str, Any] | None, axis: str) -> int:
    """How many exchanges of a whole axis a rank has made; -1 where it left no record."""
    if record is None:
        return -1
    counts = (count["number"] for count in record["counts"] if count["axis"] == axis and count["peer"] is None)
    return int(next(counts, 0))


def _entry(record: Mapping[str, Any] | None, axis: str, number: int) -> dict[str, Any] | None:
    """An exchange of a whole axis; None where the rank has not come to it, or where it is too long ago."""
    for entry in () if record is None else record["entries"]:
        if (entry["axis"], entry["number"], entry["peer"]) == (axis, number, None):
            return dict(entry)
    return None


def _different(axis: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    kinds = sorted({entry["operation"] for entry in entries})
    if len(kinds) < 2:
        return []
    return [f"exchange {entries[0]['number']} on {axis} is {' on some ranks, '.join(kinds)} on others"]


def _wait(rank: int, on: int, entry: Mapping[str, Any]) -> Waits:
    seconds = entry["entered"] if entry["left"] is None else 0.0
    return Waits(rank=rank, on=on, exchange=f"{entry['axis']} {entry['operation']} {entry['number']}", seconds=seconds)


def _messages(rank: int, record: Mapping[str, Any], found: Mapping[int, dict[str, Any]]) -> list[Waits]:
    """Receipts that are open although the other rank has not sent so many."""
    waits = []
    for entry in record["entries"]:
        if entry["peer"] is None or entry["left"] is not None or entry["operation"] != "receive":
            continue
        sent = 0
        for count in found.get(entry["peer"], {}).get("counts", ()):
            if count["axis"] == entry["axis"] and count["peer"] == rank and count["operation"] == "send":
                sent = count["number"]
        if sent < entry["number"]:
            waits.append(_wait(rank, entry["peer"], entry))
    return waits


def _suspects(world: int, silent: Sequence[int], waits: Sequence[Waits]) -> list[int]:
    """Silent ranks; then those that are waited for and wait for nobody; in a circle, those that most wait for."""
    waiting, waited = {wait.rank for wait in waits}, {wait.on for wait in waits}
    found = [*silent, *sorted(waited - waiting - set(silent))]
    if not found and waited:
        by: dict[int, set[int]] = defaultdict(set)
        for wait in waits:
            by[wait.on].add(wait.rank)
        most = max(len(ranks) for ranks in by.values())
        found = sorted(rank for rank in by if len(by[rank]) == most)
    return found


def _path(suspect: int, waits: Sequence[Waits]) -> list[Waits]:
    """The longest of the shortest ways to a suspect along who waits for whom."""
    steps: dict[int, Waits] = {}
    edge = [suspect]
    furthest = suspect
    while edge:
        further = []
        for wait in waits:
            if wait.on in edge and wait.rank not in steps and wait.rank != suspect:
                steps[wait.rank] = wait
                further.append(wait.rank)
        furthest = further[0] if further else furthest
        edge = further
    path = []
    while furthest != suspect:
        path.append(steps[furthest])
        furthest = steps[furthest].on
    return path


def report(hang: Hang) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "folder": str(hang.folder),
        "world": hang.world,
        "silent": list(hang.silent),
        "suspects": [
            {
                "rank": rank,
                "place": hang.place(rank),
                "reason": hang.records[rank]["reason"] if rank in hang.records else None,
                "doing": hang.records[rank]["doing"] if rank in hang.records else None,
                "stack": hang.stack(rank),
            }
            for rank in hang.suspects
        ],
        "waits": [vars(wait) for wait in hang.waits],
        "paths": [[vars(wait) for wait in path] for path in hang.paths],
        "differ": list(hang.differ),
        "grid": grid(hang),
    }


def grid(hang: Hang) -> list[dict[str, Any]]:
    """The place of each rank that left a record, and whether it is a suspect."""
    ranks = sorted(hang.records)
    found = zip(ranks, places([hang.records[rank]["axes"] for rank in ranks]), strict=True)
    return [
        {"rank": rank, "dp": dp, "pp": pp, "tp": tp, "suspect": rank in hang.suspects} for rank, (dp, pp, tp) in found
    ]


def text(hang: Hang) -> str:
    """All of it for people."""
    lines = [f"{len(hang.records)} of {hang.world} ranks left a record in {hang.folder}"]
    for rank in hang.suspects:
        lines.append(f"\nSUSPECT  {hang.place(rank)}: {_why(hang, rank)}")
        lines += [f"    {frame}" for frame in hang.stack(rank)]
    if not hang.suspects:
        lines.append("nobody waits for a rank that has not arrived")
    for path in hang.paths:
        lines.append("\nwho waits for whom, to the suspect:")
        lines += [f"    {hang.place(w.rank)} waits for rank {w.on} in {w.exchange}, {w.seconds:.1f} s" for w in path]
    lines += [f"\nNOT THE SAME: {what}" for what in hang.differ]
    return "\n".join(lines)


def _why(hang: Hang, rank: int) -> str:
    waiting = sorted({wait.rank for wait in hang.waits if wait.on == rank})
    told = f"ranks {', '.join(map(str, waiting))} wait for it" if waiting else "nobody is known to wait for it"
    if rank not in hang.records:
        return f"left no record (stopped, killed, or its machine is gone); {told}"
    record = hang.records[rank]
    doing = " > ".join(record["doing"])
    return f"{told}; step {record['step']}{f', in {doing}' if doing else ''}; its record: {record['reason']}"
