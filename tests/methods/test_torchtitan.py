"""The degrees that TorchTitan's rules pick, and that what they pick can be run and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.methods.torchtitan import TorchTitan, nearest_to_root
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.train.build import settle
from tests.train import ranked


def recipe(size: str, *sets: str) -> Any:
    return recipes.load("methods/torchtitan", verb="train", sets=[f"model.size={size}", *sets])


@pytest.mark.parametrize(
    ("size", "ranks", "settings", "want"),
    [
        ("llama-3-8b", 128, {}, {"dp_shard": 128}),
        ("llama-3-70b", 256, {"dimensions": 2}, {"dp_shard": 32, "tp": 8, "sequence_parallel": True}),
        (
            "llama-3.1-405b",
            512,
            {"dimensions": 3},
            {"dp_shard": 8, "tp": 8, "pp": 8, "sequence_parallel": True, "schedule": "interleaved-1f1b"},
        ),
        (
            "llama-3.1-405b",
            512,
            {"dimensions": 4, "tokens_per_rank": 32},
            {"dp_shard": 4, "cp": 4, "tp": 8, "pp": 4, "sequence_parallel": True, "schedule": "interleaved-1f1b"},
        ),
        ("llama-3-8b", 8, {"dimensions": 4, "ranks_per_node": 1, "tokens_per_rank": 16}, {"cp": 8, "dp_shard": 1}),
        ("llama-3-8b", 256, {"replicas": 4}, {"dp_replicate": 4, "dp_shard": 64}),
    ],
)
def test_the_papers_layouts(size: str, ranks: int, settings: dict[str, Any], want: dict[str, Any]) -> None:
    assert TorchTitan(**settings).settle(ranks, recipe(size)) == Layout(**want)


def test_a_pipeline_of_few_blocks_is_plain() -> None:
    made = recipe("llama-3-8b", "model.n_layers=15").layout
    assert made.asked is None
    found = TorchTitan(dimensions=3).settle(512, recipe("llama-3-8b", "model.n_layers=15"))
    assert (found.pp, found.schedule) == (8, "1f1b")


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 64))
def test_all_ranks_are_used(dimensions: Any, node: int, replicas: int, more: int) -> None:
    ranks = node * replicas * more
    rule = TorchTitan(dimensions=dimensions, ranks_per_node=node, replicas=replicas)
    assert rule.settle(ranks, recipe_8b).ranks == ranks


recipe_8b = recipe("llama-3-8b")


@given(st.integers(1, 5000))
def test_nearest_to_root(number: int) -> None:
    found = nearest_to_root(number)
    assert number % found == 0
    apart = max(found / number**0.5, number**0.5 / found)
    others = [d for d in range(1, number + 1) if number % d == 0]
    assert all(max(d / number**0.5, number**0.5 / d) >= apart * (1 - 1e-12) for d in others)


@pytest.mark.parametrize(
    ("sets", "ranks", "told"),
    [
        (["layout.dimensions=2"], 12, "layout.ranks_per_node: 8 does not divide 12 ranks. Legal: 1, 2, 3, 4, 6, 12"),
        (["layout.replicas=3"], 8, "layout.replicas: 3 does not divide 8 ranks"),
        (["layout.dimensions=4", "layout.tokens_per_rank=32"], 16, "128 tokens on 2 ranks make 64 each"),
        (["layout.dimensions=2", "layout.ranks_per_node=4"], 8, "4 does not divide the key/value heads"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(sets: list[str], ranks: int, told: str) -> None:
    made = recipes.load("methods/torchtitan", verb="train", sets=sets)
    with pytest.raises(RecipeError, match=told):
        settle(made, ranks)


@pytest.mark.parametrize(
    "line", ["layout.ranks_per_node=4", "layout.tokens_per_rank=64"], ids=["ranks_per_node", "tokens_per_rank"]
)
def test_settings_without_effect_are_told(line: str) -> None:
    with pytest.raises(RecipeError, match="has no effect with dimensions"):
        recipes.load("methods/torchtitan", verb="train", sets=[line])


@pytest.mark.ranks
def test_a_run_keeps_what_was_picked(text: Path, cache: Path, tmp_path: Path) -> None:
    """Two dimensions on four ranks; its folder has the plain layout, which goes on as it is."""
    picked = {"use": "torchtitan", "dimensions": 2, "ranks_per_node": 2}
    gang.run(ranked.train, 4, ranked.table(text, cache, layout=picked), str(tmp_path / "run"))
    kept = recipes.load(str(tmp_path / "run" / "recipe.toml"), verb="train")
    assert kept.layout == Layout(dp_shard=2, tp=2, sequence_parallel=True)
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    assert ranked.losses(tmp_path / "run") == pytest.approx(ranked.losses(tmp_path / "one"), rel=1e-5)
