"""Packing: documents laid end to end and cut into rows.

A document is stored as [bos] ids [eos]. The documents of one source, in the shuffled order of epoch 0, then of epoch 1,
and so on, make one endless stream. Window w covers the tokens w*T ... w*T + T of it (T the sequence length): the first
T are its inputs, the last T its targets. Neighbouring windows share one token, which is the last target of one and the
first input of the next. So over an epoch every token is an input exactly once, and every token but the bos of each
document is a target exactly once: a bos is what a model would have to guess across the border of two documents, and is
ignored.

Rows are the windows in a shuffled order: those of an epoch (a round of n_tokens // T windows) are drawn in the order of
a hash. Without it a long document would fill whole batches by itself.

A document that is cut goes on in another row, without its beginning: attention stays within the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import DataError
from lmworks.core.seeds import seed_for

IGNORED = -100
"""The target that no loss counts."""

Int = NDArray[np.int64]


@final
class Tokens:
    """Tokens at flat positions 0, 1, ... across one or more arrays, which may be memory maps."""

    def __init__(self, arrays: Sequence[NDArray[np.integer[Any]]]) -> None:
        self.arrays = tuple(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.arrays else 0

    def take(self, at: Int) -> Int:
        """The tokens at these positions, in the shape of `at`."""
        if len(self.arrays) == 1:
            return self.arrays[0][at].astype(np.int64)
        found = np.empty_like(at)
        which = np.searchsorted(self._ends, at, side="right")
        for i in np.unique(which):
            here = which == i
            array = self.arrays[i]
            found[here] = array[at[here] - (self._ends[i] - len(array))]
        return found


@final
@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one split: where each starts in `tokens`, its length with bos and eos, UTF-8 bytes, content hash."""

    tokens: Tokens
    starts: Int
    lengths: Int
    n_bytes: Int
    hashes: NDArray[np.uint64]

    @property
    def n_tokens(self) -> int:
        """All tokens, bos and eos included."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def chosen(self, which: NDArray[np.bool_]) -> Documents:
        """Those of the documents for which `which` holds."""
        starts, lengths, n_bytes = (part[which] for part in (self.starts, self.lengths, self.n_bytes))
        return Documents(self.tokens, starts, lengths, n_bytes, self.hashes[which])


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """B packed rows of T tokens as arrays; see `lmworks.data.load.Batch` for what they hold."""

    tokens_BT: Int
    targets_BT: Int
    positions_BT: Int
    documents_BT: Int


def pack(tokens_BW: Int, is_start_BW: NDArray[np.bool_], is_real_BW: NDArray[np.bool_] | None = None) -> Rows:
    """Rows from windows of W = T + 1 tokens.

    is_start: the token is the first of its document. is_real: False for padding behind the end of the data, which
    forms a document of its own and is never a target.
    """
    starts_BT = is_start_BW[:, :-1].copy()
    ignored_BT = is_start_BW[:, 1:]
    if is_real_BW is not None:
        ignored_BT = ignored_BT | ~is_real_BW[:, 1:]
        starts_BT[:, 1:] |= is_real_BW[:, :-2] & ~is_real_BW[:, 1:-1]
    starts_BT[:, 0] = True
    at_T = np.arange(starts_BT.shape[1], dtype=np.int64)
    begun_BT = np.maximum.accumulate(np.where(starts_BT, at_T, 0), axis=1)
    return Rows(
        tokens_BT=np.ascontiguousarray(tokens_BW[:, :-1]),
        targets_BT=np.where(ignored_BT, IGNORED, tokens_BW[:, 1:]),
        positions_BT=at_T - begun_BT,
        documents_BT=np.cumsum(starts_BT, axis=1, dtype=np.int64) - 1,
    )


@final
class Order:
    """Documents laid end to end in one order."""

    def __init__(self, documents: Documents, order: Int) -> None:
        self._order = order
        self._starts = documents.starts[order]
        self._lengths = documents.lengths[order]
        self._ends = np.cumsum(self._lengths)

    def locate(self, place: Int) -> tuple[Int, NDArray[np.bool_]]:
        """Flat positions of the tokens at these places of the order, and whether each begins a document."""
        rank = np.searchsorted(self._ends, place, side="right")
        within = place - (self._ends[rank] - self._lengths[rank])
        return self._starts[rank] + within, within == 0

    def documents(self, place: Int) -> list[tuple[int, int, int]]:
        """The documents that rising places of the order lie in: number, first token in it, how many tokens."""
        rank = np.searchsorted(self._ends, place, side="right")
        within = place - (self._ends[rank] - self._lengths[rank])
        found, first, count = np.unique(rank, return_index=True, return_counts=True)
        told = zip(self._order[found], within[first], count, strict=True)
        return [(int(number), int(start), int(tokens)) for number, start, tokens in told]


class Piece(NamedTuple):
    """A part of a document in a row."""

    document: str
    """The hash of its text, as token shards hold it."""
    start: int
    """The first of its tokens in the row, bos counted."""
    tokens: int


@final
class Stream:
    """The endless stream of one source: documents and windows in a new order every epoch. A row depends on (seed, row).

    Raises DataError when the documents together are not longer than one sequence.
    """

    def __init__(self, documents: Documents, *, sequence_length: int, seed: int, name: str) -> None:
        if documents.n_tokens <= sequence_length:
            raise _too_short(documents.n_tokens, sequence_length, name)
        self.name = name
        self.width = sequence_length + 1
        self._documents = documents
        self._length = sequence_length
        self._seed = seed
        self._n_tokens = documents.n_tokens
        self._round = documents.n_tokens // sequence_length
        self._orders: dict[int, Order] = {}
        self._shuffles: dict[int, Int] = {}

    def epochs(self, rows: int) -> float:
        """How often every token was seen after so many rows."""
        return rows * self._length / self._n_tokens

    def windows(self, rows_B: Int) -> tuple[Int, NDArray[np.bool_]]:
        """Tokens and document starts, both (B, T + 1), of the given rows, in any order."""
        at_BW = window_places(self._window_of(rows_B), self._length)
        epoch_BW, place_BW = np.divmod(at_BW, self._n_tokens)
        flat_BW = np.empty_like(at_BW)
        is_start_BW = np.empty(at_BW.shape, dtype=np.bool_)
        for epoch in np.unique(epoch_BW):
            here = epoch_BW == epoch
            flat_BW[here], is_start_BW[here] = self._order(int(epoch)).locate(place_BW[here])
        return self._documents.tokens.take(flat_BW), is_start_BW

    def documents(self, row: int) -> list[Piece]:
        """The documents whose tokens are the inputs of a row, in their order."""
        at_T = window_places(self._window_of(np.array([row], dtype=np.int64)), self._length)[0, :-1]
        epoch_T, place_T = np.divmod(at_T, self._n_tokens)
        found = []
        for epoch in np.unique(epoch_T):
            for number, start, tokens in self._order(int(epoch)).documents(place_T[epoch_T == epoch]):
                found.append(Piece(f"{int(self._documents.hashes[number]):016x}", start, tokens))
        return found

    def _window_of(self, rows_B: Int) -> Int:
        """The window that stands at each row."""
        round_B, place_B = np.divmod(rows_B, self._round)
        window_B = np.empty_like(rows_B)
        for index in np.unique(round_B):
            here = round_B == index
            window_B[here] = index * self._round + self._shuffle(int(index))[place_B[here]]
        return window_B

    def _shuffle(self, index: int) -> Int:
        """The order of the windows of one round. Rows lie in at most a few rounds, so the last ones are kept."""
        if index not in self._shuffles:
            order = shuffled(self._round, seed_for(self._seed, "rows", self.name, index))
            self._shuffles = dict([*list(self._shuffles.items())[-1:], (index, order)])
        return self._shuffles[index]

    def _order(self, epoch: int) -> Order:
        """The order of the documents of one epoch; the last ones are kept."""
        if epoch not in self._orders:
            order = shuffled(len(self._documents), seed_for(self._seed, "data", self.name, epoch))
            kept = list(self._orders.items())[-2:]  # a round of windows touches up to three epochs
            self._orders = dict([*kept, (epoch, Order(self._documents, order))])
        return self._orders[epoch]


def window_places(windows_B: Int, sequence_length: int) -> Int:
    """Places in the stream that the given windows cover: (B, T + 1)."""
    return windows_B[:, None] * sequence_length + np.arange(sequence_length + 1, dtype=np.int64)


def shuffled(count: int, seed: int) -> Int:
    """0 ... count - 1 in the order of a hash of (seed, number): the same with every numpy on every machine."""
    numbers = np.arange(count, dtype=np.uint64)
    return np.argsort(_splitmix(_splitmix(numbers) ^ _splitmix(np.full(1, seed, dtype=np.uint64))), kind="stable")


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64: every bit of the result depends on every bit of x. Wraps at 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _too_short(n_tokens: int, sequence_length: int, name: str) -> DataError:
    return DataError(
        f"sequence longer than the data: sequence_length = {sequence_length} needs {sequence_length + 1} tokens, "
        f"and '{name}' has {n_tokens} to train on",
        legal=f"sequence_length up to {n_tokens - 1}" if n_tokens > 1 else None,
        next_step="read more text, or set a smaller data.sequence_length",
    )
