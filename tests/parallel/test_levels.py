"""Bytes by level: who is a neighbour over which link, counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given

from lmworks.parallel.layout import Layout
from lmworks.parallel.levels import by_level, names
from lmworks.parallel.state import STATE_AXES, StatePlacement
from lmworks.parallel.world import lines
from tests.parallel.test_state import placed

TOPO = Layout(dp_shard=8, state=StatePlacement(weights=2, gradients=4, levels=(2, 4)))


@pytest.mark.parametrize(
    ("axis", "rank", "level"),
    [("weights", 0, 0), ("weights", 7, 0), ("gradients", 0, 1), ("gradients", 6, 1), ("optimizer", 1, 2)],
)
def test_a_ladder_along_the_levels_sends_each_state_over_its_own(axis: str, rank: int, level: int) -> None:
    found = by_level(TOPO, rank, {(axis, "all-gather"): 12.0})
    assert found == [12.0 if i == level else 0.0 for i in range(3)]
    assert names(TOPO) == ["among 2", "among 4", "network"]


def test_a_ring_over_all_ranks_crosses_the_network_at_the_ends_of_nodes() -> None:
    layout = Layout(dp_shard=8, state=StatePlacement(levels=(2, 4)))
    crossed = [by_level(layout, rank, {("weights", "all-gather"): 1.0}).index(1.0) for rank in range(8)]
    assert crossed == [0, 1, 0, 2, 0, 1, 0, 2]


def test_what_goes_to_all_is_spread_over_the_levels_of_all_others() -> None:
    layout = Layout(dp_shard=8, state=StatePlacement(levels=(2, 4)))
    assert by_level(layout, 5, {("weights", "all-to-all int4"): 7.0}) == [1.0, 2.0, 4.0]


def test_hops_stay_on_their_sides_of_a_node() -> None:
    layout = Layout(dp_shard=8, state=StatePlacement(levels=(2, 4), gradients_as="int4"))
    assert by_level(layout, 5, {("weights/inside", "all-to-all int4"): 6.0}) == [2.0, 4.0, 0.0]
    assert by_level(layout, 5, {("weights/across", "all-to-all int4"): 6.0}) == [0.0, 0.0, 6.0]


def test_axes_of_no_state_are_left_out() -> None:
    assert by_level(TOPO, 0, {("tp", "all-reduce"): 5.0, ("world", "all-reduce"): 5.0}) == [0.0, 0.0, 0.0]


@given(placed())
def test_nothing_is_lost_and_receivers_are_in_the_group(layout: Layout) -> None:
    """Against the groups themselves: rings go round, by their ranks' places on fsdp."""
    for axis in STATE_AXES:
        for line in lines(layout, axis):
            for i, rank in enumerate(line):
                size = 6.0 if len(line) > 1 else 0.0
                assert sum(by_level(layout, rank, {(axis, "all-reduce"): 6.0})) == size
                other = line[(i + 1) % len(line)]
                assert layout.state is not None
                level = layout.state.level(layout.place(rank, "fsdp"), layout.place(other, "fsdp"))
                assert by_level(layout, rank, {(axis, "all-reduce"): size})[level] == size
