"""Who goes out: all blocks while the first two steps size buffers and measure, then those of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmworks.methods.ssdtrain.plan import BACKWARD, least_ahead, paper_plan, strict_plan
from lmworks.train.moved import Facts
from lmworks.train.offload import TensorCache
from lmworks.train.scratch import doubt

PROFILED = 2
"""The step that is measured; the one before it makes buffers and files."""
YEAR = 365.25 * 24 * 3600.0
LONG = 0.1
"""The share of a step from which on waiting is told."""
MEASURED = "profile"


@dataclass(frozen=True, kw_only=True)
class Flight:
    """What a pilot is to do."""

    names: tuple[str, ...]
    """Blocks in the order of the forward pass."""
    plan: Literal["strict", "paper", "all"]
    bandwidth: Literal["profile"] | float | tuple[float, float]
    again: bool
    """Whether blocks are run again in the backward pass."""
    deeper: bool
    """Whether the plan may ask for more blocks ahead than one."""
    folders: tuple[Path, ...] = ()
    """Where files are; none: nothing is written to a disk."""
    endurance: float = 0.0
    """Bytes that the disks are made for."""


class Pilot:
    """Decides for the blocks of one cache. `notes` are told with the first step."""

    def __init__(self, flight: Flight, notes: Sequence[str] = ()) -> None:
        self.flight = flight
        self.out = set(flight.names)
        """Blocks that go out."""
        self.cache: TensorCache | None = None
        self._notes = [*notes, *(found for folder in flight.folders if (found := doubt(folder)) is not None)]
        self._heard = 0
        self._waited = False

    def goes(self, name: str) -> bool:
        """Whether a block's tensors go out now: the last one's do not where they are needed again at once."""
        at_once = name == self.flight.names[-1] and self.cache is not None and self.cache.turns
        return name in self.out and not at_once

    def hear(self, facts: Facts) -> None:
        """What a step moved. The second one decides."""
        self._heard += 1
        if self._heard == 1:
            facts.notes += [f"saved tensors: {note}" for note in self._notes]
        if self._heard == PROFILED:
            self._decide(facts)
        elif self._heard > PROFILED and not self._waited and facts.stalled > LONG * facts.seconds:
            self._waited = True
            share = f"{facts.stalled:.2g} s of a step of {facts.seconds:.2g} s"
            facts.notes.append(f"saved tensors: the backward pass waited {share} for them to come back")

    def _decide(self, facts: Facts) -> None:
        """Plan by what was measured, and tell it."""
        names, times, sizes = self.flight.names, facts.times(), facts.sizes()
        seconds = [_mean(times.get(name, [])) for name in names]
        nbytes = [_mean(sizes.get(name, [])) for name in names]
        if not any(nbytes):
            facts.notes.append("saved tensors: none is as large as least_bytes, so nothing goes out")
            return
        write, read = rates(facts, self.flight.bandwidth)
        out = self._plan(seconds, nbytes, facts, write, read)
        self.out = set(names[:out])
        written = sum(
            visit.nbytes
            for made in facts.passes
            for visit in made.visits
            if visit.name in self.out and not (made.turns and visit.name == names[-1])
        )
        goes = [name for name in names if name in self.out and (name != names[-1] or not _all_turn(facts))]
        facts.notes += self._told(goes, write, read, written, facts.seconds)

    def _plan(self, seconds: list[float], nbytes: list[float], facts: Facts, write: float, read: float) -> int:
        backward = BACKWARD + self.flight.again
        rest = _mean(facts.between())
        if self.flight.plan == "all":
            return len(seconds)
        if self.flight.plan == "paper":
            return paper_plan(seconds, nbytes, together(write, read), rest=rest, backward=backward)
        out = strict_plan(seconds, nbytes, write, read, rest=rest, backward=backward)
        if self.flight.deeper and self.cache is not None and out:
            self.cache.depth = least_ahead(seconds, nbytes, out, write, read, rest=rest, backward=backward)
        return out

    def _told(self, goes: list[str], write: float, read: float, written: int, seconds: float) -> list[str]:
        """The plan in words, and how long the disks last."""
        names, plan = self.flight.names, self.flight.plan
        rate = f"{size(write)}/s out, {size(read)}/s back"
        if not goes:
            return [f"saved tensors: no block goes out ({plan} plan, {rate})"]
        which = f"block {goes[0]}" if len(goes) == 1 else f"blocks {goes[0]}-{goes[-1]}"
        go = "goes" if len(goes) == 1 else "go"
        text = (
            f"saved tensors: {which} of {names[0]}-{names[-1]} {go} out ({plan} plan, {rate}); {size(written)} a step"
        )
        if not self.flight.folders or not written:
            return [text]
        years = self.flight.endurance / written * seconds / YEAR
        notes = [f"{text}; at this rate {size(self.flight.endurance)} of writing last {years:.2g} years"]
        if years < 1:
            less = "around = 'recompute', a larger least_bytes, or to = 'host'"
            notes.append(f"saved tensors: the disk would be worn out in {years:.2g} years. Less is written with {less}")
        return notes


def rates(facts: Facts, bandwidth: Literal["profile"] | float | tuple[float, float]) -> tuple[float, float]:
    """Bytes a second out and back: as set, or as measured; 0 where nothing got out in time."""
    if isinstance(bandwidth, tuple):
        return bandwidth
    if bandwidth != MEASURED:
        return float(bandwidth), float(bandwidth)
    write = facts.stored / facts.seconds_storing if facts.stored and facts.seconds_storing else 0.0
    read = facts.loaded / facts.seconds_loading if facts.loaded and facts.seconds_loading else write
    return write, read


def together(write: float, read: float) -> float:
    """One rate for both ways: of as many bytes out as back."""
    return 2 / (1 / write + 1 / read) if write and read else 0.0


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit, of in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= of:
            return f"{nbytes / of:.3g} {unit}"
    return f"{nbytes:.3g} bytes"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _all_turn(facts: Facts) -> bool:
    return all(made.turns for made in facts.passes)
