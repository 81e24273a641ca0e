"""A cluster that obeys orders at once, with a clock of its own: what a driver's state machine is tried on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lmworks.guard import state as states
from lmworks.guard.between import partners
from lmworks.guard.diagnose import Rules
from lmworks.guard.report import RankSeen, Report
from lmworks.guard.state import Do, End, Evict, Facts, Node, Note, Revive, SetAside, State
from lmworks.parallel.failure import Failure

SOUND = {"failed": None, "host": "", "memory": 10e9, "loopback": 5e9, "disk": 1e8}


@dataclass
class Cluster:
    """Nodes of two ranks each. Tests change what agents report; the rest follows from orders."""

    members: tuple[str, ...] = ("a", "b")
    spares: tuple[str, ...] = ()
    rules: Rules = field(default_factory=lambda: Rules(missed=10, still=30, begins=100, grace=60))
    fits: frozenset[int] = frozenset({1, 2, 3, 4})
    now: float = 1000.0
    saved: int | None = None
    asked: int = 0
    slow: int | None = None
    dead: set[str] = field(default_factory=set)
    """Nodes whose agents do not come back."""
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: dict[tuple[str, str], float] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    orders: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    evicted: dict[str, str] = field(default_factory=dict)
    revived: list[str] = field(default_factory=list)
    aside: int = 0
    deep: list[bool] = field(default_factory=list)
    """Of each check of the first level."""
    end: End | None = None
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.heard = dict.fromkeys((*self.members, *self.spares), self.now)
        self.state, actions = states.begin(self.members, self.spares, 0, self.now)
        self._do(actions)
        self.revived.clear()

    def turn(self, seconds: float = 1.0, turns: int = 1) -> None:
        """Time goes by, agents that live report, the driver decides."""
        for _ in range(turns):
            if self.end is not None:
                return
            self.now += seconds
            for name in self.heard:
                if name not in self.dead and name in self.reports:
                    self.heard[name] = self.now
            nodes = {
                name: Node(report=self.reports.get(name), quiet=self.now - since) for name, since in self.heard.items()
            }
            facts = Facts(nodes=nodes, saved=self.saved, asked=self.asked, fits=self.fits, slow=self.slow)
            self.state, actions = states.advance(self.state, facts, self.now, self.rules)
            self._do(actions)

    def settle(self, turns: int = 10) -> None:
        """Long enough for a halt, a check and a start."""
        self.turn(turns=turns)

    def rank(self, rank: int, **facts: Any) -> None:
        """Change what is seen of a rank."""
        for name, report in self.reports.items():
            ranks = tuple(dataclasses.replace(one, **facts) if one.rank == rank else one for one in report.ranks)
            self.reports[name] = dataclasses.replace(report, ranks=ranks)

    def all_ranks(self, **facts: Any) -> None:
        """Change what is seen of all ranks."""
        for report in list(self.reports.values()):
            for one in report.ranks:
                self.rank(one.rank, **facts)

    def fails(self, node: str, **facts: Any) -> None:
        """The ranks of a node end with an error."""
        first = self.reports[node].ranks[0].rank
        told = {"rank": first, "world": 4, "time": self.now, "exit_code": 1, "message": "it broke", "kind": "Error"}
        self.reports[node] = dataclasses.replace(self.reports[node], doing="ended", failure=Failure(**told | facts))

    def done(self) -> None:
        """All ranks come to their end."""
        for name, report in self.reports.items():
            if report.ranks:
                self.reports[name] = dataclasses.replace(report, doing="ended")
        self.all_ranks(code=0)

    def _do(self, actions: list[states.Action]) -> None:
        for action in actions:
            match action:
                case Do(order):
                    self.orders.append(order.do)
                    self.deep += [order.deep] if order.do == "check" and order.level == 1 else []
                    for name in list(self.heard):
                        if name not in self.dead and name not in order.evicted:
                            self._obey(name, order)
                case Revive(name):
                    self.revived.append(name)
                    self.heard[name] = self.now
                    self.reports.pop(name, None)
                case Evict(name, why):
                    self.evicted[name] = why
                case SetAside():
                    self.aside += 1
                case Note(incident):
                    self.notes.append(incident.text)
                case End():
                    self.end = action

    def _obey(self, name: str, order: Any) -> None:
        report = self.reports.get(name) or Report(node=name, pid=1, host=name, count=1)
        report = dataclasses.replace(report, order=order.number, check=None)
        if order.do == "start" and name in order.nodes:
            place = order.nodes.index(name)
            ranks = tuple(RankSeen(rank=2 * place + i, pid=9, began=True, pace=1.0, step=1) for i in range(2))
            report = dataclasses.replace(report, attempt=order.attempt, doing="runs", ranks=ranks, failure=None)
        elif order.do in ("halt", "stop"):
            doing = "ended" if report.ranks else report.doing
            report = dataclasses.replace(report, doing=doing)
        elif order.do == "check" and name in order.nodes:
            check = self.checks.get(name, SOUND | {"host": name})
            if order.level == 2:
                check = {"links": {peer: self.links.get((name, peer), 1e9) for peer in partners(order.nodes, name)}}
            report = dataclasses.replace(report, doing="checked", check=check)
        self.reports[name] = report
