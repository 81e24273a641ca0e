"""The planner of attention: which queries leave a rank that has too many pairs, and for where.

Query i of a document sees i + 1 keys, so queries i and L - 1 - i of a document of L tokens see L + 1 together. The rows
of a document that lie on one rank with their mirrored ones make an item of such couples, [first, last) and its mirror
image: what it costs is linear in its couples. The middle row of an odd length is its own mirror image and costs half.
Rows without their mirrored ones (a document over several ranks of cp) make an item by themselves.

From a rank above the mean, items go to ranks below it, the emptiest first, the one with the most pairs per byte first;
what lies there already is not sent and not counted. Of an item that is too large the couples nearest to the middle go:
they are one run, and see the fewest keys. Everything is whole numbers and fixed orders: every rank finds the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lmworks.core.errors import UsageError
from lmworks.parallel.tasks import Piece, Plan, Sizes, arranged, pairs, plain

LADDER = tuple(step / 20 for step in range(1, 21))
"""Tolerances that are tried where the exchange does not fit: 0.05, 0.1, ... 1."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """Queries of one document that one rank is to compute, and that may be cut."""

    document: int
    length: int
    """Tokens of the whole document."""
    first: int
    last: int
    """Rows [first, last), and with `mirrored` their mirror image as well; last is then at most half the length, the
    middle row included."""
    mirrored: bool
    server: int

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Its rows, as runs [start, stop)."""
        if not self.mirrored:
            return ((self.first, self.last),)
        if self.through:
            return ((self.first, self.length - self.first),)
        return (self.first, self.last), (self.length - self.last, self.length - self.first)

    @property
    def through(self) -> bool:
        """Whether it is one run through the middle of its document."""
        return self.mirrored and 2 * self.last >= self.length

    @property
    def pairs(self) -> int:
        """Its cost."""
        return sum(pairs(*run) for run in self.runs)

    def smallest(self, tile: int) -> int:
        """The fewest rows (couples) that may be cut off: a tile of queries in each run; the whole item where less than
        a tile would be left."""
        unit = -(-tile // 2) if self.through else tile
        whole = self.last - self.first
        return unit if whole >= unit + tile else whole

    def cut(self, number: int, late: bool = True) -> tuple[Item, Item | None]:
        """`number` rows (couples) from its end, which of couples is the middle, or from its start; and the rest."""
        if number == self.last - self.first:
            return self, None
        if late:
            edge = self.last - number
            return replace(self, first=edge), replace(self, last=edge)
        edge = self.first + number
        return replace(self, last=edge), replace(self, first=edge)

    def most(self, limit: int, late: bool) -> int:
        """The most rows (couples) that `cut` can take for at most `limit` pairs."""
        if self.mirrored:
            half = self.through and self.length % 2  # the first couple is the middle row alone
            return min(self.last - self.first, (limit + half * (self.length + 1) // 2) // (self.length + 1))
        if limit >= self.pairs:
            return self.last - self.first
        if late:  # n stop - n (n - 1) / 2 <= limit, the smaller root
            side = 2 * self.last + 1
            return (side - math.isqrt(side * side - 8 * limit - 1) - 1) // 2
        side = 2 * self.first + 1  # n first + n (n + 1) / 2 <= limit
        return (math.isqrt(side * side + 8 * limit) - side) // 2


class Offer(NamedTuple):
    """What a rank may be given."""

    worth: float
    """Pairs per byte."""
    pairs: int
    item: Item
    given: Item
    left: Item | None


def balance(
    pieces: Iterable[Piece],
    ranks: int,
    *,
    sizes: Sizes,
    tolerance: float = 0.1,
    tile: int = 128,
    buffer_bytes: int | None = None,
) -> Plan:
    """The plan of a micro-batch whose largest load is at most (1 + tolerance) of the mean, or says why it is not.

    `tile`: queries of a shard are a multiple of it in documents that are long enough; shorter ones stay whole.
    `buffer_bytes`: what a rank can send or receive in one exchange. Where that is too little the tolerance is raised,
    and the plan's reason names what would be needed; at the end nothing moves. Raises UsageError where even that does
    not fit, because documents lie over several ranks.
    """
    pieces = tuple(sorted(pieces))
    made = _balanced(pieces, ranks, sizes, tolerance, tile)
    needed = made.buffer_bytes(sizes)
    if buffer_bytes is None or needed <= buffer_bytes:
        return made
    told = f"the exchange needs {needed} bytes, and the buffer has {buffer_bytes}"
    for raised in (step for step in LADDER if step > tolerance):
        made = _balanced(pieces, ranks, sizes, raised, tile)
        if made.buffer_bytes(sizes) <= buffer_bytes:
            why = f"{told}: a tolerance of {raised:g} instead of {tolerance:g} fits"
            return replace(made, reason="; ".join(filter(None, (why, made.reason))))
    made = plain(pieces, ranks)
    if made.buffer_bytes(sizes) > buffer_bytes:
        least = made.buffer_bytes(sizes)
        raise UsageError(
            f"{told}; {least} where every rank computes its own queries",
            where="layout.servers.buffer_bytes",
            legal=f"a buffer of {least} bytes or more, {needed} for balance",
        )
    return replace(made, tolerance=tolerance, reason=f"{told}: nothing moves")


def _balanced(pieces: tuple[Piece, ...], ranks: int, sizes: Sizes, tolerance: float, tile: int) -> Plan:
    state = _State(pieces, ranks, sizes, tolerance, tile)
    while state.over and state.give():
        pass
    while state.over and state.round_up():
        pass
    tasks = [(item.document, *run, item.server) for items in state.items for item in items for run in item.runs]
    return arranged(pieces, tasks, ranks, tolerance=tolerance, reason=state.reason())


class _State:
    """Loads and items while they are balanced."""

    def __init__(self, pieces: Sequence[Piece], ranks: int, sizes: Sizes, tolerance: float, tile: int) -> None:
        self.sizes, self.tile = sizes, tile
        self.lengths = plain(pieces, ranks).lengths
        self.pieces: dict[int, list[Piece]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.document, []).append(piece)
        self.items: list[list[Item]] = [[] for _ in range(ranks)]
        self.known: dict[tuple[int, int], int] = {}
        """Keys that a server needs, or once needed, of a document, from the first on: by (server, document)."""
        for document, own in self.pieces.items():
            for item in _items(document, self.lengths[document], own):
                self._put(item)
        self.loads = [sum(item.pairs for item in items) for items in self.items]
        self.mean = -(-sum(self.loads) // ranks)
        self.limit = max(self.mean, math.floor((1 + tolerance) * sum(self.loads) / ranks))

    @property
    def over(self) -> bool:
        """Whether some load exceeds the tolerance."""
        return max(self.loads) > self.limit

    def give(self) -> bool:
        """One move from a rank over the tolerance to one below the mean, neither past the mean; False if there is
        none."""
        givers = [rank for rank, load in enumerate(self.loads) if load > self.limit]
        takers = sorted((rank for rank, load in enumerate(self.loads) if load < self.mean), key=self._emptiest)
        for taker in takers:
            need = self.mean - self.loads[taker]
            offers = (
                offer
                for giver in givers
                for item in self.items[giver]
                for offer in self._offers(item, taker, min(need, self.loads[giver] - self.mean))
            )
            if self._best(offers, taker):
                return True
        return False

    def round_up(self) -> bool:
        """One smallest shard from the fullest rank to the emptiest, where that makes the larger load smaller."""
        giver = max(range(len(self.loads)), key=lambda rank: (self.loads[rank], -rank))
        taker = min(range(len(self.loads)), key=self._emptiest)
        gap = self.loads[giver] - self.loads[taker]
        offers = (offer for item in self.items[giver] for offer in self._smallest(item, taker) if offer.pairs < gap)
        return self._best(offers, taker)

    def reason(self) -> str | None:
        """Why a load is over the tolerance."""
        if not self.over:
            return None
        fullest = max(range(len(self.loads)), key=lambda rank: (self.loads[rank], -rank))
        excess = 100 * (self.loads[fullest] / self.mean - 1)
        least = min(offer.pairs for item in self.items[fullest] for offer in self._smallest(item, fullest))
        text = f"rank {fullest} has {excess:.3g} % more than the mean, and the smallest shard that it could give"
        return f"{text} has {100 * least / self.mean:.3g} % of it (tile = {self.tile})"

    def _emptiest(self, rank: int) -> tuple[int, int]:
        return self.loads[rank], rank

    def _offers(self, item: Item, taker: int, limit: int) -> Iterator[Offer]:
        """The largest parts of an item within the limit."""
        unit, size = item.smallest(self.tile), item.last - item.first
        for late in (True,) if item.mirrored else (True, False):
            number = item.most(limit, late)
            if number < size:
                number = min(number, size - self.tile) // unit * unit
            if number > 0:
                yield self._offer(item, number, late, taker)

    def _smallest(self, item: Item, taker: int) -> Iterator[Offer]:
        """The smallest parts of an item."""
        for late in (True,) if item.mirrored else (True, False):
            yield self._offer(item, item.smallest(self.tile), late, taker)

    def _offer(self, item: Item, number: int, late: bool, taker: int) -> Offer:
        given, left = item.cut(number, late)
        cost, own = given.pairs, self.pieces[item.document]
        queries = sum(_elsewhere(own, start, stop, taker) for start, stop in given.runs)
        keys = _elsewhere(own, self.known.get((taker, item.document), 0), given.runs[-1][1], taker)
        sent = queries * (self.sizes.query + self.sizes.found) + keys * self.sizes.keys
        return Offer(cost / sent if sent else math.inf, cost, item, given, left)

    def _best(self, offers: Iterable[Offer], taker: int) -> bool:
        """Do what is worth most; between equals the larger, then the earlier document and row. False without any."""
        best = max(offers, key=lambda o: (o.worth, o.pairs, -o.given.document, -o.given.first), default=None)
        if best is None:
            return False
        self.items[best.item.server].remove(best.item)
        self.loads[best.item.server] -= best.pairs
        self.loads[taker] += best.pairs
        self._put(replace(best.given, server=taker))
        if best.left is not None:
            self._put(best.left)
        return True

    def _put(self, item: Item) -> None:
        self.items[item.server].append(item)
        at = (item.server, item.document)
        self.known[at] = max(self.known.get(at, 0), item.runs[-1][1])


def _items(document: int, length: int, pieces: Sequence[Piece]) -> Iterator[Item]:
    """A document's rows on each rank: those with their mirrored ones as couples, the others by themselves."""
    for rank in sorted({piece.rank for piece in pieces}):
        own = [(piece.start, piece.stop) for piece in pieces if piece.rank == rank]
        image = [(length - stop, length - start) for start, stop in reversed(own)]
        half = [(0, (length + 1) // 2)]
        both = _common(own, image)
        for mirrored, runs in ((True, _common(both, half)), (False, _common(own, _between(both, length)))):
            for first, last in _joined(runs):
                yield Item(document=document, length=length, first=first, last=last, mirrored=mirrored, server=rank)


def _common(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two lists of rising runs share."""
    shared, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < stop:
            shared.append((start, stop))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return shared


def _between(runs: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What rising runs leave of [0, length)."""
    edges = [0, *(edge for run in runs for edge in run), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rising runs with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _elsewhere(pieces: Sequence[Piece], start: int, stop: int, rank: int) -> int:
    """Tokens of [start, stop) that lie on other ranks."""
    return sum(max(0, min(stop, piece.stop) - max(start, piece.start)) for piece in pieces if piece.rank != rank)
