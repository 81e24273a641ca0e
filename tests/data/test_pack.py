from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.core.seeds import seed_for
from lmworks.data.pack import IGNORED, Stream, Tokens, pack, shuffled
from tests.data.toy import BOS, as_lists, documents
from tests.oracles import packing

lengths = st.lists(st.integers(2, 9), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 3))
def test_rows_are_the_oracles_rows_over_several_epochs(sizes: list[int], length: int, seed: int, arrays: int) -> None:
    toy = documents(sizes, arrays=arrays)
    length = min(length, toy.n_tokens - 1)
    stream = Stream(toy, sequence_length=length, seed=seed, name="toy")

    def order(epoch: int) -> list[int]:
        return shuffled(len(sizes), seed_for(seed, "data", "toy", epoch)).tolist()

    n_rows = 3 * toy.n_tokens // length + 2
    per_round = toy.n_tokens // length
    windows = list(islice(packing.rows(packing.endless(as_lists(toy), order), length), n_rows + per_round))
    expected = packing.shuffle(windows, per_round, lambda i: shuffled(per_round, seed_for(seed, "rows", "toy", i)))[
        :n_rows
    ]
    found = pack(*stream.windows(np.arange(n_rows)))
    assert found.tokens_BT.tolist() == [row.tokens for row in expected]
    assert found.targets_BT.tolist() == [row.targets for row in expected]
    assert found.positions_BT.tolist() == [row.positions for row in expected]
    assert found.documents_BT.tolist() == [row.documents for row in expected]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 12), st.integers(0, 1000), st.integers(0, 40))
def test_a_row_is_the_pieces_of_documents_that_are_named(sizes: list[int], length: int, seed: int, row: int) -> None:
    toy = documents(sizes)
    length = min(length, toy.n_tokens - 1)
    stream = Stream(toy, sequence_length=length, seed=seed, name="toy")
    by_hash = {f"{int(key):016x}": tokens for key, tokens in zip(toy.hashes, as_lists(toy), strict=True)}
    pieces = stream.documents(row)
    told = [token for name, start, count in pieces for token in by_hash[name][start : start + count]]
    assert told == pack(*stream.windows(np.array([row]))).tokens_BT[0].tolist()
    assert [piece.start for piece in pieces[1:]] == [0] * (len(pieces) - 1), "only the first may be cut in front"


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 7), st.integers(0, 1000))
def test_no_token_is_lost_or_doubled(sizes: list[int], length: int, seed: int) -> None:
    """n_tokens rounds are a whole number of epochs: every token is a target equally often, but no first bos."""
    toy = documents(sizes)
    length = min(length, toy.n_tokens - 1)
    stream = Stream(toy, sequence_length=length, seed=seed, name="toy")
    n_rows = toy.n_tokens * (toy.n_tokens // length)
    found = pack(*stream.windows(np.arange(n_rows)))
    times = n_rows * length // toy.n_tokens
    inputs = Counter(found.tokens_BT.ravel().tolist())
    targets = Counter(found.targets_BT.ravel().tolist())
    tokens = Counter(token for document in as_lists(toy) for token in document)
    assert inputs == Counter({token: count * times for token, count in tokens.items()})
    assert targets.pop(IGNORED) == len(sizes) * times, "exactly the bos of each document, each epoch"
    tokens[BOS] -= len(sizes)
    assert targets == Counter({token: count * times for token, count in tokens.items()})


def test_rows_that_stand_together_come_from_many_documents() -> None:
    """A document of 100 windows does not fill the batches: 20 documents, 8 rows, at least 4 documents among them."""
    toy = documents([400] * 20)
    stream = Stream(toy, sequence_length=4, seed=0, name="toy")
    owner = {token: i for i, document in enumerate(as_lists(toy)) for token in document if token != BOS}
    for first in range(0, 400, 8):
        tokens, _ = stream.windows(np.arange(first, first + 8))
        assert len({owner[t] for t in tokens.ravel().tolist() if t in owner}) >= 4


def test_a_small_case_by_eye() -> None:
    toy = documents([4, 3, 5], first=10)  # 7 10 11 7 | 7 12 7 | 7 13 14 15 7
    windows = toy.tokens.take(np.array([[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]))
    starts = np.array([[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=bool)
    found = pack(windows, starts)
    assert found.tokens_BT.tolist() == [[7, 10, 11, 7, 7], [12, 7, 7, 13, 14]]
    assert found.targets_BT.tolist() == [[10, 11, 7, -100, 12], [7, -100, 13, 14, 15]]
    assert found.positions_BT.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]
    assert found.documents_BT.tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]


def test_rows_may_be_asked_for_in_any_order() -> None:
    toy = documents([5, 9, 4])
    stream = Stream(toy, sequence_length=3, seed=1, name="toy")
    rows = np.array([40, 3, 17, 3, 0])
    tokens, starts = stream.windows(rows)
    for i, row in enumerate(rows):
        alone, start = stream.windows(np.array([row]))
        assert tokens[i].tolist() == alone[0].tolist()
        assert starts[i].tolist() == start[0].tolist()


def test_every_epoch_has_another_order_and_another_seed_too() -> None:
    orders = {tuple(shuffled(50, seed_for(seed, "data", "toy", epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


@given(st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_the_order_is_that_of_splitmix_in_plain_integers(count: int, seed: int) -> None:
    def splitmix(x: int) -> int:
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    expected = sorted(range(count), key=lambda i: splitmix(splitmix(i) ^ splitmix(seed)))
    assert shuffled(count, seed).tolist() == expected


def test_sequence_longer_than_the_data_names_the_longest_legal_one() -> None:
    toy = documents([4, 5])
    Stream(toy, sequence_length=8, seed=0, name="books")
    with pytest.raises(DataError, match="sequence longer than the data") as caught:
        Stream(toy, sequence_length=9, seed=0, name="books")
    assert "'books' has 9" in str(caught.value)
    assert caught.value.legal == "sequence_length up to 8"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data())
def test_tokens_across_arrays_are_one_long_array(sizes: list[int], data: st.DataObject) -> None:
    arrays = [np.arange(size, dtype=np.uint32) + 10 * i for i, size in enumerate(sizes)]
    flat = np.concatenate(arrays).astype(np.int64)
    if not len(flat):
        return
    at = np.array(data.draw(st.lists(st.integers(0, len(flat) - 1), max_size=10)), dtype=np.int64)
    assert Tokens(arrays).take(at).tolist() == flat[at].tolist()
