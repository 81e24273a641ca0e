"""What a driver decides, as a pure function of what it knows, what it sees, and the time.

A run goes round: *run* until something is wrong, *halt* all ranks, *check* the nodes, and *run* again without those
that are bad, from the newest complete checkpoint. It ends when it is done, was asked to stop, or when trying again is
of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lmworks.guard import between, selfcheck
from lmworks.guard.diagnose import SEEN, Incident, Rules, diagnose, told_by_ranks
from lmworks.guard.report import Order, Report
from lmworks.parallel.failure import STOPPED

RUN, HALT, CHECK, OVER = "run", "halt", "check", "over"
INTERRUPTED = 130
"""Exit code of a rank that a person interrupted."""
HALT_SECONDS = 30.0
"""How long nodes have to end their ranks before they count as gone."""
UNEXPLAINED = ("nan", "hang")
"""Kinds that a machine may have caused without a sign: where no node is known, all are looked at more closely."""
PATIENCE = 3.0
"""Seconds that ranks have to end by themselves once another one has failed."""
CHECK_SECONDS = 120.0
"""How long nodes have to answer a self-check; an agent that is started anew imports torch in it."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as the driver sees it."""

    report: Report | None = None
    """None until its agent has told something."""
    quiet: float = 0.0
    """Seconds since it last did, or since it was started, by the driver's clock."""

    def down(self, rules: Rules) -> bool:
        """Whether nothing is to be expected of it."""
        return self.quiet > (rules.begins if self.report is None else rules.missed)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a driver sees in one look."""

    nodes: Mapping[str, Node]
    saved: int | None = None
    """The step of the newest complete checkpoint."""
    asked: int = 0
    """How often it was asked to stop."""
    fits: frozenset[int] = frozenset()
    """With how many nodes the recipe's layout works."""
    slow: int | None = None
    """A rank that takes longer than its peers."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a driver knows; the next one goes on with it."""

    members: tuple[str, ...]
    """The nodes of the run, in the order of their ranks."""
    spares: tuple[str, ...] = ()
    phase: str = RUN
    since: float = 0.0
    """When the phase began, by the driver's clock."""
    order: int = 0
    given: Order | None = None
    """The newest order."""
    attempt: int = 0
    evicted: Mapping[str, str] = field(default_factory=dict)
    """Why each was."""
    incident: Incident | None = None
    """What is being mended."""
    incidents: tuple[Incident, ...] = ()
    bad: Mapping[str, str] = field(default_factory=dict)
    """What the first level of the self-check found, while the second one goes on."""
    tried: int = 0
    """Incidents since the last new checkpoint or eviction."""
    stopping: int = 0
    """How often it was asked to stop."""
    slow: int | None = None
    """The slow rank that was told."""


@dataclass(frozen=True)
class Do:
    """Give this order to all nodes."""

    order: Order


@dataclass(frozen=True)
class Revive:
    """Start an agent on the node, in place of one that may be there."""

    node: str


@dataclass(frozen=True)
class Evict:
    """Take the node out of the run for good."""

    node: str
    why: str


@dataclass(frozen=True)
class SetAside:
    """Look at the newest checkpoint: one that is damaged is kept, under a name by which nobody takes it."""


@dataclass(frozen=True)
class Note:
    """Tell people of something that went wrong."""

    of: Incident


@dataclass(frozen=True)
class End:
    """The run is over: the exit code, and why."""

    code: int
    text: str = ""


Action = Do | Revive | Evict | SetAside | Note | End
Answer = tuple[State, list[Action]]


def begin(members: tuple[str, ...], spares: tuple[str, ...], attempt: int, now: float) -> Answer:
    """A new run: agents everywhere, ranks on the members."""
    state = State(members=members, spares=spares, attempt=attempt - 1)
    state, actions = _start(state, now)
    return state, [*(Revive(name) for name in (*members, *spares)), *actions]


def advance(state: State, facts: Facts, now: float, rules: Rules) -> Answer:
    """The next state, and what is to be done."""
    steps: dict[str, Callable[[State, Facts, float, Rules], Answer]] = {RUN: _run, HALT: _halt, CHECK: _check}
    return steps[state.phase](state, facts, now, rules)


def _run(state: State, facts: Facts, now: float, rules: Rules) -> Answer:
    if facts.asked > state.stopping:
        asked = replace(state, stopping=facts.asked, phase=HALT, since=now)
        return _ordered(asked, "stop" if facts.asked == 1 else "halt")
    seen = {name: facts.nodes[name] for name in state.members}
    current = [node.report for node in seen.values() if node.report and node.report.attempt == state.attempt]
    if len(current) == len(seen) and all(report.doing == "ended" and report.is_done for report in current):
        return _ended(state, 0)
    late = now - state.since > rules.begins
    quiet = {name: node.quiet for name, node in seen.items() if node.down(rules) or (late and not _runs(node, state))}
    found = diagnose(current, quiet, rules)
    if found is None and facts.slow is not None and facts.slow != state.slow:
        return _slow(state, facts.slow, current, now, rules)
    if found is None:
        return state, []
    return _broken(state, replace(found, saved=facts.saved), now)


def _runs(node: Node, state: State) -> bool:
    """Whether it has started the ranks of this attempt."""
    report = node.report
    return report is not None and report.attempt == state.attempt and report.doing != "waits"


def _broken(state: State, incident: Incident, now: float) -> Answer:
    """Everything stops: the ranks that are left wait for those that are not.

    Ranks that stop by themselves save, and ranks that fail may be at the end of a save; others are ended at once.
    """
    state = replace(state, incident=incident, phase=HALT, since=now)
    if incident.exit_code == STOPPED:
        return _ordered(state, "stop")
    state, actions = _ordered(state, "halt", patience=0.0 if incident.kind in SEEN else PATIENCE)
    return state, [Note(incident), *actions]


def _slow(state: State, rank: int, reports: list[Report], now: float, rules: Rules) -> Answer:
    node = next(report.node for report in reports if any(one.rank == rank for one in report.ranks))
    text = f"rank {rank} ({node}) is slow: it computes longer than its peers in every step, and they wait for it"
    found = Incident(kind="slow", node=node, rank=rank, text=text)
    state = replace(state, slow=rank)
    return _broken(state, found, now) if rules.evict_slow else (state, [Note(found)])


def _halt(state: State, facts: Facts, now: float, rules: Rules) -> Answer:
    if state.stopping and facts.asked > state.stopping:
        return _ordered(replace(state, stopping=facts.asked, since=now), "halt")
    nodes = {name: facts.nodes[name] for name in state.members}
    assert state.given is not None, "a halt was ordered"
    limit = HALT_SECONDS + (rules.grace if state.given.do == "stop" else 0.0)
    waiting = [name for name, node in nodes.items() if not node.down(rules) and not _has_ended(node, state)]
    if waiting and now - state.since < limit:
        return state, []
    reports = [node.report for node in nodes.values() if node.report and node.report.attempt == state.attempt]
    cause = told_by_ranks(state.incident, reports)
    if state.stopping or (cause is not None and cause.exit_code == STOPPED):
        return _stopped(state, cause)
    assert cause is not None, "nothing is halted without a reason"
    gone = next((name for name, node in nodes.items() if node.down(rules) or name in waiting), None)
    if cause.kind == "failed" and gone is not None:  # what others say when a node is gone is its consequence
        cause = Incident(kind="lost", node=gone, step=cause.step, text=f"nothing is heard of {gone}; {cause.text}")
    before = state.incident
    known = before is not None and (before.kind, before.node) == (cause.kind, cause.node)
    said = [] if known else [Note(cause)]
    cause = replace(cause, saved=facts.saved)
    state = replace(state, incident=None, incidents=(*state.incidents, cause), tried=_tried(state, cause))
    why = _hopeless(state, cause, rules)
    if why is not None:
        return _ended(state, cause.exit_code, f"{cause.text}\n  {why}" if why else cause.text)
    # a rank that could not read may be heard behind those that only lost it: what is damaged shows when it is looked at
    mended: list[Action] = [SetAside()] if cause.kind in ("damaged", "failed", "lost") else []
    down = [Revive(name) for name, node in nodes.items() if node.down(rules) or name in waiting]
    deep = cause.node is None and cause.kind in UNEXPLAINED
    state, actions = _ordered(replace(state, phase=CHECK, since=now, bad={}), "check", deep=deep)
    return state, [*said, *mended, *down, *actions]


def _has_ended(node: Node, state: State) -> bool:
    report = node.report
    return report is not None and report.order >= state.order and report.doing in ("ended", "idle", "checked")


def _tried(state: State, cause: Incident) -> int:
    """Incidents in a row without a newer checkpoint."""
    before = state.incidents[-1] if state.incidents else None
    return state.tried + 1 if before is not None and state.tried and before.saved == cause.saved else 1


def _hopeless(state: State, cause: Incident, rules: Rules) -> str | None:
    """Why trying again is of no use; None where it is, '' where the error says it all."""
    if cause.exit_code in (2, INTERRUPTED):
        return ""
    earlier = [one for one in state.incidents[:-1] if one.kind == "nan" == cause.kind and one.step == cause.step]
    if earlier:
        return f"The same step again: step {cause.step} comes from the recipe or its data, not from a machine."
    if state.tried >= rules.tries:
        return f"{state.tried} failures without a new checkpoint: the run is given up."
    return None


def _stopped(state: State, cause: Incident | None) -> Answer:
    if cause is not None and cause.exit_code != STOPPED:
        return _ended(state, cause.exit_code, cause.text)
    text = "stopped" if cause is None else cause.text
    return _ended(state, STOPPED if state.stopping < 2 else 1, f"{text}\n  next:  the same command goes on")


def _check(state: State, facts: Facts, now: float, rules: Rules) -> Answer:
    if facts.asked > state.stopping:
        return _stopped(replace(state, stopping=facts.asked), None)
    assert state.given is not None, "a check was ordered"
    found, asked = {}, state.given.nodes
    for name in asked:
        report = facts.nodes[name].report
        if report is not None and report.order >= state.order and report.check is not None:
            found[name] = report.check
    down = {name for name in asked if name not in found and facts.nodes[name].down(rules)}
    if len(found) + len(down) < len(asked) and now - state.since < CHECK_SECONDS:
        return state, []
    silent = {name: "it does not answer" for name in asked if name not in found}
    first = state.given.level == 1
    judged = selfcheck.judge(found) if first else between.judge({name: one["links"] for name, one in found.items()})
    bad = {**state.bad, **silent, **judged}
    good = tuple(name for name in state.members if name not in bad)
    if not good:
        why = "; ".join(f"{name}: {text}" for name, text in bad.items())
        text = f"every node fails the self-check ({why})"
        return _ended(state, 1, f"{text}\n  next:  suspect what all share: the check, the disk, the network")
    if first and len(good) > 1:
        return _ordered(replace(state, bad=bad, since=now), "check", nodes=good, level=2)
    return _again(state, bad, facts, now, rules)


def _again(state: State, bad: dict[str, str], facts: Facts, now: float, rules: Rules) -> Answer:
    """Run on: bad nodes are replaced by spares, or left out where the layout works without them."""
    blamed = _blamed(state, rules)
    room = len(state.spares) - len(bad)
    if blamed is not None and blamed not in bad and (room > 0 or len(state.members) - len(bad) - 1 in facts.fits):
        bad = bad | {blamed: "it was the cause of failure after failure"}
    spares = [name for name in state.spares if name not in state.evicted]
    members: list[str] = []
    for name in state.members:
        if name not in bad:
            members.append(name)
        elif spares:
            members.append(spares.pop(0))
    evictions = [Evict(name, why) for name, why in bad.items()]
    evicted = {**state.evicted, **bad}
    tried = 0 if bad else state.tried
    state = replace(state, members=tuple(members), spares=tuple(spares), evicted=evicted, tried=tried)
    if len(members) not in facts.fits:
        why = "; ".join(f"{name}: {text}" for name, text in bad.items())
        text = f"{len(members)} nodes are left, with which the layout does not work ({why})"
        return _ended(
            state, 1, f"{text}\n  next:  the same command on sound nodes goes on; --spares K keeps some ready"
        )
    state, actions = _start(state, now)
    return state, [*evictions, *actions]


def _blamed(state: State, rules: Rules) -> str | None:
    """The node that the newest incident is the fault of, where it is so too often; a slow one at once."""
    cause = state.incidents[-1]
    times = sum(one.node == cause.node for one in state.incidents)
    return cause.node if cause.node is not None and (times >= rules.blames or cause.kind == "slow") else None


def _start(state: State, now: float) -> Answer:
    state = replace(state, phase=RUN, since=now, attempt=state.attempt + 1, slow=None)
    return _ordered(state, "start")


def _ended(state: State, code: int, text: str = "") -> Answer:
    state, actions = _ordered(replace(state, phase=OVER, incident=None), "end")
    return state, [*actions, End(code, text)]


def _ordered(state: State, do: str, **more: Any) -> Answer:
    """The next order, to the members of the run unless it names others."""
    state = replace(state, order=state.order + 1)
    order = Order(
        **{"nodes": state.members, **more},
        number=state.order,
        do=do,
        attempt=state.attempt,
        evicted=tuple(state.evicted),
    )
    return replace(state, given=order), [Do(order)]
