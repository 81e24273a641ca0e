"""One reader for several processes of a machine: it lays each batch into memory that all of them see, and every other
one takes a copy.

    Board       the memory: a ring of slots, and for each process how many batches it has taken
    Reading     the process that reads and lays out
    Taking      a process that takes copies

Nobody holds a lock. Each number is written by one process only, and a slot's number last, with a checksum of what lies
there: what is taken is what was laid out, whatever order a processor shows writes in. The file that the memory is
found by is deleted as soon as all have found it, so nothing stays behind, however a process ends.

Every process could read by itself, and does so where a batch does not come: the rows of a draw hang on nothing else.
"""

from __future__ import annotations

import mmap
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self, final

import numpy as np
import torch
from numpy.typing import NDArray

from lmworks.data.load import Batch

MEMORY = Path("/dev/shm")
"""Where memory is found by name."""
SLOTS = 4
"""Batches that lie ready at once: those that a loader prepares ahead, and room to begin the next."""
PATIENCE = 600.0
"""Seconds that one process waits for another, before each reads for itself: as long as ranks wait for each other."""
STALE = 3600.0
"""Seconds after which a file of a process that is gone may be deleted: it died while others looked for it."""
NAPS = (0.0001, 0.002)
"""Seconds between two looks, at first and at most."""
TENSORS = ("tokens_BT", "targets_BT", "positions_BT", "documents_BT", "sources_BT")
"""What a training batch is made of: int64, all of one shape."""
OPEN, SHARED, ENDED = range(3)
"""States of a board."""
HEAD = 4
"""Numbers in front: readers, slots, values of a slot, state."""
LABEL = 4
"""Numbers of a slot: how many batches were laid out with the one in it, its checksum, its rows and their tokens."""

Ints = NDArray[np.int64]


class Sharing(Protocol):
    """How a loader comes by a batch, given its number and how it would make it."""

    def __call__(self, number: int, make: Callable[[], Batch]) -> Batch:
        """The batch of a draw, counted from 0."""
        ...

    def end(self) -> None:
        """From now on each process reads for itself."""
        ...


@final
class Board:
    """Memory that processes of one machine see. Made by one, found by `readers` others."""

    def __init__(self, memory: mmap.mmap) -> None:
        numbers = np.frombuffer(memory, dtype=np.int64)
        readers, slots, self.room, _ = (int(x) for x in numbers[:HEAD])
        self._head: Ints = numbers[:HEAD]
        ends = np.cumsum([HEAD, readers, readers, slots * LABEL, slots * self.room])
        self.here, self.taken, labels, values = np.split(numbers[: ends[-1]], ends[:-1])[1:]
        self.labels: Ints = labels.reshape(slots, LABEL)
        self.values: Ints = values.reshape(slots, self.room)

    @classmethod
    def make(cls, path: Path, *, readers: int, room: int, slots: int = SLOTS) -> Self:
        """A new board whose slots hold `room` int64 values. Raises OSError where there is not so much memory."""
        size = 8 * (HEAD + 2 * readers + slots * (LABEL + room))
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # else a full memory shows as a signal that kills, when it is written
            memory = mmap.mmap(file, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
        np.frombuffer(memory, dtype=np.int64)[:HEAD] = (readers, slots, room, OPEN)
        return cls(memory)

    @classmethod
    def find(cls, path: Path, place: int) -> Self:
        """The board that another process made, and word that this one, of the others at `place`, has found it."""
        file = os.open(path, os.O_RDWR)
        try:
            board = cls(mmap.mmap(file, os.fstat(file).st_size))
        finally:
            os.close(file)
        board.here[place] = 1
        return board

    @property
    def state(self) -> int:
        """OPEN, SHARED or ENDED."""
        return int(self._head[3])

    @state.setter
    def state(self, value: int) -> None:
        self._head[3] = value

    def lay(self, number: int, batch: Batch) -> bool:
        """Lay a batch out, behind the one before; False where the others do not take, or it does not fit."""
        rows, length = batch.tokens_BT.shape
        slot, size = number % len(self.labels), len(TENSORS) * rows * length
        if size > self.room or not self._wait(lambda: int(self.taken.min()) > number - len(self.labels)):
            self.state = ENDED
            return False
        values = self.values[slot, :size]
        for out_W, name in zip(values.reshape(len(TENSORS), -1), TENSORS, strict=True):
            out_W[:] = getattr(batch, name).numpy().reshape(-1)
        self.labels[slot, 1:] = (zlib.crc32(values), rows, length)  # type: ignore[arg-type]  # an array is a buffer
        self.labels[slot, 0] = number + 1
        return True

    def take(self, place: int, number: int) -> Batch | None:
        """A copy of a batch; None where it does not come. Its slot is then free, as far as this process goes."""
        slot = number % len(self.labels)
        found: list[Ints] = []

        def there() -> bool:
            count, checksum, rows, length = (int(x) for x in self.labels[slot])
            if count != number + 1:
                return False
            values = self.values[slot, : len(TENSORS) * rows * length].copy()
            if zlib.crc32(values) != checksum:  # type: ignore[arg-type]  # an array is a buffer
                return False  # the number was seen before what it stands for
            found.append(values.reshape(len(TENSORS), rows, length))
            return True

        if not self._wait(there):
            return None
        self.taken[place] = number + 1
        return Batch(*(torch.from_numpy(x_BT) for x_BT in found[0]))

    def _wait(self, there: Callable[[], bool]) -> bool:
        """Look again and again; False when the board ends meanwhile, or nothing comes for too long."""
        nap, most = NAPS
        until = time.monotonic() + PATIENCE
        while not there():
            if self.state == ENDED or time.monotonic() > until:
                return False
            time.sleep(nap)
            nap = min(2 * nap, most)
        return True


@final
class Reading:
    """The process that reads: every batch is laid out for the others before it is used here."""

    def __init__(self, board: Board) -> None:
        self._board: Board | None = board

    def __call__(self, number: int, make: Callable[[], Batch]) -> Batch:
        """As `Sharing`. A batch that cannot be made is an error in the draw that it is of, here and on the others."""
        try:
            batch = make()
        except BaseException:
            self.end()
            raise
        board = self._board
        if board is not None and not board.lay(number, batch):
            self.end()
        return batch

    def end(self) -> None:
        """As `Sharing`."""
        board, self._board = self._board, None
        if board is not None:
            board.state = ENDED


@final
class Taking:
    """A process that takes copies: of those that do so the one at `place`."""

    def __init__(self, board: Board, place: int) -> None:
        self._board: Board | None = board
        self._place = place

    def __call__(self, number: int, make: Callable[[], Batch]) -> Batch:
        """As `Sharing`."""
        board = self._board
        batch = None if board is None else board.take(self._place, number)
        if batch is None:
            self.end()
            return make()
        return batch

    def end(self) -> None:
        """As `Sharing`. The others read for themselves too: they would wait for this one."""
        board, self._board = self._board, None
        if board is not None:
            board.state = ENDED


def clear_away(folder: Path, prefix: str) -> None:
    """Delete what processes that are gone left in a folder: files called PREFIX-PID-..., not young ones."""
    for path in folder.glob(f"{prefix}-*"):
        pid = path.name.split("-")[len(prefix.split("-"))]
        try:
            old = time.time() - path.stat().st_mtime > STALE
            if old and pid.isdigit() and not Path(f"/proc/{pid}").exists():
                path.unlink()
        except OSError:  # of somebody else, or deleted meanwhile
            continue
