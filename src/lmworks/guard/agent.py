"""The agent of a node: starts its ranks, reads their heart-beats, reports, and does what the driver orders.

    python -m lmworks.guard.agent RUN NODE [--given]

--given: something else than the driver starts it, so it waits for one.

It lives without a driver: the ranks go on, and the next driver finds it by its report. It ends when it is told to, when
it was evicted, or when its ranks have ended and no driver was seen for `ORPHAN` seconds.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from types import FrameType

from lmworks.guard import between, selfcheck
from lmworks.guard.report import Arrivals, Folder, Order, RankSeen, Report, order_at, plan_at, report_at, table_at
from lmworks.parallel import pulse
from lmworks.parallel.attempt import Attempt, Seats, store

TURN = 0.1
"""Seconds between two looks at orders and ranks."""
REPORT = 0.5
"""Seconds between two reports; what is new is told at once."""
LEAVES = 3.0
"""Seconds after the ends of its ranks in which an agent that was told to stop by a signal still reports."""
ORPHAN = 600.0
"""Seconds without a driver after which an agent that has nothing to do ends."""
STACK_SECONDS = 2.0
"""In which py-spy must have looked at a rank."""
TAIL = 2000
"""Bytes of a log that are told."""
PACES = 20
"""Steps whose median time is told."""


class Tracker:
    """What an agent makes of one rank's beats."""

    def __init__(self, arrivals: Arrivals, rank: int) -> None:
        self._arrivals, self._rank = arrivals, rank
        self._beat: pulse.Beat | None = None
        self._steps: list[tuple[int, float]] = []

    def look(self, folder: Path, pid: int, code: int | None) -> RankSeen:
        """The rank as it is now."""
        path = pulse.file_of(folder, self._rank)
        beat = pulse.read(path) or self._beat  # a beat that is being replaced is the last one still
        self._beat = beat
        if beat is None:
            return RankSeen(rank=self._rank, pid=pid, code=code, quiet=self._arrivals.age(f"{self._rank} beat", None))
        renewed = path.stat().st_mtime_ns if path.exists() else 0
        still = self._arrivals.age(f"{self._rank} progress", beat.progress)
        if beat.step is not None and (not self._steps or self._steps[-1][0] != beat.step):
            self._steps = [*self._steps[-PACES:], (beat.step, self._arrivals.clock())]
        return RankSeen(
            rank=self._rank,
            pid=pid,
            code=code,
            began=True,
            quiet=self._arrivals.age(f"{self._rank} beat", (beat.count, renewed)),
            still=still,
            pace=self._pace(),
            step=beat.step,
            calls=beat.calls,
            sent=beat.sent,
            busy=beat.busy,
            waits=beat.waits,
            stage=beat.stage,
            over=beat.over,
            event=beat.event,
            last=beat.last,
            stack=beat.stack,
        )

    def _pace(self) -> float | None:
        pairs = zip(self._steps, self._steps[1:], strict=False)
        paces = [(later - when) / (next_ - step) for (step, when), (next_, later) in pairs if next_ > step]
        return median(paces) if paces else None


class Agent:
    """One node of a run."""

    def __init__(self, run: Path, node: str) -> None:
        self._asked = 0
        """Signals that asked it to stop."""
        self._leaves = float("inf")
        self._folder, self._node = Folder(run), node
        self._plan = plan_at(self._folder.plan)
        self._arrivals = Arrivals(time.monotonic)
        self._trackers: dict[int, Tracker] = {}
        self._attempt: Attempt | None = None
        self._number: int | None = None
        self._order = Order(number=0, do="start")
        self._held = ExitStack()
        """The store, where this node holds it."""
        self._store: tuple[str, int] | None = None
        self._doing = "idle"
        self._door: between.Door | None = None
        self._check: dict[str, object] | None = None
        self._found: dict[str, object] = {}
        self._together: selfcheck.Together | None = None
        """What was found so far, and what goes on."""
        self._until = float("inf")
        """When ranks that were asked to stop are ended."""
        self._count = 0
        self._told: tuple[object, ...] = ()
        self._when = float("-inf")

    def run(self) -> None:
        """Until it is told to end, was evicted, or is not needed any more."""
        self._folder.nodes.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                order = order_at(self._folder.orders)
                if order is not None and order.number > self._order.number:
                    self._order = order
                    if order.do == "end" or self._node in order.evicted:
                        return
                    self._obey(order)
                if self._doing == "waits":
                    self._join()
                self._look()
                self._tell()
                if self._is_orphan() or self._asked > 1 or time.monotonic() > self._leaves:
                    return
                time.sleep(TURN)
        finally:
            self._end()
            self._doing = "gone"
            self._tell()

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal that asks to stop: the ranks save and stop; a second one ends all at once."""
        self._asked += 1
        if self._attempt is not None:
            self._attempt.send(signal.SIGTERM)
            self._until = min(self._until, time.monotonic() + self._plan.grace)

    def _obey(self, order: Order) -> None:
        self._check = None
        self._give_up_check()
        if order.do == "start":
            self._end()
            if self._node in order.nodes:
                self._number, self._doing = order.attempt, "waits"
                if order.nodes[0] == self._node:
                    self._store = (self._host, self._held.enter_context(store()))
        elif order.do == "stop" and self._attempt is not None:
            self._attempt.send(signal.SIGTERM)
            self._until = time.monotonic() + self._plan.grace
        elif order.do == "halt" and self._attempt is not None:
            if not order.patience:  # nobody has told why: look before they are gone
                stacks(self._attempt)
            self._attempt.end(signal.SIGTERM if order.patience else signal.SIGKILL)
            self._until = time.monotonic() + order.patience
        elif order.do == "check" and self._node in order.nodes:
            self._check = self._checked(order)
            if order.deep and order.level == 1 and self._check["failed"] is None and self._plan.ranks_per_node > 1:
                self._together = selfcheck.Together(self._plan.ranks_per_node)
                self._found, self._check = self._check, None

    @property
    def _host(self) -> str:
        """Under which other nodes find this one."""
        return "127.0.0.1" if self._plan.local else socket.gethostname()

    def _checked(self, order: Order) -> dict[str, object]:
        """The self-check of this level. The door is open before the first one is answered."""
        if order.level == 1:
            self._door = self._door or between.Door("127.0.0.1" if self._plan.local else "0.0.0.0")
            return selfcheck.here(self._folder.path)
        reports = [report_at(self._folder.node(name)) for name in order.nodes]
        doors = {report.node: report.door for report in reports if report is not None and report.door is not None}
        return {"links": between.links(doors, order.nodes, self._node)}

    def _join(self) -> None:
        """Start the ranks as soon as the store is known."""
        first = self._order.nodes[0]
        told = self._store
        if first != self._node:
            report = report_at(self._folder.node(first))
            told = report.store if report is not None and report.attempt == self._number else None
        if told is None or self._number is None:
            return
        each, place = self._plan.ranks_per_node, self._order.nodes.index(self._node)
        beats, folder = self._folder.beats(self._number), self._folder.attempt(self._number)
        folder.mkdir(parents=True, exist_ok=True)
        seats = Seats(
            here=each,
            world=each * len(self._order.nodes),
            first=each * place,
            machine=place,
            store=told,
            sharing=each * len(self._order.nodes) if self._plan.local else None,
            threads=self._plan.threads,
            more={**self._plan.environment, pulse.FOLDER: str(beats.resolve())},
        )
        self._attempt, self._doing = Attempt(folder), "runs"
        self._arrivals = Arrivals(time.monotonic)
        self._trackers = {rank: Tracker(self._arrivals, rank) for rank in seats.ranks}
        self._attempt.begin([sys.executable, *self._plan.program], seats, shown=False)

    def _look(self) -> None:
        if self._together is not None and (more := self._together.answer()) is not None:
            self._check, self._together = {**self._found, **more}, None
        attempt = self._attempt
        if self._asked and self._doing != "runs":
            self._leaves = min(self._leaves, time.monotonic() + LEAVES)
        if attempt is None or self._doing != "runs":
            return
        attempt.look()
        if time.monotonic() >= self._until:
            attempt.end(signal.SIGKILL)
        if not attempt.left():
            attempt.close()
            self._doing = "ended"

    def _tell(self) -> None:
        """Write the report: when something is new, and otherwise now and then."""
        attempt = self._attempt
        codes = {} if attempt is None else {rank: code for rank, (_, code) in attempt.ended.items()}
        now = time.monotonic()
        fresh = (self._order.number, self._doing, self._store, tuple(codes.items()), self._check is None)
        if fresh == self._told and now - self._when < REPORT:
            return
        self._told, self._when, self._count = fresh, now, self._count + 1
        failure = None
        if attempt is not None and codes:
            asked = [signal.SIGTERM] if self._order.do == "stop" or self._asked else []
            failure = attempt.first_error(asked)
        ranks: list[RankSeen] = []
        if attempt is not None and self._number is not None:
            beats = self._folder.beats(self._number)
            for rank, process in attempt.processes.items():
                ranks.append(self._trackers[rank].look(beats, process.pid, codes.get(rank)))
        Report(
            node=self._node,
            pid=os.getpid(),
            host=platform.node(),
            count=self._count,
            order=self._order.number,
            attempt=self._number,
            doing="checked" if self._check is not None else self._doing,
            store=self._store,
            door=None if self._door is None else (self._host, self._door.port),
            ranks=tuple(ranks),
            failure=failure,
            tail=self._tail(failure.rank if failure is not None else None),
            check=self._check,
        ).write(self._folder.node(self._node))

    def _tail(self, rank: int | None) -> str:
        """The end of a rank's log."""
        if self._attempt is None:
            return ""
        path = self._attempt.folder / f"rank_{min(self._attempt.processes) if rank is None else rank}.log"
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def _give_up_check(self) -> None:
        if self._together is not None:
            self._together.close()
            self._together = None

    def _end(self) -> None:
        """End what is left of the ranks, and give the store back."""
        if self._attempt is not None:
            self._attempt.close()
        self._attempt, self._store, self._until = None, None, float("inf")
        self._held.close()
        self._give_up_check()
        if self._door is not None:
            self._door.close()
        self._door, self._doing = None, "idle"

    def _is_orphan(self) -> bool:
        seen = self._arrivals.age("lease", (table_at(self._folder.lease) or {}).get("count"))
        return self._doing != "runs" and seen > ORPHAN


def stacks(attempt: Attempt) -> None:
    """Keep where each rank stands, in rank_R.stack.txt, where py-spy is installed: it sees stopped processes too."""
    if shutil.which("py-spy") is None:
        return
    for rank in sorted(attempt.left()):
        words = ["py-spy", "dump", "--nonblocking", "--pid", str(attempt.processes[rank].pid)]
        with (attempt.folder / f"rank_{rank}.stack.txt").open("wb") as out, suppress(subprocess.TimeoutExpired):
            subprocess.run(words, check=False, stdout=out, stderr=out, timeout=STACK_SECONDS)


def main(words: list[str]) -> int:
    """Run the agent of a node."""
    for number in (signal.SIGINT, signal.SIGHUP):  # meant for the driver, which orders what follows
        signal.signal(number, signal.SIG_IGN)
    run = Path(words[0])
    if "--given" in words[2:]:
        _await_driver(Folder(run))
    agent = Agent(run, words[1])
    signal.signal(signal.SIGTERM, agent.ask)
    agent.run()
    return 0


def _await_driver(folder: Folder) -> None:
    """Until a driver is seen to renew its lease: then orders and plan are its own, and not those of an earlier run."""
    seen: set[object] = set()
    while len(seen) < 3:  # none or an old one, the one it is taken with, a renewed one
        seen.add((table_at(folder.lease) or {}).get("count"))
        time.sleep(TURN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
