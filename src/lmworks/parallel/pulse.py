"""The heart-beat of a rank: one small file that says how far it is, so that somebody outside sees when it is not.

A thread writes it, at most once a second, where a launcher asks for it by LMWORKS_BEATS. It tells the step, the last
event, what went over the wire, and where the main thread stands, which it looks at twenty times a second: a rank that
waits for others stands in an exchange, and what it did before it came there is time of its own. A process that is
stopped writes nothing; one that is stuck goes on to say where.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from lmworks.core.events import Events
from lmworks.parallel.wire import Wire

FOLDER = "LMWORKS_BEATS"
"""The environment variable that names the folder of the files."""
PERIOD = 1.0
"""Seconds between two beats."""
LOOK = 0.05
"""Seconds between two looks at the main thread."""
DEPTH = 6
"""How many frames of it are told, the innermost last."""
WAITS = ("/torch/distributed/", "/lmworks/parallel/wire.py")
"""Files whose code waits for other ranks; elsewhere in `parallel` it says `.wait()`."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    pid: int
    host: str
    count: int
    """How many it has said."""
    step: int | None = None
    """The step that it makes or has made; None before the first one."""
    event: str = ""
    """The last event that it wrote."""
    calls: int = 0
    """Exchanges that it began."""
    sent: float = 0.0
    """Bytes of them, as the wire counts."""
    last: str = ""
    """The last exchanges, oldest first."""
    moves: int = 0
    """How often the main thread was somewhere else than at the look before."""
    stack: tuple[str, ...] = ()
    """Where it is."""
    waits: bool = False
    """Whether it stands in an exchange."""
    busy: float = 0.0
    """Seconds in which it did not, until its step began: whole steps, whenever in a step it beats."""
    waited: float = 0.0
    """Seconds in which it did."""
    stage: int = 0
    """Its place along the pipeline: ranks of one stage do the same work."""
    over: bool = False
    """Whether it was the last one."""

    @property
    def progress(self) -> tuple[object, ...]:
        """What changes as long as a rank does anything."""
        return self.step, self.event, self.calls, self.moves


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's beat lies."""
    return folder / f"rank_{rank}.beat.json"


def read(path: Path) -> Beat | None:
    """The beat in a file; None where there is none, or none of this version."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return Beat(**table | {"stack": tuple(table["stack"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Pulse:
    """The beating of this process while it is entered; nothing where no launcher asked for it."""

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER)
        self._folder = Path(folder) if folder is not None else None
        self._rank = int(os.environ.get("RANK", "0"))
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._wire: Wire | None = None
        self.events: Events | None = None
        """Where this rank writes its events, once it does."""
        self._thread: threading.Thread | None = None
        self._place: tuple[tuple[str, int], ...] = ()
        self._moves = 0
        self._times = {False: 0.0, True: 0.0}
        """Seconds by whether it waits."""
        self._step: int | None = None
        self._busy = 0.0

    def __enter__(self) -> Pulse:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def on(self, wire: Wire) -> Wire:
        """Tell of this wire from now on."""
        self._wire = wire
        return wire

    def _run(self) -> None:
        assert self._folder is not None
        path = file_of(self._folder, self._rank)
        count, said, looked, waits = 0, float("-inf"), time.monotonic(), False
        while True:
            over = self._over.wait(LOOK)
            now = time.monotonic()
            self._times[waits] += now - looked  # where it stood at the last look; also when it was stopped since
            looked = now
            step = self._events_step()
            if step is None or step != self._step:
                self._step, self._busy = step, self._times[False]
            waits, stack = self._look()
            if over or now - said >= PERIOD:
                count, said = count + 1, now
                _write(path, self._beat(count, stack, waits=waits, over=over))
            if over:
                return

    def _events_step(self) -> int | None:
        events = self.events
        return None if events is None or not events.last else events.step

    def _look(self) -> tuple[bool, tuple[str, ...]]:
        """Whether the main thread waits for other ranks, and its innermost frames."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        place: list[tuple[str, int]] = []
        names: list[str] = []
        while frame is not None and len(place) < DEPTH:
            place.append((frame.f_code.co_filename, frame.f_lineno))
            names.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
            frame = frame.f_back
        if tuple(place) != self._place:
            self._place, self._moves = tuple(place), self._moves + 1
        return bool(place) and _is_wait(*place[0]), tuple(reversed(names))

    def _beat(self, count: int, stack: tuple[str, ...], *, waits: bool, over: bool) -> Beat:
        wire, events = self._wire, self.events
        bills = [] if wire is None else list(wire.bills.copy().values())
        return Beat(
            rank=self._rank,
            pid=os.getpid(),
            host=platform.node(),
            count=count,
            step=self._step,
            event="" if events is None else events.last,
            calls=sum(bill.calls for bill in bills),
            sent=sum(bill.bytes for bill in bills),
            last=_last(wire),
            moves=self._moves,
            stack=stack,
            waits=waits,
            busy=self._busy,
            waited=self._times[True],
            stage=0 if wire is None else wire.place("pp"),
            over=over,
        )


def _last(wire: Wire | None) -> str:
    """The last exchanges, unless one begins in this moment."""
    with suppress(RuntimeError):
        return "" if wire is None else wire.last()
    return ""


def _is_wait(file: str, line: int) -> bool:
    if any(part in file for part in WAITS):
        return True
    return "/lmworks/parallel/" in file and ".wait(" in linecache.getline(file, line)


def _write(path: Path, beat: Beat) -> None:
    """Replace the file. Not synced: a beat is worth nothing after a power cut. On a full disk its time is renewed."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(beat)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            os.utime(path)
