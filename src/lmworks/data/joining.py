"""From surveys to clusters: which documents are the same, and which of them stays."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.data.clusters import Components, Int, join_alike, shared
from lmworks.data.keys import Key, text_hash
from lmworks.data.stage import Surveyed, text_of
from lmworks.data.units import read_records

CHUNK = 20_000
"""Documents of clusters whose keys are compared in one go."""


@final
class Clusters:
    """Groups of documents that are the same, end to end: group g from `starts[g]` on, the one that is kept first."""

    def __init__(self, corpus: Corpus, numbers: Int, starts: Int, similarity: Any) -> None:
        self._corpus, self._similarity = corpus, similarity
        self.numbers, self.starts = numbers, starts
        self.sizes = np.diff(np.append(starts, len(numbers)))
        self.kept = np.repeat(numbers[starts], self.sizes)
        """For each member the one that is kept in its place, which may be itself."""
        self.removed = (self.kept != numbers) & (numbers < corpus.first_reference)

    @cached_property
    def _rising(self) -> Int:
        """The places of members in the order of their numbers."""
        return np.argsort(self.numbers, kind="stable")

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """For each document of a shard that is in a cluster: its row, the name of the one kept in its place, and how
        many the cluster holds."""
        first, end = self._corpus.stretch(shard)
        low, high = np.searchsorted(self.numbers, [first, end], sorter=self._rising)
        for i in self._rising[low:high].tolist():
            of = self._corpus.name(int(self.kept[i])) if self.removed[i] else None
            cluster = int(np.searchsorted(self.starts, i, side="right")) - 1
            yield {"row": int(self.numbers[i]) - first, "of": of, "copies": int(self.sizes[cluster])}

    def table(self) -> Iterator[dict[str, Any]]:
        """A row for each member. `bands` is how many keys it shares with the one that is kept: none where both are
        only like a third."""
        cluster = np.repeat(np.arange(len(self)), self.sizes)
        for start in range(0, len(self.numbers), CHUNK):
            numbers, kept = self.numbers[start : start + CHUNK], self.kept[start : start + CHUNK]
            shared_M = (self._corpus.keys_of(numbers) == self._corpus.keys_of(kept)).sum(axis=0)
            lengths = self._corpus.lengths_of(numbers)
            for i, (number, of) in enumerate(zip(numbers.tolist(), kept.tolist(), strict=True)):
                named = {"cluster": int(cluster[start + i]), "source": self._corpus.source(number)}
                row = {**named, "id": self._corpus.id(number), "length": int(lengths[i])}
                state = "removed" if self.removed[start + i] else "kept"
                row["state"] = "reference" if number >= self._corpus.first_reference else state
                if number != of:
                    row |= {"like": self._corpus.name(of), "bands": int(shared_M[i])}
                if number != of and self._similarity is not None:
                    row["similarity"] = round(self._similarity(min(number, of), max(number, of)), 4)
                yield row

    def by_source(self) -> dict[tuple[str, str], int]:
        """Removed documents by their own source and that of the one that is kept."""
        own, of = (self._corpus.shards_of(numbers[self.removed]) for numbers in (self.numbers, self.kept))
        shards = len(self._corpus.sources)
        pairs, counts = np.unique(own * shards + of, return_counts=True)
        found: dict[tuple[str, str], int] = {}
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            names = self._corpus.sources[pair // shards], self._corpus.sources[pair % shards]
            found[names] = found.get(names, 0) + count
        return found

    def largest(self, count: int) -> dict[str, int]:
        """Names of the documents that are kept of the largest clusters, with their sizes."""
        order = np.argsort(-self.sizes, kind="stable")[:count]
        return {self._corpus.name(int(self.numbers[self.starts[g]])): int(self.sizes[g]) for g in order}


@final
class Corpus:
    """All surveyed documents, numbered through; keys and details stay on disk."""

    def __init__(self, surveys: Sequence[Surveyed], references: Sequence[Surveyed], key: Key, *, memory: int) -> None:
        self._surveys = [*surveys, *references]
        self.key, self._memory = key, memory
        self._keys = [self._keys_at(shard) for shard in range(len(self._surveys))]
        self._starts = np.cumsum([0, *(part.shape[1] for part in self._keys)])
        self._list = self._starts.tolist()
        self.first_reference = int(self._starts[len(surveys)])
        self.looked_at = self.refused = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def sources(self) -> list[str]:
        """The source of each shard."""
        return [
            str(json.loads((one.folder / "source.json").read_text(encoding="utf-8"))["source"]) for one in self._surveys
        ]

    def bands(self, per_source: bool = False) -> Iterator[Any]:
        """All groups of documents that share a key, band by band."""
        salts = [text_hash(source) for source in self.sources] if per_source else None
        for band in range(self.key.bands):
            yield from shared(self._keys, band, self._memory, salts)

    def stretch(self, shard: int) -> tuple[int, int]:
        """The numbers of a shard's documents: from the first to before the second."""
        return int(self._starts[shard]), int(self._starts[shard + 1])

    def shards_of(self, numbers: Int) -> Int:
        """The shard of each document."""
        return np.searchsorted(self._starts, numbers, side="right") - 1

    def source(self, number: int) -> str:
        """The source of a document."""
        return self.sources[self._shard(number)]

    def id(self, number: int) -> str:
        """The id of a document, from the file of its shard."""
        shard = self._shard(number)
        row = number - int(self._starts[shard])
        ends, text = self._ids[shard]
        return bytes(text[ends[row] : ends[row + 1]]).decode("utf-8", "surrogatepass")

    def name(self, number: int) -> str:
        """Source and id, for people."""
        return f"{self.source(number)}: {self.id(number)}"

    def lengths_of(self, numbers: Int) -> Int:
        """Characters of each document."""
        found = np.empty(len(numbers), dtype=np.int64)
        for shard, mine, rows in self._by_shard(numbers):
            found[mine] = np.load(self._surveys[shard].folder / "lengths.npy", mmap_mode="r", allow_pickle=False)[rows]
        return found

    def keys_of(self, numbers: Int) -> NDArray[Any]:
        """keys_KM of M documents."""
        found = np.empty((self.key.bands, len(numbers)), dtype=np.uint64)
        for shard, mine, rows in self._by_shard(numbers):
            found[:, mine] = self._keys_at(shard)[:, rows]  # mapped anew: what was looked at is let go
        return found

    def _keys_at(self, shard: int) -> NDArray[Any]:
        """keys_KD of a shard, which stay on disk."""
        found: NDArray[Any] = np.load(self._surveys[shard].folder / "keys.npy", mmap_mode="r", allow_pickle=False)
        return found

    def _by_shard(self, numbers: Int) -> Iterator[tuple[int, Int, Int]]:
        """Each shard that has some of the documents, their places among them, and their rows."""
        shards = self.shards_of(numbers)
        for shard in np.unique(shards).tolist():
            mine = np.flatnonzero(shards == shard)
            yield shard, mine, numbers[mine] - int(self._starts[shard])

    @cached_property
    def _ids(self) -> list[tuple[Any, Any]]:
        """For each shard where ids end, and their bytes; both stay on disk."""
        folders = [one.folder for one in self._surveys]
        ends, texts = (
            [np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False)) for folder in folders]
            for name in ("ends.npy", "ids.npy")
        )  # a view of a map is a map, and slow to make; one of an array is not, and the bytes stay where they are
        return list(zip(ends, texts, strict=True))

    def _shard(self, number: int) -> int:
        return bisect_right(self._list, number) - 1

    def details(self, wanted: NDArray[np.bool_], folder: Path) -> Details:
        """What similarities are computed from, of the wanted documents, in a file of that folder."""
        path = folder / "details.bin"
        ends: list[int] = []
        places: list[int] = []
        dtype: np.dtype[Any] = np.dtype(np.uint64)
        with path.open("wb") as file:
            for shard, survey in enumerate(self._surveys):
                start, end = int(self._starts[shard]), int(self._starts[shard + 1])
                if not wanted[start:end].any():
                    continue
                for row, record in enumerate(read_records(survey.records)):
                    if wanted[start + row]:
                        detail = self.key.detail(text_of(record))
                        dtype = detail.dtype
                        file.write(detail.tobytes())
                        ends.append(file.tell() // dtype.itemsize)
                        places.append(start + row)
        return Details(path, dtype, np.array(places, dtype=np.int64), np.array([0, *ends], dtype=np.int64))


@final
class Details:
    """Details of some documents, in a file that is mapped into memory."""

    def __init__(self, path: Path, dtype: np.dtype[Any], numbers: Int, ends: Int) -> None:
        self._numbers, self._ends = numbers, ends
        self._all = np.memmap(path, dtype=dtype, mode="r") if ends[-1] else np.zeros(0, dtype=dtype)

    def of(self, number: int) -> NDArray[Any]:
        """The detail of one document."""
        place = int(np.searchsorted(self._numbers, number))
        assert self._numbers[place] == number, "details are there for all candidates"
        return np.asarray(self._all[self._ends[place] : self._ends[place + 1]])


def clusters_of(corpus: Corpus, *, prefer: Sequence[str], per_source: bool, folder: Path) -> Clusters:
    """All clusters of two documents or more. Which of them is kept does not depend on the order. The folder is for
    what pairs are compared by, as long as the clusters are used."""
    found = Components(len(corpus))
    if corpus.key.least is None:
        for band in corpus.bands(per_source):
            found.join(band.members, band.firsts)
        return _chosen(corpus, found, prefer, None)
    similarity = _similarity(corpus, corpus.details(_candidates(corpus, per_source), folder))
    refused: set[tuple[int, int]] = set()
    for band in corpus.bands(per_source):
        for group in band.groups():
            roots = found.roots(group)
            if (roots != roots[0]).any():
                join_alike(found, group, lambda a, b: similarity(a, b) >= (corpus.key.least or 0.0), refused)
    corpus.refused = len(refused)
    return _chosen(corpus, found, prefer, similarity)


def copies_of(corpus: Corpus, *, folder: Path) -> Clusters:
    """For each document that is the same as a reference: the two of them, the reference first. Where several are, the
    first of the reference documents counts."""
    similarity = None
    if corpus.key.least is not None:
        similarity = _similarity(corpus, corpus.details(_candidates(corpus, False), folder))
    pairs: dict[int, int] = {}
    refused: set[tuple[int, int]] = set()
    for band in corpus.bands():
        for group in band.groups():
            if group[-1] >= corpus.first_reference > group[0]:
                _match(corpus, group, similarity, pairs, refused)
    corpus.refused = len(refused)
    numbers = np.array([[pairs[number], number] for number in sorted(pairs)], dtype=np.int64).reshape(-1)
    return Clusters(corpus, numbers, np.arange(0, len(numbers), 2, dtype=np.int64), similarity)


def _match(
    corpus: Corpus, group: NDArray[Any], similarity: Any, pairs: dict[int, int], refused: set[tuple[int, int]]
) -> None:
    """Note for each document of a group the first reference in it that is the same."""
    references = group[group >= corpus.first_reference].tolist()
    for number in group[group < corpus.first_reference].tolist():
        for reference in references:
            if reference >= pairs.get(number, len(corpus)):
                break
            if (number, reference) in refused:
                continue
            if similarity is None or similarity(number, reference) >= (corpus.key.least or 0.0):
                pairs[number] = reference
            else:
                refused.add((number, reference))


def _candidates(corpus: Corpus, per_source: bool) -> NDArray[np.bool_]:
    """Documents that share a key with another."""
    wanted = np.zeros(len(corpus), dtype=np.bool_)
    for band in corpus.bands(per_source):
        wanted[band.members] = True
    return wanted


def _similarity(corpus: Corpus, details: Details) -> Any:
    @lru_cache(maxsize=4096)
    def similarity(first: int, second: int) -> float:
        corpus.looked_at += 1
        return corpus.key.similarity(details.of(first), details.of(second))

    return similarity


def _chosen(corpus: Corpus, found: Components, prefer: Sequence[str], similarity: Any) -> Clusters:
    """The clusters in the order of their smallest numbers, each with the one that is kept first: a reference, of the
    source that is preferred, the longest, the one whose source and id come first."""
    labels = found.labels()
    several = np.bincount(labels, minlength=len(labels)) > 1
    numbers = np.flatnonzero(several[labels]).astype(np.int64)
    places = {source: place for place, source in enumerate(prefer)}
    place_S = np.array([places.get(source, len(places)) for source in corpus.sources], dtype=np.int32)
    rank: list[NDArray[Any]] = [
        -corpus.lengths_of(numbers),
        place_S[corpus.shards_of(numbers)],
        numbers < corpus.first_reference,
        labels[numbers],
    ]
    order = np.lexsort(rank)
    numbers, rank = numbers[order], [column[order] for column in rank]
    begins = np.flatnonzero(np.diff(rank[-1], prepend=-1)).astype(np.int64)
    # a cluster of references alone is nobody's business; references stand first, so its last one tells
    ends = np.append(begins[1:], len(numbers))[: len(begins)]
    sizes = ends - begins
    some = numbers[ends - 1] < corpus.first_reference
    picked, sizes = np.repeat(some, sizes), sizes[some]
    starts = np.cumsum(sizes) - sizes
    numbers, rank = numbers[picked], [column[picked] for column in rank]
    tied = np.ones(len(numbers), dtype=np.bool_)  # as good as the one before it
    for column in rank:
        tied[1:] &= column[1:] == column[:-1]
    for start in starts[np.append(tied[1:], False)[starts]].tolist():
        end = start + 1
        while end < len(numbers) and tied[end]:
            end += 1
        best = min(range(start, end), key=lambda i: (corpus.source(n := int(numbers[i])), corpus.id(n), n))
        numbers[start], numbers[best] = numbers[best], numbers[start]
    return Clusters(corpus, numbers, starts, similarity)
