"""Routes of rows: pieces of packed rows, and what each server gets, token by token."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.parallel.layout import Order
from lmworks.parallel.routes import Lot, Routes, pieces, routes
from lmworks.parallel.sight import places
from lmworks.parallel.tasks import Plan, arranged, plain
from tests.oracles import tasks as oracle
from tests.parallel.layings import layings

CPU = torch.device("cpu")
Token = tuple[int, int]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any tasks on any laying; some ranks without tokens, some without tasks."""
    held, ranks = draw(layings())
    tasks = []
    for document, length in plain(held, ranks).lengths.items():
        edges = sorted({0, length, *draw(st.sets(st.integers(1, length), max_size=3))})
        tasks += [(document, a, b, draw(st.integers(0, ranks - 1))) for a, b in pairwise(edges)]
    return arranged(held, tasks, ranks)


def swapped(sent: list[list[list[Token]]], lots: list[Lot]) -> list[list[Token]]:
    """What comes to each rank when all ranks send [from][to]; the counts that both sides know are those of the runs."""
    ranks = range(len(sent))
    for i in ranks:
        assert [len(sent[i][j]) for j in ranks] == list(lots[i].sent)
        assert [len(sent[j][i]) for j in ranks] == list(lots[i].came)
    return [[token for i in ranks for token in sent[i][j]] for j in ranks]


@settings(deadline=None, max_examples=40)
@given(plans())
def test_every_server_computes_with_the_tokens_of_its_tasks_and_every_result_comes_home(plan: Plan) -> None:
    at = {where: token for token, where in oracle.home(plan.pieces).items()}
    found = [routes(plan, rank, CPU) for rank in range(plan.ranks)]
    for kind in ("queries", "keys"):
        lots: list[Lot] = [getattr(each, kind) for each in found]
        leaving = []
        for rank, lot in enumerate(lots):
            rows = [at[rank, row] for row in lot.rows.tolist()]
            stops = np.cumsum([0, *lot.sent])
            leaving.append([rows[a:b] for a, b in pairwise(stops)])
        came = swapped(leaving, lots)
        for rank, lot in enumerate(lots):
            computed = [came[rank][i] for i in lot.order.tolist()]
            assert [computed[i] for i in lot.home.tolist()] == came[rank], "home undoes order"
            wanted(plan, found[rank], rank, kind, computed)


def wanted(plan: Plan, route: Routes, rank: int, kind: str, computed: list[Token]) -> None:
    """Each run of the rank has the tokens of its task."""
    tasks = [task for task in plan.tasks if task.server == rank]
    for task, run in zip(tasks, route.runs, strict=True):
        if kind == "queries":
            own = computed[run.query : run.query + run.queries]
            assert own == [(task.document, i) for i in range(task.start, task.stop)]
        else:
            assert computed[run.key : run.key + run.keys] == [(task.document, i) for i in range(task.stop)]
    if kind == "queries":
        assert len(computed) == sum(run.queries for run in route.runs)


@given(st.sampled_from(get_args(Order)), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_pieces_are_the_documents_of_rows_token_by_token(order: Order, cp: int, rows: int, run: int, seed: int) -> None:
    """Any ids, also such that come twice in a row and in several rows."""
    readers, length = 2, 2 * cp * run
    ids = np.random.default_rng(seed).integers(0, 3, (readers, rows, length))
    held = [places(order, length, cp, rank).numpy() for rank in range(cp)]
    by_rank = np.stack([ids[reader][:, own] for reader in range(readers) for own in held])
    found = oracle.home(tuple(pieces(by_rank, held)))
    assert len(found) == ids.size, "every token is in one piece"
    numbers = {}
    for reader in range(readers):
        for row in range(rows):
            seen: dict[int, int] = {}
            for place, name in enumerate(ids[reader, row].tolist()):
                rank = next(i for i, own in enumerate(held) if place in own)
                offset = row * len(held[rank]) + int(np.flatnonzero(held[rank] == place)[0])
                token = next(token for token, where in found.items() if where == (reader * cp + rank, offset))
                within = seen.get(name, 0)
                seen[name] = within + 1
                assert token == (numbers.setdefault((reader, row, name), token[0]), within)
    assert len(set(numbers.values())) == len(numbers), "no two documents share a number"


def test_a_rank_without_tokens_or_tasks_has_empty_routes() -> None:
    plan = arranged(plain([], 2).pieces, [], 2)
    route = routes(plan, 1, CPU)
    assert (route.tokens, route.runs, route.queries.sent, route.keys.came) == (0, (), (0, 0), (0, 0))
    assert len(route.keys.rows) == len(route.queries.order) == 0
    assert pieces(np.zeros((2, 0, 5), dtype=np.int64), [np.arange(5)]) == []
