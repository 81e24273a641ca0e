"""Attention over the ranks of cp on a clock: rounds of sends beside products, on links that are given.

The rounds are those of `parallel/context.py` and `parallel/ring.py`, their bytes those that the counted door is held
against (`parallel/traffic.py`). A rank begins a round when its last one is over; a message leaves when both of its ends
have begun the round, and takes

    latency + the longest of  bytes on a line / line,  bytes of a sender / port,  bytes of a receiver / port

where all messages of the round on that line, or of that rank, count. So a full mesh, a switch, a ring of lines and
links that send one way at a time differ by numbers only, and so do engines.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from lmworks.parallel.layout import Layout
from lmworks.parallel.sight import places
from lmworks.parallel.traffic import Ways, of_context

FORWARD, BACKWARD = 4, 10
"""FLOPs of a query, a key and a value of a head: two products forward; five backward, where scores are made again."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the ranks of cp."""

    line: float
    """Bytes per second from one rank to one other, one way."""
    port: float = math.inf
    """Bytes per second that a rank sends in all, and that it receives in all. Infinite: each line has its own wires."""
    latency: float = 0.0
    """Seconds from the last byte sent to its arrival."""
    both_ways: bool = True
    """Whether a line and a port carry both ways at once; else both ways share them."""
    neighbours_only: bool = False
    """Lines join neighbours of a ring only: what goes k ranks on crosses k lines."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Attention of one block on the ranks of cp."""

    engine: Literal["all-gather", "ring", "tokenring", "ulysses"]
    order: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    ranks: int
    rows: int = 1
    sequence: int
    """Tokens of a row, over all ranks."""
    heads: int
    groups: int
    head_dim: int
    value_bytes: int = 2
    rate: float
    """FLOP/s of attention on one rank."""

    @property
    def ways(self) -> Ways:
        """Bytes of a token in each of the ranks - 1 times that it is sent: there and back, forward and backward."""
        layout = Layout(cp=self.ranks, dp_shard=1, context=self.engine, order=self.order)
        whole = of_context(layout, self.heads, self.groups, self.head_dim, value_bytes=self.value_bytes)
        times = max(1, self.ranks - 1)
        there, back = ((forth / times, home / times) for forth, home in (whole.forward, whole.backward))
        return Ways(forward=there, backward=back)

    @property
    def tokens(self) -> int:
        """Of one rank."""
        return self.rows * self.sequence // self.ranks

    def seconds(self, pairs: float, flops: int) -> float:
        """Of so many pairs of a query and a key that it sees, in every row and head."""
        return pairs * self.rows * self.heads * self.head_dim * flops / self.rate

    def pairs(self) -> list[list[int]]:
        """[asking][asked]: pairs of a query of one rank and a key of one that it sees, in a causal row."""
        return _pairs(self.order, self.sequence, self.ranks)


@lru_cache(maxsize=64)
def _pairs(order: Literal["zigzag", "contiguous", "striped"], sequence: int, ranks: int) -> list[list[int]]:
    by_rank = [places(order, sequence, ranks, rank).numpy() for rank in range(ranks)]
    return [[int(np.searchsorted(keys, own, side="right").sum()) for keys in by_rank] for own in by_rank]


@dataclass(frozen=True)
class Message:
    """Bytes from one rank to another."""

    source: int
    target: int
    size: float


@dataclass(frozen=True)
class Round:
    """What ranks do beside each other: seconds that each computes, and what is sent meanwhile."""

    compute: tuple[float, ...]
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A pass of all rounds."""

    seconds: float
    """Until the last rank is done."""
    busy: tuple[float, ...]
    """Seconds that each rank computes."""
    rounds: tuple[float, ...]
    """Seconds of each round on the rank that takes longest over it."""

    @property
    def exposed(self) -> float:
        """Seconds that the busiest rank waits."""
        return self.seconds - max(self.busy)


def forward(calls: Calls, links: Links) -> Clock:
    """The forward pass of one block's attention."""
    return run(forward_rounds(calls), links)


def backward(calls: Calls, links: Links) -> Clock:
    """Its backward pass."""
    return run(backward_rounds(calls), links)


def forward_rounds(calls: Calls) -> list[Round]:
    """What ranks do in each round of a forward pass."""
    return list(_rounds(calls, FORWARD, calls.ways.forward, 0.0))


def backward_rounds(calls: Calls) -> list[Round]:
    """The same of a backward pass."""
    ways = calls.ways
    if calls.engine == "ring":  # keys and values as before; their gradients follow two rounds later
        first = ways.forward[0]
        return list(_rounds(calls, BACKWARD, (first, 0.0), ways.backward[0] - first))
    return list(_rounds(calls, BACKWARD, ways.backward, 0.0))


def run(rounds: Sequence[Round], links: Links) -> Clock:
    """Rounds on the clock. Ranks go on by themselves: one that is late holds up those it sends to, and no others."""
    ranks = len(rounds[0].compute)
    begin, longest = [0.0] * ranks, []
    for each in rounds:
        took = _times(each.messages, links)
        end = [start + compute for start, compute in zip(begin, each.compute, strict=True)]
        for message, seconds in zip(each.messages, took, strict=True):
            arrival = max(begin[message.source], begin[message.target]) + seconds
            for rank in (message.source, message.target):
                end[rank] = max(end[rank], arrival)
        longest.append(max(after - before for after, before in zip(end, begin, strict=True)))
        begin = end
    busy = tuple(sum(each.compute[rank] for each in rounds) for rank in range(ranks))
    return Clock(seconds=max(begin), busy=busy, rounds=tuple(longest))


def _times(messages: Sequence[Message], links: Links) -> list[float]:
    """Seconds of each message of a round."""
    ranks = 1 + max((max(m.source, m.target) for m in messages), default=0)
    on_line: dict[tuple[int, int], float] = defaultdict(float)
    out: dict[tuple[str, int], float] = defaultdict(float)
    ways = [list(_way(message, ranks, links)) for message in messages]
    for message, way in zip(messages, ways, strict=True):
        for line in way:
            on_line[line] += message.size
        out["send", message.source] += message.size
        out["receive" if links.both_ways else "send", message.target] += message.size
    found = []
    for message, way in zip(messages, ways, strict=True):
        sent = out["send", message.source]
        received = out["receive" if links.both_ways else "send", message.target]
        fullest = max(on_line[line] for line in way)
        found.append(links.latency + max(fullest / links.line, max(sent, received) / links.port))
    return found


def _way(message: Message, ranks: int, links: Links) -> Iterator[tuple[int, int]]:
    """The lines that a message crosses."""
    stops = [message.source, message.target]
    if links.neighbours_only:
        ahead = (message.target - message.source) % ranks
        step, hops = (1, ahead) if ahead <= ranks - ahead else (-1, ranks - ahead)
        stops = [(message.source + step * hop) % ranks for hop in range(hops + 1)]
    for a, b in pairwise(stops):
        yield (a, b) if links.both_ways else (min(a, b), max(a, b))


# --- the engines ------------------------------------------------------------------------------------------------------


def _rounds(calls: Calls, flops: int, ways: tuple[float, float], follow: float) -> Iterator[Round]:
    """The rounds of a pass. `ways`: bytes of a token forth and back, `follow`: forth behind the goods."""
    if calls.engine in ("ring", "tokenring"):
        yield from _going_round(calls, flops, ways, follow)
    elif calls.engine == "ulysses":
        yield from _over_heads(calls, flops, ways[0])
    else:
        collective = [Round((0.0,) * calls.ranks, tuple(_next(calls, ways[0])))] * (calls.ranks - 1)
        work = Round(tuple(calls.seconds(sum(row), flops) for row in calls.pairs()))
        yield from [*collective, work] if flops == FORWARD else [work, *collective]


def _going_round(calls: Calls, flops: int, ways: tuple[float, float], follow: float) -> Iterator[Round]:
    n, pairs = calls.ranks, calls.pairs()
    forth, back = ways
    for step in range(n + 1 if back or follow else n):
        messages: list[Message] = []
        if step < n - 1:
            messages += _next(calls, forth)
        if step >= 2 and follow:
            messages += _next(calls, follow)
        if step >= 2 and back:
            messages += [Message(rank, (rank + 1 - step) % n, back * calls.tokens) for rank in range(n)]
        compute = [0.0] * n
        for rank in range(n if step < n else 0):
            other = (rank - step) % n
            asking, asked = (rank, other) if calls.engine == "ring" else (other, rank)
            compute[rank] = calls.seconds(pairs[asking][asked], flops)
        yield Round(tuple(compute), tuple(messages))


def _next(calls: Calls, size: float) -> list[Message]:
    """Every rank to the one behind it."""
    return [Message(rank, (rank + 1) % calls.ranks, size * calls.tokens) for rank in range(calls.ranks)]


def _over_heads(calls: Calls, flops: int, size: float) -> Iterator[Round]:
    """All-to-all, whole rows with some heads, all-to-all; `size`: bytes of a token to each other rank, both together.

    Backward the results' gradients come first, and those of queries, keys and values go home.
    """
    n = calls.ranks
    result = calls.heads * calls.head_dim * calls.value_bytes / n
    first, second = (size - result, result) if flops == FORWARD else (result, size - result)
    seen = sum(sum(row) for row in calls.pairs()) / n
    yield Round((0.0,) * n, _to_all(calls, first))
    yield Round((calls.seconds(seen, flops),) * n)
    yield Round((0.0,) * n, _to_all(calls, second))


def _to_all(calls: Calls, size: float) -> tuple[Message, ...]:
    ranks = range(calls.ranks)
    return tuple(Message(a, b, size * calls.tokens) for a in ranks for b in ranks if a != b)
