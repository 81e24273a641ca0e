"""Ranks of one machine that draw rows, of which some need the same."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmworks.data import sharing
from lmworks.data.pack import Stream
from lmworks.parallel import readers, world
from lmworks.parallel.layout import Layout
from tests.data.test_load import SOURCES, WEIGHTS
from tests.data.toy import loader

ROWS, LENGTH = 4, 4


@dataclass(frozen=True)
class Drawn:
    """What a rank drew, as a hash of all bytes; how often tokens were read; what lay in memory; what was said."""

    rows: str
    reads: int
    during: list[str]
    after: list[str]
    files: int
    """Open files more than before."""
    notes: tuple[str, ...]


def named() -> list[str]:
    """Files in memory."""
    return sorted(p.name for p in sharing.MEMORY.glob("*"))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def draws(rank: int, layout: Layout, steps: int, memory: str, dies: int | None = None) -> Drawn:
    """So many draws. `memory`: where it is found; `dies`: the rank that is killed in the middle."""
    sharing.MEMORY = Path(memory)
    reads = 0
    plain = Stream.windows

    def windows(self: Stream, *words: Any) -> Any:
        nonlocal reads
        reads += 1
        return plain(self, *words)

    Stream.windows = windows  # type: ignore[method-assign]
    wire = world.wire(layout, world.Seat(rank=rank, world=layout.ranks, local_rank=rank, local_world=layout.ranks))
    files = open_files()
    own = layout.place(rank, "batch"), layout.size("batch")
    how, notes = readers.appoint(wire, torch.device("cpu"), rows=ROWS // own[1], length=LENGTH)
    during = named()
    rows = loader(SOURCES[:1], weights=WEIGHTS[:1], length=LENGTH, share=own, prefetch=2, sharing=how)
    found = hashlib.sha256()
    for step in range(steps):
        if dies == rank and step == steps // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = rows.draw(ROWS)
        for name in sharing.TENSORS:
            found.update(getattr(batch, name).numpy().tobytes())
        if step % 8 == 0:
            wire.wait()  # ranks train together
    counted = reads  # before any of them closes: then the others read what they had begun to take
    wire.wait()
    rows.close()
    wire.wait()
    return Drawn(found.hexdigest(), counted, during, named(), open_files() - files, notes)
