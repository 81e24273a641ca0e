"""ZeRO++'s switches: what they become, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.train.build import settle


def plus(*sets: str) -> Any:
    return recipes.load("quickstart", verb="train", sets=["batch_size=48", "layout={use='zero++'}", *sets])


@pytest.mark.parametrize("switches", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("ranks", [4, 16])
def test_zero_plus_plus_is_three_switches(ranks: int, switches: tuple[bool, bool, bool]) -> None:
    qwz, hpz, qgz = switches
    sets = [f"layout.{name}={str(on).lower()}" for name, on in zip(("qwz", "hpz", "qgz"), switches, strict=True)]
    state = settle(plus(*sets), ranks).layout.state
    assert state == StatePlacement(
        levels=(8,) if ranks == 16 else (),
        secondary=8 if hpz and ranks == 16 else None,
        weights_as="int8" if qwz else "plain",
        gradients_as="int4" if qgz else "plain",
    )


def test_alone_it_is_one_rank() -> None:
    assert settle(plus(), 1).layout == Layout(dp_shard=1)


def test_zero_plus_plus_on_uneven_nodes_says_so_too() -> None:
    asked = plus()
    assert settle(asked, 12).layout == Layout(dp_replicate=3, dp_shard=4)
    (note,) = asked.layout.notes(12, asked)
    assert "12 ranks do not make nodes of 8; this is hsdp, in 3 groups of 4 ranks" in note
    assert asked.layout.notes(16, asked) == []


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["layout.qwz=false", "layout.hpz=false", "layout.qgz=false"], "which is ZeRO-3. Turn one on"),
        (["layout.qwz=false", "layout.qgz=false", "layout.block=64"], "layout.block: has no effect"),
        (["layout.ranks=8"], r"layout\.ranks: is 8, but 16 were started"),
        (["layout.qgz=false", "layout.feedback=0.5"], "layout.feedback: has no effect without qgz"),
    ],
)
def test_settings_without_effect_and_other_ranks_are_refused(sets: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(plus(*sets), 16)
