"""Which links an axis runs over, and how fast."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.parallel.layout import Layout
from lmworks.plan import cluster as clusters
from lmworks.plan.links import BELOW, between, of_axis, of_pipeline, ring, stride
from tests.plan.conftest import level

DGX = clusters.load("dgx-a100")


@pytest.mark.parametrize(
    ("ranks", "apart", "rate"),
    [
        (8, 1, 300e9),  # within a node
        (32, 1, 200e9),  # eight adapters of a node side by side
        (16, 4, 50e9),  # two ranks of a ring in each node
        (12, 8, 25e9),  # one
        (2, 64, 25e9),
    ],
)
def test_rings_of_a_dgx(ranks: int, apart: int, rate: float) -> None:
    assert ring(DGX, ranks, apart).bytes_per_second == rate


def test_a_ring_takes_bytes_over_rate_and_a_latency_a_call() -> None:
    found = ring(DGX, 8, 1)
    assert found.seconds(300e9, calls=2) == pytest.approx(1.0 + 2 * 5e-6 * 3)
    assert ring(DGX, 1, 1).seconds(1e9) == 0.0


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_ring_is_never_faster_than_its_fastest_links_nor_slower_than_one_slow_one(ranks: int, apart: int) -> None:
    rates = [entry.bytes_per_second.value for entry in DGX.links]
    found = ring(DGX, ranks, apart).bytes_per_second
    assert ranks == 1 or min(rates) <= found <= max(rates)


def test_strides_follow_the_order_of_ranks() -> None:
    layout = Layout(pp=2, dp_replicate=3, dp_shard=5, cp=7, tp=11)
    for axis in ("tp", "cp", "dp_shard", "dp_replicate", "pp"):
        here = next(rank for rank in range(layout.ranks) if layout.place(rank, axis) == 1)
        assert here == stride(layout, axis), axis
    assert set(BELOW) >= {"tp", "cp", "fsdp", "dp_replicate", "pp"}


def test_a_pipeline_within_a_node_takes_its_links() -> None:
    layout = Layout(pp=8, dp_shard=1, tp=2)
    links = of_pipeline(DGX, layout)
    assert links[2, 3].bytes_per_second == 300e9  # ranks 4 and 6
    assert links[3, 4].bytes_per_second == 25e9  # ranks 6 and 8: the next node
    assert of_axis(DGX, layout, "tp").bytes_per_second == 300e9


def test_three_levels() -> None:
    frontier = clusters.load("frontier")
    assert between(frontier, 0, 1).bytes_per_second == 200e9
    assert between(frontier, 1, 2).bytes_per_second == 50e9
    assert between(frontier, 7, 8).bytes_per_second == 12.5e9
    assert ring(frontier, 64, 1).bytes_per_second == 100e9  # eight shares of the network, two dies on each link


def test_one_level_is_the_only_one() -> None:
    flat = dataclasses.replace(DGX, links=(level("wire", None, 7.0, latency=3.0),))
    found = ring(flat, 16, 4)
    assert found.bytes_per_second == 7.0
    assert found.latency_seconds == 3.0 * math.log2(16)
