"""Where saved tensors go: host memory, or files. Both are called from several threads.

A file is taken away from its folder as soon as it is open (POSIX keeps what an open file holds), so a process that is
killed leaves nothing behind. Its name carries the run and the rank for systems that cannot do that.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096
"""Slots in a file start and end at whole pages."""


class Host:
    """Copies in host memory: pinned where there is a GPU, and used again, since pinning is slow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def store(self, values: Tensor) -> Tensor:
        """A copy of the values."""
        with self._lock:
            kept = self._free[values.nbytes].pop() if self._free[values.nbytes] else None
        if kept is None:
            kept = torch.empty(values.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return kept.copy_(values)

    def load(self, slot: Tensor, out: Tensor) -> None:
        """Copy a slot into `out`."""
        out.copy_(slot)

    def free(self, slot: Tensor) -> None:
        """Keep the memory for the next of its size."""
        with self._lock:
            self._free[slot.nbytes].append(slot)

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._free.clear()


class Disk:
    """One file in each folder, written in turns; a slot is (file, first byte, bytes)."""

    def __init__(self, folders: Sequence[Path], name: str) -> None:
        self._lock = threading.Lock()
        self._files: list[int] = []
        self._ends: list[int] = []
        self._turn = itertools.cycle(range(len(folders)))
        self._free: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in folders]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / name
            self._files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
            self._ends.append(0)
            if os.name == "posix":
                path.unlink()

    @property
    def nbytes(self) -> int:
        """Size of all files: the most that waited at one time."""
        return sum(self._ends)

    def store(self, values: Tensor) -> tuple[int, int, int]:
        """Write the values to a slot that is free. Raises OSError, with the slot given back, when they do not fit."""
        room = -(-values.nbytes // PAGE) * PAGE
        with self._lock:
            which = next(self._turn)
            free = self._free[which][room]
            start = free.pop() if free else self._ends[which]
            self._ends[which] = max(self._ends[which], start + room)
        slot = which, start, values.nbytes
        try:
            view = _view(values)
            while view:
                done = os.pwrite(self._files[which], view, start)
                view, start = view[done:], start + done
        except OSError:
            self.free(slot)
            raise
        return slot

    def load(self, slot: tuple[int, int, int], out: Tensor) -> None:
        """Read a slot into `out`. Raises OSError when the file is shorter than what was written."""
        which, start, nbytes = slot
        here = out if out.device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        view = _view(here)
        while view:
            done = os.preadv(self._files[which], [view], start)
            if done == 0:
                raise OSError(f"{len(view)} bytes of a saved tensor are missing from its file")
            view, start = view[done:], start + done
        if here is not out:
            out.copy_(here)

    def free(self, slot: tuple[int, int, int]) -> None:
        """The slot may be written again."""
        which, start, nbytes = slot
        with self._lock:
            self._free[which][-(-nbytes // PAGE) * PAGE].append(start)

    def close(self) -> None:
        """Close the files, which gives their room back."""
        with self._lock:
            for file in self._files:
                os.close(file)
            self._files = []


def _view(values: Tensor) -> memoryview:
    """Flat bytes of a CPU tensor, without a copy."""
    return memoryview(values.numpy())  # type: ignore[arg-type]  # arrays are buffers; numpy's types do not say so
