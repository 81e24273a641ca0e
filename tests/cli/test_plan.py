"""The verb `plan`, as a person and as a script see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmworks.cli.app import app
from lmworks.core import recipe as recipes
from lmworks.train import loop
from tests.cli.conftest import Command
from tests.train import toy

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


def _scored(tmp_path: Path) -> Path:
    """The folder of a real run that is long enough to be scored."""
    table = toy.table(toy.corpus(tmp_path / "text"), tmp_path / "cache", steps=9, threads=1)
    folder = loop.run(recipes.decode(table), tmp_path / "run", resume="auto", report=toy.Silent()).path
    (tmp_path / "toy.toml").write_text((folder / "recipe.toml").read_text())
    return folder


def test_a_score_corrects_the_next_plan_unless_it_is_left_out(
    lmworks: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))
    folder, planned = _scored(tmp_path), ("plan", "toy.toml", "--cluster", "laptop", "--gpus", "1")
    before = json.loads(lmworks(*planned, "--json").out)
    assert before["correction"]["runs"] == 0
    told = lmworks("plan", "--score", str(folder), "--cluster", "laptop")
    assert told.code == 0, told.err
    for words in ("measured/predicted", "6 steady steps", "optimizer state", "kept for later plans"):
        assert words in told.out
    scored = json.loads(lmworks("plan", "--score", str(folder), "--cluster", "laptop", "--json").out)
    after = json.loads(lmworks(*planned, "--json").out)
    assert after["correction"]["runs"] == 1
    ratio = after["plans"][0]["step_seconds"] / before["plans"][0]["step_seconds"]
    assert ratio == pytest.approx(scored["factor"], rel=1e-6)
    assert "corrected by 1 run: x" in lmworks(*planned).out
    assert json.loads(lmworks(*planned, "--json", "--uncorrected").out) == before
    Path(scored["kept"]).write_text("torn")
    damaged = lmworks(*planned)
    assert damaged.code == 0
    assert "not corrected by runs" in damaged.out
    refused = lmworks("plan", "--score", str(folder), "--cluster", "laptop")
    assert refused.code == 1
    assert "score the runs again" in refused.err


def test_mistakes_with_scores_are_told(lmworks: Command) -> None:
    for words, says in (
        (("plan",), "no recipe to plan"),
        (("plan", "quickstart", "--score", "x"), "RECIPE has no effect with --score"),
        (("plan", "--score", "x", "--gpus", "2", "--uncorrected"), "--gpus, --uncorrected has no effect"),
        (("plan", "--score", "x", "--cluster", "laptop"), "no run's folder"),
        (("plan", "--score", "x", "--cluster", "labtop"), "did you mean 'laptop'"),
    ):
        answer = lmworks(*words)
        assert answer.code == 2, words
        assert says in answer.err


def test_the_best_hour_and_the_making_of_machines_are_told(tmp_path: Path) -> None:
    rows = "".join(f"{hour},{100 if hour == 3 else 400}\n" for hour in range(24))
    (tmp_path / "grid.csv").write_text(f"# source: a test\n# year: 2024\nhour (UTC),carbon (g/kWh)\n{rows}")
    sets = [*TINY, "--set", f"energy.hourly={tmp_path / 'grid.csv'}", "--set", "energy.country=Utopia"]
    found = CliRunner().invoke(app, ["plan", "quickstart", *sets, "--region", "US-CA"])
    assert found.exit_code == 0, found.output
    assert "started at 03:00 UTC: " in found.output
    assert (
        "kg CO2 at 179 g/kWh (California, United States, 2023, location-based, direct emissions only); EPA"
        in found.output
    )
    assert "by grid.csv (Utopia, 2024: a test)" in found.output
    assert "making the machines, the run's share of 5 years, not in the above: " in found.output
    answer = json.loads(CliRunner().invoke(app, ["plan", "quickstart", *sets, "--json"]).stdout)
    by_start = answer["plans"][0]["co2_kg_by_start_utc"]
    assert len(by_start) == 24
    assert min(by_start) == by_start[3]
    assert answer["plans"][0]["co2_embodied_kg"]["central"] > 0
