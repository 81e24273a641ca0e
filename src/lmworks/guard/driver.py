"""The driver: looks at what agents report, decides by `state`, and sees to it that it is done.

It holds nothing that is not in the run folder. When it dies the agents and ranks go on, and the next driver takes the
lease, reads the state, gives the last order again, and goes on from there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.core.errors import CheckpointError, LmworksError
from lmworks.core.events import Events
from lmworks.core.files import write_json
from lmworks.guard import state as states
from lmworks.guard.diagnose import Incident, Rules
from lmworks.guard.lease import Lease
from lmworks.guard.nodes import Nodes
from lmworks.guard.report import Arrivals, Folder, Order, Plan, report_at, table_at, write
from lmworks.guard.state import Do, End, Evict, Facts, Node, Note, Revive, SetAside, State
from lmworks.guard.straggler import Stragglers
from lmworks.model.checkpoint import complete, step_of, verify
from lmworks.parallel.launch import Asked

TURN = 0.1
"""Seconds between two looks."""
LEAVE = 15.0
"""Seconds that agents have to end when the run is over."""


@dataclass(frozen=True, kw_only=True)
class Driving:
    """What a driver needs."""

    run: Path
    plan: Plan
    nodes: Nodes
    spares: int = 0
    rules: Rules
    fits: frozenset[int]
    """With how many nodes the recipe's layout works."""
    note: Callable[[str], None]
    show: Callable[[str], None] | None = None
    """Gets what rank 0 writes; None: nobody wants it."""


def drive(how: Driving) -> None:
    """Bring a run to its end. Raises LmworksError with the exit code that tells how it ended otherwise.

    SIGTERM and SIGINT ask the ranks to save and stop; a second one ends them at once.
    """
    folder = Folder(how.run)
    lease = Lease(folder.lease)
    before = lease.take()
    with Asked() as asked:
        driver = _Driver(how, folder, lease)
        end = driver.run(asked, goes_on=before)
    lease.give_back()
    if end.code:
        error = LmworksError(end.text)
        error.exit_code = end.code
        raise error


class _Driver:
    def __init__(self, how: Driving, folder: Folder, lease: Lease) -> None:
        self._how, self._folder, self._lease = how, folder, lease
        self._events = Events(folder.events, run=how.run.resolve().name)
        self._arrivals = Arrivals(time.monotonic)
        self._ignored: dict[str, int] = {}
        """By node, the process of an agent whose place another one takes."""
        self._stragglers = Stragglers()
        self._shown = (-1, 0)
        """Of the log of rank 0: attempt, and how much of it was shown."""
        self._kept: State | None = None
        self._end: End | None = None

    def run(self, asked: Asked, *, goes_on: bool) -> End:
        """Look, decide, do; until the run is over."""
        state, actions = self._first(goes_on=goes_on)
        while True:
            self._keep(state)
            for action in actions:
                self._do(action)
            if self._end is not None:
                self._leave(state)
                return self._end
            time.sleep(TURN)
            self._lease.renew()
            self._show(state)
            state, actions = states.advance(state, self._facts(state, asked), time.monotonic(), self._how.rules)

    def _first(self, *, goes_on: bool) -> states.Answer:
        """The state of the driver that was there before, if its run is not over, or a new one."""
        names = self._how.nodes.names()
        kept = table_at(self._folder.state) if goes_on else None
        if kept is not None and kept["phase"] != states.OVER:
            state = dataclasses.replace(decoded(kept), since=time.monotonic(), stopping=0)
            assert state.given is not None, "a run begins with an order"
            self._say(f"going on with this run, attempt {state.attempt}: its driver is gone", "attach")
            write(self._folder.orders, dataclasses.asdict(state.given))  # it may have died before it could
            return state, []
        for name in names:
            self._how.nodes.end(name)
        for path in (self._folder.orders, *self._folder.nodes.glob("*.json")):
            path.unlink(missing_ok=True)
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._how.plan.write(self._folder.plan)
        count = len(names) - self._how.spares
        return states.begin(names[:count], names[count:], self._folder.next_attempt(), time.monotonic())

    def _facts(self, state: State, asked: Asked) -> Facts:
        nodes = {name: self._node(name) for name in (*state.members, *state.spares)}
        current = [nodes[name].report for name in state.members]
        ranks = [rank for report in current if report and report.attempt == state.attempt for rank in report.ranks]
        saved = complete(self._folder.run / "checkpoints")
        return Facts(
            nodes=nodes,
            saved=step_of(saved[-1]) if saved else None,
            asked=len(asked.signals),
            fits=self._how.fits,
            slow=self._stragglers.look(ranks) if state.phase == states.RUN else None,
        )

    def _node(self, name: str) -> Node:
        path = self._folder.node(name)
        report = report_at(path)
        if report is not None and report.pid == self._ignored.get(name):
            report = None
        renewed = path.stat().st_mtime_ns if report is not None else 0
        age = self._arrivals.age(name, None if report is None else (report.pid, report.count, renewed))
        return Node(report=report, quiet=age)

    def _do(self, action: states.Action) -> None:
        match action:
            case Do(order):
                write(self._folder.orders, dataclasses.asdict(order))
                self._events.write(f"order {order.do}", stream="guard", **dataclasses.asdict(order))
                if order.do == "start":
                    self._stragglers.forget()
                    self._say(f"attempt {order.attempt}: {self._ranks(order)}", "attempt")
            case Revive(name):
                report = report_at(self._folder.node(name))
                if report is not None:
                    self._ignored[name] = report.pid
                self._arrivals.forget(name)
                self._how.nodes.start(name)
                self._events.write("revive", stream="guard", node=name)
            case Evict(name, why):
                self._say(f"{name} is evicted: {why}", "evict")
                self._how.nodes.evict(name, why)
            case SetAside():
                self._set_aside()
            case Note(incident):
                facts = dataclasses.asdict(incident)
                report = report_at(self._folder.node(incident.node)) if incident.node is not None else None
                self._say(facts.pop("text"), "incident", **facts, tail="" if report is None else report.tail)
            case End():
                self._end = action
                self._events.write("end", stream="guard", code=action.code, text=action.text)
        self._events.flush()

    def _ranks(self, order: Order) -> str:
        each, count = self._how.plan.ranks_per_node, len(order.nodes)
        where = f" on {count} nodes" if count > 1 else ""
        return f"{each * count} ranks{where}; their output: {self._folder.attempt(order.attempt)}/rank_R.log"

    def _say(self, text: str, event: str, **facts: Any) -> None:
        self._events.write(event, stream="guard", **{"text": text, **facts})
        self._events.flush()
        self._how.note(text)

    def _set_aside(self) -> None:
        """Rename the newest checkpoint when it is damaged indeed."""
        for path in complete(self._folder.run / "checkpoints")[-1:]:
            try:
                verify(path)
            except CheckpointError as error:
                aside = path.with_name(f"damaged-{path.name}")
                path.rename(aside)
                self._say(f"{error.what}: set aside as {aside}", "set aside")

    def _keep(self, state: State) -> None:
        if state != self._kept:
            write_json(self._folder.state, dataclasses.asdict(state))
            self._kept = state

    def _show(self, state: State) -> None:
        """Hand on what rank 0 wrote since the last look."""
        if self._how.show is None:
            return
        attempt, done = self._shown if self._shown[0] == state.attempt else (state.attempt, 0)
        try:
            with (self._folder.attempt(attempt) / "rank_0.log").open("rb") as log:
                log.seek(done)
                data = log.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._how.show(whole.decode("utf-8", errors="replace"))
        self._shown = (attempt, done + len(whole))

    def _leave(self, state: State) -> None:
        """Wait until the agents have ended."""
        self._show(state)
        until = time.monotonic() + LEAVE
        names = [*state.members, *state.spares]
        while time.monotonic() < until and any(self._lingers(name, state) for name in names):
            time.sleep(TURN)
            self._lease.renew()
        for name in names:
            self._how.nodes.end(name)

    def _lingers(self, name: str, state: State) -> bool:
        report = self._node(name).report
        return report is not None and report.doing != "gone"


def decoded(table: dict[str, Any]) -> State:
    """A state as it was kept."""
    incidents = tuple(Incident(**one) for one in table["incidents"])
    given = table["given"]
    order = None if given is None else Order(**given | {name: tuple(given[name]) for name in ("nodes", "evicted")})
    incident = None if table["incident"] is None else Incident(**table["incident"])
    lists = {name: tuple(table[name]) for name in ("members", "spares")}
    return State(**table | lists | {"incidents": incidents, "given": order, "incident": incident})
