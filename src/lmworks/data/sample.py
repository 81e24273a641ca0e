"""A fair sample of documents to train a tokenizer on, without holding more than the sample in memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from lmworks.data.record import Record, Text, content_hash


def sample_texts(records: Iterable[object], limit: int) -> list[str]:
    """The texts with the highest content hashes, up to `limit` UTF-8 bytes; the last one is cut to fit.

    Hashes are as good as random numbers, and do not depend on the order of the files. The validation split takes the
    lowest hashes, so the tokenizer sees held-out text only where the sample is nearly all there is.
    """
    heap: list[tuple[int, str, int]] = []
    held = 0
    for record in records:
        if not isinstance(record, Record):
            continue
        key = content_hash(record)
        for part in record.content:
            if isinstance(part, Text):
                text = _cut(part.text, limit)
                size = len(text.encode("utf-8"))
                heapq.heappush(heap, (key, text, size))
                held += size
        while heap and held - heap[0][2] >= limit:
            held -= heapq.heappop(heap)[2]
    chosen = sorted(heap, reverse=True)
    if chosen and held > limit:
        _, text, size = chosen[-1]
        return [text for _, text, _ in chosen[:-1]] + [_cut(text, size - (held - limit))]
    return [text for _, text, _ in chosen]


def _cut(text: str, n_bytes: int) -> str:
    """The longest beginning of a text that is not longer than so many UTF-8 bytes."""
    if len(text) <= n_bytes // 4:
        return text
    return text.encode("utf-8")[:n_bytes].decode("utf-8", errors="ignore")
