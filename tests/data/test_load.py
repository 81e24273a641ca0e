from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.data.load import Batch
from tests.data.toy import as_lists, documents, loader

SOURCES = [documents([5, 9, 4, 7]), documents([6, 3, 3], first=5000), documents([30], first=9000)]
WEIGHTS = [0.5, 0.3, 0.2]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("tokens_BT", "targets_BT", "positions_BT", "documents_BT")
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 3))
def test_any_draws_give_the_same_rows(draws: list[int], prefetch: int) -> None:
    pieces = loader(SOURCES, weights=WEIGHTS, prefetch=prefetch)
    found = torch.cat([pieces.draw(rows).tokens_BT for rows in draws])
    pieces.close()
    assert torch.equal(found, loader(SOURCES, weights=WEIGHTS).draw(sum(draws)).tokens_BT)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("share", [(0, 1), (1, 3)])
def test_origins_are_those_of_the_last_draw(prefetch: int, share: tuple[int, int]) -> None:
    found = loader(SOURCES, weights=WEIGHTS, prefetch=prefetch, share=share)
    assert found.origins() == []
    by_name = {
        name: {f"{int(key):016x}": tokens for key, tokens in zip(source.hashes, as_lists(source), strict=True)}
        for name, source in zip("abc", SOURCES, strict=True)
    }
    for rows in (4, 4, 7, 4):
        batch = found.draw(rows)
        origins = found.origins()
        told = [[t for key, at, n in o.documents for t in by_name[o.source][key][at : at + n]] for o in origins]
        assert told == batch.tokens_BT.tolist()
    found.close()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_at_every_position_is_the_unbroken_run(prefetch: int) -> None:
    unbroken = loader(SOURCES, weights=WEIGHTS, prefetch=prefetch)
    states, batches = [], []
    for _ in range(20):
        states.append(json.dumps(unbroken.state()))
        batches.append(unbroken.draw(3))
    for i, state in enumerate(states):
        resumed = loader(SOURCES, weights=WEIGHTS, prefetch=prefetch)
        resumed.draw(5)
        resumed.load(json.loads(state))
        assert same(resumed.draw(3), batches[i])
        if i + 1 < len(batches):
            assert same(resumed.draw(3), batches[i + 1])
        resumed.close()
    unbroken.close()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9))
def test_shares_together_are_the_whole(world: int, rows: int) -> None:
    whole = loader(SOURCES, weights=WEIGHTS)
    ranks = [loader(SOURCES, weights=WEIGHTS, share=(i, world)) for i in range(world)]
    for _ in range(3):
        batch = whole.draw(rows)
        parts = [rank.draw(rows) for rank in ranks]
        for i, part in enumerate(parts):
            assert same(part, batch[i::world])
        assert all(rank.state() == whole.state() for rank in ranks)


def test_a_state_moves_to_another_world_size() -> None:
    first = loader(SOURCES, weights=WEIGHTS)
    first.draw(7)
    half = loader(SOURCES, weights=WEIGHTS, share=(1, 2))
    half.load(first.state())
    assert same(half.draw(4), first.draw(4)[1::2])


def test_a_source_keeps_its_order_when_another_joins() -> None:
    alone = loader(SOURCES[:1]).draw(6).tokens_BT
    mixed = loader(SOURCES[:2]).draw(12).tokens_BT
    assert torch.equal(mixed[(mixed < 5000).all(dim=1)], alone)


def test_epochs_are_counted_by_source() -> None:
    both = loader(SOURCES[:2])  # 25 and 12 tokens, 4 a row
    both.draw(10)
    assert both.epochs() == {"a": 5 * 4 / 25, "b": 5 * 4 / 12}


def test_another_size_of_draw_throws_away_what_was_prepared() -> None:
    ahead, plain = loader(SOURCES, weights=WEIGHTS, prefetch=2), loader(SOURCES, weights=WEIGHTS)
    for rows in (2, 2, 5, 1, 1, 4):
        assert same(ahead.draw(rows), plain.draw(rows))
        assert ahead.state() == plain.state()
    ahead.close()
    assert same(ahead.draw(2), plain.draw(2))
    ahead.close()


def test_another_seed_is_refused_and_named() -> None:
    with pytest.raises(DataError, match="seed is 2, was 1"):
        loader(SOURCES, seed=2).load(loader(SOURCES, seed=1).state())


def test_other_sources_are_refused_and_named() -> None:
    with pytest.raises(DataError, match="the source 'c' is gone"):
        loader(SOURCES[:2]).load(loader(SOURCES).state())
    with pytest.raises(DataError, match="the source 'b' is new"):
        loader(SOURCES[:2]).load(loader(SOURCES[:1]).state())


@pytest.mark.parametrize("share", [(1, 1), (-1, 2), (0, 0)])
def test_a_share_lies_within_the_world(share: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= i < n"):
        loader(SOURCES, share=share)


def test_a_draw_has_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        loader(SOURCES).draw(0)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_pinned_batch_is_the_same_batch_on_the_gpu(prefetch: int) -> None:
    pinned = loader(SOURCES, weights=WEIGHTS, prefetch=prefetch, pin=True)
    plain = loader(SOURCES, weights=WEIGHTS)
    for _ in range(4):
        batch = pinned.draw(3)
        assert batch.tokens_BT.is_pinned()
        assert same(batch.to("cuda").to("cpu"), plain.draw(3))
    pinned.close()


def test_a_batch_splits_into_micro_batches() -> None:
    batch = loader(SOURCES).draw(7)
    parts = batch.split(3)
    assert [part.rows for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.targets_BT for part in parts]), batch.targets_BT)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.documents_BT.dtype == torch.int64
    assert batch.n_bytes == 0
    assert same(batch.to("cpu"), batch)
