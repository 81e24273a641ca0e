"""The ranks that one machine starts in one attempt of a run: their processes, their ends, and which error was first.

Who starts them holds the store in which ranks find each other, or names the machine that does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lmworks.core.errors import LmworksError
from lmworks.parallel import failure
from lmworks.parallel.failure import STOPPED, Failure

POLL = 0.05
"""Seconds between two looks at the ranks."""
VIOLENT = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that end a rank without a word. What its peers raise then ('connection closed') is never the cause."""


@dataclass(frozen=True, kw_only=True)
class Seats:
    """Which ranks of a run a machine starts, and how they find the others."""

    here: int
    """Ranks on this machine."""
    world: int
    """Ranks of the run."""
    first: int = 0
    """The first of those on this machine."""
    machine: int = 0
    """The machine's number."""
    store: tuple[str, int]
    """Host and port."""
    restart: int = 0
    restarts: int = 0
    """Which of how many restarts this is."""
    sharing: int | None = None
    """Ranks that share the cores, where they are more than those that are started here."""
    threads: int | None = None
    """Threads of a rank. None: OMP_NUM_THREADS as the person set it, otherwise the cores shared out."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further variables of the ranks' environment."""

    @property
    def ranks(self) -> range:
        """Those on this machine."""
        return range(self.first, self.first + self.here)


@dataclass
class Attempt:
    """The processes of one attempt."""

    folder: Path
    """Gets rank_R.log and rank_R.error.json."""
    world: int = 1
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By rank."""
    logs: list[IO[bytes]] = field(default_factory=list)
    ended: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Rank -> when, and with what code, -N for signal N."""
    ours: set[int] = field(default_factory=set)
    """Ranks that this process has begun to end: what becomes of them is not their own doing."""

    def left(self) -> set[int]:
        """Ranks that have not ended."""
        return set(self.processes) - set(self.ended)

    def send(self, number: int) -> None:
        """A signal for each rank that is left."""
        for rank in self.left():
            with suppress(ProcessLookupError):
                self.processes[rank].send_signal(number)

    def end(self, number: int) -> None:
        """The same, to end them."""
        self.ours |= self.left()
        self.send(number)

    def begin(self, words: Sequence[str], seats: Seats, *, shown: bool) -> None:
        """Start this machine's ranks. `shown`: rank 0 writes to this process's output and not to its log."""
        self.world = seats.world
        for rank in seats.ranks:
            out = None if shown and rank == 0 else (self.folder / f"rank_{rank}.log").open("wb")
            if out is not None:
                self.logs.append(out)
            self.processes[rank] = _start(words, _environment(self.folder, seats, rank), out)

    def look(self) -> None:
        """Note which ranks have ended. What a rank had started ends with it."""
        for rank, process in self.processes.items():
            if rank not in self.ended and _is_over(process):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                self.ended[rank] = (time.time(), process.wait())

    def close(self) -> None:
        """End what is left at once, and wait for it."""
        self.end(signal.SIGKILL)
        while self.left():
            self.look()
            time.sleep(POLL)
        for log in self.logs:
            log.close()

    def first_error(self, asked: Sequence[int] = ()) -> Failure | None:
        """The first error in time: None when every rank is done, or was ended by this process without a word.

        A rank that vanished before its peers ended is the cause of what they say. Otherwise the earliest file counts,
        or, where no rank wrote one, the exit code. `asked`: signals that asked them to stop.
        """
        codes = {rank: code for rank, (_, code) in self.ended.items() if code != 0}
        said = {found.rank: found for found in failure.everything(self.folder) if found.rank in codes}
        silent = {rank: self._silent(rank, asked) for rank in codes if rank not in said and rank not in self.ours}
        vanished = [found for rank, found in silent.items() if -codes[rank] in VIOLENT]
        others = min((when for rank, (when, _) in self.ended.items() if rank in said), default=float("inf"))
        found = [one for one in vanished if one.time <= others + 2 * POLL]
        found = found or [*said.values(), *silent.values()]
        found = [one for one in found if one.exit_code != STOPPED] or found
        return min(found, key=lambda one: (one.time, one.rank), default=None)

    def _silent(self, rank: int, asked: Sequence[int]) -> Failure:
        """A rank that ended by itself without an error file."""
        when, code = self.ended[rank]
        if code > 0:
            text = f"it ended with exit code {code}"
            return Failure(rank=rank, world=self.world, time=when, exit_code=code, message=text)
        if -code in asked:
            text = "it was asked to stop before it could save"
            return Failure(rank=rank, world=self.world, time=when, exit_code=STOPPED, message=text)
        text = f"it was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            text += " (out of memory? dmesg tells)"
        return Failure(rank=rank, world=self.world, time=when, exit_code=1, message=text)


@contextmanager
def store() -> Iterator[int]:
    """The port, which the system chose, of a store that this process holds while inside."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415  (not listed; takes seconds)

    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield held.port


def _start(words: Sequence[str], environment: dict[str, str], out: IO[bytes] | None) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the ranks through the launcher only, and what a rank starts ends with it.
    die = _dies_with_us()
    try:
        return subprocess.Popen(
            list(words),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die,  # noqa: PLW1509  (one call into libc; the store's threads hold no lock of Python's)
        )
    except OSError as error:
        raise LmworksError(f"cannot start a rank: {error.strerror}", where=words[0]) from error


def _dies_with_us() -> Callable[[], None] | None:
    """On Linux, what lets a rank be killed by the system when the launcher is."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, launcher = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def die() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:
            os._exit(1)

    return die


def _environment(folder: Path, seats: Seats, rank: int) -> dict[str, str]:
    """What torchrun sets, and where errors are written."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = str(max(1, cores // (seats.sharing or seats.here)))
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank - seats.first,
        "GROUP_RANK": seats.machine,
        "WORLD_SIZE": seats.world,
        "LOCAL_WORLD_SIZE": seats.here,
        "MASTER_ADDR": seats.store[0],
        "MASTER_PORT": seats.store[1],
        "TORCHELASTIC_USE_AGENT_STORE": True,  # ranks are clients of a store that none of them holds
        "TORCHELASTIC_RESTART_COUNT": seats.restart,
        "TORCHELASTIC_MAX_RESTARTS": seats.restarts,
        "TORCHELASTIC_RUN_ID": folder.name,
        "OMP_NUM_THREADS": str(seats.threads) if seats.threads else os.environ.get("OMP_NUM_THREADS", shared),
        failure.FOLDER: folder.resolve(),
        **seats.more,
    }
    kept = {name: value for name, value in os.environ.items() if name != failure.TORCHRUN}
    return kept | {name: str(value) for name, value in names.items()}


def _is_over(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended. It is not reaped: until then its number, and so its group, cannot be anybody else's."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
