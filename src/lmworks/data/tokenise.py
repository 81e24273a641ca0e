"""From a reader's documents to tokens: in batches, on all cores, with every document accounted for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import DataError
from lmworks.data.fingerprint import Fingerprint, listed
from lmworks.data.read import Progress, Reader
from lmworks.data.record import MENDED, Dropped, Ids, Record, Text, content_hash
from lmworks.data.tokenizer import Tokenizer

BATCH_BYTES = 4_000_000
"""Text that is tokenised in one call: enough for all cores, little enough for steady progress."""
NAMED = 100
"""Names of dropped documents kept per reason; the counts are always exact."""

Sink = Callable[[NDArray[np.int64], int, int], None]
"""Takes a document's tokens with bos and eos, its UTF-8 bytes and its content hash."""


@final
@dataclass
class Tally:
    """What happened to every document that was seen: kept + dropped = seen."""

    seen: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    """Documents that were not UTF-8, by what they were taken for; they are among the kept."""

    def see(self, item: Record | Dropped) -> None:
        """Count one document."""
        self.seen += 1
        if isinstance(item, Record):
            self.kept += 1
            licence = item.licence or "unknown"
            self.licences[licence] = self.licences.get(licence, 0) + 1
            if MENDED in item.facts:
                was = str(item.facts[MENDED])
                self.mended[was] = self.mended.get(was, 0) + 1
            return
        self.dropped[item.reason] = self.dropped.get(item.reason, 0) + 1
        named = self.names.setdefault(item.reason, [])
        if len(named) < NAMED:
            named.append(item.id)

    def watch(self, items: Iterable[Record | Dropped]) -> Iterator[Record | Dropped]:
        """Hand the documents on, and count them."""
        for item in items:
            self.see(item)
            yield item

    def balance(self) -> dict[str, Any]:
        """The counts and the names, for a manifest."""
        assert self.kept + sum(self.dropped.values()) == self.seen
        counts = {"seen": self.seen, "kept": self.kept, "dropped": self.dropped, "dropped_names": self.names}
        return {**counts, "mended": self.mended} if self.mended else counts

    def must_hold_documents(self, name: str) -> None:
        """Raise DataError when nothing was kept, with what was dropped and why."""
        if not self.kept:
            reasons = [f"{count} {why} ({listed(self.names[why])})" for why, count in self.dropped.items()]
            why = f"dropped: {'; '.join(reasons)}" if reasons else "its files are empty"
            raise DataError(
                f"no document is left of {self.seen} seen; {why}",
                where=f"reader '{name}'",
                next_step="check the reader's paths and field names; text must be UTF-8",
            )


def tokenise(
    reader: Reader, source: Fingerprint, tokenizer: Tokenizer, sink: Sink, progress: Progress | None = None
) -> Tally:
    """Send every document's tokens to `sink`, in reading order, and return the count of what was seen.

    While one batch is tokenised the next is read and the last one written.
    """
    tally = Tally()
    clock = _Clock(f"tokenising {reader.label}", source.size, progress)
    running: deque[tuple[list[Record], Future[list[NDArray[np.int64]]]]] = deque()

    def collect() -> None:
        records, future = running.popleft()
        done = 0
        for record, ids in zip(records, future.result(), strict=True):
            size = _n_bytes(record, tokenizer)
            sink(ids, size, content_hash(record))
            done += size
        clock.add(done)

    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in _batches(reader, source, tally):
            running.append((batch, pool.submit(encode, batch, tokenizer)))
            if len(running) > 2:
                collect()
        while running:
            collect()
    clock.end()
    return tally


def encode(records: Sequence[Record], tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    """The tokens of each record, with bos before and eos after it."""
    texts = [part.text for record in records for part in record.content if isinstance(part, Text)]
    encoded = iter(tokenizer.encode_batch(texts))
    bos, eos = np.array([tokenizer.bos]), np.array([tokenizer.eos])
    found = []
    for record in records:
        parts = [
            next(encoded) if isinstance(part, Text) else _checked(part, record, tokenizer) for part in record.content
        ]
        found.append(np.concatenate([bos, *parts, eos]))
    return found


def _batches(reader: Reader, source: Fingerprint, tally: Tally) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for item in tally.watch(reader.read(source.source_files())):
        if isinstance(item, Record):
            batch.append(item)
            size += sum(len(part.text) if isinstance(part, Text) else len(part.ids) for part in item.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _checked(part: Ids, record: Record, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The ids of a part that came as ids. Raises DataError for one that the tokenizer does not have."""
    ids = np.array(part.ids, dtype=np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise DataError(
            f"token id {wrong} is not one of this tokenizer",
            where=record.id,
            legal=f"0 to {tokenizer.vocab_size - 1}",
            next_step="use the tokenizer that made these ids",
        )
    return ids


def _n_bytes(record: Record, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of a document; ids count as the text that they decode to."""
    texts = (part.text if isinstance(part, Text) else tokenizer.decode(part.ids) for part in record.content)
    return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)


@final
class _Clock:
    """Reports bytes done and the time left. Packed files hold more text than their size: then no total is given."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        self._begun = time.monotonic()

    def add(self, done: int) -> None:
        self._done += done
        known = self._total if self._done <= self._total else None
        seconds = time.monotonic() - self._begun
        left = seconds / self._done * (known - self._done) if known is not None and self._done else None
        if self._progress is not None:
            self._progress(stage=self._stage, done=self._done, total=known, unit="bytes", seconds_left=left)

    def end(self) -> None:
        """All is read, whatever the files' sizes promised."""
        if self._progress is not None:
            self._progress(stage=self._stage, done=self._done, total=self._done, unit="bytes", seconds_left=0.0)
