"""From surveys to clusters: which documents are the same, and which of them stays."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.data.clusters import Components, Int, join_alike, shared
from lmworks.data.keys import Key, text_hash
from lmworks.data.stage import Surveyed, text_of
from lmworks.data.units import read_records, read_rows


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A document of a cluster."""

    number: int
    """Among all documents, references behind all others."""
    shard: int
    row: int
    source: str
    id: str
    length: int
    reference: bool

    @property
    def name(self) -> str:
        """Source and id, for people."""
        return f"{self.source}: {self.id}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A member and the one that is kept in its place, which may be itself."""

    member: Member
    of: Member
    cluster: int
    bands: int
    """How many keys the two share. None may be shared: both are then like a third."""
    similarity: float | None
    """Of the two, where pairs are looked at."""

    @property
    def removed(self) -> bool:
        """Whether the member is dropped."""
        return self.member.number != self.of.number and not self.member.reference

    def to_json(self) -> dict[str, Any]:
        """A row of the table of clusters."""
        member = self.member
        named = {"cluster": self.cluster, "source": member.source, "id": member.id, "length": member.length}
        state = "reference" if member.reference else "removed" if self.removed else "kept"
        like = {"like": self.of.name, "bands": self.bands} if self.member.number != self.of.number else {}
        alike = {"similarity": round(self.similarity, 4)} if like and self.similarity is not None else {}
        return {**named, "state": state, **like, **alike}


@final
class Corpus:
    """All surveyed documents, numbered through; keys and details stay on disk."""

    def __init__(self, surveys: Sequence[Surveyed], references: Sequence[Surveyed], key: Key, *, memory: int) -> None:
        self._surveys = [*surveys, *references]
        self.key, self._memory = key, memory
        self.keys = [np.load(one.folder / "keys.npy", mmap_mode="r", allow_pickle=False) for one in self._surveys]
        self._starts = np.cumsum([0, *(part.shape[1] for part in self.keys)])
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
            yield from shared(self.keys, band, self._memory, salts)

    def members(self, numbers: Sequence[int]) -> dict[int, Member]:
        """The documents of these numbers."""
        wanted = np.array(sorted(numbers), dtype=np.int64)
        found: dict[int, Member] = {}
        for shard, survey in enumerate(self._surveys):
            start, end = int(self._starts[shard]), int(self._starts[shard + 1])
            rows = set((wanted[(wanted >= start) & (wanted < end)] - start).tolist())
            if not rows:
                continue
            lengths = np.load(survey.folder / "lengths.npy", mmap_mode="r", allow_pickle=False)
            for row, entry in enumerate(read_rows(survey.folder / "ids.jsonl.zst")):
                if row in rows:
                    found[start + row] = Member(
                        number=start + row,
                        shard=shard,
                        row=row,
                        source=self.sources[shard],
                        id=entry["id"],
                        length=int(lengths[row]),
                        reference=start >= self.first_reference,
                    )
        return found

    def shared_bands(self, first: int, second: int) -> int:
        """How many keys two documents share."""
        return int(np.count_nonzero(self._keys_of(first) == self._keys_of(second)))

    def _keys_of(self, number: int) -> NDArray[Any]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return np.asarray(self.keys[shard][:, number - int(self._starts[shard])])

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


def clusters_of(corpus: Corpus, *, prefer: Sequence[str], per_source: bool) -> list[list[Copy]]:
    """All clusters of two documents or more, each with the one that is kept first. They do not depend on the order."""
    found = Components(len(corpus))
    if corpus.key.least is None:
        for band in corpus.bands(per_source):
            found.join(band.members, band.firsts)
        return _chosen(corpus, found, prefer, None)
    with tempfile.TemporaryDirectory(prefix="lmworks-dedup-") as folder:
        details = corpus.details(_candidates(corpus, per_source), Path(folder))
        similarity = _similarity(corpus, details)
        refused: set[tuple[int, int]] = set()
        for band in corpus.bands(per_source):
            for group in band.groups():
                roots = found.roots(group)
                if (roots != roots[0]).any():
                    join_alike(found, group, lambda a, b: similarity(a, b) >= (corpus.key.least or 0.0), refused)
        corpus.refused = len(refused)
        return _chosen(corpus, found, prefer, similarity)


def copies_of(corpus: Corpus) -> list[list[Copy]]:
    """For each document that is the same as a reference: the two of them, the reference first. Where several are, the
    first of the reference documents counts."""
    with tempfile.TemporaryDirectory(prefix="lmworks-dedup-") as folder:
        similarity = None
        if corpus.key.least is not None:
            similarity = _similarity(corpus, corpus.details(_candidates(corpus, False), Path(folder)))
        pairs: dict[int, int] = {}
        refused: set[tuple[int, int]] = set()
        for band in corpus.bands():
            for group in band.groups():
                if group[-1] >= corpus.first_reference > group[0]:
                    _match(corpus, group, similarity, pairs, refused)
        corpus.refused = len(refused)
        members = corpus.members([*pairs, *set(pairs.values())])
        order = sorted(pairs, key=lambda n: (members[n].source, members[n].id, n))
        return [
            [_copy(corpus, members[n], members[pairs[number]], cluster, similarity) for n in (pairs[number], number)]
            for cluster, number in enumerate(order)
        ]


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


def _chosen(corpus: Corpus, found: Components, prefer: Sequence[str], similarity: Any) -> list[list[Copy]]:
    labels = found.labels()
    numbers = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1) if len(labels) else labels
    members = corpus.members(numbers.tolist())
    grouped: dict[int, list[Member]] = {}
    for number in numbers.tolist():
        grouped.setdefault(int(labels[number]), []).append(members[number])
    order = {source: place for place, source in enumerate(prefer)}

    def rank(member: Member) -> tuple[Any, ...]:
        place = order.get(member.source, len(order))
        return (not member.reference, place, -member.length, member.source, member.id, member.number)

    clusters = sorted((sorted(group, key=rank) for group in grouped.values()), key=lambda g: (g[0].source, g[0].id))
    clusters = [group for group in clusters if not all(member.reference for member in group)]
    return [
        [_copy(corpus, member, group[0], number, similarity) for member in group]
        for number, group in enumerate(clusters)
    ]


def _copy(corpus: Corpus, member: Member, of: Member, cluster: int, similarity: Any) -> Copy:
    alike = None
    if similarity is not None and member.number != of.number:
        alike = similarity(min(member.number, of.number), max(member.number, of.number))
    bands = corpus.shared_bands(member.number, of.number)
    return Copy(member=member, of=of, cluster=cluster, bands=bands, similarity=alike)
