from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.data.holdout import Holdout
from lmworks.data.pack import IGNORED, Documents
from tests.data.toy import BOS, as_lists, documents

sizes = st.lists(st.integers(2, 9), min_size=1, max_size=6)


def pieces(limit: int = 20000) -> np.ndarray:
    """3 bytes for each token but the special one, as the toy documents count theirs."""
    table = np.full(limit, 3, dtype=np.int64)
    table[BOS] = 0
    return table


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_every_token_counts_once_and_bytes_are_whole(
    first: list[int], second: list[int], length: int, batch_rows: int, known: bool
) -> None:
    toys = [documents(first), documents(second, first=5000)]
    holdout = Holdout(toys, sequence_length=length, batch_rows=batch_rows, piece_bytes=pieces() if known else None)
    targets: Counter[int] = Counter()
    for batch in holdout:
        targets.update(batch.targets_BT.ravel().tolist())
    tokens = Counter(token for toy in toys for document in as_lists(toy) for token in document)
    tokens[BOS] -= len(first) + len(second)
    targets.pop(IGNORED, None)
    assert targets == tokens
    assert sum(batch.n_bytes for batch in holdout) == holdout.n_bytes == sum(int(toy.n_bytes.sum()) for toy in toys)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 7), st.integers(0, 9))
def test_the_first_rows_are_the_first_rows_with_their_own_bytes(lengths: list[int], length: int, rows: int) -> None:
    toy = documents(lengths)
    whole = list(Holdout([toy], sequence_length=length, batch_rows=1, piece_bytes=pieces()))
    some = list(Holdout([toy], sequence_length=length, batch_rows=1, piece_bytes=pieces(), rows=rows))
    assert len(some) == min(rows, len(whole))
    for a, b in zip(some, whole, strict=False):
        assert torch.equal(a.tokens_BT, b.tokens_BT)
        assert torch.equal(a.targets_BT, b.targets_BT)
        counted = int(((a.targets_BT != IGNORED) & (a.targets_BT != BOS)).sum())
        assert a.n_bytes == b.n_bytes == 3 * counted, "bytes of exactly the tokens that are targets"


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_shares_together_are_the_whole_in_equal_shapes(
    lengths: list[int], length: int, batch_rows: int, world: int
) -> None:
    toy = documents(lengths)
    whole = Holdout([toy], sequence_length=length, batch_rows=batch_rows, piece_bytes=pieces())
    ranks = [
        Holdout([toy], sequence_length=length, batch_rows=batch_rows, piece_bytes=pieces(), share=(i, world))
        for i in range(world)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert len({part.tokens_BT.shape for part in parts}) == 1
        joined = torch.stack([part.targets_BT for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(joined[: batch.rows], batch.targets_BT)
        assert bool((joined[batch.rows :] == IGNORED).all())
        assert sum(part.n_bytes for part in parts) == batch.n_bytes


def test_padding_is_a_document_of_its_own() -> None:
    (batch,) = Holdout([documents([4])], sequence_length=6)  # 7 1000 1001 7
    assert batch.tokens_BT.tolist() == [[7, 1000, 1001, 7, 0, 0]]
    assert batch.targets_BT.tolist() == [[1000, 1001, 7, IGNORED, IGNORED, IGNORED]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_the_order_is_by_hash_over_all_sources() -> None:
    a, b = documents([3, 3]), documents([3, 3], first=5000)
    swapped = Documents(a.tokens, a.starts, a.lengths, a.n_bytes, np.array([9, 2], dtype=np.uint64))
    other = Documents(b.tokens, b.starts, b.lengths, b.n_bytes, np.array([5, 1], dtype=np.uint64))
    (batch,) = Holdout([swapped, other], sequence_length=11)
    inner = [token for token in batch.tokens_BT[0].tolist() if token != BOS]
    assert inner == [5001, 1001, 5000, 1000]


def test_no_documents_give_no_batches() -> None:
    empty = documents([3])
    none = Documents(empty.tokens, *(array[:0] for array in (empty.starts, empty.lengths, empty.n_bytes, empty.hashes)))
    assert list(Holdout([none], sequence_length=4)) == []
    assert len(Holdout([none], sequence_length=4)) == 0
