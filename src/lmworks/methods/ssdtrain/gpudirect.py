"""Files that a GPU reads and writes itself (GPUDirect Storage), by kvikio."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lmworks.core.need import need
from lmworks.train.backends import Room, Slot
from lmworks.train.scratch import fresh


class GpuDirect:
    """One file in each folder, written in turns. Raises MissingExtra where kvikio is not installed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        kvikio = need("kvikio", extra="gpudirect", why="saved.to = 'gpudirect'")
        self._files = []
        for folder in folders:
            path = fresh(folder)
            self._files.append(kvikio.CuFile(str(path), "w+"))
            with suppress(OSError):  # a file system that keeps the names of open files: the next run takes it away
                path.unlink()
        self._room = Room(len(folders))

    def store(self, values: Tensor, ready: Any = None) -> Slot:
        """Write the values to a slot that is free. Raises OSError, with the slot given back, when they do not fit."""
        slot = self._room.take(values.nbytes)
        try:
            _wait(ready)
            _must_be_whole(self._files[slot.file].write(values, file_offset=slot.start), slot)
        except BaseException:
            self.free(slot)
            raise
        return slot

    def load(self, slot: Slot, out: Tensor, ready: Any = None) -> None:
        """Read a slot into `out`, whose memory the stream that computes may still have been using."""
        _wait(ready)
        try:
            _must_be_whole(self._files[slot.file].read(out, file_offset=slot.start), slot)
        except RuntimeError as error:  # kvikio's own
            raise OSError(str(error)) from error

    def free(self, slot: Slot) -> None:
        """The slot may be written again."""
        self._room.give(slot)

    def close(self) -> None:
        """Close the files, which gives their room back."""
        while self._files:
            self._files.pop().close()


def _wait(ready: Any) -> None:
    if ready is not None:
        ready.synchronize()


def _must_be_whole(done: int, slot: Slot) -> None:
    if done != slot.nbytes:
        raise OSError(f"{done} of {slot.nbytes} bytes went between GPU and file")
