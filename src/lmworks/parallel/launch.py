"""Start the ranks of a run on this machine, watch them, restart them, and tell the first error.

The ranks get torchrun's environment variables, and a store that this process holds on a port that the system chose, in
the way torchrun's own agent does it. The agent itself is not used: it restarts after every exit code, also after a
recipe error or a stop; it loses exit codes when a signal reached it; and it gives ranks that save thirty seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from lmworks.core.errors import LmworksError, UsageError
from lmworks.parallel import failure
from lmworks.parallel.failure import STOPPED, Failure

POLL = 0.05
"""Seconds between two looks at the ranks."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
VIOLENT = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that end a rank without a word. What its peers raise then ('connection closed') is never the cause."""
FINAL = {0, 2, STOPPED}
"""Exit codes after which a restart would do the same again, or what nobody wants."""

Command = Callable[[int], Sequence[str]]
"""The words that start a rank, in the n-th attempt (0, 1, ...) of a launch; the same for all ranks."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How ranks are started on this machine."""

    ranks: int
    logs: Path
    """Gets attempt_A/rank_R.log and attempt_A/rank_R.error.json."""
    max_restarts: int = 0
    """How often all ranks are started again after one of them failed."""
    threads: int | None = None
    """Threads of a rank. None: OMP_NUM_THREADS as the person set it, otherwise the cores shared out."""
    grace: float = 120.0
    """Seconds that ranks have to save and end once a stop was asked for, or once one of them has stopped."""
    patience: float = 5.0
    """The same once one of them has failed: they cannot go on without it."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UsageError(f"{self.ranks} ranks", legal="1 or more", where="--local")


@dataclass
class _Attempt:
    """The processes of one attempt."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[IO[bytes]] = field(default_factory=list)
    ended: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Rank -> when, and with what code, -N for signal N."""
    ours: set[int] = field(default_factory=set)
    """Ranks that this process has begun to end: what becomes of them is not their own doing."""

    def left(self) -> set[int]:
        return set(range(len(self.processes))) - set(self.ended)

    def send(self, number: int) -> None:
        for rank in self.left():
            with suppress(ProcessLookupError):
                self.processes[rank].send_signal(number)

    def end(self, number: int) -> None:
        self.ours |= self.left()
        self.send(number)


class _Asked:
    """Remembers the signals that reach the launcher while it is entered."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Asked:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)


def launch(command: Command, how: Launch, note: Callable[[str], None]) -> None:
    """Run the ranks to their end. Raises LmworksError with the first error and the exit code of its rank.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are handed on, so that the ranks save and stop (exit code 3); a second one ends
    them at once. Rank 0 writes to this process's output, every other rank to its log.
    """
    with _Asked() as asked:
        for restart in range(how.max_restarts + 1):
            attempt = _Attempt(_free(how.logs))
            log = attempt.folder / "rank_R.log"
            note(f"attempt {attempt.folder.name.removeprefix('attempt_')}: {how.ranks} ranks; output of ranks: {log}")
            with _started(attempt, list(command(restart)), how, restart):
                _watch(attempt, how, asked, note)
            found = _first(attempt, how, asked.signals)
            if found is None:
                return
            path = attempt.folder / f"rank_{found.rank}.log"
            error = found.error(path if path.exists() else None)
            if found.exit_code in FINAL or asked.signals or restart == how.max_restarts:
                raise error
            note(f"{error}\nall ranks start again ({restart + 1} of {how.max_restarts} restarts)")


def _free(logs: Path) -> Path:
    """The folder of the next attempt, counted over all launches of the run."""
    numbers = [int(path.name.removeprefix("attempt_")) for path in logs.glob("attempt_*")]
    folder = logs / f"attempt_{max(numbers, default=-1) + 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise LmworksError(
            f"cannot write the run folder: {error.strerror}",
            where=str(logs),
            next_step="give another folder: --run DIR",
        ) from error
    return folder


@contextmanager
def _started(attempt: _Attempt, words: list[str], how: Launch, restart: int) -> Iterator[None]:
    """The ranks run inside; whatever happens, none is left afterwards."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415  (not listed; takes seconds)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        for rank in range(how.ranks):
            out = None if rank == 0 else (attempt.folder / f"rank_{rank}.log").open("wb")
            if out is not None:
                attempt.logs.append(out)
            attempt.processes.append(_start(words, _environment(attempt, how, rank, restart, store.port), out))
        yield
    finally:
        attempt.end(signal.SIGKILL)
        while attempt.left():
            _look(attempt)
        for log in attempt.logs:
            log.close()


def _start(words: list[str], environment: dict[str, str], out: IO[bytes] | None) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the ranks through the launcher only, and what a rank starts ends with it.
    die = _dies_with_us()
    try:
        return subprocess.Popen(
            words,
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


def _environment(attempt: _Attempt, how: Launch, rank: int, restart: int, port: int) -> dict[str, str]:
    """What torchrun sets, and where errors are written."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(how.threads) if how.threads else os.environ.get("OMP_NUM_THREADS", str(max(1, cores // how.ranks)))
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": how.ranks,
        "LOCAL_WORLD_SIZE": how.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # ranks are clients of this process's store
        "TORCHELASTIC_RESTART_COUNT": restart,
        "TORCHELASTIC_MAX_RESTARTS": how.max_restarts,
        "TORCHELASTIC_RUN_ID": attempt.folder.name,
        "OMP_NUM_THREADS": threads,
        failure.FOLDER: attempt.folder.resolve(),
    }
    kept = {name: value for name, value in os.environ.items() if name != failure.TORCHRUN}
    return kept | {name: str(value) for name, value in names.items()}


def _look(attempt: _Attempt) -> None:
    """Note which ranks have ended. What a rank had started ends with it."""
    time.sleep(POLL)
    for rank, process in enumerate(attempt.processes):
        if rank not in attempt.ended and _is_over(process):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            attempt.ended[rank] = (time.time(), process.wait())


def _is_over(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended. It is not reaped: until then its number, and so its group, cannot be anybody else's."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _watch(attempt: _Attempt, how: Launch, asked: _Asked, note: Callable[[str], None]) -> None:
    """Until all ranks have ended, or until those that are left must be ended."""
    until = float("inf")
    heard = waiting = False
    while len(attempt.ended) < len(attempt.processes):
        _look(attempt)
        if len(asked.signals) > 1:
            return
        if asked.signals and not heard:
            heard = True
            name = signal.Signals(asked.signals[0]).name
            note(f"got {name}: the ranks save and stop (at most {how.grace:g} s; once more ends them at once)")
            attempt.send(asked.signals[0])
            until = time.monotonic() + how.grace
        codes = {code for _, code in attempt.ended.values()} - {0}
        if codes == {STOPPED} and not waiting:
            waiting = True
            until = min(until, time.monotonic() + how.grace)
        elif codes - {STOPPED} and not attempt.ours:
            attempt.end(signal.SIGTERM)
            until = min(until, time.monotonic() + how.patience)
        if time.monotonic() >= until:
            return


def _first(attempt: _Attempt, how: Launch, asked: list[int]) -> Failure | None:
    """How the attempt ended: None when every rank is done, otherwise the first error in time.

    A rank that vanished before its peers ended is the cause of what they say. Otherwise the earliest file counts, or,
    where no rank wrote one, the exit code.
    """
    codes = {rank: code for rank, (_, code) in attempt.ended.items() if code != 0}
    said = {found.rank: found for found in failure.everything(attempt.folder) if found.rank in codes}
    silent = {
        rank: _silent(attempt, rank, asked=asked) for rank in codes if rank not in said and rank not in attempt.ours
    }
    vanished = [found for rank, found in silent.items() if -codes[rank] in VIOLENT]
    others = min((when for rank, (when, _) in attempt.ended.items() if rank in said), default=float("inf"))
    found = [one for one in vanished if one.time <= others + 2 * POLL]
    found = found or [*said.values(), *silent.values()]
    found = [one for one in found if one.exit_code != STOPPED] or found
    if not found and codes:
        return _ended(attempt, how, asked)
    return min(found, key=lambda one: (one.time, one.rank), default=None)


def _silent(attempt: _Attempt, rank: int, *, asked: list[int]) -> Failure:
    """A rank that ended by itself without an error file."""
    when, code = attempt.ended[rank]
    world = len(attempt.processes)
    if code > 0:
        return Failure(rank=rank, world=world, time=when, exit_code=code, message=f"it ended with exit code {code}")
    if -code in asked:
        text = "it was asked to stop before it could save"
        return Failure(rank=rank, world=world, time=when, exit_code=STOPPED, message=text)
    text = f"it was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        text += " (out of memory? dmesg tells)"
    return Failure(rank=rank, world=world, time=when, exit_code=1, message=text)


def _ended(attempt: _Attempt, how: Launch, asked: list[int]) -> Failure:
    """The ranks did not stop when they were asked to, and said nothing."""
    rank = min(attempt.ours)
    twice = len(asked) > 1
    text = "ended at once, without saving" if twice else f"it did not stop within {how.grace:g} seconds"
    text += "\n  next:  the same command goes on from the newest complete checkpoint"
    code = 130 if twice and asked[1] == signal.SIGINT else 1
    return Failure(rank=rank, world=len(attempt.processes), time=time.time(), exit_code=code, message=text)
