"""Where saved tensors go: host memory, or files. Both are called from several threads.

Files are written past the page cache where the system can do that: what waits on a disk is not to fill the memory that
it was to free, and a write costs a tenth of the processor's time (benchmarks/log.md).
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmworks.train.lanes import CHUNK, PAGE, Lane
from lmworks.train.scratch import Scratch


class Host:
    """Copies in host memory: pinned where there is a GPU, and used again, since pinning is slow."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._lane = Lane()

    def store(self, values: Tensor, ready: Any = None) -> Tensor:
        """A copy of the values."""
        kept: Tensor | None = _taken(self._free[values.nbytes])
        if kept is None:
            kept = torch.empty(values.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._lane.copy(values, kept, ready)
        return kept

    def load(self, slot: Tensor, out: Tensor, ready: Any = None) -> None:
        """Copy a slot into `out`."""
        self._lane.copy(slot, out, ready)

    def free(self, slot: Tensor) -> None:
        """Keep the memory for the next of its size."""
        self._free[slot.nbytes].append(slot)

    def close(self) -> None:
        """Give the memory back."""
        self._free.clear()


class Slot(NamedTuple):
    """A place in one of several files."""

    file: int
    start: int
    nbytes: int

    @property
    def room(self) -> int:
        """Bytes of the whole pages that it takes."""
        return -(-self.nbytes // PAGE) * PAGE


class Room:
    """Places in several files, by whole pages and in turns. What is free is used again by its size."""

    def __init__(self, files: int) -> None:
        self._lock = threading.RLock()
        self._ends = [0] * files
        self._turn = itertools.cycle(range(files))
        self._free: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in range(files)]

    @property
    def nbytes(self) -> int:
        """Size of all files: the most that waited at one time."""
        return sum(self._ends)

    def take(self, nbytes: int) -> Slot:
        """A place that nobody has."""
        with self._lock:
            slot = Slot(next(self._turn), 0, nbytes)
            start = _taken(self._free[slot.file][slot.room])
            if start is None:
                start = self._ends[slot.file]
                self._ends[slot.file] += slot.room
        return slot._replace(start=start)

    def give(self, slot: Slot) -> None:
        """It may be taken again. Without the lock: a handle may die, and call this, while this thread holds others."""
        self._free[slot.file][slot.room].append(slot.start)


class Disk:
    """One file in each folder, written in turns."""

    def __init__(self, folders: Sequence[Path], *, direct: bool = True) -> None:
        self._files: list[Scratch] = []
        try:
            for folder in folders:
                self._files.append(Scratch(folder, direct=direct))
        except BaseException:
            self.close()
            raise
        self._room = Room(len(folders))
        self._lane = Lane()

    @property
    def nbytes(self) -> int:
        """Size of all files: the most that waited at one time."""
        return self._room.nbytes

    @property
    def direct(self) -> bool:
        """Whether all of them go past the page cache."""
        return all(file.direct for file in self._files)

    def store(self, values: Tensor, ready: Any = None) -> Slot:
        """Write the values to a slot that is free. Raises OSError, with the slot given back, when they do not fit."""
        slot = self._room.take(values.nbytes)
        try:
            for part in _parts(slot):
                buffer = self._lane.buffer[: part.nbytes]
                first = part.start - slot.start
                self._lane.copy(values[first : first + part.nbytes], buffer, ready)
                self._files[slot.file].write(self._lane.buffer[: part.room], part.start)
        except BaseException:
            self.free(slot)
            raise
        return slot

    def load(self, slot: Slot, out: Tensor, ready: Any = None) -> None:
        """Read a slot into `out`. Raises OSError when the file is shorter than what was written."""
        for part in _parts(slot):
            self._files[slot.file].read(self._lane.buffer[: part.room], part.start)
            first = part.start - slot.start
            self._lane.copy(self._lane.buffer[: part.nbytes], out[first : first + part.nbytes], ready)

    def free(self, slot: Slot) -> None:
        """The slot may be written again."""
        self._room.give(slot)

    def close(self) -> None:
        """Close the files, which gives their room back."""
        while self._files:
            self._files.pop().close()


def _parts(slot: Slot) -> list[Slot]:
    """A slot in pieces that a lane's buffer holds."""
    starts = range(0, slot.nbytes, CHUNK)
    return [Slot(slot.file, slot.start + first, min(CHUNK, slot.nbytes - first)) for first in starts]


def _taken(free: list[Any]) -> Any:
    """The last of a list, taken off it; None where it is empty, also when another thread was quicker."""
    try:
        return free.pop()
    except IndexError:
        return None
