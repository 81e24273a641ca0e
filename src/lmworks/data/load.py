"""The deterministic loader: rows of packed tokens as tensors, in an order that depends on (seed, row) only.

`draw` gives (batch, and where the next row is): the counts of rows taken from each source are the whole state. How many
workers prepare rows, and how many ranks share them, changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmworks.data.identity import Identity
from lmworks.data.mixture import Mixture
from lmworks.data.pack import Int, Piece, Rows, Stream, pack

if TYPE_CHECKING:
    from lmworks.data.sharing import Sharing

State = dict[str, Any]
FORMAT = 1


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens; tensors are int64 where nothing else is said.

    tokens_BT: inputs. targets_BT: the token after each input, -100 where no loss counts (the next document's bos,
    padding). positions_BT: 0, 1, ... from the beginning of each document or of the row. documents_BT: 0, 1, ... in each
    row; a token attends to earlier ones of its own document only. sources_BT: which reader each token is from, counted
    in the recipe's order; a training row has one. bytes_B: UTF-8 bytes that each row's targets stand for; None for
    training rows, where nobody asks. weights_B: float32, how much each row's targets weigh in the loss and in its
    counts; None: all alike.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    sources_BT: Tensor
    bytes_B: Tensor | None = None
    weights_B: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes that all targets stand for; 0 for training rows, where they are not counted."""
        return int(self.bytes_B.sum()) if self.bytes_B is not None else 0

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait."""
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self._tensors()))  # type: ignore[arg-type]  # only the last two are ever None

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch(*(None if t is None else t.pin_memory() for t in self._tensors()))  # type: ignore[arg-type]  # only the last two are ever None

    def split(self, rows: int) -> list[Batch]:
        """Batches of at most `rows` rows, in order; the last one may be smaller."""
        return [self[i : i + rows] for i in range(0, self.rows, rows)]

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The chosen rows."""
        return Batch(*(None if t is None else t[rows] for t in self._tensors()))  # type: ignore[arg-type]  # only the last two are ever None

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.tokens_BT,
            self.targets_BT,
            self.positions_BT,
            self.documents_BT,
            self.sources_BT,
            self.bytes_B,
            self.weights_B,
        )


class Origin(NamedTuple):
    """Where a row of a batch is from."""

    source: str
    """The reader's name."""
    row: int
    """Its number in the reader's own rows; with the recipe's seed it stands for these tokens."""
    documents: list[Piece]


def batch_of(rows: Rows, sources_BT: Int, bytes_B: Int | None = None) -> Batch:
    """Arrays as tensors; memory is shared."""
    return Batch(
        tokens_BT=torch.from_numpy(rows.tokens_BT),
        targets_BT=torch.from_numpy(rows.targets_BT),
        positions_BT=torch.from_numpy(rows.positions_BT),
        documents_BT=torch.from_numpy(rows.documents_BT),
        sources_BT=torch.from_numpy(sources_BT),
        bytes_B=None if bytes_B is None else torch.from_numpy(bytes_B),
    )


@final
class Loader:
    """Training rows without end, from several sources by weight.

    share=(i, n): this loader gives rows i, i + n, i + 2n, ... of every draw, so n ranks together give the whole draw.
    prefetch: draws that a thread prepares ahead, each as large as the last one. pin: in page-locked memory, for a GPU.
    sharing: how processes that draw the same rows, and nothing else, read them once between them.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        mixture: Mixture,
        identity: Identity,
        *,
        share: tuple[int, int] = (0, 1),
        prefetch: int = 2,
        pin: bool = False,
        sharing: Sharing | None = None,
    ) -> None:
        index, count = share
        if not 0 <= index < count:
            raise ValueError(f"share is (i, n) with 0 <= i < n, got {share}")
        self._streams = tuple(streams)
        self._mixture = mixture
        self._identity = identity
        self._share = slice(index, None, count)
        self._prefetch = prefetch
        self._pin = pin
        self._sharing = sharing
        self._made = 0
        """Draws that were begun: their numbers, for those who share them."""
        self._counts = [0] * len(self._streams)
        self._ahead: deque[tuple[int, list[int], Future[Batch]]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._drawn: tuple[list[int], int] | None = None
        """Rows taken before the last draw, and how many it had."""

    def draw(self, rows: int) -> Batch:
        """This share of the next `rows` rows."""
        if rows < 1:
            raise ValueError(f"a draw has at least one row, got {rows}")
        self._drawn = self._counts, rows
        if self._ahead and self._ahead[0][0] != rows:
            self._drop()
        if self._ahead:
            _, after, future = self._ahead.popleft()
            batch = future.result()
        else:
            order, after = self._mixture.take(self._counts, rows)
            batch = self._shared(self._counts, order)
        self._counts = after
        self._look_ahead(rows)
        return batch

    def state(self) -> State:
        """Where the next row is: JSON values, a few hundred bytes. Rows prepared ahead are not part of it."""
        taken = {stream.name: count for stream, count in zip(self._streams, self._counts, strict=True)}
        return {"format": FORMAT, "rows": taken, "made_with": self._identity.to_json()}

    def load(self, state: State) -> None:
        """Continue where `state` was taken.

        Raises DataError, naming what differs and which files changed, when the rows would not be the same.
        """
        self._identity.must_match(state["made_with"])
        self._drop()
        self._counts = [int(state["rows"][stream.name]) for stream in self._streams]

    def origins(self) -> list[Origin]:
        """Where the rows of the last draw are from, in their order; none before the first draw."""
        if self._drawn is None:
            return []
        (before, rows), names = self._drawn, [stream.name for stream in self._streams]
        source_B, row_B = _rows_of(before, self._mixture.take(before, rows)[0])
        asked = list(zip(source_B[self._share].tolist(), row_B[self._share].tolist(), strict=True))

        def found() -> list[Origin]:
            return [Origin(names[source], row, self._streams[source].documents(row)) for source, row in asked]

        return found() if self._pool is None else self._pool.submit(found).result()  # streams are for one thread

    def epochs(self) -> dict[str, float]:
        """How often each source's tokens were seen so far."""
        return {s.name: s.epochs(count) for s, count in zip(self._streams, self._counts, strict=True)}

    def close(self) -> None:
        """End the thread, and what is shared. A later draw starts the thread again."""
        self._drop()
        self._leave()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _look_ahead(self, rows: int) -> None:
        if self._prefetch > 0 and self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmworks-loader")
        while self._pool is not None and len(self._ahead) < self._prefetch:
            before = self._ahead[-1][1] if self._ahead else self._counts
            order, after = self._mixture.take(before, rows)
            self._ahead.append((rows, after, self._pool.submit(self._shared, before, order)))

    def _drop(self) -> None:
        """Forget what was prepared. Streams are not for two threads at once, so what is running must end first.

        Of those who share draws, some may have prepared more than others: what was shared is at its end.
        """
        if self._made:
            self._leave()
        for _, _, future in self._ahead:
            if not future.cancel():
                future.exception()
        self._ahead.clear()

    def _leave(self) -> None:
        if self._sharing is not None:
            self._sharing.end()
        self._sharing = None

    def _shared(self, counts: Sequence[int], order: Sequence[int]) -> Batch:
        """A draw, which another process may have made. One thread makes all of them, in their order."""
        number, sharing = self._made, self._sharing
        self._made += 1
        batch = (
            self._assemble(counts, order) if sharing is None else sharing(number, lambda: self._assemble(counts, order))
        )
        return batch.pinned() if self._pin else batch

    def _assemble(self, counts: Sequence[int], order: Sequence[int]) -> Batch:
        """The rows of a draw that are this loader's share. `order`: the source of each row of the whole draw."""
        source_B, row_B = _rows_of(counts, order)
        source_B, row_B = source_B[self._share], row_B[self._share]
        parts = [(source_B == i, stream) for i, stream in enumerate(self._streams)]
        windows = [(here, *stream.windows(row_B[here])) for here, stream in parts if here.any()]
        if len(windows) == 1:
            _, tokens_BW, is_start_BW = windows[0]
        else:
            shape = (len(row_B), self._streams[0].width)
            tokens_BW, is_start_BW = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.bool_)
            for here, tokens, is_start in windows:
                tokens_BW[here], is_start_BW[here] = tokens, is_start
        rows = pack(tokens_BW, is_start_BW)
        return batch_of(rows, np.repeat(source_B[:, None], rows.tokens_BT.shape[1], axis=1))


def _rows_of(counts: Sequence[int], order: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source, and row within that source, of each row of a draw."""
    source_B = np.array(order, dtype=np.int64)
    row_B = np.empty_like(source_B)
    for source, count in enumerate(counts):
        here = source_B == source
        row_B[here] = count + np.arange(int(here.sum()))
    return source_B, row_B
