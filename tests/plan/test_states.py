"""Placements of states on a clock: the closed forms of frontier-zero, and Frontier's own links."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lmworks.methods.frontier_zero import FrontierZero, cost
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.zeropp import ZeroPlusPlus
from lmworks.plan import cluster as clusters
from lmworks.plan import simulate, time
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.links import spread
from lmworks.plan.shape import Ground
from lmworks.plan.work import Practice, Work
from tests.plan.conftest import level, recipe

BARE = Practice(gathers_overlap=False, data_overlaps=False, gradient_bytes=2)
"""As the closed forms have it: nothing hides, and gradients are summed in 16 bits."""
BLOCK = 8192
WIDE = {"vocab_size": 384, "hidden_size": 1536, "n_heads": 12, "n_kv_heads": 12, "ffn_size": 6144}
"""Of which 384 ranks have equal rows."""


def layouts(ranks: int, settings: Any) -> dict[str, Layout]:
    """The three that the closed forms are of."""
    topo = FrontierZero(secondary="node", block=BLOCK, memory_gib=1e9)
    return {
        "zero_3": Layout(dp_shard=ranks, state=StatePlacement()),
        "zero_plus_plus": ZeroPlusPlus(block=BLOCK).settle(ranks, settings),
        "topo": topo.settle(ranks, settings),
    }


def waited(cluster: Cluster, nodes: int, accumulation: int) -> dict[str, tuple[float, float]]:
    """Seconds of a step that go to states: simulated, and in closed form."""
    settings = recipe(batch_size=8 * nodes * accumulation, model=WIDE)
    found = {}
    for name, layout in layouts(8 * nodes, settings).items():
        work = Work(Ground(settings, cluster), BARE)
        choice = Choice(layout=layout, rows=1, micro_batches=accumulation, saved=settings.saved)
        both = simulate.of_choice(work, choice).seconds, time.of_step(work, choice)
        found[name] = (both[0].gather + both[0].reduce, both[1].gather + both[1].reduce)
    return found


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("nodes", [4, 48])
def test_on_nodes_of_like_links_they_are_the_closed_forms(nodes: int, accumulation: int) -> None:
    """One kind of link in a node, so that a ring goes as fast as the closed forms have it. What differs is scales of
    codes, 0.05 % of int8, that a rank is not sent its own part of what it gathers (1 of 32), and that what stands
    around blocks is gathered once."""
    links = (level("node", 8, 50e9), level("network", None, 12.5e9))
    cluster = dataclasses.replace(clusters.load("frontier"), links=links)
    settings = recipe(model=WIDE)
    gathered = 2 * sum(math.prod(shape) for shape in Ground(settings, cluster).shapes.values()) / 1e9
    machine = cost.Cluster(nodes=nodes, pair=50.0, link=50.0, net=100.0)
    for name, told in waited(cluster, nodes, accumulation).items():
        closed = getattr(cost, name)(machine, gathered).of(accumulation)
        assert told == pytest.approx((closed, closed), rel=0.04), name


def test_on_frontier_accumulation_decides() -> None:
    """One micro-batch: ZeRO++ waits least. Eight: ZeRO-topo, and ZeRO-3 longest by far, as by the closed forms."""
    one, eight = (waited(clusters.load("frontier"), 48, accumulation) for accumulation in (1, 8))
    assert min(one, key=lambda name: one[name]) == "zero_plus_plus"
    assert sorted(eight, key=lambda name: eight[name]) == ["topo", "zero_plus_plus", "zero_3"]
    assert eight["zero_3"][0] / eight["topo"][0] > 1.5
    assert eight["zero_3"][0] == pytest.approx(8 * one["zero_3"][0])


def test_what_goes_to_all_takes_each_levels_own_share() -> None:
    """8 ranks a node, 4 nodes: 7 of 31 others are near, 24 far, over links that no neighbour lends."""
    cluster = dataclasses.replace(
        clusters.load("frontier"), links=(level("node", 8, 1e12), level("network", None, 24.0))
    )
    assert spread(cluster, 32, 1).bytes_per_second == pytest.approx(31.0)
    assert spread(cluster, 4, 8).bytes_per_second == pytest.approx(24.0)
    assert spread(cluster, 8, 1).bytes_per_second == pytest.approx(1e12)
    assert spread(cluster, 1, 1).seconds(100.0) == 0.0
