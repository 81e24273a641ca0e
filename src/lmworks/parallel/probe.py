"""Measuring the links between machines: a tournament in which each two of them send to each other, alone.

In a round every machine is in one pair at most, so that nothing is measured beside other traffic of the same machine;
a switch that all pairs share is seen as loaded as a training step loads it. What a round found is written before the
next one begins. The same code runs over gloo and NCCL.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from lmworks.core.errors import DataError, LmworksError
from lmworks.core.run import hardware
from lmworks.parallel.links import TABLES, Profile, changed, empty, from_json, read, to_json
from lmworks.parallel.wire import Sent, Wire

PATIENCE = timedelta(seconds=60)
"""How long a message of a probe may take before its link counts as dead."""
REPEATS = 5
Pair = tuple[int, int]


def rounds(number: int) -> list[tuple[Pair, ...]]:
    """Every pair of 0 .. number - 1 once, in rounds in which each is in one pair at most; one idles where the number is
    odd. The first stays where it is, the others go round."""
    if number < 2:
        return []
    places: list[int | None] = [*range(number), *([None] if number % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append(tuple((min(a, b), max(a, b)) for a, b in met if a is not None and b is not None))
        places = [places[0], places[-1], *places[1:-1]]
    return found


class _Seen(NamedTuple):
    """What one rank found of its way to a partner; zeros where it had none."""

    bytes_per_second: float = 0.0
    both_ways: float = 0.0
    latency_seconds: float = 0.0


def begin(
    wire: Wire, machine: str, each: int, path: Path, device: torch.device, *, flops: float, message_bytes: int
) -> Profile:
    """What is to be filled in: the profile at `path`, where it is of these machines and messages, or an empty one.

    Every rank calls it with the name of its machine, of `each` ranks, and its FLOP/s. Raises DataError for a file that
    is of something else.
    """
    slowest = -float(wire.maximum(torch.tensor([-flops], device=device, dtype=torch.float64), "world")[0])
    names = told_by_all(wire, machine, device)
    device_name, driver = this_device(device)
    facts = {"device": device_name, "driver": driver, "flops_per_second": slowest, "message_bytes": message_bytes}
    said = ""
    if wire.rank == 0:
        said = _begun(path, tuple(names[::each]), facts | {"ranks_per_machine": each})
    said = wire.told(said)
    if not said.startswith("{"):
        raise DataError(said, where=str(path), next_step="give another file: --out FILE")
    return from_json(said)


def _begun(path: Path, machines: tuple[str, ...], facts: dict[str, Any]) -> str:
    """The profile to fill in, as JSON, or what is wrong with the one that is there."""
    try:
        start = empty(machines, **facts)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return to_json(start)
        there = read(path)
    except DataError as error:
        return error.what
    for name in ("machines", "ranks_per_machine", "device", "driver", "message_bytes"):
        if getattr(there, name) != getattr(start, name):
            return f"it is of other links: {name} is {getattr(there, name)}, here {getattr(start, name)}"
    return to_json(there)


def told_by_all(wire: Wire, text: str, device: torch.device) -> list[str]:
    """What each rank says, of 256 bytes at most, in their order."""
    bytes_1C = torch.zeros(1, 256, dtype=torch.uint8, device=device)
    spoken = torch.tensor(list(text.encode()[:256]), dtype=torch.uint8, device=device)
    bytes_1C[0, : len(spoken)] = spoken
    told_WC = wire.gather(bytes_1C, "world", 0).cpu()
    return [bytes(row[row > 0].tolist()).decode(errors="replace") for row in told_WC]


def this_device(device: torch.device) -> tuple[str, str]:
    """Its name, and its driver's version; empty where there is none."""
    if device.type != "cuda":
        return str(hardware()["processor"]), ""
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.exists() else []
    return torch.cuda.get_device_name(device), next((word for word in words if word[:1].isdigit()), "")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One rank of a tournament; all ranks of `wire`, which count machine by machine, run it together."""

    wire: Wire
    device: torch.device
    path: Path
    """Where the first rank writes."""
    repeats: int = REPEATS
    """Of which the median counts."""
    note: Callable[[str], None] = lambda text: None

    def run(self, profile: Profile) -> Profile:
        """Measure what `profile` lacks, of machines in the order of their ranks. Gives the same on every rank.

        Raises LmworksError with the names of the machines when a link does not carry anything; what was measured before
        is in the file.
        """
        each = profile.ranks_per_machine
        assert self.wire.layout.ranks == each * len(profile.machines), "as many ranks on every machine"
        for number, pairs in enumerate(turns := rounds(len(profile.machines)), start=1):
            wanted = [pair for pair in pairs if {pair, pair[::-1]} & set(profile.missing)]
            if wanted:
                profile = self._round(profile, wanted)
                self.note(f"links: round {number} of {len(turns)}, {len(profile.missing)} ways left")
        insides = [(i, i) for i, j in profile.missing if i == j]
        return self._round(profile, insides) if insides else profile

    def _round(self, profile: Profile, pairs: list[Pair]) -> Profile:
        """One round on the wire; the profile with what it found, in the file as well."""
        each = profile.ranks_per_machine
        machine, local = divmod(self.wire.rank, each)
        pair = next((pair for pair in pairs if machine in pair), None)
        seen = _Seen()
        try:
            if pair is not None and pair[0] == pair[1]:
                if local ^ 1 < each:  # neighbours inside; the last of an odd number idles
                    seen = self._measured(machine * each + (local ^ 1), profile.message_bytes, first=local % 2 == 0)
            elif pair is not None:
                other = pair[1] if machine == pair[0] else pair[0]
                seen = self._measured(other * each + local, profile.message_bytes, first=machine == pair[0])
        except RuntimeError as error:
            raise self._dead(profile, [pair] if pair is not None else pairs) from error
        try:
            told = self.wire.gather(torch.tensor([list(seen)], device=self.device, dtype=torch.float64), "world", 0)
        except RuntimeError as error:
            raise self._dead(profile, pairs) from error
        profile = replace(profile, **_entered(profile, pairs, told.tolist()))
        if self.wire.rank == 0:
            profile.write(self.path)
        return profile

    def _dead(self, profile: Profile, pairs: list[Pair]) -> LmworksError:
        names = "; ".join(profile.pair(i, j) for i, j in pairs)
        return LmworksError(
            f"nothing comes through {names}: the link is dead, or slower than {profile.message_bytes} bytes a minute",
            where="probe",
            next_step=f"mend it: the same command goes on with what is in {self.path}; or leave a machine out, and "
            "give another --out",
        )

    def _measured(self, partner: int, size: int, *, first: bool) -> _Seen:
        """This rank's way to its partner, which does the same; `first` begins."""
        found = (0.0, 0.0)
        for mine in (first, not first):
            if mine:
                found = self._to(partner, size)
            else:
                self._echo(partner, size)
        swap = median(self._seconds(self._swap, size, partner) for _ in range(self.repeats + 1))
        return _Seen(found[0], size / swap, found[1])

    def _to(self, partner: int, size: int) -> tuple[float, float]:
        """Bytes per second and latency of the way there. What comes back is four bytes."""
        self._there_and_back(4, partner)  # the first message makes the connection
        short = median(self._seconds(self._there_and_back, 4, partner) for _ in range(self.repeats))
        long = median(self._seconds(self._there_and_back, size, partner) for _ in range(self.repeats))
        sending = long - short if long > short else long
        return size / sending, short / 2

    def _echo(self, partner: int, size: int) -> None:
        """The other side of `_to`."""
        for length in [4] * (self.repeats + 1) + [size] * self.repeats:
            self.wire.receive((length,), torch.uint8, self.device, partner, "world")
            self.wire.send(self._bytes(4), partner, "world")

    def _there_and_back(self, size: int, partner: int) -> None:
        self.wire.send(self._bytes(size), partner, "world")
        self.wire.receive((4,), torch.uint8, self.device, partner, "world")

    def _swap(self, size: int, partner: int) -> None:
        out, into = self._bytes(size), self._bytes(size)
        self.wire.begin_swap([Sent(out, partner)], [(into, partner)], "world").wait()

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def _seconds(self, work: Callable[..., None], *args: int) -> float:
        """Of one exchange. On a GPU the clock is read when the device is done."""
        self._settle()
        start = time.perf_counter()
        work(*args)
        self._settle()
        return time.perf_counter() - start

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _entered(profile: Profile, pairs: list[Pair], told: list[list[float]]) -> dict[str, Any]:
    """The profile's tables with a round's entries: of each machine's ranks the slowest."""
    each, found = profile.ranks_per_machine, dict[str, Any]()
    for column, name in enumerate(TABLES):
        entries = {}
        for i, j in {way for pair in pairs for way in (pair, pair[::-1])}:
            seen = [row[column] for row in told[i * each : (i + 1) * each] if row[column] > 0]
            entries[i, j] = max(seen) if name == "latency_seconds" else min(seen)
        found[name] = changed(getattr(profile, name), entries)
    return found
