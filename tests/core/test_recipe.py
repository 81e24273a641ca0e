"""Recipes: strict, all errors at once, nearest names, and a resolved file that runs again."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.train.optim import AdamW
from lmworks.train.recipe import Train
from lmworks.train.schedule import Cosine, WarmupStableDecay

SMALL: dict[str, Any] = {
    "do": "train",
    "steps": 10,
    "batch_size": 4,
    "model": {"use": "decoder", "n_layers": 2, "hidden_size": 32, "n_heads": 2, "ffn_size": 64},
    "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 32},
    "optimizer": {"use": "adamw", "lr": 1e-3},
}


def problems(table: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        recipes.decode(table)
    assert caught.value.exit_code == 2
    return {problem.path: problem.text for problem in caught.value.problems}


def test_a_small_recipe_decodes_with_its_defaults() -> None:
    recipe = recipes.decode(SMALL)
    assert isinstance(recipe, Train)
    assert recipe.optimizer == AdamW(lr=1e-3)
    assert recipe.schedule == Cosine()
    assert recipe.data.sequence_length == 32


def test_all_errors_are_reported_at_once_with_path_and_nearest_name() -> None:
    table = {
        **SMALL,
        "stesp": 5,
        "steps": "many",
        "optimizer": {"use": "adamw", "lr": -1.0, "weight_decey": 0.1},
        "schedule": {"use": "cosin"},
    }
    found = problems(table)
    assert set(found) == {"stesp", "steps", "optimizer.lr", "optimizer.weight_decey", "schedule.use"}
    assert "did you mean 'steps'" in found["stesp"]
    assert "adamw has no setting 'weight_decey'; did you mean 'weight_decay'?" in found["optimizer.weight_decey"]
    assert "did you mean 'cosine'" in found["schedule.use"]
    assert "greater than 0" in found["optimizer.lr"]
    assert "'many'" in found["steps"]


def test_a_missing_key_is_named() -> None:
    table = {key: value for key, value in SMALL.items() if key != "steps"}
    assert "no default" in problems(table)["steps"]


@pytest.mark.parametrize(("path", "value"), [("seed", True), ("batch_size", 2.0), ("compile", 1), ("steps", 0)])
def test_types_are_strict(path: str, value: object) -> None:
    assert path in problems({**SMALL, path: value})


def test_an_int_is_a_legal_float() -> None:
    assert recipes.decode({**SMALL, "optimizer": {"use": "sgd", "lr": 1}}).optimizer.lr == 1.0


def test_a_pair_that_contradicts_itself_is_refused_with_its_reason() -> None:
    found = problems({**SMALL, "schedule": {"use": "cosine", "warmup": 10}, "micro_batch_size": 8})
    assert "do not end before" in found["schedule.warmup"]
    assert "more than batch_size" in found["micro_batch_size"]


def test_a_setting_without_effect_is_refused() -> None:
    assert "no effect" in problems({**SMALL, "samples": {"every": 5}})["samples.every"]


def test_a_part_without_use_lists_the_legal_ones() -> None:
    assert "adamw" in problems({**SMALL, "optimizer": {"lr": 1e-3}})["optimizer.use"]


def test_a_recipe_of_another_verb_says_which_command_runs_it() -> None:
    with pytest.raises(RecipeError, match="lmworks train"):
        recipes.decode(SMALL, verb="plan")


def test_an_unknown_verb_lists_the_known_ones() -> None:
    assert "train" in problems({**SMALL, "do": "trian"})["do"]


def test_the_resolved_recipe_loads_again_as_it_is(tmp_path: Path) -> None:
    recipe = recipes.decode(SMALL)
    path = tmp_path / "recipe.toml"
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path) == recipe


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    decay=st.floats(0, 0.5),
    prompts=st.lists(st.text(max_size=20), max_size=3),
    micro=st.none() | st.integers(1, 4),
)
def test_dump_then_decode_is_the_identity(
    steps: int, lr: float, betas: tuple[float, float], decay: float, prompts: list[str], micro: int | None
) -> None:
    recipe = dataclasses.replace(
        recipes.decode(SMALL),
        steps=steps,
        optimizer=AdamW(lr=lr, betas=betas),
        schedule=WarmupStableDecay(decay=decay),
        micro_batch_size=micro,
        samples=dataclasses.replace(recipes.decode(SMALL).samples, prompts=tuple(prompts)),
    )
    assert recipes.decode(tomllib.loads(recipes.dump(recipe))) == recipe


def test_sets_go_through_the_same_decoder() -> None:
    table = recipes.apply_sets(
        SMALL, ["optimizer.lr=2e-3", "data.readers.0.weight=2.0", "schedule.use=linear", "steps=20"]
    )
    recipe = recipes.decode(table)
    assert recipe.optimizer.lr == 2e-3
    assert recipe.data.readers[0].weight == 2.0
    assert recipe.steps == 20
    assert SMALL["steps"] == 10


def test_setting_another_part_drops_the_settings_of_the_old_one() -> None:
    table = recipes.apply_sets(
        {**SMALL, "optimizer": {"use": "adamw", "lr": 1e-3, "eps": 1e-6}}, ["optimizer.use=lion", "optimizer.lr=1e-4"]
    )
    assert table["optimizer"] == {"use": "lion", "lr": 1e-4}


def test_another_size_drops_the_settings_of_the_old_shape() -> None:
    size = {"model": {"size": "llama-1m"}}
    table = recipes.apply_sets(SMALL, ["model.size=llama-1m"])
    assert table["model"] == size["model"]
    assert recipes.merge({"model": {"use": "decoder", "n_layers": 2}}, size) == size
    assert recipes.decode(table).model.hidden_size != SMALL["model"]["hidden_size"]


def test_a_file_without_an_ending_does_not_hide_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("not a recipe")
    assert recipes.load("quickstart", verb="train").do == "train"


@pytest.mark.parametrize("item", ["steps", "=3", "data.readers.7.weight=1", "steps.deep=1"])
def test_a_bad_set_is_refused(item: str) -> None:
    with pytest.raises(RecipeError):
        recipes.apply_sets(SMALL, [item])


def test_a_base_is_one_level_and_merged_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'do = "train"\nsteps = 5\noptimizer = { use = "adamw", lr = 1.0, eps = 1e-6 }\n'
    )
    (tmp_path / "over.toml").write_text('base = "base.toml"\noptimizer = { lr = 2.0 }\n')
    assert recipes.read(tmp_path / "over.toml") == {
        "do": "train",
        "steps": 5,
        "optimizer": {"use": "adamw", "lr": 2.0, "eps": 1e-6},
    }
    (tmp_path / "third.toml").write_text('base = "over.toml"\n')
    with pytest.raises(RecipeError, match="one level"):
        recipes.read(tmp_path / "third.toml")


def test_another_part_replaces_the_table_of_the_base() -> None:
    merged = recipes.merge(
        {"optimizer": {"use": "adamw", "lr": 1.0, "eps": 1e-6}}, {"optimizer": {"use": "lion", "lr": 0.1}}
    )
    assert merged == {"optimizer": {"use": "lion", "lr": 0.1}}


def test_broken_toml_names_the_file_and_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("steps = \n")
    with pytest.raises(RecipeError, match="line 1") as caught:
        recipes.load(path)
    assert "broken.toml" in str(caught.value)


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="quickstart"):
        recipes.load("quickstrat", verb="train")


def test_differences_are_found_by_path() -> None:
    assert recipes.differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == {
        "b.c": (2, 3),
        "d": (None, 4),
    }


def test_a_size_is_merged_under_the_table() -> None:
    model = recipes.decode({**SMALL, "model": {"size": "smollm2-135m", "max_position": 512}}).model
    assert (model.hidden_size, model.n_layers, model.max_position) == (576, 30, 512)


def test_an_unknown_size_names_the_nearest() -> None:
    assert "smollm2-135m" in problems({**SMALL, "model": {"size": "smolm2-135m"}})["model.size"]


@pytest.mark.parametrize("path", sorted(recipes.recipes_folder().glob("train/*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert recipes.load(path).do == path.parent.name
