"""Places of ranks, splits of blocks and parts of tensors: nothing twice, nothing left out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.model.decoder import DecoderConfig
from lmworks.parallel.layout import AXES, VIEWS, Layout
from lmworks.parallel.pipeline import block_costs, cheapest, held_by, holder, split
from lmworks.parallel.servers import Servers
from lmworks.parallel.shard import shares
from lmworks.parallel.world import lines
from lmworks.train.build import settle

DEGREES = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    degrees = draw(DEGREES)
    fsdp = degrees["dp_shard"] * degrees["cp"]
    ep = draw(st.sampled_from([d for d in range(1, fsdp + 1) if fsdp % d == 0]))
    return Layout(**degrees, ep=ep)


@given(layouts())
def test_every_rank_has_a_place_of_its_own(layout: Layout) -> None:
    places = {tuple(layout.place(rank, axis) for axis in AXES) for rank in range(layout.ranks)}
    assert places == set(itertools.product(*(range(layout.size(axis)) for axis in AXES)))


@given(layouts(), st.sampled_from([*AXES, "batch", "fsdp", "loss", "ep", "edp"]))
def test_lines_cover_all_ranks_once_in_the_order_of_places(layout: Layout, axis: str) -> None:
    found = lines(layout, axis)
    assert sorted(rank for line in found for rank in line) == list(range(layout.ranks))
    apart = [a for a in AXES if a != axis and a not in VIEWS.get(axis, ())]
    if axis in ("ep", "edp"):
        apart = [a for a in AXES if a not in VIEWS["fsdp"]]
    for line in found:
        assert [layout.place(rank, axis) for rank in line] == list(range(layout.size(axis)))
        for other in apart:
            assert len({layout.place(rank, other) for rank in line}) == 1, other


@given(layouts())
def test_ranks_with_other_experts_and_ranks_with_the_same_make_up_fsdp(layout: Layout) -> None:
    for rank in range(layout.ranks):
        here = layout.place(rank, "edp") * layout.ep + layout.place(rank, "ep")
        assert here == layout.place(rank, "fsdp")


@given(DEGREES, st.integers(1, 200))
def test_what_is_left_goes_to_dp_shard_or_the_nearest_legal_is_named(degrees: dict[str, int], world: int) -> None:
    others = {axis: size for axis, size in degrees.items() if axis != "dp_shard"}
    product = math.prod(others.values())
    if world % product == 0:
        assert Layout(**others).settle(world) == Layout(**others, dp_shard=world // product)
        return
    with pytest.raises(RecipeError) as told:
        Layout(**others).settle(world)
    words = str(told.value).partition(f"Legal with {world}: ")[2].partition(";")[0]
    legal = {name: int(size) for name, size in (pair.split(" = ") for pair in words.split(", "))}
    assert Layout(**legal).settle(world).ranks == world
    assert all(legal.get(axis, 1) <= size for axis, size in others.items())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 30))
def test_the_split_is_the_best_of_all(costs: list[int], stages: int, head: int) -> None:
    stages = min(stages, len(costs))
    found = cheapest([float(c) for c in costs], stages, after=float(head))
    assert sum(found) == len(costs)
    assert min(found) >= 1

    def dearest(lengths: Any) -> int:
        stops = list(itertools.accumulate(lengths))
        sums = [sum(costs[stop - size : stop]) for stop, size in zip(stops, lengths, strict=True)]
        return max([*sums[:-1], sums[-1] + head])

    every = [
        lengths for lengths in itertools.product(range(1, len(costs) + 1), repeat=stages) if sum(lengths) == len(costs)
    ]
    assert dearest(found) == min(dearest(lengths) for lengths in every)


def test_a_large_head_leaves_the_last_stage_fewer_blocks() -> None:
    shape: dict[str, Any] = {"n_layers": 8, "hidden_size": 64, "n_heads": 4, "n_kv_heads": 4, "ffn_size": 128}
    small, large = (DecoderConfig(vocab_size=size, **shape) for size in (64, 4096))
    layout = Layout(pp=2, dp_shard=1)
    assert [len(s) for s in split(small, layout, sequence=32)] == [4, 4]
    lengths = [len(s) for s in split(large, layout, sequence=32)]
    assert lengths == [7, 1]
    head = 2 * 4096 * 64
    assert head > 3 * block_costs(large, sequence=32)[0]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zero-bubble-v"])
def test_every_stage_has_one_holder(schedule: Any) -> None:
    layout = Layout(pp=3, dp_shard=1, schedule=schedule)
    held = [held_by(layout, place) for place in range(3)]
    assert sorted(stage for stages in held for stage in stages) == list(range(layout.stages))
    assert all(stage in held[holder(layout, stage)] for stage in range(layout.stages))


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_tile_what_is_divided(size: int, ranks: int) -> None:
    """Any number of ranks, also more than there are entries."""
    found = shares(size, ranks)
    assert [entry for start, length in found for entry in range(start, start + length)] == list(range(size))
    assert max(length for _, length in found) - min(length for _, length in found) <= 1


HEADS = ["model.n_heads=6", "model.n_kv_heads=6", "model.head_dim=8"]


@pytest.mark.parametrize(
    ("ranks", "sets", "told"),
    [
        (2, ["layout.context=ring"], r"layout\.context: has no effect with cp = 1"),
        (2, ["layout.order=striped"], r"layout\.order: has no effect with cp = 1"),
        (2, ["layout.sequence_parallel=true"], r"layout\.sequence_parallel: has no effect with tp = 1"),
        (4, ["layout.cp=4"], "holds two runs of a row's tokens, but sequence_length = 60; take a multiple of 8, as 64"),
        (
            7,
            ["layout.cp=7", "layout.order=contiguous"],
            "7 ranks holds as many of a row's tokens.* multiple of 7, as 63",
        ),
        (4, ["layout.cp=4", "layout.context=ulysses"], "4 ranks of cp some of the 6 key/value heads.* cp = 1, 2, 3, 6"),
        (4, ["layout.cp=2", "layout.tp=2", "layout.context=ulysses"], "2 ranks of cp some of the 3 .* cp = 1, 3, or"),
        (
            4,
            ["layout.cp=2", "layout.tp=2", "layout.order=striped", "layout.sequence_parallel=true", "L=58"],
            r"sequence_length = 58 is not divisible by 4; take 60",
        ),
    ],
)
def test_rows_that_cannot_be_divided_so_are_refused_with_what_can(ranks: int, sets: list[str], told: str) -> None:
    plain = ["layout.use=ranks", *HEADS, "data.sequence_length=60"]
    sets = [line.replace("L=", "data.sequence_length=") for line in sets]
    with pytest.raises(RecipeError, match=told):
        settle(recipes.load("quickstart", verb="train", sets=plain + sets), ranks)


@pytest.mark.parametrize(
    ("ranks", "sets", "told"),
    [
        (1, ["layout.servers.tile=8"], r"layout\.servers: has no effect: no other rank"),
        (2, ["layout.servers.tile=8", "layout.tp=2"], r"layout\.servers: has no effect: no other rank"),
        (2, ["layout.servers.tile=8", "compile=true"], r"layout\.servers: works on blocks that are not compiled"),
        (2, ["layout.servers.tile=8", "model.sliding_window=9"], r"layout\.servers: computes causal .* 9 tokens"),
        (
            2,
            ["layout.servers.ping_pong=true", "micro_batch_size=1"],
            r"layout\.servers\.ping_pong: needs two rows or more in a micro-batch, here is 1",
        ),
        (
            2,
            ["layout.servers.tile=8", "layout.cp=2", "layout.context=ring"],
            r"layout\.context: has no effect with servers",
        ),
        (2, ["layout.servers.tile=0"], r"layout\.servers\.tile"),
        (2, ["layout.servers.keep=never"], r"layout\.servers\.keep.*resend"),
        (2, ["layout.servers.tiles=8"], r"layout\.servers\.tiles.*tile"),
    ],
)
def test_attention_that_cannot_be_served_is_refused_with_the_reason(ranks: int, sets: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(recipes.load("quickstart", verb="train", sets=["layout.use=ranks", *HEADS, *sets]), ranks)


@pytest.mark.parametrize("schedule", ["zero-bubble-v", "dualpipe-v"])
def test_a_tied_table_at_both_ends_of_a_v_is_refused_wherever_fsdp_would_divide_it(schedule: str) -> None:
    """Twice, that is: over cp as well as over dp_shard, where each of its two modules asks for a part of its own."""
    plain = ["layout.use=ranks", "model.tied=true", "layout.pp=2", "micro_batch_size=1", f"layout.schedule={schedule}"]
    for sets in (["layout.cp=2"], []):
        with pytest.raises(RecipeError, match=r"layout\.schedule: .* puts both ends of a tied model on one rank"):
            settle(recipes.load("quickstart", verb="train", sets=[*plain, *sets]), 4)
        untied = [*plain, *sets, "model.tied=false"]
        assert settle(recipes.load("quickstart", verb="train", sets=untied), 4).layout.size("fsdp") == 2
    copies = [*plain, "layout.dp_replicate=2"]
    assert settle(recipes.load("quickstart", verb="train", sets=copies), 4).layout.dp_replicate == 2


def test_servers_need_no_setting_of_their_own() -> None:
    """One row of a micro-batch is no mistake: halves are taken where there are some."""
    sets = ["layout.servers.keep=cache", "micro_batch_size=1"]
    layout = settle(recipes.load("quickstart", verb="train", sets=sets), 2).layout
    assert layout.servers == Servers(keep="cache")
    assert layout.size("attention") == 2


def test_a_division_that_one_order_cannot_make_another_can() -> None:
    sets = ["layout.cp=4", "layout.order=striped", "data.sequence_length=60"]
    assert settle(recipes.load("quickstart", verb="train", sets=sets), 4).layout.runs == 4
