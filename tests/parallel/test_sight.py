"""Places of tokens, and masks between two ranks, against the mask of whole rows."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmworks.model.attention import boolean_mask
from lmworks.parallel.layout import Order
from lmworks.parallel.sight import Sight, places

ORDERS = st.sampled_from(get_args(Order))


@given(ORDERS, st.integers(1, 6), st.integers(1, 5))
def test_every_token_is_on_one_rank_in_rising_order(order: Order, ranks: int, run: int) -> None:
    length = 2 * ranks * run
    held = [places(order, length, ranks, rank) for rank in range(ranks)]
    assert all(len(own) == 2 * run for own in held)
    assert all(bool((own.diff() > 0).all()) for own in held)
    assert sorted(torch.cat(held).tolist()) == list(range(length))


def sight(order: Order, ranks: int, length: int, window: int | None, documents: Tensor | None) -> Sight:
    held = tuple(places(order, length, ranks, rank) for rank in range(ranks))
    by_rank = None if documents is None else torch.stack([documents[:, own] for own in held], 1)
    return Sight(places=held, here=held, window=window, documents_BRT=by_rank)


@given(ORDERS, st.integers(1, 4), st.integers(1, 4), st.none() | st.integers(1, 9), st.none() | st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_pairs_make_up_the_mask_of_whole_rows(
    order: Order, ranks: int, run: int, window: int | None, seed: int | None
) -> None:
    """Any documents, also such that are interrupted."""
    length, documents = 2 * ranks * run, None
    if seed is not None:
        documents = torch.randint(0, 2, (2, length), generator=torch.Generator().manual_seed(seed))
    found = sight(order, ranks, length, window, documents)
    whole = boolean_mask(length, length, window, documents, torch.device("cpu"))
    for asking in range(ranks):
        by_keys = whole[:, :, found.places[asking]]
        assert torch.equal(found.row(asking), by_keys[..., torch.cat(found.places)])
        for asked in range(ranks):
            want, own = by_keys[..., found.places[asked]], torch.zeros_like(by_keys[..., found.places[asked]])
            pair = found.pair(asking, asked)
            if pair is not None:
                own[:, :, pair.queries, pair.keys] = True if pair.seen is None else pair.seen
            assert torch.equal(own, want)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_ranks_have_the_same_work_and_no_mask_but_for_their_own_keys(ranks: int) -> None:
    """Queries on the keys of a later rank see its first run; the later run of queries sees all of an earlier rank."""
    run = 3
    found = sight("zigzag", ranks, 2 * ranks * run, None, None)
    first, second, both = slice(0, run), slice(run, 2 * run), slice(0, 2 * run)
    for asking in range(ranks):
        for asked in range(ranks):
            pair = found.pair(asking, asked)
            assert pair is not None
            want = (both, first) if asked < asking else (second, both) if asked > asking else (both, both)
            assert (pair.queries, pair.keys) == want
            assert (pair.seen is None) == (asking != asked)


def test_keys_that_come_later_cost_nothing() -> None:
    found = sight("contiguous", 3, 12, None, None)
    assert [found.pair(0, asked) is None for asked in range(3)] == [False, True, True]
    near = sight("contiguous", 3, 12, 2, None)
    assert near.pair(2, 0) is None, "out of the window"
