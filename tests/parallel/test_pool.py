"""A model whose ranks serve each other's attention learns what it learns in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from lmworks.core.errors import UsageError
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.pool import Pool
from lmworks.parallel.servers import Servers
from lmworks.parallel.tasks import Plan, Sizes, plain
from lmworks.parallel.wire import Wire
from lmworks.train.rehearse import Seen, differences
from lmworks.train.saved import Offload, Recompute
from tests.parallel.pooled import LENGTH, MODEL, ROWS, Pass, batch, disagreeing, in_order, learned, remarks
from tests.parallel.served import shuffled

BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}
TWO: dict[str, Any] = {"dp_shard": 2}
ONE_STREAM = Servers(tolerance=0.0, tile=8, ping_pong=False)
CACHED = Servers(tolerance=0.0, tile=8, keep="cache")
CACHED_STREAM = Servers(tolerance=0.0, tile=8, ping_pong=False, keep="cache")
PASSES = {
    "planned": Pass(axes=TWO),
    "random": Pass(axes=TWO, random=1),
    "random-one-stream": Pass(axes=TWO, random=2, servers=ONE_STREAM),
    "random-cached": Pass(axes=TWO, random=3, servers=CACHED),
    "random-cached-one-stream": Pass(axes=TWO, random=4, servers=CACHED_STREAM),
    "home-one-stream": Pass(axes=TWO, at_home=True, servers=ONE_STREAM),
    "one-row-at-a-time": Pass(axes=TWO, random=5, micro=1),
    "float32": Pass(axes=TWO, random=6, dtype=torch.float32),
    "float32-cached": Pass(axes=TWO, random=7, servers=CACHED, dtype=torch.float32),
    "recompute": Pass(axes=TWO, random=8, saved=Recompute()),
    "recompute-cached": Pass(axes=TWO, random=9, servers=CACHED, saved=Recompute()),
    "products": Pass(axes=TWO, random=10, saved=Recompute(keep="products")),
    "host": Pass(axes=TWO, random=11, saved=Offload(to="host", last=0, least_bytes=0)),
    "host-cached": Pass(axes=TWO, random=12, servers=CACHED, saved=Offload(to="host", last=0, least_bytes=0)),
    "cp": Pass(axes={"cp": 2}, random=13),
    "uneven-halves": Pass(axes={"cp": 2}, random=19, micro=3),
    "cp-planned": Pass(axes={"cp": 2, "order": "contiguous"}),
    "four": Pass(axes={"dp_shard": 4}, random=14),
    "four-cached": Pass(axes={"dp_replicate": 4}, random=15, servers=CACHED),
    "cp-dp": Pass(axes={"cp": 2, "dp_shard": 2}, random=16),
    "tp": Pass(axes={"tp": 2, "dp_shard": 2}, random=17),
    "pp": Pass(axes={"pp": 2, "dp_shard": 2, "schedule": "gpipe"}, random=18, micro=2, saved=Recompute()),
}


@cache
def one(dtype: torch.dtype) -> Seen:
    """Every document alone, in one process."""
    return learned(0, [Pass(axes={}, servers=None, dtype=dtype)])[0][0]


@cache
def ran(ranks: int) -> dict[str, list[tuple[Seen, dict[str, int]]]]:
    """All passes of so many ranks on one gang, by name and rank."""
    own = [name for name, each in PASSES.items() if each.layout.ranks == ranks]
    found = gang.run(learned, ranks, [PASSES[name] for name in own])
    return {name: [seen[i] for seen in found] for i, name in enumerate(own)}


@pytest.mark.ranks
@pytest.mark.parametrize("name", PASSES)
def test_loss_and_gradients_are_those_of_block_diagonal_attention(name: str) -> None:
    each = PASSES[name]
    want, found = one(each.dtype), [seen for seen, _ in ran(each.layout.ranks)[name]]
    assert found[0].losses == pytest.approx(want.losses, rel=BOUND[each.dtype])
    worst, missing = differences(found, want)
    assert not missing
    assert worst <= BOUND[each.dtype]


@pytest.mark.ranks
def test_what_waits_is_each_ranks_own_where_it_is_sent_again() -> None:
    """Whatever the plan; with a cache it is that of the rank that computed it."""
    heads, groups, size, value = 4, 2, 8, 8
    tokens = LENGTH * ROWS // 2
    query, keys, lse = heads * size * value, 2 * groups * size * value, heads * value
    home = [books["0"] for _, books in ran(2)["home-one-stream"]]
    assert home == [books["0"] for _, books in ran(2)["random-one-stream"]]
    assert home[0] == home[1]
    plan = plan_of(seed=4)
    for rank, (_, books) in enumerate(ran(2)["random-cached-one-stream"]):
        computed = sum(task.stop - task.start for task in plan.tasks if task.server == rank)
        kept = sum(last for (server, _), last in plan.last_keys.items() if server == rank)
        more = computed * (2 * query + lse) + kept * keys + tokens * query
        assert books["0"] == home[rank] + more - tokens * (2 * query + keys + lse)


def plan_of(seed: int) -> Any:
    """The random plan of a micro-batch of all rows."""
    layout = Layout(dp_shard=2, servers=ONE_STREAM)
    pool = Pool(Wire(layout, 0, {}), MODEL.blocks()[0], lambda pieces, ranks, sizes: plain(pieces, ranks))
    documents = torch.stack([batch().documents_BT[rank::2] for rank in range(2)])
    return shuffled(pool.plan(documents, torch.float64), seed)


def test_what_an_exchange_may_take_bounds_the_plan() -> None:
    """As much as the plan needs changes nothing; with less the tolerance rises, and less moves."""

    def planned(room: int | None) -> Plan:
        servers = Servers(tolerance=0.0, tile=8, buffer_bytes=room)
        pool = Pool(Wire(Layout(dp_shard=2, servers=servers), 0, {}), MODEL.blocks()[0])
        return pool.plan(torch.stack([batch().documents_BT[rank::2] for rank in range(2)]), torch.float32)

    free = planned(None)
    needed = free.buffer_bytes(Sizes.of(4, 2, 8, 4))
    assert needed > 0
    assert planned(needed) == free
    raised, none = planned(needed - 1), planned(1)
    assert f"needs {needed} bytes, and the buffer has {needed - 1}" in (raised.reason or "")
    assert raised.buffer_bytes(Sizes.of(4, 2, 8, 4)) < needed
    assert none.buffer_bytes(Sizes.of(4, 2, 8, 4)) == 0


@pytest.mark.ranks
def test_a_plan_that_is_not_the_one_asked_for_is_told_once() -> None:
    """After the first of two passes, whichever rank one asks; never where plans are as asked for."""
    told = gang.run(remarks, 2, [Servers(tolerance=0.0, tile=8, buffer_bytes=1), Servers(tolerance=9.0)])
    for bound, free in told:
        assert len(bound[0]) == 1
        assert bound[0][0].startswith("layout.servers: the exchange needs ")
        assert bound[1] == ()
        assert free == [(), ()]


@pytest.mark.ranks
def test_halves_take_turns_forward_and_backward() -> None:
    """While one half's rows are on their way, the other half is at work, whose exchange is then already under way."""
    forward = ["q_proj forward", "begin 0", "q_proj forward", "begin 1"]
    forward += ["wait 0", "begin 2", "wait 1", "begin 3", "wait 2", "o_proj forward", "wait 3", "o_proj forward"]
    backward = ["o_proj backward", "begin 4", "o_proj backward", "begin 5"]
    backward += ["wait 4", "begin 6", "wait 5", "begin 7", "wait 6", "q_proj backward", "wait 7", "q_proj backward"]
    for log in gang.run(in_order, 2, 2):
        assert log == forward + backward


@pytest.mark.ranks
def test_ranks_with_different_plans_do_not_begin() -> None:
    for told in gang.run(disagreeing, 2, 2):
        assert "different plans" in told


@pytest.mark.parametrize(("over", "told"), [({"cached": 3}, "a cache cannot grow"), ({"window": 5}, "a window cannot")])
def test_what_cannot_be_served_is_refused(over: dict[str, Any], told: str) -> None:
    pool = Pool(Wire(Layout(dp_shard=2, servers=Servers()), 0, {}), MODEL.blocks()[0])
    facts: dict[str, Any] = {"batch": 1, "new": 4, "cached": 0, "window": None, "documents_BK": None}
    with pytest.raises(UsageError, match=told):
        pool(**facts | over, device=torch.device("cpu"), dtype=torch.float32)
