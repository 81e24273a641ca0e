"""Which rank is slow: the one that is busy longer than its peers in every step, while they wait for it.

In a gang all steps last equally long; what differs is how much of them a rank spends outside exchanges. Ranks of one
stage of a pipeline do the same work and are compared; a rank must stand out in most of the last rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from lmworks.guard.report import RankSeen

WINDOW = 6
"""Steps of a round."""
SHARE = 0.25
"""How much longer than its peers' median a slow rank is busy."""
LEAST = 0.5
"""By how many seconds of a round at least: ten looks of its heart, or quick steps would be told apart by chance."""
ROUNDS, FLAGS = 3, 2
"""Of so many rounds a slow rank stands out in so many."""


@dataclass
class Stragglers:
    """Looks at ranks again and again."""

    _begun: dict[int, RankSeen] = field(default_factory=dict)
    _flags: list[int | None] = field(default_factory=list)

    def forget(self) -> None:
        """A new attempt begins."""
        self._begun, self._flags = {}, []

    def look(self, ranks: Sequence[RankSeen]) -> int | None:
        """A rank that is slow now, if any."""
        now = {rank.rank: rank for rank in ranks if rank.step is not None}
        if len(now) < 2 or set(now) != set(self._begun):
            self._begun = now
            return None
        steps = {rank: (seen.step or 0) - (self._begun[rank].step or 0) for rank, seen in now.items()}
        if min(steps.values()) >= WINDOW:
            per_step = {rank: (seen.busy - self._begun[rank].busy) / steps[rank] for rank, seen in now.items()}
            stages = {rank: seen.stage for rank, seen in now.items()}
            self._flags = [*self._flags, slowest(per_step, stages, least=LEAST / min(steps.values()))][-ROUNDS:]
            self._begun = now
        named = [rank for rank in self._flags if rank is not None]
        return next((rank for rank in named if named.count(rank) >= FLAGS), None)


def slowest(busy: dict[int, float], stages: dict[int, int], *, least: float = 0.0) -> int | None:
    """The rank that is busy longest of those that stand out from the others of their stage, by `least` or more.

    `busy` and `least`: seconds a step.
    """
    found = []
    for rank, seconds in busy.items():
        peers = [busy[other] for other in busy if other != rank and stages[other] == stages[rank]]
        if not peers:
            continue
        usual = median(peers)
        if seconds > (1 + SHARE) * usual and seconds - usual >= least:
            found.append((seconds - usual, rank))
    return max(found)[1] if found else None
