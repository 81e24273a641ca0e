"""Degrees of states: axes that nest, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import STATE_AXES, StatePlacement, problems, smaller
from lmworks.parallel.world import lines
from lmworks.train.build import settle


@st.composite
def placed(draw: st.DrawFn) -> Layout:
    """Layouts whose degrees nest, with ranks of other axes around."""
    steps = [draw(st.integers(1, 3)) for _ in range(4)]
    weights, gradients, optimizer, ranks = (math.prod(steps[: i + 1]) for i in range(4))
    cp = draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    secondary = draw(st.sampled_from([None, *(d for d in range(2, weights) if weights % d == 0)]))
    state = StatePlacement(weights=weights, gradients=gradients, optimizer=optimizer, secondary=secondary)
    levels = sorted({weights, gradients, optimizer} - {1})
    if draw(st.booleans()):
        state = dataclasses.replace(state, levels=tuple(levels))
    pp, tp = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Layout(pp=pp, tp=tp, cp=cp, dp_shard=ranks // cp, state=state)


@given(placed())
def test_places_on_the_four_axes_make_up_the_place_on_fsdp(layout: Layout) -> None:
    for rank in range(layout.ranks):
        place, stride = 0, 1
        for axis in ("weights", "gradients", "optimizer", "copies"):
            place += layout.place(rank, axis) * stride
            stride *= layout.size(axis)
        assert place == layout.place(rank, "fsdp")
        assert stride == layout.size("fsdp")


@given(placed(), st.sampled_from(STATE_AXES))
def test_lines_of_a_state_cover_all_ranks_once_and_leave_other_axes_alone(layout: Layout, axis: str) -> None:
    found = lines(layout, axis)
    assert sorted(rank for line in found for rank in line) == list(range(layout.ranks))
    others = [a for a in ("weights", "gradients", "optimizer", "copies") if axis not in (a, "secondary")]
    for line in found:
        assert [layout.place(rank, axis) for rank in line] == list(range(layout.size(axis)))
        for other in ("pp", "tp", *others):
            assert len({layout.place(rank, other) for rank in line}) == 1, other


@pytest.mark.parametrize(
    ("degrees", "levels", "axis", "sizes"),
    [
        ({}, (2, 8), "weights", (8, 2)),
        ({}, (4,), "weights", (4, 4)),
        ({}, (), "weights", (16,)),
        ({}, (16,), "weights", (16,)),
        ({"weights": 2, "gradients": 8}, (2, 8), "weights", (2,)),
        ({"weights": 2, "gradients": 8}, (2, 8), "gradients", (4,)),
        ({"weights": 2}, (2, 8), "gradients", (4, 2)),
    ],
)
def test_sums_of_codes_go_inside_the_largest_level_first(
    degrees: dict[str, int], levels: tuple[int, ...], axis: str, sizes: tuple[int, ...]
) -> None:
    """16 ranks; the two hops of an axis make up its place, neighbours first."""
    layout = Layout(dp_shard=16, state=StatePlacement(levels=levels, gradients_as="int4", **degrees))
    assert layout.state is not None
    hops = layout.state.hops(axis, 16)
    assert tuple(layout.size(hop) for hop in hops) == sizes
    assert set(hops) <= set(layout.state.axes(16))
    for rank in range(16):
        first, *later = (layout.place(rank, hop) for hop in hops)
        assert first + sum(place * sizes[0] for place in later) == layout.place(rank, axis)
    for hop in hops:
        assert sorted(rank for line in lines(layout, hop) for rank in line) == list(range(16))


@pytest.mark.parametrize(("pair", "level"), [((0, 1), 0), ((1, 2), 1), ((0, 7), 1), ((7, 8), 2), ((0, 15), 2)])
def test_a_level_is_the_fastest_link_that_joins_two_places(pair: tuple[int, int], level: int) -> None:
    assert StatePlacement(levels=(2, 8)).level(*pair) == level


REFUSED: list[tuple[int, list[str], str]] = [
    (1, ["weights=1"], r"layout\.state: has no effect: dp_shard x cp = 1"),
    (4, ["weights=3"], r"layout\.state\.weights: 3 does not divide gradients = 4\. Legal: 1, 2, 4"),
    (4, ["weights=2", "gradients=1"], r"layout\.state\.weights: 2 does not divide gradients = 1\. Legal: 1"),
    (4, ["optimizer=3"], r"layout\.state\.optimizer: 3 does not divide dp_shard x cp = 4\. Legal: 1, 2, 4"),
    (4, ["levels=[2,3]"], r"layout\.state\.levels: \[2, 3\]: 2 does not divide 3\."),
    (4, ["levels=[2,2]"], "2 stands twice"),
    (4, ["levels=[3]"], "3 does not divide 4.*divide dp_shard x cp = 4"),
    (4, ["secondary=3"], r"layout\.state\.secondary: 3 is no true divisor above 1 of weights = 4\. Legal: 2"),
    (4, ["weights=2", "gradients=2", "secondary=2"], "of weights = 2. Legal: none; leave it out"),
    (
        8,
        ["weights=4", "gradients=4", "secondary=2"],
        r"state\.secondary: is made by torch for one set of ranks.*4 of 8",
    ),
    (8, ["secondary=2", "../tp=2"], r"state\.secondary: .* there are several: tp = 2"),
    (4, ["secondary=2", "../reshard=false"], "kept for the backward pass: reshard = false says"),
    (4, ["secondary=3", "secondary_as='int8'"], r"3 is no divisor above 1 of dp_shard x cp = 4\. Legal: 2, 4"),
    (4, ["weights=1", "secondary=2", "secondary_as='int8'"], "secondary: has no effect: weights = 1, so nothing"),
    (4, ["secondary_as='int8'"], "secondary_as: has no effect without secondary"),
    (4, ["weights=1", "weights_as='int8'"], "weights_as: has no effect: weights = 1"),
    (4, ["weights=1", "gradients=1", "gradients_as='int4'"], "gradients_as: has no effect: gradients = 1"),
    (4, ["block=512"], "block: has no effect"),
    (4, ["feedback=0.5"], "feedback: has no effect with gradients_as = 'plain'"),
    (4, ["weights=2", "../dp_replicate=2"], "Take dp_replicate = 1 and optimizer = dp_shard x cp / 2"),
]


@pytest.mark.parametrize(("ranks", "sets", "told"), REFUSED)
def test_what_cannot_be_or_has_no_effect_is_refused_with_what_can(ranks: int, sets: list[str], told: str) -> None:
    paths = [f"layout.{s.removeprefix('../')}" if s.startswith("../") else f"layout.state.{s}" for s in sets]
    with pytest.raises(RecipeError, match=told):
        settle(recipes.load("quickstart", verb="train", sets=paths), ranks)


def test_a_placement_survives_the_recipe_file() -> None:
    values: dict[str, Any] = {"weights": 2, "gradients": 4, "levels": [2, 4]}
    sets = [f"layout.state.{name}={value}" for name, value in values.items()]
    recipe = settle(recipes.load("quickstart", verb="train", sets=sets), 8)
    assert recipe.layout.state == StatePlacement(weights=2, gradients=4, levels=(2, 4))
    again = recipes.decode(recipes.table_of(recipe))
    assert again.layout == recipe.layout


@given(placed())
def test_a_smaller_placement_has_the_same_steps_and_can_be(layout: Layout) -> None:
    assert layout.state is not None
    state, ranks = smaller(layout.state, layout.size("fsdp"))
    small = Layout(dp_shard=ranks, state=state)
    for axis in STATE_AXES:
        assert (small.size(axis) > 1) == (layout.size(axis) > 1), axis
        assert small.size(axis) <= layout.size(axis)
    if state.secondary is not None and state.degree("weights", ranks) < ranks:
        return  # torch makes no such copy, and the large one is refused as well
    assert ranks == 1 or list(problems(state, small)) == []
