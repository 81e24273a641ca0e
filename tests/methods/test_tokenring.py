"""TokenRing's layouts: what they become, which models are refused, and that runs are those of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.methods.tokenring import TokenRing
from lmworks.model.checkpoint import complete
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.traffic import of_context
from lmworks.train.build import settle
from tests.train import ranked


def recipe(*sets: str) -> Any:
    return recipes.load("methods/tokenring", verb="train", sets=sets)


@pytest.mark.parametrize(
    ("ranks", "sets", "want"),
    [
        (1, [], {"dp_shard": 1}),
        (4, [], {"cp": 4, "dp_shard": 1, "context": "tokenring"}),
        (8, ["layout.cp=2"], {"cp": 2, "dp_shard": 4, "context": "tokenring"}),
        (2, ["layout.order=striped"], {"cp": 2, "dp_shard": 1, "context": "tokenring", "order": "striped"}),
    ],
)
def test_it_becomes_a_plain_layout(ranks: int, sets: list[str], want: dict[str, Any]) -> None:
    assert settle(recipe(*sets), ranks).layout == Layout(**want)


@pytest.mark.parametrize(
    ("sets", "ranks", "told"),
    [
        (["layout.cp=3"], 8, r"layout\.cp: 3 does not divide 8 ranks. Legal: 2, 4, 8"),
        (["layout.cp=1"], 8, r"layout\.cp: is 1, which passes nothing round"),
        (["layout.cp=3"], 3, r"sequence_length = 128; take a multiple of 6, as 132"),
        (["layout.cp=3", "layout.order=striped"], 3, r"sequence_length = 128; take a multiple of 3, as 129"),
        (["layout.heavier=true"], 2, r"layout\.heavier: has no effect: 8 query heads are not more than 2 x 8"),
        (["model.n_heads=8", "layout.cp=4"], 4, r'layout: queries of 32 .* 2 x 8: 2 times .* cp = 4, context = "ring"'),
    ],
)
def test_what_cannot_be_or_does_not_pay_is_refused_with_what_does(sets: list[str], ranks: int, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(recipe(*sets), ranks)


def test_who_wants_heavier_queries_round_gets_them() -> None:
    assert settle(recipe("model.n_heads=8", "layout.heavier=true"), 2).layout.context == "tokenring"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([64, 128]), st.sampled_from([2, 4]), st.integers(2, 8))
def test_the_rule_is_that_of_the_bytes(groups: int, times: int, head_dim: int, value_bytes: int, ranks: int) -> None:
    """Refused exactly where the fuller way of a forward pass is fuller than ring attention's, sums of lse aside."""
    heads = groups * times
    full = {
        engine: max(
            of_context(
                Layout(dp_shard=1, cp=ranks, context=engine), heads, groups, head_dim, value_bytes=value_bytes
            ).forward
        )
        for engine in ("ring", "tokenring")
    }
    aside = (ranks - 1) * heads * 4
    assert (full["tokenring"] - aside > full["ring"]) == (heads > 2 * groups)
    made = recipes.load(
        "methods/tokenring",
        verb="train",
        sets=[
            f"model.n_heads={heads}",
            f"model.n_kv_heads={groups}",
            "model.head_dim=8",
            f"layout.heavier={'true' if heads > 2 * groups else 'false'}",
        ],
    )
    assert made.layout == TokenRing(heavier=heads > 2 * groups)


@pytest.mark.ranks
def test_a_run_on_two_ranks_is_the_run_of_one_and_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    """Packed documents, grouped heads; stopped in the middle, then resumed as the plain layout that it became."""
    picked = {"layout": {"use": "tokenring"}}
    gang.run(ranked.train, 2, ranked.table(text, cache, **picked), str(tmp_path / "two"))
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    assert ranked.losses(tmp_path / "two") == pytest.approx(ranked.losses(tmp_path / "one"), rel=1e-5)
    kept = recipes.load(str(tmp_path / "two" / "recipe.toml"), verb="train")
    assert kept.layout == Layout(cp=2, dp_shard=1, context="tokenring")
    whole = ranked.losses(tmp_path / "two")
    plain = ranked.table(text, cache, layout={"cp": 2, "dp_shard": 1, "context": "tokenring"})
    middle = complete(tmp_path / "two" / "checkpoints")[0]
    notes = gang.run(ranked.train, 2, plain, str(tmp_path / "two"), str(middle))
    assert any("going on from step 5" in note for note in notes[0])
    assert ranked.losses(tmp_path / "two") == whole


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["all-gather", "ring", "tokenring"])
def test_what_waits_for_the_backward_pass_is_what_was_planned(
    engine: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    """q, k, v, out and lse of a rank's own tokens; with all-gather, the keys of all ranks and a mask."""
    layout = {"cp": 2, "dp_shard": 1, "context": engine}
    gang.run(ranked.train, 2, ranked.table(text, cache, layout=layout) | {"steps": 3}, str(tmp_path / "run"))
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert memory["measured"]["saved"] == pytest.approx(memory["predicted"]["saved"], rel=1e-2)
