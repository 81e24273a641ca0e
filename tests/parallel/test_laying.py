"""Packings of documents on ranks: nothing is lost, and each does what it is for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.laying import by_work, over_ranks, rows, steps, whole
from lmworks.parallel.tasks import plain

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 30))
def test_rows_cut_documents_where_the_packer_does(lengths: list[int], tokens: int) -> None:
    """Token by token: a row's documents are the runs of equal numbers in it."""
    stream = [document for document, length in enumerate(lengths) for _ in range(length)]
    want = []
    for start in range(0, len(stream) - tokens + 1, tokens):
        row = stream[start : start + tokens]
        want.append(tuple(row.count(document) for document in sorted(set(row))))
    assert list(rows(lengths, tokens)) == want


@given(LENGTHS, st.integers(1, 4), st.integers(1, 20), st.integers(1, 2))
def test_steps_hand_rows_out_in_order(lengths: list[int], ranks: int, tokens: int, rows_each: int) -> None:
    made = list(steps(lengths, ranks=ranks, tokens=tokens, rows_each=rows_each))
    every = list(rows(lengths, tokens))
    assert [row for step in made for rank in step for row in rank] == every[: len(made) * ranks * rows_each]
    assert len(every) - len(made) * ranks * rows_each < ranks * rows_each


@given(LENGTHS, st.integers(1, 4), st.integers(1, 200))
def test_by_work_keeps_documents_whole_within_the_room(lengths: list[int], ranks: int, room: int) -> None:
    held, left = by_work(lengths, ranks=ranks, room=room)
    assert sorted([*left, *(length for own in held for length in own)]) == sorted(lengths)
    assert all(sum(own) <= room for own in held)
    assert all(sum(own) + length > room for own in held for length in left)


def test_by_work_is_more_equal_than_rows_in_order() -> None:
    lengths = [64, 64, 8, 8, 8, 8, 8, 8, 8, 8]
    held, left = by_work(lengths, ranks=2, room=96)
    assert [sum(x * x for x in own) for own in held] == [64 * 64 + 4 * 64] * 2
    assert not left


@given(LENGTHS, st.integers(1, 4))
def test_over_ranks_every_rank_has_as_many_tokens_and_as_much_attention(lengths: list[int], ranks: int) -> None:
    plan = plain(over_ranks(lengths, ranks), ranks)
    assert list(plan.lengths.values()) == lengths
    own = [sum(piece.stop - piece.start for piece in plan.pieces if piece.rank == rank) for rank in range(ranks)]
    assert max(own) - min(own) <= 2 * len(lengths)
    assert max(plan.loads) - min(plan.loads) <= 2 * sum(length + 1 for length in lengths)


def test_documents_are_numbered_and_follow_each_other_on_their_rank() -> None:
    assert [tuple(piece) for piece in whole([[3, 2], [], [4]], first=7)] == [
        (7, 0, 3, 0, 0),
        (8, 0, 2, 0, 3),
        (9, 0, 4, 2, 0),
    ]


def test_no_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="0 ranks"):
        over_ranks([3], 0)
