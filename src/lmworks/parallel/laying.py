"""How documents are laid on the ranks of data parallel: four packings by lengths alone.

    plain             documents end to end, cut into rows of equal tokens; what is cut off goes on in another row as a
                      document of its own, as `data/pack.py` does: equal memory, unequal attention
    by work           whole documents, the longest first, each to the rank whose squared lengths sum to the least and
                      that has room (the greedy rule of WLB-LLM, Wang et al. 2025): more equal attention, unequal memory
    by document       every document over all ranks, an early and a late run each: equal both, every rank gathers all
                      keys
    shared attention  plain rows, whose attention is cut anew by `balance.py`

Lengths in tokens. What a rank holds is a list of rows, a row a list of documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lmworks.core.errors import UsageError
from lmworks.parallel.tasks import Piece

Row = tuple[int, ...]
"""Lengths of the documents of one row, in order."""


def rows(lengths: Iterable[int], tokens: int) -> Iterator[Row]:
    """Rows of exactly so many tokens from documents in order; the last, unfilled one is left out."""
    row: list[int] = []
    room = tokens
    for length in lengths:
        left = length
        while left >= room:
            yield (*row, room)
            left -= room
            row, room = [], tokens
        if left:
            row.append(left)
            room -= left


def steps(lengths: Iterable[int], *, ranks: int, tokens: int, rows_each: int) -> Iterator[tuple[tuple[Row, ...], ...]]:
    """Micro-batches of plain packing: for every rank its rows, [rank][row]."""
    found = rows(lengths, tokens)
    while len(step := [row for _, row in zip(range(ranks * rows_each), found, strict=False)]) == ranks * rows_each:
        yield tuple(tuple(step[rank * rows_each : (rank + 1) * rows_each]) for rank in range(ranks))


class ByWork(NamedTuple):
    """Documents on ranks, and those that found no room."""

    held: tuple[Row, ...]
    """By rank."""
    left: Row
    """For a later step."""


def by_work(lengths: Iterable[int], *, ranks: int, room: int) -> ByWork:
    """Whole documents to the rank with the least attention so far that has room for them, the longest first."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    work, used, left = [0] * ranks, [0] * ranks, []
    for length in sorted(lengths, reverse=True):
        free = [rank for rank in range(ranks) if used[rank] + length <= room]
        if not free:
            left.append(length)
            continue
        rank = min(free, key=lambda rank: (work[rank], rank))
        held[rank].append(length)
        work[rank] += length * length
        used[rank] += length
    return ByWork(tuple(map(tuple, held)), tuple(left))


def whole(held: Sequence[Iterable[int]], first: int = 0) -> tuple[Piece, ...]:
    """The pieces of documents that lie on one rank each, by rank; numbered from `first` on."""
    found = []
    document = first
    for rank, lengths in enumerate(held):
        offset = 0
        for length in lengths:
            found.append(Piece(document, 0, length, rank, offset))
            document, offset = document + 1, offset + length
    return tuple(found)


def over_ranks(lengths: Iterable[int], ranks: int) -> tuple[Piece, ...]:
    """The pieces of documents that lie on all ranks: runs r and 2 n - 1 - r of 2 n on rank r, as equal as they go.

    Raises UsageError for fewer than one rank.
    """
    if ranks < 1:
        raise UsageError(f"{ranks} ranks", legal="1 or more")
    filled = [0] * ranks
    found = []
    for document, length in enumerate(lengths):
        edges = [length * run // (2 * ranks) for run in range(2 * ranks + 1)]
        for run in range(2 * ranks):
            start, stop = edges[run], edges[run + 1]
            rank = min(run, 2 * ranks - 1 - run)
            if start < stop:
                found.append(Piece(document, start, stop, rank, filled[rank]))
                filled[rank] += stop - start
    return tuple(found)
