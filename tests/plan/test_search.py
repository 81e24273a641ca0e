"""The search: everything that it offers is legal and fits, and the same question has the same answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError, UsageError
from lmworks.parallel.footprint import predict
from lmworks.parallel.layout import problems_of
from lmworks.plan import cluster as clusters
from lmworks.plan import report
from lmworks.plan.cluster import Cluster, Figure
from lmworks.plan.search import (
    ROOM,
    Answer,
    as_recipe,
    choices,
    described,
    divisors,
    placed,
    refuse_nothing,
    relaxed,
    search,
)
from lmworks.plan.shape import Ground
from tests.plan.conftest import recipe

DGX = clusters.load("dgx-a100")


def tight(settings: Any, share: float, devices: int) -> tuple[Cluster, Answer]:
    """A cluster whose memory lets `share` of the layouts in."""
    ground = Ground(settings, DGX)
    sizes = sorted(
        max(ground.footprint(c, place).total for place in range(c.layout.pp)) for c in choices(ground, devices)
    )
    room = sizes[int(share * (len(sizes) - 1))] / ROOM
    cluster = dataclasses.replace(DGX, memory_bytes=Figure(value=room, source="a test"))
    return cluster, search(settings, cluster, devices=devices, show=1000, simulated=1000)


@pytest.mark.parametrize("devices", [1, 2, 6, 8])
def test_every_choice_is_legal_and_takes_all_devices(devices: int) -> None:
    settings = recipe(batch_size=24)
    found = list(choices(Ground(settings, DGX), devices))
    assert found
    assert len(set(found)) == len(found)
    for choice in found:
        assert choice.layout.ranks == devices
        assert choice.rows * choice.micro_batches * choice.layout.size("batch") == 24
        assert not problems_of(as_recipe(settings, choice)), described(choice)


def test_no_plan_exceeds_the_memory_of_any_rank() -> None:
    settings = recipe(batch_size=8)
    cluster, answer = tight(settings, 0.3, 4)
    assert 0 < answer.fitting < answer.looked_at
    assert answer.fitting + sum(answer.refused.values()) == answer.looked_at
    for plan in answer.plans[::4]:
        whole = dataclasses.replace(as_recipe(settings, plan.choice), device="cuda")
        for rank in range(4):
            told = predict(whole, plan.choice.layout, rank, vocabulary=257)
            assert told.total <= plan.memory.total <= ROOM * cluster.memory_bytes.value


def test_states_are_shared_in_every_way_that_the_links_suggest() -> None:
    """Frontier: pairs in nodes of eight."""
    ground = Ground(recipe(batch_size=32), clusters.load("frontier"))
    found = {placed(c.layout) for c in choices(ground, 16) if c.layout.state is not None and c.layout.tp == 1}
    full = {"1/1/16", "1/16/16", "8/8/8", "2/8/16", "8/8/16", "16/16/16, copy 8"}
    assert {f"states {each}" for each in full} <= found
    assert all(c.layout.ep == 1 and c.layout.dp_replicate == 1 for c in choices(ground, 8) if c.layout.state)


@pytest.mark.parametrize("groups", [4, 1])
def test_engines_are_those_that_heads_allow(groups: int) -> None:
    data = {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 4096}
    settings = recipe(data=data, model={"n_kv_heads": groups, "max_position": 4096})
    found = {c.layout.context for c in choices(Ground(settings, DGX), 2) if c.layout.cp == 2}
    assert found == {"all-gather", "ring", "tokenring"} | ({"ulysses"} if groups == 4 else set())


def test_the_recipes_own_layout_is_costed_as_it_is() -> None:
    settings = recipe(batch_size=32, layout={"use": "frontier-zero"}, micro_batch_size=2)
    answer = search(settings, clusters.load("frontier"), devices=16, own=True)
    (plan,) = answer.plans
    assert answer.looked_at == 1
    assert plan.choice.layout == settings.layout.settle(16, settings)
    assert (plan.choice.rows, plan.choice.micro_batches) == (2, 1)
    assert described(plan.choice).startswith("shard 16, states 2/8/16")
    with pytest.raises(RecipeError, match="Legal: 1, 2, 4"):
        search(dataclasses.replace(settings, micro_batch_size=3, batch_size=128), DGX, devices=32, own=True)
    with pytest.raises(RecipeError, match="take 33"):
        search(settings, DGX, devices=11, own=True)


def test_plans_are_in_order_and_the_same_again() -> None:
    settings = recipe(batch_size=8)
    one, two = (search(settings, DGX, devices=8, show=20) for _ in range(2))
    seconds = [plan.step.seconds.total for plan in one.plans]
    assert seconds == sorted(seconds)
    assert [plan.choice for plan in one.plans] == [plan.choice for plan in two.plans]
    assert report.as_json(one, DGX) == report.as_json(two, DGX)


def test_the_best_by_the_simulator_is_among_the_best_by_the_closed_form() -> None:
    """Fifty simulated layouts hold the one that simulating all would find."""
    settings = recipe(batch_size=16, model={"hidden_size": 512, "ffn_size": 1408})
    few = search(settings, DGX, devices=8).plans[0]
    every = search(settings, DGX, devices=8, simulated=10_000).plans[0]
    assert few.step.seconds.total == pytest.approx(every.step.seconds.total, rel=1e-3)


def test_objectives_make_small_what_they_say() -> None:
    settings = recipe(batch_size=8)
    for objective in ("energy", "money", "co2"):
        answer = search(settings, DGX, devices=8, objective=objective, show=10)  # type: ignore[arg-type]
        values = [plan.bill.value(objective) for plan in answer.plans]  # type: ignore[arg-type]
        assert values == sorted(values)


def test_nothing_fits_and_the_nearest_is_told() -> None:
    settings = recipe(batch_size=8)
    _, answer = tight(settings, 0.0, 2)
    less = dataclasses.replace(DGX, memory_bytes=Figure(value=answer.plans[0].memory.total, source="a test"))
    nothing = search(settings, less, devices=2)
    assert not nothing.plans
    assert nothing.nearest is not None
    assert nothing.nearest.memory.total == answer.plans[0].memory.total
    said = relaxed(nothing, less, settings)
    assert said[0].startswith("the nearest, ")
    assert any("--gpus 4 has a layout that fits" in line for line in said)


def test_rows_that_nobody_can_divide() -> None:
    with pytest.raises(UsageError, match="no layout divides 1 rows") as caught:
        search(recipe(batch_size=1, data=_short()), DGX, devices=11)
    assert "--set batch_size=11" in str(caught.value)


def _short() -> dict[str, Any]:
    return {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 96}


def test_parts_that_no_layout_can_hold_are_told_as_the_layout_tells_them() -> None:
    settings = recipe(optimizer={"use": "muon", "lr": 1e-3})
    with pytest.raises(RecipeError, match="Run it on one rank"):
        refuse_nothing(search(settings, DGX, devices=2))
    assert search(settings, DGX, devices=1).plans


def test_the_plans_recipe_is_a_recipe(tmp_path: Any) -> None:
    settings = recipe(batch_size=16)
    answer = search(settings, DGX, devices=8)
    path = tmp_path / "planned.toml"
    path.write_text(report.recipe_text(answer, answer.plans[0], DGX), encoding="utf-8")
    again = recipes.load(str(path), verb="train")
    assert again == as_recipe(settings, answer.plans[0].choice)
    assert again.layout.ranks == 8


def test_divisors() -> None:
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
