"""ZeRO-topo and ZeRO++: what their layouts become, what is refused, what they cost, and runs of several ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.methods.frontier_zero import parameters
from lmworks.methods.frontier_zero.cost import Cluster, break_even, memory, topo, zero_3, zero_plus_plus
from lmworks.model.checkpoint import complete
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.train import rehearse
from lmworks.train.build import settle
from lmworks.train.small import small
from tests.train import ranked

FRONTIER = Cluster(nodes=48)
SLOW = Cluster(nodes=48, net=25.0)
M = 40.0
"""GB of 20 billion weights."""


def recipe(*sets: str) -> Any:
    return recipes.load("methods/frontier-zero", verb="train", sets=["batch_size=48", *sets])


# --- what they become ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "sets", "want"),
    [
        (4, [], {"weights": 2, "gradients": 4, "levels": (2,)}),
        (8, ["layout.node=4"], {"weights": 2, "gradients": 4, "levels": (2, 4)}),
        (16, ["layout.node=8"], {"weights": 2, "gradients": 8, "levels": (2, 8)}),
        (2, [], {"weights": 2, "gradients": 2, "levels": ()}),
        (8, ["layout.pair=4", "layout.node=4"], {"weights": 4, "gradients": 4, "levels": (4,)}),
        (8, ["layout.pair=1", "layout.node=4"], {"weights": 1, "gradients": 4, "levels": (4,)}),
        (
            16,
            ["layout.node=8", "layout.secondary=node", "layout.weights_as=int8", "layout.feedback=0.5"],
            {
                "weights": 2,
                "gradients": 8,
                "levels": (2, 8),
                "secondary": 8,
                "secondary_as": "int8",
                "weights_as": "int8",
                "feedback": 0.5,
            },
        ),
    ],
)
def test_topo_becomes_a_plain_layout(ranks: int, sets: list[str], want: dict[str, Any]) -> None:
    state = StatePlacement(**{"gradients_as": "int4", **want})
    assert settle(recipe(*sets), ranks).layout == Layout(dp_shard=ranks, state=state)


def test_alone_it_is_one_rank() -> None:
    assert settle(recipe(), 1).layout == Layout(dp_shard=1)


@pytest.mark.parametrize(
    ("ranks", "sets", "shared"),
    [(12, ["layout.node=8"], 4), (3, [], 3), (6, ["layout.pair=4", "layout.node=8"], 6)],
)
def test_uneven_nodes_share_inside_of_them_and_say_so(ranks: int, sets: list[str], shared: int) -> None:
    asked = recipe(*sets)
    assert settle(asked, ranks).layout == Layout(dp_replicate=ranks // shared, dp_shard=shared)
    (note,) = asked.layout.notes(ranks, asked)
    assert f"{ranks} ranks do not make pairs of" in note
    assert f"hsdp, in {ranks // shared} groups of {shared} ranks" in note
    assert asked.layout.notes(16, asked) == []


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["layout.ranks=8"], r"layout\.ranks: is 8, but 4 were started"),
        (["layout.feedback=1.5"], r"layout\.feedback"),
        (["layout.pair=3"], r"layout\.pair: 3 does not divide node = 4\. Legal: 1, 2, 4"),
        (["layout.pair=1", "layout.weights_as=int8"], "layout.weights_as: has no effect: with pair = 1"),
        (["layout.pair=1", "layout.secondary=node"], "layout.secondary: has no effect: with pair = 1"),
        (["layout.gradients_as=plain", "layout.feedback=0.5"], "layout.feedback: has no effect"),
    ],
)
def test_what_has_no_effect_or_does_not_nest_is_refused(sets: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(recipe(*sets), 4)


def test_weights_that_a_pair_cannot_hold_are_refused_with_the_sum_and_a_wider_pair() -> None:
    values = parameters(recipe())  # weights are used in four bytes with fp32, which the recipe leaves to the machine
    total = 4 * values / 2 + 4 * values / 4 + 12 * values / 8
    bound = f"layout.memory_gib={total / 2**30 * 0.999}"
    with pytest.raises(RecipeError, match=r"would hold .* GiB \(weights / 2 .* gradients / 4 .*Take pair = 4"):
        settle(recipe("layout.node=4", "precision=fp32", bound), 8)
    settle(recipe("layout.node=4", "precision=fp32", f"layout.memory_gib={total / 2**30 * 1.001}"), 8)
    with pytest.raises(RecipeError, match=r'Take layout\.use = "zero\+\+"'):
        settle(recipe("layout.node=4", "layout.pair=4", "layout.memory_gib=1e-6"), 8)


# --- what they cost --------------------------------------------------------------------------------------------------


def test_twenty_billion_parameters_take_what_the_page_says() -> None:
    gigabytes = {
        "topo": memory(20, weights=2, gradients=8, optimizer=384, secondary=8),
        "zero-3": memory(20, weights=384, gradients=384, optimizer=384),
        "zero++": memory(20, weights=384, gradients=384, optimizer=384, secondary=8, copied=2),
        "in a node": memory(20, weights=8, gradients=8, optimizer=8),
    }
    assert {name: round(size, 2) for name, size in gigabytes.items()} == {
        "topo": 28.12,
        "zero-3": 0.83,
        "zero++": 5.83,
        "in a node": 40.0,
    }


@pytest.mark.parametrize(
    ("cluster", "accumulation", "want"),
    [
        (FRONTIER, 1, (2.4, 1.4, 1.7)),
        (FRONTIER, 2, (4.8, 2.7, 2.3)),
        (FRONTIER, 4, (9.6, 5.5, 3.6)),
        (FRONTIER, 8, (19.2, 11.0, 6.1)),
        (SLOW, 1, (4.7, 2.1, 4.1)),
        (SLOW, 8, (37.6, 16.4, 8.4)),
    ],
)
def test_seconds_are_those_of_the_page(cluster: Cluster, accumulation: int, want: tuple[float, float, float]) -> None:
    found = [scheme(cluster, M).of(accumulation) for scheme in (zero_3, zero_plus_plus, topo)]
    assert [round(seconds, 1) for seconds in found] == list(want)


@given(
    st.builds(
        Cluster,
        nodes=st.integers(2, 64),
        pair=st.floats(50, 400),
        link=st.floats(10, 100),
        net=st.floats(5, 200),
    ),
    st.floats(1, 100),
)
def test_topo_is_ahead_from_where_it_breaks_even(cluster: Cluster, gathered: float) -> None:
    needed = break_even(cluster, gathered)
    ours, theirs = topo(cluster, gathered), zero_plus_plus(cluster, gathered)
    if math.isinf(needed):
        assert ours.of(10**6) > theirs.of(10**6)
    else:
        assert ours.of(math.ceil(needed) + 1) < theirs.of(math.ceil(needed) + 1)
        assert needed < 2 or ours.of(math.floor(needed) - 1) > theirs.of(math.floor(needed) - 1)


def test_it_breaks_even_where_the_page_says() -> None:
    assert 1 < break_even(FRONTIER, M) < 2
    assert 2 < break_even(SLOW, M) < 3


# Claims at full scale, modelled for 8 micro-batches a step, which is assumed. One factor is fitted: the seconds of a
# micro-batch's computing that communication is not hidden behind.
PUBLISHED = {"zero++ over zero-3": 1.405, "topo over zero++": 1.707, "topo over zero-3": 2.398}


def modelled(bare: float) -> dict[str, float]:
    three, plus_plus, ours = (8 * bare + scheme(FRONTIER, M).of(8) for scheme in (zero_3, zero_plus_plus, topo))
    return dict(zip(PUBLISHED, (three / plus_plus, plus_plus / ours, three / ours), strict=True))


def fitted() -> float:
    def off(bare: float) -> float:
        found = modelled(bare)
        return sum(math.log(found[name] / PUBLISHED[name]) ** 2 for name in PUBLISHED)

    return min((i / 1000 for i in range(4001)), key=off)


def test_one_fitted_factor_gives_the_published_order_and_nearly_the_ratios() -> None:
    assert fitted() == pytest.approx(0.385, abs=0.001)
    found = modelled(fitted())
    assert {name: round(ratio, 2) for name, ratio in found.items()} == {
        "zero++ over zero-3": 1.58,
        "topo over zero++": 1.53,
        "topo over zero-3": 2.43,
    }
    for name, ratio in PUBLISHED.items():
        assert found[name] == pytest.approx(ratio, rel=0.13)


def test_loss_in_scaling_is_not_what_the_formulas_explain() -> None:
    """0.94 was published up to 48 nodes. From 8 nodes on the formulas lose a hundredth: nothing in them waits."""
    few, many = (8 * fitted() + topo(Cluster(nodes=nodes), M).of(8) for nodes in (8, 48))
    assert few / many == pytest.approx(0.99, abs=0.005)


# --- runs ------------------------------------------------------------------------------------------------------------

LAYOUT = {"use": "frontier-zero", "node": 4, "secondary": "node", "block": 64}
"""Two rows of the toy's token table in a block."""


@pytest.mark.ranks
def test_a_run_on_four_ranks_is_near_that_of_one_and_goes_on_where_it_was(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    """Two micro-batches a step. Resumed in the middle, as the plain layout that it became, it is bitwise unbroken; one
    rank goes on from the same checkpoint."""
    picked = {"layout": LAYOUT, "micro_batch_size": 1}
    spec = ranked.table(text, cache, **picked)
    gang.run(ranked.train, 4, spec, str(tmp_path / "four"))
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    whole, one = ranked.losses(tmp_path / "four"), ranked.losses(tmp_path / "one")
    assert whole[0] == pytest.approx(one[0], rel=1e-6)
    assert whole == pytest.approx(one, rel=0.02)
    assert whole != one
    kept = recipes.load(str(tmp_path / "four" / "recipe.toml"), verb="train")
    assert kept.layout == settle(recipe("layout.secondary=node", "layout.block=64"), 4).layout
    middle = complete(tmp_path / "four" / "checkpoints")[0]
    alone = gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "alone"), str(middle))
    assert any("going on from step 5" in note for note in alone[0])
    assert ranked.losses(tmp_path / "alone")[-7:] == pytest.approx(whole[-7:], rel=0.02)
    plain = ranked.table(text, cache, layout=recipes.table_of(kept)["layout"], micro_batch_size=1)
    notes = gang.run(ranked.train, 4, plain, str(tmp_path / "four"), str(middle))
    assert any("going on from step 5" in note for note in notes[0])
    assert ranked.losses(tmp_path / "four") == whole


@pytest.mark.ranks
def test_a_rehearsal_sends_plain_values_and_says_so() -> None:
    """Sixteen ranks, rehearsed on eight: two nodes of two pairs."""
    asked = recipe("layout.secondary=node", "layout.weights_as=int8")
    scene, said = small(asked, settle(asked, 16).layout, most=8)
    assert any("int8, int4 -> plain" in line for line in said)
    assert scene.layout == Layout(dp_shard=8, state=StatePlacement(weights=2, gradients=4, levels=(2, 4)))
    verdict = rehearse.rehearse(scene)
    assert verdict.equal
    assert verdict.billed
