"""Tasks of core attention: cost, coverage, and what must travel, against counting token by token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.tasks import Piece, Plan, Sizes, Task, arranged, pairs, plain
from tests.oracles import tasks as oracle
from tests.parallel.layings import laid, layings

SIZES = Sizes(query=7, keys=11, found=5)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any tasks at all on any laying."""
    pieces, ranks = draw(layings())
    lengths = plain(pieces, ranks).lengths
    tasks = []
    for document, length in lengths.items():
        edges = sorted({0, length, *draw(st.sets(st.integers(1, length), max_size=4))})
        tasks += [(document, a, b, draw(st.integers(0, ranks - 1))) for a, b in pairwise(edges)]
    return arranged(pieces, tasks, ranks)


@settings(deadline=None)
@given(plans())
def test_loads_and_traffic_are_those_of_counting_tokens(plan: Plan) -> None:
    assert list(plan.loads) == oracle.work(plan)
    for counted, sent in zip(oracle.sent(plan), (plan.sent_queries, plan.sent_keys), strict=True):
        assert {(i, j): n for i, row in enumerate(sent) for j, n in enumerate(row) if n} == counted
    queries, keys = oracle.sent(plan)
    assert plan.moved_bytes(SIZES) == queries.total() * (7 + 5) + keys.total() * 11
    assert plan.buffer_bytes(SIZES) == oracle.largest_buffer(plan, SIZES)


@settings(deadline=None)
@given(plans())
def test_moves_bring_every_server_what_its_tasks_need_in_order(plan: Plan) -> None:
    at = oracle.home(plan.pieces)
    for move in (*plan.query_moves, *plan.key_moves):
        assert [at[move.document, i] for i in range(move.start, move.stop)] == [
            (move.source, move.offset + i) for i in range(move.stop - move.start)
        ]
    needed = [(task.document, i, task.server) for task in plan.tasks for i in range(task.start, task.stop)]
    assert [(m.document, i, m.server) for m in plan.query_moves for i in range(m.start, m.stop)] == needed
    keys = [(d, i, server) for (server, d), last in plan.last_keys.items() for i in range(last)]
    assert [(m.document, i, m.server) for m in plan.key_moves for i in range(m.start, m.stop)] == keys


@settings(deadline=None)
@given(plans())
def test_the_pairs_of_all_ranks_are_those_of_the_documents_whatever_the_plan(plan: Plan) -> None:
    whole = sum(length * (length + 1) // 2 for length in plan.lengths.values())
    assert sum(plan.loads) == whole == sum(plain(plan.pieces, plan.ranks).loads)


@given(layings())
def test_the_plain_plan_sends_no_query_and_whole_documents_no_key(laying: tuple[tuple[Piece, ...], int]) -> None:
    pieces, ranks = laying
    plan = plain(pieces, ranks)
    assert not any(map(sum, plan.sent_queries))
    if len({piece.document for piece in pieces}) == len({(piece.document, piece.rank) for piece in pieces}):
        assert plan.moved_bytes(SIZES) == 0


def test_a_pair_of_mirrored_rows_costs_one_more_than_the_document_is_long() -> None:
    length = 13
    assert {pairs(i, i + 1) + pairs(length - 1 - i, length - i) for i in range(6)} == {length + 1}
    assert 2 * pairs(6, 7) == length + 1


@pytest.mark.parametrize(
    ("pieces", "tasks", "told"),
    [
        ([(0, 0, 4, 0, 0)], [(0, 0, 3, 0)], "document 0: 3 of 4 tokens are computed"),
        ([(0, 0, 4, 0, 0)], [(0, 0, 3, 0), (0, 2, 4, 1)], r"\[2, 4\) is computed where token 2 was due"),
        ([(0, 0, 4, 0, 0)], [(0, 0, 4, 2)], "there is no rank 2"),
        ([(0, 0, 4, 0, 0)], [], "document 0 has no task"),
        ([(0, 0, 4, 0, 0)], [(0, 0, 4, 0), (1, 0, 1, 0)], "document 1 has tasks, and no tokens"),
        ([(0, 1, 4, 0, 0)], [(0, 0, 4, 0)], "is held where token 0 was due"),
        ([(0, 0, 0, 0, 0)], [(0, 0, 0, 0)], r"\[0, 0\) is held where no token was due"),
    ],
)
def test_a_plan_that_is_none_is_refused(pieces: list[tuple[int, ...]], tasks: list[tuple[int, ...]], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Plan(ranks=2, pieces=tuple(Piece(*p) for p in pieces), tasks=tuple(Task(*t) for t in tasks))


def test_a_digest_tells_two_plans_apart_and_not_the_order_of_pieces() -> None:
    pieces = laid([5, 7], [0, 1])
    assert plain(pieces, 2).digest == plain(pieces[::-1], 2).digest
    assert plain(pieces, 2).digest != arranged(pieces, [(0, 0, 5, 0), (1, 0, 7, 0)], 2).digest
