"""What an agent tells of its node, what a driver orders, and where both lie in the run folder.

    guard/lease.json        who drives, and that it lives
    guard/state.json        what the driver knows; the next one goes on with it
    guard/orders.json       the newest order, for all nodes
    guard/plan.json         what is started, and how
    guard/nodes/NAME.json   the newest report of a node
    guard/beats/attempt_A/  heart-beats of ranks
    guard/events.jsonl      what happened, in the one event schema

All are small files, replaced in one step. Nobody compares clocks of two machines: a reader notes by its own clock when
a file has changed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmworks.core import files
from lmworks.parallel.failure import Failure


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """A rank, as the agent of its node sees it. Ages are in seconds by the agent's own clock."""

    rank: int
    pid: int
    code: int | None = None
    """How it ended, -N by signal N; None while it runs."""
    began: bool = False
    """Whether it has beaten."""
    quiet: float = 0.0
    """Since its last beat, or since it was started."""
    still: float = 0.0
    """Since its beats last told of anything new."""
    pace: float | None = None
    """Seconds of a step, the median of the last ones."""
    step: int | None = None
    calls: int = 0
    sent: float = 0.0
    busy: float = 0.0
    """Seconds outside exchanges, since it began."""
    waits: bool = False
    """Whether it stands in an exchange."""
    stage: int = 0
    over: bool = False
    """Whether it beats no more because it is at its end."""
    event: str = ""
    last: str = ""
    stack: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The newest word of an agent."""

    node: str
    pid: int
    host: str
    count: int
    order: int = 0
    """The newest order that it has obeyed."""
    attempt: int | None = None
    """Of its ranks."""
    doing: str = "idle"
    """idle, waits (for the store), runs, ended (its ranks have), checked, gone (the agent has)."""
    store: tuple[str, int] | None = None
    """Host and port of the store, where this node holds it."""
    door: tuple[str, int] | None = None
    """Host and port that partners of a check come to, while there is one."""
    ranks: tuple[RankSeen, ...] = ()
    failure: Failure | None = None
    """The first error among its ranks."""
    tail: str = ""
    """The last lines of the log of the rank that failed, or of its first."""
    check: dict[str, Any] | None = None
    """What the self-check found."""

    @property
    def is_done(self) -> bool:
        """Whether all its ranks have come to their end."""
        return all(rank.code == 0 for rank in self.ranks)

    def write(self, path: Path) -> None:
        """Replace the file of this node. Where the disk is full its time is renewed: the node lives."""
        try:
            write(path, dataclasses.asdict(self))
        except OSError:
            with suppress(OSError):
                os.utime(path)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What all nodes shall do. A node that an order does not name has nothing to do; one that was evicted ends."""

    number: int
    do: str
    """start, stop (save first), halt, check, end."""
    attempt: int = 0
    nodes: tuple[str, ...] = ()
    """In the order of their ranks."""
    evicted: tuple[str, ...] = ()
    level: int = 1
    """Of a check: 1, each node by itself; 2, between nodes."""
    deep: bool = False
    """Whether the first level also tries the ranks of each node together, which takes longer."""
    patience: float = 0.0
    """Seconds that ranks have to end by themselves before a halt ends them."""


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace a file in one step. Not synced: what stands in it is renewed, or worth nothing after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(table), encoding="utf-8")
    temporary.replace(path)


def table_at(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that is whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def report_at(path: Path) -> Report | None:
    """The report in a file; None where there is none."""
    table = table_at(path)
    if table is None:
        return None
    ranks = tuple(RankSeen(**one | {"stack": tuple(one["stack"])}) for one in table["ranks"])
    failure = None if table["failure"] is None else Failure(**table["failure"])
    places = {name: None if table[name] is None else (table[name][0], table[name][1]) for name in ("store", "door")}
    return Report(**table | {"ranks": ranks, "failure": failure, **places})


def order_at(path: Path) -> Order | None:
    """The order in a file; None where there is none."""
    table = table_at(path)
    if table is None:
        return None
    return Order(**table | {name: tuple(table[name]) for name in ("nodes", "evicted")})


class Folder:
    """The paths of a guarded run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "guard"
        self.lease = self.path / "lease.json"
        self.state = self.path / "state.json"
        self.orders = self.path / "orders.json"
        self.plan = self.path / "plan.json"
        self.events = self.path / "events.jsonl"
        self.nodes = self.path / "nodes"
        self.logs = run / "logs"

    def node(self, name: str) -> Path:
        """The report of a node."""
        return self.nodes / f"{name}.json"

    def beats(self, attempt: int) -> Path:
        """Heart-beats of an attempt."""
        return self.path / "beats" / f"attempt_{attempt}"

    def attempt(self, number: int) -> Path:
        """Logs and errors of an attempt."""
        return self.logs / f"attempt_{number}"

    def next_attempt(self) -> int:
        """The first number that is free, over all launches of the run."""
        return max((int(path.name.removeprefix("attempt_")) for path in self.logs.glob("attempt_*")), default=-1) + 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a guarded run starts, and how; the same for all its nodes."""

    program: tuple[str, ...]
    """What Python starts as each rank, such as -m lmworks train RECIPE --run DIR."""
    ranks_per_node: int
    local: bool
    """Whether all nodes are this machine."""
    threads: int | None = None
    grace: float = 120.0
    """Seconds that ranks have to save and end once a stop was asked for."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of the ranks."""

    def write(self, path: Path) -> None:
        """Write the file that agents read."""
        files.write_json(path, dataclasses.asdict(self))


def plan_at(path: Path) -> Plan:
    """The plan in a file."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return Plan(**table | {"program": tuple(table["program"])})


class Arrivals:
    """When something last changed, by the reader's own clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._seen: dict[str, tuple[object, float]] = {}

    def age(self, name: str, now_is: object) -> float:
        """Seconds since what stands under a name was something else; 0 at the first look."""
        now = self.clock()
        before, when = self._seen.get(name, (None, now))
        if name not in self._seen or before != now_is:
            self._seen[name] = (now_is, now)
            return 0.0
        return now - when

    def forget(self, name: str) -> None:
        """Begin anew."""
        self._seen.pop(name, None)
