"""The books of saved tensors that leave memory: what a step moved, and where each storage is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lmworks.core.spans import Clock
from lmworks.train.ledger import Storage


class Backend(Protocol):
    """Where bytes go. Called from threads. `ready`: when the memory on the device may be read or written."""

    def store(self, values: Tensor, ready: Any = None) -> Any:
        """Write a flat uint8 tensor out; returns its slot. Raises OSError when it cannot."""
        ...

    def load(self, slot: Any, out: Tensor, ready: Any = None) -> None:
        """Read a slot into a flat uint8 tensor; it is there when this returns."""
        ...

    def free(self, slot: Any) -> None:
        """The slot may be used again. Takes no lock."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Visit:
    """One forward pass of one block."""

    def __init__(self, name: str, *, out: bool) -> None:
        self.name, self.out = name, out
        self.nbytes = 0
        """Bytes that it was the first to save, of storages that are large enough to go out."""
        self.begun: Any = None
        self.ended: Any = None
        """Moments of the cache's clock; None before it has one."""


class Pass:
    """One forward pass over the blocks of a cache."""

    def __init__(self, *, turns: bool = True) -> None:
        self.turns = turns
        """Whether its own backward pass comes next."""
        self.visits: list[Visit] = []
        self.piece = self.tail = Piece(self, None)
        """The piece that is being filled, and the last one that holds something."""
        self.turned: Any = None
        """The moment at which its backward pass came to the blocks."""

    def begin_piece(self) -> None:
        """What comes now is of another piece. One that holds nothing is passed over by what asks ahead."""
        self.piece = Piece(self, self.tail if self.tail.parcels else None)

    def add(self, parcel: Parcel, *, most: int | None) -> None:
        """A parcel of the piece at work, of which no more than `most` are in one."""
        if parcel in self.piece.parcels:
            return
        if most is not None and len(self.piece.parcels) >= most:
            self.begin_piece()
        self.piece.parcels.append(parcel)
        self.tail = self.piece


class Piece:
    """What comes back together: the storages that a block saved, or a part of them."""

    def __init__(self, of: Pass, before: Piece | None) -> None:
        self.of, self.before = of, before
        self.parcels: list[Parcel] = []
        self.entered = False
        """Whether the backward pass has come to it."""


@dataclass(kw_only=True, eq=False)
class Parcel:
    """One storage on its way out or back. The ledger's lock guards it."""

    storage: Storage
    scope: str
    device: torch.device
    handles: int = 1
    here: Any = None
    """The storage, where it is in memory: to be written, forwarded, or read back."""
    slot: Any = None
    counter: Any = None
    """A tensor without values that counts the edits of the tensor that was saved, and their number then."""
    version: int = 0
    going: Future[None] | None = None
    coming: Future[None] | None = None
    failure: BaseException | None = None
    dead: bool = False

    @property
    def edited(self) -> bool:
        """Whether the tensor was changed in place since it was saved."""
        changed: bool = self.counter._version != self.version
        return changed


@dataclass(kw_only=True)
class Facts:
    """What one step moved."""

    stored: int = 0
    loaded: int = 0
    forwarded: int = 0
    """Bytes that were taken from memory because their write was not over."""
    misses: int = 0
    """Storages that the backward pass came to before they had been asked for."""
    kept: int = 0
    """Bytes that could not be written, or would have waited too long for it, and stayed."""
    stalled: float = 0.0
    """Seconds that the backward pass waited for storages to come back."""
    seconds: float = 0.0
    """Of everything since the facts before."""
    seconds_storing: float = 0.0
    seconds_loading: float = 0.0
    """Seconds in which at least one thread wrote, or read."""
    passes: list[Pass] = field(default_factory=list)
    clock: Clock | None = None
    notes: list[str] = field(default_factory=list)
    """Sentences for people."""

    def times(self) -> dict[str, list[float]]:
        """Seconds of each block's forward passes, in the order of the blocks; a GPU is waited for."""
        found: dict[str, list[float]] = {}
        for visit in (visit for made in self.passes for visit in made.visits):
            if self.clock is not None and visit.begun is not None:
                found.setdefault(visit.name, []).append(self.clock.between(visit.begun, visit.ended))
        return found

    def sizes(self) -> dict[str, list[int]]:
        """Bytes that could go out, of the same."""
        found: dict[str, list[int]] = {}
        for visit in (visit for made in self.passes for visit in made.visits):
            found.setdefault(visit.name, []).append(visit.nbytes)
        return found

    def between(self) -> list[float]:
        """Of each pass that turned: seconds between its last block's forward and backward pass, the head's work."""
        if self.clock is None:
            return []
        turned = [made for made in self.passes if made.turns and made.turned is not None and made.visits]
        ends = [(made.visits[-1].ended, made.turned) for made in turned]
        return [self.clock.between(*span) for span in ends if span[0] is not None]


class Busy:
    """A context that any number of threads enter: the seconds in which at least one was inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since, self._seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._seconds += time.perf_counter() - self._since

    def taken(self) -> float:
        """Seconds since this was last asked."""
        with self._lock:
            now = time.perf_counter()
            running = now - self._since if self._inside else 0.0
            found, self._seconds, self._since = self._seconds + running, 0.0, now
        return found
