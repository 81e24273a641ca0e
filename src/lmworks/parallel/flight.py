"""The flight record of a rank: its last exchanges, kept in memory, and written out when the ranks wait in vain.

Every exchange gets a number on its axis. Ranks of an axis make the same exchanges in the same order, so of two records
the one with the smaller number tells who has not arrived. A rank writes its record, with the stack of every thread,

    when it ends with an error,
    when it hears SIGUSR2, also while it waits inside of an exchange,
    when nothing has moved on it for a while,
    and when another rank of the run has written one: a file in the run folder is how they tell each other.
"""

from __future__ import annotations

import os
import platform
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

from lmworks.core import files

KEPT = 256
"""Exchanges that a rank remembers."""
FRESH = 900.0
"""Seconds for which a record is of the same hang: more than an exchange waits."""
FORMAT = 1
ASKED = "asked"
"""The file that asks all ranks of a run for their records."""
SIGNAL = signal.SIGUSR2


@dataclass(slots=True, eq=False)
class Entry:
    """One exchange."""

    number: int
    """Counted from 1 on its axis; of messages between two ranks, on its axis, direction and peer."""
    axis: str
    operation: str
    bytes: int
    peer: int | None
    """The other rank of a message between two, None where the whole axis takes part."""
    entered: float
    """By the monotonic clock."""
    left: float | None = None


@final
class Flight:
    """The last exchanges of one rank. Entering and leaving cost about a microsecond."""

    def __init__(self, keep: int = KEPT) -> None:
        self._entries: deque[Entry] = deque(maxlen=keep)
        self._counts: Counter[tuple[str, str, int | None]] = Counter()
        self.moved = time.monotonic()
        """When anything began or ended here last."""

    def enter(self, axis: str, operation: str, nbytes: float, peer: int | None = None) -> Entry:
        """An exchange begins."""
        key = (axis, "" if peer is None else operation, peer)
        self._counts[key] += 1
        self.moved = time.monotonic()
        entry = Entry(self._counts[key], axis, operation, int(nbytes), peer, self.moved)
        self._entries.append(entry)
        return entry

    def leave(self, entry: Entry) -> None:
        """It has ended, or, on a GPU, is in the hands of the GPU."""
        self.moved = entry.left = time.monotonic()

    def touch(self) -> None:
        """Something else went on: the rank is not stuck."""
        self.moved = time.monotonic()

    def last(self, count: int) -> list[Entry]:
        """The last so many exchanges, oldest first."""
        return list(self._entries)[-count:]

    def told(self) -> dict[str, Any]:
        """Counts and entries as JSON values; times are seconds before now."""
        now = time.monotonic()
        counts = [
            {"axis": axis, "operation": operation, "peer": peer, "number": number}
            for (axis, operation, peer), number in list(self._counts.items())
        ]
        entries = [
            {
                "number": entry.number,
                "axis": entry.axis,
                "operation": entry.operation,
                "bytes": entry.bytes,
                "peer": entry.peer,
                "entered": now - entry.entered,
                "left": None if entry.left is None else now - entry.left,
            }
            for entry in list(self._entries)
        ]
        return {"counts": counts, "entries": entries, "quiet": now - self.moved}


def stacks(but: int | None = None) -> dict[str, list[str]]:
    """Where every thread of this process stands, outermost call first. `but`: a thread to leave out, by its ident."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, f"thread {ident}"): [
            f"{frame.filename}:{frame.lineno} {frame.name}: {(frame.line or '').strip()}"
            for frame in traceback.extract_stack(stack)
        ]
        for ident, stack in sys._current_frames().items()
        if ident != but
    }


@final
class Recorder:
    """Writes this rank's record into a folder of the run, whenever it is asked for.

    Enter it around the run: a thread then watches for SIGUSR2, for other ranks' records and for standstill.
    """

    def __init__(
        self,
        flight: Flight,
        folder: Path,
        *,
        rank: int,
        facts: Callable[[], Mapping[str, Any]],
        moved: Callable[[], float],
        patience: float,
        told: Callable[[str], None],
    ) -> None:
        """`facts`: what else stands in a record, as JSON values. `moved`: when anything else began here last, by the
        monotonic clock. `patience`: seconds without any movement after which a rank writes a record.
        `told`: hears of it, from another thread."""
        self._flight, self._folder, self._rank = flight, folder, rank
        self._facts, self._moved, self._patience, self._told = facts, moved, patience, told
        self._period = min(2.0, patience / 4)
        self._written = 0.0
        """When the last record was written, by the monotonic clock."""
        self._heard = _changed(folder / ASKED)
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._before: tuple[Any, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Recorder:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        os.set_blocking(theirs, False)
        self._pipe = ours, theirs
        self._listen(theirs)
        self._thread = threading.Thread(target=self._watch, args=(ours,), name="lmworks-flight", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._pipe is not None, "it was entered"
        assert self._thread is not None, "it was entered"
        if self._before is not None:
            handler, descriptor = self._before
            signal.set_wakeup_fd(descriptor)
            signal.signal(SIGNAL, handler)
        ours, theirs = self._pipe
        os.write(theirs, b"\0")
        self._thread.join()
        os.close(ours)
        os.close(theirs)

    def _listen(self, descriptor: int) -> None:
        """Let SIGUSR2 wake the thread: Python's own handler would wait for the end of the exchange that hangs."""
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGNAL) is not signal.SIG_DFL:
            return
        before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        if before != -1:  # someone else listens in this way, and there is one place
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            return
        self._before = signal.signal(SIGNAL, _nothing), before

    def write(self, reason: str, *, ask: bool = True, replace: bool = True) -> Path | None:
        """Write the record; None where the disk does not take it. `ask`: the other ranks are to write theirs.
        `replace`: also where there is one of this hang already, from when this rank still stood where it hung."""
        path = self._folder / f"rank-{self._rank:05d}.json"
        if not replace and self._written and time.monotonic() - self._written < FRESH:
            return path
        with self._lock, suppress(OSError):  # what went wrong is told without it
            self._folder.mkdir(parents=True, exist_ok=True)
            place = {"rank": self._rank, "machine": platform.node(), "pid": os.getpid()}
            what = {"format": FORMAT, "reason": reason, "time": time.time(), **place}
            own = threading.get_ident() if threading.current_thread() is self._thread else None
            files.write_json(path, {**what, **self._facts(), **self._flight.told(), "stacks": stacks(but=own)})
            self._written = time.monotonic()
            if ask:
                (self._folder / ASKED).write_text(f"rank {self._rank}: {reason}\n", encoding="utf-8")
                self._heard = _changed(self._folder / ASKED)
            return path
        return None

    def _watch(self, pipe: int) -> None:
        while True:
            ready, _, _ = select.select([pipe], [], [], self._period)
            heard = os.read(pipe, 4096) if ready else b""
            if 0 in heard:
                return
            if SIGNAL in heard:
                self.write("SIGUSR2")
            self._answer()
            moved = max(self._flight.moved, self._moved())
            quiet = time.monotonic() - moved
            if quiet > self._patience and self._written < moved:
                path = self.write(f"nothing has moved for {quiet:.0f} s")
                self._told(f"nothing has moved for {quiet:.0f} s; where this rank stands is in {path}")

    def _answer(self) -> None:
        """Write a record where another rank has written one since."""
        changed = _changed(self._folder / ASKED)
        if changed != self._heard:
            self._heard = changed
            self.write("another rank asked", ask=False)


def _changed(path: Path) -> int:
    """When a file was written last; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _nothing(number: int, frame: FrameType | None) -> None:
    """SIGUSR2 has been heard by the thread already."""


def records(folder: Path) -> Sequence[Path]:
    """The records in a folder, by rank."""
    return sorted(folder.glob("rank-*.json"))
