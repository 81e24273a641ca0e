"""A probe as one of several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmworks.core.errors import LmworksError
from lmworks.parallel import probe, world
from lmworks.parallel.layout import Layout
from lmworks.parallel.links import Profile, to_json
from lmworks.parallel.wire import Wire

MESSAGE = 1 << 16


def _wire(rank: int, ranks: int) -> Wire:
    return world.wire(Layout(dp_shard=ranks), world.Seat(rank=rank, world=ranks, local_rank=rank))


def _start(wire: Wire, each: int, path: str) -> Profile:
    name = f"m{wire.rank // each}"
    cpu = torch.device("cpu")
    return probe.begin(wire, name, each, Path(path), cpu, flops=1e9 * (1 + wire.rank), message_bytes=MESSAGE)


def measured(rank: int, ranks: int, each: int, path: str) -> tuple[str, list[str], dict[Any, Any]]:
    """The profile as JSON, what was noted, and the bill."""
    wire, notes = _wire(rank, ranks), []
    start = _start(wire, each, path)
    run = probe.Probe(wire=wire, device=torch.device("cpu"), path=Path(path), repeats=2, note=notes.append)
    found = to_json(run.run(start))
    return found, notes, {key: (bill.calls, bill.bytes) for key, bill in wire.bills.items()}


def refused(rank: int, ranks: int, each: int, path: str) -> str:
    """The error of a file that is of something else."""
    try:
        _start(_wire(rank, ranks), each, path)
    except LmworksError as error:
        return str(error)
    return ""


def with_a_dead_rank(rank: int, ranks: int, path: str, dead: int) -> str:
    """One rank leaves before the first round: what the others are told."""
    wire = _wire(rank, ranks)
    start = _start(wire, 1, path)
    wire.wait()
    if rank == dead:
        return "gone"
    try:
        probe.Probe(wire=wire, device=torch.device("cpu"), path=Path(path), repeats=1).run(start)
    except LmworksError as error:
        return str(error)
    return ""
