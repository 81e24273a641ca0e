"""Pipette's plans on links that differ: what they take, what is refused, and that runs are those of one rank."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError, RecipeError
from lmworks.methods.pipette import plans, ready
from lmworks.methods.pipette.plans import ground_of, terms
from lmworks.model.checkpoint import complete
from lmworks.parallel import gang
from lmworks.parallel.footprint import predict
from lmworks.parallel.layout import Layout
from lmworks.parallel.links import Profile
from lmworks.parallel.traffic import Work, traffic
from lmworks.plan.latency import Pipeline, pipette_seconds
from lmworks.train.build import settle
from tests.train import ranked

GIB = 2**30


def recipe(*sets: str) -> Any:
    return recipes.load("methods/pipette", verb="train", sets=["device=cpu", "precision=fp32", *sets])


def links(machines: int, each: int, *, seed: int | None = None, slow: float = 1e9, **over: Any) -> Profile:
    """Alike, or log-normal by seed."""
    draw = np.random.default_rng(seed)
    between = (
        np.full((machines, machines), slow)
        if seed is None
        else slow * np.exp(draw.normal(0, 0.5, (machines, machines)))
    )
    table = tuple(
        tuple(float(between[i, j]) if i != j else (20 * slow if each > 1 else None) for j in range(machines))
        for i in range(machines)
    )
    late = tuple(tuple(1e-5 for _ in range(machines)) for _ in range(machines))
    facts = {
        "machines": tuple(f"m{i}" for i in range(machines)),
        "ranks_per_machine": each,
        "device": "GPU",
        "driver": "1",
        "flops_per_second": 2e10,
        "message_bytes": 1024,
        "bytes_per_second": table,
        "both_ways": table,
        "latency_seconds": late,
    }
    return Profile(**facts | over)


def planned(made: Any, of: Profile, **over: Any) -> Any:
    return plans(made, of, **{"memory_gib": 1.0, "flops": 2e10, "moves": 200, "simulated": 3} | over)


# --- the part --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "sets"), [(1, []), (2, []), (4, ["layout.bytes_per_second=1e3"])])
def test_it_becomes_a_plain_layout(world: int, sets: list[str]) -> None:
    found = settle(recipe(*sets), world).layout
    assert isinstance(found, Layout)
    assert found.ranks == world
    assert found.machines is None, "links are alike"
    assert found.pp == (2 if sets else 1), "on slow links fewer gradients go between machines"


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["layout.profile=links.json"], r"layout\.bytes_per_second: has no effect: the profile tells it"),
        (["layout.machines=2"], r"layout\.machines: is 2, with 1 ranks each; 4 ranks were started"),
        (["layout.ranks_per_machine=3"], r"layout\.ranks_per_machine: 3 does not divide 4 ranks. Legal: 1, 2, 4"),
        (
            ["layout.memory_gib=1e-4"],
            r"layout\.memory_gib: no layout keeps a rank below it; pp = 4, tp = 1 needs least",
        ),
        (
            ["batch_size=1", "micro_batch_size=1", "model.n_layers=1"],
            r"layout: no layout of these ranks is legal; the first: layout.dp_repl",
        ),
    ],
)
def test_what_cannot_be_is_told_with_what_can(sets: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(recipe(*sets), 4)


def test_without_links_all_that_they_would_tell_is_asked_for() -> None:
    made = recipes.table_of(recipe()) | {"layout": {"use": "pipette", "memory_gib": 1.0}}
    with pytest.raises(RecipeError) as refused:
        recipes.decode(made)
    assert [problem.path for problem in refused.value.problems] == [
        "layout.ranks_per_machine",
        "layout.bytes_per_second",
        "layout.inside_bytes_per_second",
        "layout.flops",
    ]


def test_ranks_are_those_of_the_profile_or_of_named_machines(tmp_path: Path) -> None:
    assert recipe().layout.asked is None
    assert recipe("layout.machines=3").layout.asked == 3
    assert profiled(tmp_path / "links.json", links(3, 2)).layout.asked == 6


def profiled(path: Path, of: Profile, *sets: str) -> Any:
    of.write(path)
    table = recipes.table_of(recipe(*sets)) | {"layout": {"use": "pipette", "memory_gib": 1.0, "profile": str(path)}}
    return recipes.decode(table)


def test_a_profile_of_another_device_or_of_gaps_warns_and_counts_must_be_right(tmp_path: Path) -> None:
    whole = links(4, 1, seed=0)
    made = profiled(tmp_path / "links.json", whole)
    with pytest.warns(UserWarning, match=r"links\.json: links were measured on 'GPU', this is"):
        made.layout.settle(4, made)
    with pytest.raises(RecipeError, match=r"layout\.profile: is of 4 machines with 1 ranks each, 8 were started"):
        made.layout.settle(8, made)
    rows = [list(row) for row in whole.bytes_per_second]
    rows[0][1] = rows[2][3] = None
    gaps = dataclasses.replace(whole, bytes_per_second=tuple(map(tuple, rows)))
    made = profiled(tmp_path / "links.json", gaps)
    told = r"not measured, .* median .*: from m0 to m1, from m2 to m3"
    with pytest.warns(UserWarning, match="measured on"), pytest.warns(UserWarning, match=told):
        made.layout.settle(4, made)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_dead_link_is_named(value: float, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    made = profiled(path, links(2, 1))
    content = json.loads(path.read_text())
    content["bytes_per_second"][0][1] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"links\.json: bytes_per_second from m0 to m1 is"):
        made.layout.settle(2, made)


def test_without_flops_in_the_profile_they_are_asked_for(tmp_path: Path) -> None:
    made = profiled(tmp_path / "links.json", links(2, 1, flops_per_second=None))
    told = pytest.raises(RecipeError, match=r"layout\.flops: is needed")
    with pytest.warns(UserWarning, match="measured on"), told:
        made.layout.settle(2, made)


@pytest.mark.parametrize(
    ("sets", "memory", "told"),
    [
        (["model.n_layers=8", "micro_batch_size=16"], 0.012, "It fits with micro_batch_size = 1"),
        (["model.n_layers=8", "micro_batch_size=1"], 0.008, 'It fits with saved.use = "recompute"'),
        (["model.n_layers=8", "micro_batch_size=1"], 0.0001, "More machines alone do not help"),
    ],
)
def test_the_nearest_change_that_fits_is_told(sets: list[str], memory: float, told: str) -> None:
    made = recipe(*sets, f"layout.memory_gib={memory}")
    with pytest.raises(RecipeError, match=told):
        made.layout.settle(2, made)


# --- plans -----------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(2, 1), (4, 2), (3, 2)]), st.integers(0, 99), st.floats(0.002, 0.02))
def test_no_plan_exceeds_memory_and_every_layout_is_a_plan_or_a_refusal(
    size: tuple[int, int], seed: int, memory: float
) -> None:
    made, machines, each = recipe("batch_size=48"), *size
    found, refused = planned(made, links(machines, each, seed=seed), memory_gib=memory)
    divisors = [sum(n % d == 0 for d in range(1, n + 1)) for n in size]
    assert len(found) + len(refused) == math.prod(divisors)
    for plan in found:
        for rank in range(plan.layout.ranks):
            assert predict(made, plan.layout, rank, vocabulary=257).total <= plan.bytes <= memory * GIB
    assert all(each.bytes is None or each.bytes > memory * GIB for each in refused)
    assert all(each.reason for each in refused)


def test_the_same_settings_give_the_same_plans() -> None:
    of = links(8, 2, seed=1)
    made = recipe("batch_size=64")
    first, again = (planned(made, of, rows=(1, 2, 4), seed=3)[0] for _ in range(2))
    assert first == again
    assert len({plan.micro_batch for plan in first}) > 1
    assert [plan.seconds for plan in first[:3]] == sorted(plan.seconds for plan in first[:3])


def test_every_machine_has_one_place_and_pipelines_stand_as_they_were_placed() -> None:
    of = links(6, 2, seed=2)
    found, _ = planned(recipe("batch_size=48", "model.n_layers=6"), of, moves=2000)
    assert {plan.layout.pp for plan in found} == {1, 2, 3, 6}
    for plan in found:
        layout = plan.layout
        assert layout.machines is not None
        assert sorted(layout.machines) == sorted(of.machines)
        each = layout.ranks // len(layout.machines)
        for row, wanted in enumerate(np.array(plan.placed.order).reshape(-1, layout.pp)):
            for stage, machine in enumerate(wanted):
                rank = next(
                    rank
                    for rank in range(layout.ranks)
                    if layout.place(rank, "pp") == stage and layout.place(rank, "batch") * layout.tp // each == row
                )
                assert layout.machines[rank // each] == f"m{machine}"


@pytest.mark.parametrize("layout", [Layout(pp=2, dp_replicate=2, dp_shard=1), Layout(pp=2, dp_shard=1, tp=2)])
def test_terms_are_our_own_counts(layout: Layout) -> None:
    made = recipe("model.vocab_size=257", "model.tied=false")
    if layout.tp > 1:
        layout = dataclasses.replace(layout, sequence_parallel=True)
    of = links(2, 2)
    found = terms(made, layout, of, 1e9)
    shape, length = made.model, made.data.sequence_length
    tokens = made.micro_batch_size * length
    work = Work(rows=2, micro_batches=found.micro_batches, sequence=length, value_bytes=4)
    sent = traffic(shape, layout, 0, work)
    assert found.boundary_bytes * found.micro_batches == sent["pp"], "one boundary, one direction"
    cost = shape.cost(sequence=length)
    inside = 4 * tokens * shape.hidden_size * 4 * (layout.tp - 1) / layout.tp / 2e10
    assert sum(found.forward) == pytest.approx(
        cost.forward_flops_per_token * tokens / layout.tp / 1e9 + shape.n_layers * inside, rel=1e-9
    )
    assert sum(found.backward) == pytest.approx(2 * sum(found.forward) - shape.n_layers * inside, rel=1e-9)
    if layout.dp_replicate > 1:
        assert sent["dp_replicate"] <= found.gradient_bytes * 2 * (2 - 1) / 2


def test_recomputed_blocks_run_forward_once_more() -> None:
    layout, of = Layout(dp_replicate=2, dp_shard=1), links(2, 1)
    plain = terms(recipe("model.vocab_size=257"), layout, of, 1e9)
    again = terms(recipe("model.vocab_size=257", "saved.use=recompute"), layout, of, 1e9)
    head = 2 * 257 * 64 * 2 * 128 / 1e9
    assert again.backward[0] - plain.backward[0] == pytest.approx(plain.forward[0] - head)


def test_with_links_alike_a_plan_takes_what_the_closed_form_says() -> None:
    of, made = links(4, 1), recipe()
    found, _ = planned(made, of, simulated=0)
    for plan in found:
        layout = plan.layout
        part = terms(made, layout, of, 2e10)
        hop = 2 * (part.boundary_bytes / 1e9 + 1e-5)
        pipeline = Pipeline(
            ranks=layout.pp,
            micro_batches=part.micro_batches,
            forward=max(part.forward),
            backward=max(part.backward),
            crossing=(layout.pp - 1) * hop,
        )
        d = layout.dp_replicate
        assert plan.pipe == pytest.approx(pipette_seconds(pipeline))
        assert plan.exchange == pytest.approx(2 * (d - 1) / d * part.gradient_bytes / 1e9)
        assert plan.simulated is None


def test_the_clock_knows_that_stages_differ() -> None:
    """The closed form takes each stage as the dearest, which the one with the head is."""
    found, _ = planned(recipe("model.n_layers=4"), links(4, 1, slow=1e12), simulated=9)
    deep = next(plan for plan in found if plan.layout.pp == 4)
    assert deep.simulated is not None
    assert deep.simulated < deep.pipe


@pytest.mark.parametrize("seed", range(3))
def test_a_placed_plan_is_no_slower_than_the_launchers_order(seed: int) -> None:
    of = links(6, 1, seed=seed)
    alike = dataclasses.replace(of, bytes_per_second=links(6, 1).bytes_per_second)
    made = recipe("batch_size=48", "model.n_layers=6")
    placed = {plan.layout.pp: plan for plan in planned(made, of, simulated=0)[0]}
    same = {plan.layout.pp: plan for plan in planned(made, alike, simulated=0)[0]}
    assert all(plan.placed.order == tuple(range(6)) for plan in same.values())
    for pp, plan in placed.items():
        ground = ground_of(of, plan.layout, terms(made, plan.layout, of, 2e10), 1)
        assert plan.placed.seconds <= ground.seconds(range(6)) + 1e-15
        assert plan.placed.seconds == pytest.approx(ground.seconds(plan.placed.order)), pp


def test_a_ready_recipe_decodes_again_and_rehearses_without_its_machines() -> None:
    from lmworks.train.small import small

    of = links(4, 1, seed=0)
    made = recipe()
    found, _ = planned(made, of, rows=(1, 2, 4))
    done = ready(made, found[0])
    again = recipes.decode(recipes.table_of(done))
    assert again.layout == found[0].layout
    assert again.micro_batch_size == found[0].micro_batch
    scene, _ = small(again, again.layout, most=8)
    assert scene.layout.machines is None


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_a_run_on_two_ranks_is_the_run_of_one_and_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    """Slow links make it a pipeline; stopped in the middle, resumed as the plain layout that it became."""
    slow = {"memory_gib": 1.0, "ranks_per_machine": 1, "bytes_per_second": 1e3, "inside_bytes_per_second": 1e9}
    picked = {"layout": {"use": "pipette", "flops": 1e10, **slow}, "micro_batch_size": 2}
    gang.run(ranked.train, 2, ranked.table(text, cache, **picked), str(tmp_path / "two"))
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    assert ranked.losses(tmp_path / "two") == pytest.approx(ranked.losses(tmp_path / "one"), rel=1e-5)
    kept = recipes.load(str(tmp_path / "two" / "recipe.toml"), verb="train")
    assert kept.layout == Layout(pp=2, dp_replicate=1, dp_shard=1)
    whole = ranked.losses(tmp_path / "two")
    plain = ranked.table(text, cache, layout={"pp": 2, "dp_shard": 1}, micro_batch_size=2)
    middle = complete(tmp_path / "two" / "checkpoints")[0]
    notes = gang.run(ranked.train, 2, plain, str(tmp_path / "two"), str(middle))
    assert any("going on from step 5" in note for note in notes[0])
    assert ranked.losses(tmp_path / "two") == whole
