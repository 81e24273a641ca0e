"""Ranks that keep flight records: one that sleeps, one that is stopped, two clocks that are apart."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lmworks.core.spans import HostClock
from lmworks.parallel import clock, world
from lmworks.parallel.flight import Recorder
from lmworks.parallel.layout import AXES, Layout
from lmworks.parallel.wire import Wire

SECONDS = 2
"""How long a collective waits here."""


def connect(layout: Layout) -> Wire:
    """The wire of this rank; its collectives wait for SECONDS only."""
    world.TIMEOUT = timedelta(seconds=SECONDS)
    return world.wire(layout, world.seat())


def apart(rank: int, skew: float) -> list[tuple[float, float, float]]:
    """How far each rank's clock is found to be: seconds, their error, and the truth. Rank r is r skews ahead."""
    wire = connect(Layout(dp_shard=2))
    mine = HostClock(skew=rank * skew)
    found = clock.align(wire, mine.now, rounds=32)
    return [(found.seconds, found.error, -rank * skew)]


def recorder(wire: Wire, folder: Path, patience: float) -> Recorder:
    """As a run has it."""
    layout, rank = wire.layout, wire.rank

    def facts() -> dict[str, Any]:
        place = {axis: layout.place(rank, axis) for axis in AXES}
        return {"world": layout.ranks, "axes": place, "groups": wire.members(), "step": 3, "doing": wire.spans.doing()}

    return Recorder(
        wire.flight, folder, rank=rank, facts=facts, moved=lambda: 0.0, patience=patience, told=lambda text: None
    )


def late(rank: int, folder: str, who: int, how: str) -> str:
    """Three sums over all four ranks, to the second of which one rank does not come: it sleeps, or is stopped."""
    wire = connect(Layout(dp_replicate=2, dp_shard=1, tp=2))
    wire.spans.on = True
    try:
        with recorder(wire, Path(folder), patience=60.0) as record:
            try:
                wire.sum(torch.ones(4), "world")
                if rank == who:
                    _stay_away(how)
                with wire.spans.span("optimizer"):
                    wire.sum(torch.ones(4), "tp")
                wire.sum(torch.ones(4), "world")
            except RuntimeError as error:
                record.write(f"error: {type(error).__name__}", replace=False)
                return "timed out"
    finally:
        time.sleep(SECONDS)  # a rank that ends takes the others' connections with it
    return "done"


def _stay_away(how: str) -> None:
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(3.0 * SECONDS)


def asked(rank: int, folder: str) -> bool:
    """One rank hears SIGUSR2 inside of an exchange that the other one comes to a second later."""
    wire = connect(Layout(dp_shard=2))
    with recorder(wire, Path(folder), patience=60.0):
        wire.wait()
        if rank == 0:
            subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -USR2 {os.getpid()}"])
        else:
            time.sleep(2.0)
        wire.sum(torch.ones(2), "world")
        wire.wait()
    return (Path(folder) / f"rank-{rank:05d}.json").is_file()
