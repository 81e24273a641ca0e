"""Start the ranks of a run on this machine, watch them, restart them, and tell the first error.

The ranks get torchrun's environment variables, and a store that this process holds on a port that the system chose, in
the way torchrun's own agent does it. The agent itself is not used: it restarts after every exit code, also after a
recipe error or a stop; it loses exit codes when a signal reached it; and it gives ranks that save thirty seconds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lmworks.core.errors import LmworksError, UsageError
from lmworks.parallel.attempt import POLL, Attempt, Seats, store
from lmworks.parallel.failure import STOPPED, Failure

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
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


class Asked:
    """Remembers the signals that reach the launcher while it is entered."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> Asked:
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
    with Asked() as asked:
        for restart in range(how.max_restarts + 1):
            attempt = Attempt(free(how.logs))
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


def free(logs: Path) -> Path:
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
def _started(attempt: Attempt, words: list[str], how: Launch, restart: int) -> Iterator[None]:
    """The ranks run inside; whatever happens, none is left afterwards."""
    with store() as port:
        seats = Seats(
            here=how.ranks,
            world=how.ranks,
            store=("127.0.0.1", port),
            restart=restart,
            restarts=how.max_restarts,
            threads=how.threads,
        )
        try:
            attempt.begin(words, seats, shown=True)
            yield
        finally:
            attempt.close()


def _watch(attempt: Attempt, how: Launch, asked: Asked, note: Callable[[str], None]) -> None:
    """Until all ranks have ended, or until those that are left must be ended."""
    until = float("inf")
    heard = waiting = False
    while len(attempt.ended) < len(attempt.processes):
        time.sleep(POLL)
        attempt.look()
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


def _first(attempt: Attempt, how: Launch, asked: list[int]) -> Failure | None:
    """How the attempt ended: None when every rank is done, otherwise the first error in time."""
    found = attempt.first_error(asked)
    if found is None and any(code != 0 for _, code in attempt.ended.values()):
        return _ended(attempt, how, asked)
    return found


def _ended(attempt: Attempt, how: Launch, asked: list[int]) -> Failure:
    """The ranks did not stop when they were asked to, and said nothing."""
    rank = min(attempt.ours)
    twice = len(asked) > 1
    text = "ended at once, without saving" if twice else f"it did not stop within {how.grace:g} seconds"
    text += "\n  next:  the same command goes on from the newest complete checkpoint"
    code = 130 if twice and asked[1] == signal.SIGINT else 1
    return Failure(rank=rank, world=len(attempt.processes), time=time.time(), exit_code=code, message=text)
