"""Validation rows: held-out documents in a fixed order, every token counted exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from lmworks.data.load import Batch, batch_of
from lmworks.data.pack import Documents, Int, Order, Tokens, pack, window_places


@final
class Holdout:
    """Batches over held-out documents. Iterating again gives the same batches again.

    The documents lie end to end, ordered by content hash over all sources, so that the first rows are a fair sample of
    all. Every token but each document's bos is a target once; the last row is filled up with ignored targets.

    documents: of each source. rows: how many rows are read at most; None: all. piece_bytes: UTF-8 bytes of each token
    id, or None. share=(i, n): rows i, i + n, ... of every batch; where the rows do not go up in n, rows without
    targets are added, so that all shares have batches of one shape.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        *,
        sequence_length: int,
        rows: int | None = None,
        batch_rows: int = 16,
        share: tuple[int, int] = (0, 1),
        piece_bytes: Int | None = None,
    ) -> None:
        self._all = _joined(documents)
        self._source_ends = np.cumsum([len(part.tokens) for part in documents])
        self._length = sequence_length
        self._batch_rows = batch_rows
        self._share = share
        self._order = np.argsort(self._all.hashes, kind="stable")
        self._ends = Order(self._all, self._order)
        self._n_tokens = self._all.n_tokens
        whole = max(0, -(-(self._n_tokens - 1) // sequence_length))
        self.n_rows = whole if rows is None else min(rows, whole)
        """Rows with targets, over all shares."""
        self._bytes = self._row_bytes(piece_bytes)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes that all rows' targets stand for, over all shares."""
        return int(self._bytes.sum())

    def __len__(self) -> int:
        return len(range(0, self.n_rows, self._batch_rows))

    def __iter__(self) -> Iterator[Batch]:
        index, count = self._share
        for first in range(0, self.n_rows, self._batch_rows):
            rows = np.arange(first, min(first + self._batch_rows, self.n_rows), dtype=np.int64)
            padded = np.concatenate([rows, np.full(-len(rows) % count, self.n_rows, dtype=np.int64)])
            yield self._batch(padded[index::count])

    def _batch(self, rows_B: Int) -> Batch:
        place_BW = window_places(rows_B, self._length)
        is_real_BW = (place_BW < self._n_tokens) & (rows_B < self.n_rows)[:, None]
        flat_BW, is_start_BW = self._ends.locate(np.minimum(place_BW, self._n_tokens - 1))
        tokens_BW = np.where(is_real_BW, self._all.tokens.take(flat_BW), 0)
        packed = pack(tokens_BW, is_start_BW & is_real_BW, is_real_BW)
        sources_BT = np.searchsorted(self._source_ends, flat_BW[:, :-1], side="right")
        return batch_of(packed, sources_BT, np.append(self._bytes, 0)[rows_B])

    def _row_bytes(self, piece_bytes: Int | None) -> Int:
        """UTF-8 bytes that the targets of each row stand for.

        A document that rows cut is shared out among them by its tokens' bytes where ids stand for fixed bytes (exact),
        else by the number of tokens. The shares of a document always add up to its bytes.
        """
        total = np.zeros(self.n_rows, dtype=np.int64)
        end = self.n_rows * self._length + 1  # places that rows read; a target of row r lies at r*T + 1 ... r*T + T
        at = 0
        for document in self._order:
            length = int(self._all.lengths[document])
            if at >= end:
                break
            row = np.maximum(np.arange(at, at + length, dtype=np.int64) - 1, 0) // self._length
            weights = self._weights(document, length, piece_bytes)
            after = np.cumsum(weights)
            given = np.diff(int(self._all.n_bytes[document]) * after // max(1, int(after[-1])), prepend=0)
            inside = row < self.n_rows
            np.add.at(total, row[inside], given[inside])
            at += length
        return total

    def _weights(self, document: int, length: int, piece_bytes: Int | None) -> Int:
        if piece_bytes is None:
            weights = np.ones(length, dtype=np.int64)
            weights[[0, -1]] = 0
            return weights
        start = int(self._all.starts[document])
        return piece_bytes[self._all.tokens.take(np.arange(start, start + length, dtype=np.int64))]


def _joined(documents: Sequence[Documents]) -> Documents:
    """The documents of several sources as one collection."""
    arrays = [array for part in documents for array in part.tokens.arrays]
    before = np.cumsum([0] + [len(part.tokens) for part in documents])
    starts = [part.starts + offset for part, offset in zip(documents, before, strict=False)]
    empty: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    return Documents(
        Tokens(arrays),
        np.concatenate([empty, *starts]),
        np.concatenate([empty, *(part.lengths for part in documents)]),
        np.concatenate([empty, *(part.n_bytes for part in documents)]),
        np.concatenate([empty.astype(np.uint64), *(part.hashes for part in documents)]),
    )
