"""Core attention as tasks: where the tokens of documents lie, and which rank computes which queries.

softmax(q k^T) v has no weights, so any rank may compute it. A task is a run of queries of one document, with all keys
up to its last query. A plan gives every query of a micro-batch to one task; what must travel for that follows from the
plan and from where the tokens lie, alike on every rank.

    pieces      tokens of documents by the rank that holds them
    tasks       queries of documents by the rank that computes them, its server
    moves       what a server needs, by the rank that holds it; from itself too, which sends nothing

Ranks are places in the pool that shares its attention: 0, 1, ... The cost of a task is its number of (query, key)
pairs: exact whole numbers, the same in sum for every plan. No torch here, and no process.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import NamedTuple, final

from lmworks.core.errors import UsageError


class Piece(NamedTuple):
    """Tokens [start, stop) of a document, on one rank."""

    document: int
    """Any number that no other document of the micro-batch has, on any rank."""
    start: int
    stop: int
    rank: int
    offset: int
    """Where token `start` is among the rank's tokens, rows behind each other; the others follow it."""


class Task(NamedTuple):
    """Queries [start, stop) of a document on its keys [0, stop): query i sees keys 0 to i."""

    document: int
    start: int
    stop: int
    server: int

    @property
    def pairs(self) -> int:
        """Its cost, in pairs of a query and a key."""
        return pairs(self.start, self.stop)


class Move(NamedTuple):
    """Tokens [start, stop) of a document that a server needs from the rank that holds them."""

    document: int
    start: int
    stop: int
    source: int
    offset: int
    """Where token `start` is among the source's tokens."""
    server: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of one token of one rank, its heads of all that tp divides."""

    query: int
    """Its queries."""
    keys: int
    """Its keys and values."""
    found: int
    """What comes back: out, and lse where it is sent."""

    @classmethod
    def of(cls, heads: int, groups: int, head_dim: int, value_bytes: int) -> Sizes:
        """By the heads of a block; lse in float32."""
        row = heads * head_dim * value_bytes
        return cls(query=row, keys=2 * groups * head_dim * value_bytes, found=row + 4 * heads)


def pairs(start: int, stop: int) -> int:
    """Pairs of a query in [start, stop) and a key that it sees: q kv - q (q - 1) / 2 with q queries and kv keys."""
    queries = stop - start
    return queries * stop - queries * (queries - 1) // 2


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tasks for all queries of the pool. Raises UsageError where a query is left out, doubled or not there."""

    ranks: int
    """Ranks of the pool, some perhaps without tokens or without tasks."""
    pieces: tuple[Piece, ...]
    tasks: tuple[Task, ...]
    """By server, then document, then first query."""
    tolerance: float = 0.0
    """By how much the largest load was allowed to exceed the mean."""
    reason: str | None = None
    """Why a load exceeds the tolerance, or why the tolerance is not the one that was asked for."""

    def __post_init__(self) -> None:
        wrong = next(self._wrong(), None)
        if wrong is not None:
            legal = "every document's tokens lie on one rank each, and every query belongs to one task"
            raise UsageError(wrong, where=f"plan of attention for {self.ranks} ranks", legal=legal)

    def _wrong(self) -> Iterator[str]:
        for rank in (*(piece.rank for piece in self.pieces), *(task.server for task in self.tasks)):
            if not 0 <= rank < self.ranks:
                yield f"there is no rank {rank}"
        held, done = _runs(self.pieces), _runs(self.tasks)
        yield from _gaps(held, "held", {document: runs[-1][1] for document, runs in held.items()})
        yield from _gaps(done, "computed", self.lengths)
        for document in self.lengths.keys() ^ done.keys():
            yield f"document {document} has {'no task' if document in self.lengths else 'tasks, and no tokens'}"

    @cached_property
    def lengths(self) -> dict[int, int]:
        """Tokens of each document."""
        found: dict[int, int] = {}
        for piece in self.pieces:
            found[piece.document] = max(found.get(piece.document, 0), piece.stop)
        return found

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Pairs that each rank computes."""
        loads = [0] * self.ranks
        for task in self.tasks:
            loads[task.server] += task.pairs
        return tuple(loads)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean one; 1 where there is nothing to compute."""
        return max(self.loads) * self.ranks / sum(self.loads) if any(self.loads) else 1.0

    @cached_property
    def query_moves(self) -> tuple[Move, ...]:
        """The queries of every task, from where they lie; in the order of the tasks."""
        by_document = _by_document(self.pieces)
        return tuple(
            move for task in self.tasks for move in _cut(by_document[task.document], task.start, task.stop, task.server)
        )

    @cached_property
    def key_moves(self) -> tuple[Move, ...]:
        """The keys [0, last) of every document that a server needs, once each however many tasks use them.

        By server, then document, then key."""
        by_document = _by_document(self.pieces)
        return tuple(
            move
            for (server, document), last in self.last_keys.items()
            for move in _cut(by_document[document], 0, last, server)
        )

    @cached_property
    def last_keys(self) -> dict[tuple[int, int], int]:
        """Keys that a server needs of a document, from its first on: by (server, document), in that order."""
        found: dict[tuple[int, int], int] = {}
        for task in self.tasks:
            at = (task.server, task.document)
            found[at] = max(found.get(at, 0), task.stop)
        return found

    @cached_property
    def sent_queries(self) -> tuple[tuple[int, ...], ...]:
        """Queries that go from rank i to rank j, [i][j]; out and lse of as many come back. 0 from a rank to itself."""
        return _sent(self.query_moves, self.ranks)

    @cached_property
    def sent_keys(self) -> tuple[tuple[int, ...], ...]:
        """Tokens whose keys and values go from rank i to rank j, [i][j]; as many gradients come back."""
        return _sent(self.key_moves, self.ranks)

    def dispatch_bytes(self, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
        """Bytes of the exchange before attention, from rank i to rank j."""
        return tuple(
            tuple(q * sizes.query + k * sizes.keys for q, k in zip(*rows, strict=True))
            for rows in zip(self.sent_queries, self.sent_keys, strict=True)
        )

    def moved_bytes(self, sizes: Sizes) -> int:
        """Bytes that all ranks send in a forward pass of one block: queries, keys and values, and what comes back."""
        queries = sum(map(sum, self.sent_queries))
        return queries * (sizes.query + sizes.found) + sum(map(sum, self.sent_keys)) * sizes.keys

    def buffer_bytes(self, sizes: Sizes) -> int:
        """The most bytes that a rank sends or receives in one exchange: before attention, or with what it found."""
        there = self.dispatch_bytes(sizes)
        back = tuple(tuple(q * sizes.found for q in row) for row in self.sent_queries)
        return max(max(*map(sum, sent), *map(sum, zip(*sent, strict=True))) for sent in (there, back))

    @cached_property
    def digest(self) -> str:
        """The same on two ranks exactly when their plans are the same."""
        return hashlib.sha256(repr((self.ranks, self.pieces, self.tasks)).encode()).hexdigest()


def plain(pieces: Iterable[Piece], ranks: int) -> Plan:
    """Every rank computes the queries that it holds."""
    tasks = ((piece.document, piece.start, piece.stop, piece.rank) for piece in pieces)
    return arranged(pieces, tasks, ranks)


def arranged(
    pieces: Iterable[Piece],
    tasks: Iterable[tuple[int, int, int, int]],
    ranks: int,
    *,
    tolerance: float = 0.0,
    reason: str | None = None,
) -> Plan:
    """A plan of (document, start, stop, server), with runs that follow each other on one server made one task."""
    joined: list[Task] = []
    for document, start, stop, server in sorted(tasks, key=lambda task: (task[3], *task[:3])):
        last = joined[-1] if joined else None
        if last is not None and (last.server, last.document, last.stop) == (server, document, start):
            joined[-1] = last._replace(stop=stop)
        else:
            joined.append(Task(document, start, stop, server))
    return Plan(ranks=ranks, pieces=tuple(sorted(pieces)), tasks=tuple(joined), tolerance=tolerance, reason=reason)


def _by_document(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    """Pieces of each document, in the order of its tokens."""
    return {document: list(own) for document, own in groupby(sorted(pieces), key=lambda piece: piece.document)}


def _cut(pieces: Sequence[Piece], start: int, stop: int, server: int) -> Iterator[Move]:
    """Tokens [start, stop) by the pieces of their document, which are in order."""
    for piece in islice(pieces, bisect_right(pieces, start, key=lambda piece: piece.stop), None):
        if piece.start >= stop:
            return
        first, last = max(start, piece.start), min(stop, piece.stop)
        yield Move(piece.document, first, last, piece.rank, piece.offset + first - piece.start, server)


def _sent(moves: Iterable[Move], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Tokens from rank to rank, without those that are there."""
    found = [[0] * ranks for _ in range(ranks)]
    for move in moves:
        if move.source != move.server:
            found[move.source][move.server] += move.stop - move.start
    return tuple(tuple(row) for row in found)


def _runs(parts: Iterable[Piece] | Iterable[Task]) -> dict[int, list[tuple[int, int]]]:
    """(start, stop) of each document, in order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for part in parts:
        found.setdefault(part.document, []).append((part.start, part.stop))
    return {document: sorted(runs) for document, runs in found.items()}


def _gaps(runs: dict[int, list[tuple[int, int]]], what: str, lengths: dict[int, int]) -> Iterator[str]:
    """Tokens of documents that lie in no run, or in two."""
    for document, own in runs.items():
        at = 0
        for start, stop in own:
            if start != at or stop <= start:
                seen = "no token" if stop <= start else f"token {min(at, start)}"
                yield f"document {document}: a run [{start}, {stop}) is {what} where {seen} was due"
            at = stop
        length = lengths.get(document, at)
        if at != length:
            yield f"document {document}: {at} of {length} tokens are {what}"
