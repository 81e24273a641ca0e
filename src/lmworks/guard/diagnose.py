"""What is wrong with a run, and whose fault it is: rules over what agents report. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lmworks.guard.report import RankSeen, Report
from lmworks.parallel.failure import STOPPED, Failure

FINAL = (2, STOPPED)
"""Exit codes of ranks after which another attempt would end the same way, or is not wanted."""


SEEN = ("lost", "silent", "hang", "slow")
"""Kinds that nobody tells: they are seen from outside."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When something counts as wrong. Seconds, by the clock of whoever looks."""

    missed: float = 15.0
    """Without a heart-beat, of a rank or of an agent, that is borne."""
    begins: float = 300.0
    """The same before the first one."""
    still: float = 60.0
    """In which no rank does anything new, at least; or `still_steps` steps, where that is longer."""
    still_steps: float = 10.0
    still_before: float = 5.0
    """How much longer that is before the second step: checkpoints are read, models built and compiled."""
    tries: int = 3
    """Failures in a row without a new checkpoint, after which the run is given up."""
    blames: int = 2
    """Failures that one node causes, after which it is evicted although its self-check is good."""
    grace: float = 120.0
    """That ranks have to save and stop."""
    evict_slow: bool = False
    """Whether a node with a slow rank is evicted, or only told of."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that went wrong."""

    kind: str
    """lost (a node), silent (a rank that runs, without a beat), hang, slow, killed, nan, damaged, failed."""
    text: str
    """For people."""
    node: str | None = None
    """The culprit, where one is known."""
    rank: int | None = None
    step: int | None = None
    exit_code: int = 1
    saved: int | None = None
    """The step of the newest complete checkpoint at that time."""


def diagnose(reports: Sequence[Report], quiet: Mapping[str, float], rules: Rules) -> Incident | None:
    """What is wrong, by the surest sign first: an error, a node without a word, a rank without a beat, no progress.

    `quiet`: nodes that have not told anything for too long, and for how many seconds.
    """
    if any(report.failure is not None for report in reports):
        return told_by_ranks(None, reports)
    for report in reports:
        if report.doing == "ended" and not report.is_done:
            return Incident(kind="failed", node=report.node, text=f"the ranks of {report.node} ended without a word")
    for name, seconds in quiet.items():
        return Incident(kind="lost", node=name, text=f"nothing was heard of {name} for {seconds:.0f} s")
    running = [(report, rank) for report in reports for rank in report.ranks if rank.code is None]
    for report, rank in running:
        if rank.quiet > (rules.missed if rank.began and not rank.over else rules.begins):
            return _silent(report, rank)
    return _still(running, rules)


def _silent(report: Report, rank: RankSeen) -> Incident:
    since = "since its last heart-beat" if rank.began else "since it was started, without a heart-beat"
    at = f" in step {rank.step}" if rank.step is not None else ""
    text = f"rank {rank.rank} ({report.node}) is silent{at}: {rank.quiet:.0f} s {since}, and its process is there"
    return Incident(kind="silent", node=report.node, rank=rank.rank, step=rank.step, text=text)


def _still(running: Sequence[tuple[Report, RankSeen]], rules: Rules) -> Incident | None:
    """Nobody does anything new: all wait, or are stuck."""
    paces = [rank.pace for _, rank in running if rank.pace is not None]
    limit = max(rules.still, rules.still_steps * median(paces)) if paces else rules.still_before * rules.still
    if not running or any(not rank.began or rank.over or rank.still <= limit for _, rank in running):
        return None
    found = suspect([rank for _, rank in running])
    seconds = min(rank.still for _, rank in running)
    text = f"hang: no rank did anything new for {seconds:.0f} s"
    if found is None:
        return Incident(kind="hang", text=f"{text}; all wait for each other", step=running[0][1].step)
    node = next(report.node for report, rank in running if rank is found)
    where = "did not come to the exchange that the others wait in" if not found.waits else "is behind the others"
    text += f"; rank {found.rank} ({node}) {where}: {' > '.join(found.stack[-3:])}"
    return Incident(kind="hang", node=node, rank=found.rank, step=found.step, text=text)


def suspect(ranks: Sequence[RankSeen]) -> RankSeen | None:
    """The rank that the others wait for: the one that does not wait itself, otherwise the one that is behind.

    None where several of equal standing could be it.
    """
    outside = [rank for rank in ranks if not rank.waits]
    if len(outside) == 1:
        return outside[0]
    among = outside or list(ranks)
    behind: tuple[Callable[[RankSeen], int], ...] = (lambda rank: rank.step or 0, lambda rank: rank.calls)
    for reached in behind:
        least = min(reached(rank) for rank in among)
        found = [rank for rank in among if reached(rank) == least]
        if len(found) == 1 and len(among) > 1:
            return found[0]
    return None


def told_by_ranks(incident: Incident | None, reports: Sequence[Report]) -> Incident | None:
    """The incident in the words of the rank that failed first, where ranks failed by themselves.

    What ranks say after a hang or the loss of a node is its consequence. A rank that vanished without a word is the
    cause of what its peers on other nodes say; otherwise the earliest error counts, by the clocks of the nodes.
    """
    if incident is not None and incident.kind in SEEN:
        return incident
    failures = [(report, report.failure) for report in reports if report.failure is not None]
    if not failures:
        return incident
    real = [pair for pair in failures if pair[1].exit_code != STOPPED] or failures
    report, failure = min(real, key=lambda pair: (bool(pair[1].kind), pair[1].exit_code not in FINAL, pair[1].time))
    kind = _kind(failure)
    text = str(failure.error())
    found = Incident(
        kind=kind, node=report.node, rank=failure.rank, step=failure.step, exit_code=failure.exit_code, text=text
    )
    # a wrong recipe, a number that is not one, a file that is damaged or cannot be written: the node is not to blame
    return replace(found, node=None) if kind in ("nan", "damaged", "unsaved") or failure.exit_code in FINAL else found


def _kind(failure: Failure) -> str:
    if failure.kind == "NonFinite":
        return "nan"
    if failure.kind == "CheckpointError":
        return "unsaved" if "could not be written" in failure.message else "damaged"
    return "failed" if failure.kind else "killed"
