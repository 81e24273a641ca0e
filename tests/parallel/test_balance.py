"""The planner of attention: loads, bytes, tiles and reasons, on documents laid in every way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.balance import LADDER, balance
from lmworks.parallel.tasks import Piece, Sizes, pairs, plain
from tests.oracles import tasks as oracle
from tests.parallel.layings import laid, layings

SIZES = Sizes(query=8, keys=4, found=9)
K = 1024
Laying = tuple[tuple[Piece, ...], int]


@settings(deadline=None, max_examples=200)
@given(layings(), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([1, 4, 16]))
def test_no_load_exceeds_the_tolerance_but_by_a_smallest_shard(laying: Laying, tolerance: float, tile: int) -> None:
    pieces, ranks = laying
    plan = balance(pieces, ranks, sizes=SIZES, tolerance=tolerance, tile=tile)
    assert list(plan.loads) == oracle.work(plan)
    whole = sum(plan.loads)
    allowed = max(-(-whole // ranks), int((1 + tolerance) * whole / ranks))
    shards = [min(length * (length + 1) // 2, 2 * tile * (length + 1)) for length in plan.lengths.values()]
    assert max(plan.loads) <= max(allowed, min(plan.loads) + max(shards))
    assert (plan.reason is not None) == (max(plan.loads) > allowed)


@settings(deadline=None)
@given(layings(), st.randoms(use_true_random=False))
def test_every_rank_finds_the_same_plan(laying: Laying, order: Any) -> None:
    pieces, ranks = laying
    shuffled = list(pieces)
    order.shuffle(shuffled)
    assert balance(pieces, ranks, sizes=SIZES).digest == balance(shuffled, ranks, sizes=SIZES).digest


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(2, 4), st.sampled_from([8, 32]))
def test_short_documents_stay_whole_and_shards_of_long_ones_are_tiles(
    lengths: list[int], ranks: int, tile: int
) -> None:
    pieces = laid(lengths, [0] * len(lengths))
    plan = balance(pieces, ranks, sizes=SIZES, tolerance=0, tile=tile)
    for document, length in enumerate(lengths):
        servers = {task.server for task in plan.tasks if task.document == document}
        if length < tile:
            assert len(servers) == 1
        for task in plan.tasks:
            if task.document == document and len(servers) > 1:
                middle = task.start < length / 2 < task.stop
                assert task.stop - task.start >= (tile - length % 2 if middle else tile)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 4))
def test_what_is_in_balance_moves_nothing(length: int, ranks: int) -> None:
    plan = balance(laid([length] * ranks, list(range(ranks))), ranks, sizes=SIZES, tolerance=0)
    assert plan.moved_bytes(SIZES) == 0
    assert plan.loads == (length * (length + 1) // 2,) * ranks


def test_the_example_of_the_paper() -> None:
    """One document of 128 K on a rank and eight of 16 K on the other: 1.78 of the mean, and in balance 1.00."""
    pieces = laid([128 * K] + [16 * K] * 8, [0] + [1] * 8)
    assert plain(pieces, 2).imbalance == pytest.approx(1.78, abs=0.005)
    plan = balance(pieces, 2, sizes=SIZES, tolerance=0)
    assert plan.imbalance == pytest.approx(1, abs=0.005)
    assert balance(pieces, 2, sizes=SIZES, tolerance=0, tile=1).imbalance == pytest.approx(1, abs=2e-5)
    first = next(task for task in plan.tasks if task.server == 1 and task.document == 0)
    assert first.start + first.stop == 128 * K  # one run around the middle
    assert plan.last_keys[1, 0] == first.stop < 128 * K  # and no key behind it


def filled(rng: np.random.Generator, ranks: int, budget: int) -> tuple[Piece, ...]:
    """Documents of 256 to 128 K tokens, log-uniform, laid on ranks of so many tokens; the last of each is cut."""
    lengths, places = [], []
    for rank in range(ranks):
        room = budget
        while room:
            length = min(room, int(256 * 512 ** rng.random()))
            lengths.append(length)
            places.append(rank)
            room -= length
    return laid(lengths, places)


def test_a_log_uniform_mix_on_eight_ranks_moves_a_few_percent_of_a_gather() -> None:
    """Of the dossier's own code: 1.70 of the mean; 6.5, 4.8, 4.1, 3.2 % of all keys to all ranks at 0, .05, .1, .2,
    out not counted. Ours are held on the mean of 12 draws."""
    sizes, ranks, budget = Sizes(query=2, keys=1, found=0), 8, 128 * K
    full = ranks * (ranks - 1) * budget * sizes.keys
    draws = [filled(np.random.default_rng(seed), ranks, budget) for seed in range(12)]
    assert 1.6 < sum(plain(pieces, ranks).imbalance for pieces in draws) / 12 < 2.0
    shares = []
    for tolerance in (0.0, 0.05, 0.1, 0.2):
        plans = [balance(pieces, ranks, sizes=sizes, tolerance=tolerance) for pieces in draws]
        assert max(plan.imbalance for plan in plans) < 1.005 + tolerance
        shares.append(sum(plan.moved_bytes(sizes) for plan in plans) / 12 / full)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 0.1
    assert shares[3] < 0.055


def test_the_next_candidate_is_tried_where_the_best_cannot_be_cut() -> None:
    """The long document is worth most per byte and has no shard that is small enough; the short one goes."""
    pieces = laid([40, 12, 12], [0, 0, 1])
    plan = balance(pieces, 2, sizes=SIZES, tolerance=0, tile=40)
    assert {task.document for task in plan.tasks if task.server == 1} == {1, 2}


def test_queries_go_where_their_keys_are() -> None:
    """Late halves of two documents lie on rank 0, each early half on the rank that takes from that document."""
    pieces = (Piece(0, 0, 64, 2, 0), Piece(0, 64, 128, 0, 0), Piece(1, 0, 64, 1, 0), Piece(1, 64, 128, 0, 64))
    plan = balance(pieces, 3, sizes=SIZES, tolerance=0.1, tile=1)
    assert {(task.server, task.document) for task in plan.tasks if task.server} == {(1, 1), (2, 0)}
    assert plan.imbalance <= 1.1


def test_an_exchange_that_does_not_fit_raises_the_tolerance_and_says_so() -> None:
    pieces = filled(np.random.default_rng(3), 8, 8 * K)
    asked = balance(pieces, 8, sizes=SIZES, tolerance=0.0)
    needed = asked.buffer_bytes(SIZES)
    room = needed - needed // 8
    raised = balance(pieces, 8, sizes=SIZES, tolerance=0.0, buffer_bytes=room)
    assert raised.tolerance in LADDER
    assert raised.buffer_bytes(SIZES) <= room < needed
    assert raised.reason is not None
    assert f"needs {needed} bytes, and the buffer has {room}" in raised.reason
    pieces = laid([3 * K], [0])
    none = balance(pieces, 3, sizes=SIZES, buffer_bytes=0)
    assert none.tasks == plain(pieces, 3).tasks
    assert "nothing moves" in str(none.reason)


def test_a_buffer_that_not_even_plain_attention_fits_is_refused() -> None:
    pieces = (Piece(0, 0, 64, 0, 0), Piece(0, 64, 128, 1, 0))
    least = 64 * SIZES.keys
    with pytest.raises(UsageError, match=rf"{least} where every rank computes its own(.|\n)*{least} bytes or more"):
        balance(pieces, 2, sizes=SIZES, buffer_bytes=least - 1)


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_token_and_ranks_without_any(ranks: int) -> None:
    plan = balance(laid([1], [0]), ranks, sizes=SIZES, tolerance=0)
    assert sum(plan.loads) == 1 == pairs(0, 1)
    assert balance((), ranks, sizes=SIZES).tasks == ()
