"""Connected components of documents, from keys that lie on disk, one band at a time and in bounded memory.

Documents are numbered from 0. A component is called by its smallest number. What comes out depends on which documents
share keys, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.data.shingles import U64, mixed

Int = NDArray[np.int64]
BYTES_A_DOCUMENT = 40
"""Of a band's keys while they are sorted, at most: key, number, order, sorted key and number, the same for a part."""
Alike = Callable[[int, int], bool]
"""Whether two documents that share a key are the same when they are looked at."""


@final
class Components:
    """A forest over N documents in which every root is the smallest number of its tree."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)

    def join(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Put each first and second into one component, all pairs at once."""
        while len(first):
            a, b = self.roots(first), self.roots(second)
            apart = a != b
            first, second = np.maximum(a[apart], b[apart]), np.minimum(a[apart], b[apart])
            np.minimum.at(self.parent, first, second)
        self._flatten()

    def join_one(self, first: int, second: int) -> None:
        """Put two documents into one component."""
        a, b = self.root(first), self.root(second)
        self.parent[max(a, b)] = min(a, b)

    def roots(self, documents: NDArray[Any]) -> NDArray[Any]:
        """The components of some documents."""
        found: NDArray[Any] = self.parent[documents]
        while True:
            above: NDArray[Any] = self.parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def root(self, document: int) -> int:
        """The component of one document."""
        while self.parent[document] != document:
            self.parent[document] = self.parent[self.parent[document]]  # half the way for those who come later
            document = int(self.parent[document])
        return document

    def labels(self) -> NDArray[Any]:
        """The component of every document."""
        self._flatten()
        return self.parent

    def _flatten(self) -> None:
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return
            self.parent = above


@final
class Band:
    """Documents that share a key in one band, some at a time: `members` end to end, group g from `starts[g]` on."""

    def __init__(self, members: NDArray[Any], starts: Int) -> None:
        self.members, self.starts = members, starts

    @property
    def firsts(self) -> NDArray[Any]:
        """For each member the first of its group, which is the smallest number."""
        sizes = np.diff(np.append(self.starts, len(self.members)))
        return np.repeat(self.members[self.starts], sizes)

    def groups(self) -> Iterator[NDArray[Any]]:
        """Each group, numbers rising."""
        yield from np.split(self.members, self.starts[1:]) if len(self.members) else ()


def shared(keys: Sequence[NDArray[Any]], band: int, memory: int, salts: Sequence[int] | None = None) -> Iterator[Band]:
    """The documents that share keys in one band. Keys that nobody shares are left out.

    keys: keys_KD of each shard, memory-mapped. memory: bytes; where all keys at once would need more, they are gone
    through several times, each time another part of them. salts: documents of shards with different ones never share.
    """
    count = sum(part.shape[1] for part in keys)
    parts = max(1, -(-count * BYTES_A_DOCUMENT // max(1, memory)))
    for part in range(parts):
        yield _grouped(keys, band, (part, parts), salts)


def _part(
    keys: Sequence[NDArray[Any]], band: int, which: tuple[int, int], salts: Sequence[int] | None
) -> tuple[U64, NDArray[Any] | None]:
    """The keys of one of so many parts of a band, and whose they are; None: those of all documents, in their order."""
    part, parts = which
    ends = np.cumsum([matrix.shape[1] for matrix in keys])
    count = int(ends[-1]) if len(ends) else 0
    values = np.empty(count if parts == 1 else 0, dtype=np.uint64)
    chosen, numbers = [values], [np.zeros(0, dtype=np.int32 if count < 2**31 else np.int64)]
    for shard, matrix in enumerate(keys):
        own = _row(matrix, band)
        start = int(ends[shard]) - len(own)
        if salts is not None:
            own = own ^ mixed(np.array([salts[shard]], dtype=np.uint64))
        if parts == 1:
            values[start : ends[shard]] = own
            continue
        mine = np.flatnonzero(own % np.uint64(parts) == np.uint64(part))
        chosen.append(own[mine])
        numbers.append((mine + start).astype(numbers[0].dtype))
    return (values, None) if parts == 1 else (np.concatenate(chosen), np.concatenate(numbers))


def _row(matrix: NDArray[Any], band: int) -> U64:
    """The keys of one band. Of a mapped file they are read, so that its pages do not stay in memory."""
    if not isinstance(matrix, np.memmap) or matrix.filename is None:
        return np.asarray(matrix[band])
    count = matrix.shape[1]
    start = matrix.offset + band * count * matrix.itemsize
    return np.fromfile(matrix.filename, dtype=np.uint64, count=count, offset=start)


def _grouped(keys: Sequence[NDArray[Any]], band: int, which: tuple[int, int], salts: Sequence[int] | None) -> Band:
    """Those of a part of a band that share a key."""
    values, numbers = _part(keys, band, which, salts)
    order = np.argsort(values, kind="stable")
    values = values[order]
    as_before = np.zeros(len(values), dtype=np.bool_)
    np.equal(values[1:], values[:-1], out=as_before[1:])
    shared_by_some = as_before.copy()
    shared_by_some[:-1] |= as_before[1:]
    begins = ~as_before[shared_by_some]
    places = order[shared_by_some]
    return Band(places if numbers is None else numbers[places], np.flatnonzero(begins).astype(np.int64))


def join_alike(found: Components, group: NDArray[Any], alike: Alike, refused: set[tuple[int, int]]) -> None:
    """Join those of a group that are the same when they are looked at. Pairs in one component are not looked at, nor
    those that were refused before; so the components are those of all pairs of the group that are alike."""
    for i, first in enumerate(group.tolist()):
        for second in group[i + 1 :].tolist():
            if (first, second) in refused or found.root(first) == found.root(second):
                continue
            if alike(first, second):
                found.join_one(first, second)
            else:
                refused.add((first, second))
