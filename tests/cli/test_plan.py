"""The verb `plan`, as a person and as a script see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmworks.cli.app import app
from lmworks.core import recipe as recipes

TINY = ("--cluster", "workstation-a100", "--set", "batch_size=8", "--set", "data.sequence_length=128")


def test_people_get_a_table_a_breakdown_and_doubts() -> None:
    found = CliRunner().invoke(app, ["plan", "quickstart", *TINY])
    assert found.exit_code == 0, found.output
    for words in (
        "rows ",
        "a step of",
        "memory of the rank that holds most",
        "layouts looked at",
        "nobody checked",
    ):
        assert words in found.stdout


def test_scripts_get_one_object_a_recipe_and_a_picture(tmp_path: Path) -> None:
    recipe, picture = tmp_path / "best.toml", tmp_path / "best.png"
    command = ["plan", "quickstart", *TINY, "--json", "--write", str(recipe), "--picture", str(picture)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    best = answer["plans"][0]
    assert sum(best["seconds_by_class"].values()) == pytest.approx(best["step_seconds"])
    assert best["memory_bytes"] == sum(size or 0 for size in best["memory_by_class"].values())
    assert answer["fitting"] <= answer["looked_at"]
    written = recipes.load(str(recipe), verb="train")
    assert written.layout.ranks == 2
    assert written.micro_batch_size == best["micro_batch_size"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    sets = ["--set", "batch_size=2", "--set", "data.sequence_length=96", "--gpus", "4"]
    found = CliRunner().invoke(app, ["plan", "quickstart", *sets, "--picture", str(picture), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["plans"][0]["layout"]["pp"] > 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_fits_is_the_answer_no() -> None:
    sets = ["--set", "model.size=llama-3-70b", "--set", "data.sequence_length=2048"]
    found = CliRunner().invoke(app, ["plan", "quickstart", "--cluster", "workstation-a100", *sets])
    assert found.exit_code == 4, found.output
    assert "Nothing fits" in found.stdout
    assert "the nearest" in found.stdout
