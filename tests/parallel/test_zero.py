"""Stages by name: the degrees they mean, and what is done where nodes are not known."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.parallel.layout import Layout, problems_of
from lmworks.parallel.state import DEGREES, StatePlacement
from lmworks.parallel.zero import Zero
from lmworks.train.build import settle

STAGES = ("ddp", "zero-1", "zero-2", "zero-3", "hsdp", "mics", "hpz")


@cache
def plain() -> Any:
    return recipes.load("quickstart", verb="train")


def found(stage: str, ranks: int, **more: Any) -> Layout:
    sets = ["layout.use=zero", f"layout.stage={stage}", *(f"layout.{name}={value}" for name, value in more.items())]
    recipe = settle(recipes.load("quickstart", verb="train", sets=[*sets, "batch_size=840"]), ranks)
    assert isinstance(recipe.layout, Layout)
    return recipe.layout


@pytest.mark.parametrize(
    ("stage", "degrees"), [("zero-1", (1, 1, 8)), ("zero-2", (1, 8, 8)), ("zero-3", (8, 8, 8)), ("mics", (4, 4, 4))]
)
def test_a_stage_is_its_degrees(stage: str, degrees: tuple[int, ...]) -> None:
    layout = found(stage, 8, **({"ranks_per_node": 4} if stage == "mics" else {}))
    assert layout.state is not None
    assert tuple(layout.state.degree(name, 8) for name in DEGREES) == degrees
    assert layout.masters == (stage in ("zero-1", "zero-2"))


def test_plain_stages_need_no_placement_of_states() -> None:
    assert found("ddp", 4) == Layout(dp_replicate=4, dp_shard=1)
    assert found("hsdp", 8, ranks_per_node=4) == Layout(dp_replicate=2, dp_shard=4)


def test_hpz_keeps_a_copy_in_each_node() -> None:
    layout = found("hpz", 8, ranks_per_node=4)
    assert layout.state == StatePlacement(secondary=4, levels=(4,))
    assert found("hpz", 4, ranks_per_node=8).state == StatePlacement(), "one node: its copy is what it has"
    assert found("hpz", 4, ranks_per_node=1).reshard is False, "nodes of one rank: the copy is whole"


@pytest.mark.parametrize("stage", ["hsdp", "mics", "hpz"])
@pytest.mark.parametrize(("ranks", "node", "group"), [(12, None, 6), (12, 8, 4), (14, 4, 2), (16, None, 8)])
def test_nodes_that_are_unknown_or_uneven_make_hsdp_and_a_note(
    stage: Any, ranks: int, node: int | None, group: int
) -> None:
    zero = Zero(stage=stage, ranks_per_node=node)
    assert zero.settle(ranks, None) == Layout(dp_replicate=ranks // group, dp_shard=group)
    (note,) = zero.notes(ranks, None)
    assert f"in groups of {group} ranks" in note
    assert ("left out" in note) == (node is None)


@given(st.sampled_from(STAGES), st.integers(1, 24), st.one_of(st.none(), st.integers(1, 10)))
def test_every_stage_settles_on_any_ranks_to_a_layout_that_can_be(stage: Any, ranks: int, node: int | None) -> None:
    layout = Zero(stage=stage, ranks_per_node=node).settle(ranks, plain())
    assert layout.ranks == ranks
    assert problems_of(dataclasses.replace(plain(), layout=layout, batch_size=ranks)) == []


def test_nodes_of_a_stage_without_them_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"layout\.ranks_per_node: has no effect with stage = 'zero-2'"):
        found("zero-2", 4, ranks_per_node=4)
