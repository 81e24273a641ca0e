"""Clocks of attention: tables, the roofline and one block, against slow ways of saying the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.speeds import Roofline, Speeds, Table, block_seconds, exchange_seconds, server_seconds
from lmworks.parallel.tasks import Sizes, arranged, pairs
from tests.oracles import clocks
from tests.parallel.layings import laid

SIZES = Sizes(query=16, keys=8, found=20)
NO_SEND = [(0.0, 0.0), (0.0, 0.0)]


def arrays(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def table(seconds_of_a_pair: float = 2.0) -> Table:
    queries, ratios = (16, 64, 256), (1.0, 2.0, 8.0)
    seconds = tuple(tuple(seconds_of_a_pair * pairs(round(q * r) - q, round(q * r)) for r in ratios) for q in queries)
    return Table(queries=queries, ratios=ratios, seconds=seconds)


@given(st.integers(1, 2000), st.integers(0, 20000))
def test_a_table_of_equal_pairs_gives_equal_pairs_everywhere(queries: int, before: int) -> None:
    found = table()(arrays(queries), arrays(before + queries))[0]
    assert found == pytest.approx(2 * pairs(before, before + queries), rel=1e-9)


def test_a_table_gives_its_entries_and_lies_between_them() -> None:
    made = Table(queries=(10, 1000), ratios=(1.0, 10.0), seconds=((55e-3, 955e-3), (500.5, 9500.5)))
    assert made(arrays(10, 1000, 10), arrays(10, 10000, 100)) == pytest.approx([55e-3, 9500.5, 955e-3])
    per_pair = made(arrays(100), arrays(100))[0] / pairs(0, 100)
    assert per_pair == pytest.approx((1e-3 * 1e-3) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("queries", "ratios", "seconds"),
    [
        ((2, 1), (1.0,), ((1.0,), (1.0,))),
        ((1, 2), (0.5,), ((1.0,), (1.0,))),
        ((1, 2), (1.0,), ((1.0,),)),
        ((1, 2), (1.0,), ((1.0,), (0.0,))),
        ((), (), ()),
    ],
)
def test_what_is_no_table_is_refused(queries: tuple[int, ...], ratios: tuple[float, ...], seconds: tuple) -> None:
    with pytest.raises(UsageError, match="table of attention times"):
        Table(queries=queries, ratios=ratios, seconds=seconds)


@given(st.integers(1, 300), st.integers(0, 500), st.sampled_from([1, 16, 128]))
def test_the_roofline_counts_whole_tiles(queries: int, before: int, tile: int) -> None:
    roof = Roofline(flops_per_pair=4.0, flops_per_second=8.0, sizes=SIZES, tile=tile)
    blocks = clocks.blocks(before, before + queries, tile)
    assert roof(arrays(queries), arrays(before + queries))[0] == pytest.approx(blocks * tile * tile / 2)


def test_the_knee_is_at_a_tile_and_memory_is_a_floor() -> None:
    roof = Roofline(flops_per_pair=1.0, flops_per_second=1.0, sizes=SIZES, tile=128)
    keys = arrays(4096, 4096, 4096)
    per_query = roof(arrays(16, 128, 1024), keys) / (16, 128, 1024)
    assert per_query[0] == pytest.approx(8 * per_query[1])
    assert per_query[1] == pytest.approx(per_query[2], rel=0.15)
    slow = Roofline(flops_per_pair=1.0, flops_per_second=1e9, sizes=SIZES, bytes_per_second=2.0)
    assert slow(arrays(3), arrays(7))[0] == (3 * 36 + 7 * 8) / 2


def test_servers_and_exchanges_of_a_plan() -> None:
    """Rank 0 holds 6 tokens; rank 1 computes its last two queries, and a document of its own."""
    plan = arranged(laid([6, 3], [0, 1]), [(0, 0, 4, 0), (0, 4, 6, 1), (1, 0, 3, 1)], 2)
    flat = Table(queries=(1,), ratios=(1.0,), seconds=((1.0,),))
    assert server_seconds(plan, flat) == pytest.approx([10, 11 + 6])
    speeds = Speeds(attention=flat, linear=1.0, bytes_per_second=2.0, sizes=SIZES)
    assert exchange_seconds(plan, speeds, backward=False) == ((2 * 16 + 6 * 8) / 2, 2 * 20 / 2)
    assert exchange_seconds(plan, speeds, backward=True) == ((2 * 52 + 6 * 8) / 2, (2 * 16 + 6 * 8) / 2)
    assert not server_seconds(arranged((), (), 3), flat).any()


DRAWN = st.lists(st.floats(0, 9), min_size=3, max_size=3).map(np.array)
EXCHANGE = st.tuples(st.floats(0, 9), st.floats(0, 9))


@settings(deadline=None)
@given(DRAWN, DRAWN, DRAWN, DRAWN, EXCHANGE, EXCHANGE, st.floats(0, 1))
def test_a_block_in_turns_is_that_of_a_slow_clock(l0, l1, a0, a1, e0, e1, before) -> None:  # type: ignore[no-untyped-def]
    found = {
        turns: block_seconds(turns, (l0, l1), (a0, a1), (e0, e1), before=before)
        for turns in ("ticks", "in-block", "single", "signal")
    }
    assert found["in-block"] == pytest.approx(clocks.in_block((l0, l1), (a0, a1), (e0, e1), before))
    assert found["ticks"] == pytest.approx(clocks.ticks((l0, l1), (a0, a1), (e0, e1)))
    assert found["signal"] <= found["ticks"] * (1 + 1e-12) <= found["single"] * (1 + 1e-9)
    assert found["in-block"] <= found["single"] * (1 + 1e-9)
    work = [l0 + l1 + a0 + a1, l0.max() + l1.max() + a0.max() + a1.max()]
    assert work[0].max() <= found["in-block"] * (1 + 1e-9)
    assert block_seconds("in-block", (l0, l1), (a0, a1), NO_SEND) <= work[1] * (1 + 1e-9)
