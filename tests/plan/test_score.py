"""Plans held against runs: real folders of small runs, with the clock of a test where a time must be known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, RecipeError, UsageError
from lmworks.core.journal import rows
from lmworks.parallel import gang
from lmworks.parallel.state import StatePlacement
from lmworks.plan import cluster as clusters
from lmworks.plan import residuals, score, search, simulate
from lmworks.plan.bill import KWH
from lmworks.plan.cluster import Cluster
from lmworks.plan.shape import Ground
from lmworks.plan.work import Work
from lmworks.train.loop import run
from tests.train import ranked, toy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps on one rank."""
    base = tmp_path_factory.mktemp("scored")
    table = toy.table(toy.corpus(base / "text"), base / "cache", steps=9, micro_batch_size=2, threads=1)
    return run(recipes.decode(table), base / "run", resume="auto", report=toy.Silent()).path


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, and a home of the test's own."""
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rewrite(path: Path, change: Any) -> None:
    """Every row of a journal through a function."""
    found = [change(row) for row in rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found if row is not None))


def timed(folder: Path, seconds: float) -> None:
    """Let the steady steps have taken so long, and the first ones much longer."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        late = 50 * seconds if row["step"] <= score.FIRST else seconds
        return row | {"seconds": late} if "seconds" in row else row

    rewrite(folder / "metrics.jsonl", change)


def edited(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_real_run_is_told_part_by_part(folder: Path, laptop: Cluster) -> None:
    found = score.score(folder, laptop)
    seconds = sorted(row["seconds"] for row in rows(folder / "metrics.jsonl") if row.get("loss") and row["step"] > 3)
    parts = {part.name: part for part in found.parts}
    assert len(seconds) == 6
    assert parts["step"].measured == pytest.approx((seconds[2] + seconds[3]) / 2)
    assert parts["tokens/s"].measured == pytest.approx(4 * 32 / parts["step"].measured)
    for name in ("weights", "gradients", "optimizer state"):
        assert parts[name].ratio == 1.0
    measured = json.loads((folder / "summary.json").read_text())["memory"]["measured"]
    assert parts["saved for backward"].measured == measured["saved"]
    assert parts["memory in all"].measured == sum(size or 0 for size in measured.values())
    assert found.run.choice.rows == found.run.choice.micro_batches == 2
    assert found.doubts == ()
    assert "energy of a step" not in parts, "what models give is no measurement"


@pytest.mark.parametrize("factor", [0.25, 1.7, 40.0])
def test_a_run_that_took_so_long_makes_the_next_plan_take_so_long(folder: Path, laptop: Cluster, factor: float) -> None:
    first = score.read(folder)
    plain = simulate.of_choice(Work(Ground(first.recipe, laptop)), first.choice).seconds.total
    timed(folder, factor * plain)
    found = score.score(folder, laptop)
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.residual is not None
    residuals.keep(laptop, found.residual)
    learnt = residuals.correction(laptop, "fp32")
    assert learnt.runs == 1
    planned = search.search(first.recipe, laptop.slowed(learnt.factor), devices=1, show=1000)
    (same,) = [plan for plan in planned.plans if plan.choice == first.choice]
    assert same.step.seconds.total == pytest.approx(factor * plain, rel=1e-6)
    again = score.score(folder, laptop)
    assert again.earlier.runs == 0, "a run does not correct itself"
    assert again.corrected_seconds == pytest.approx(plain)


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(1e-3, 10))
def test_the_factor_is_found_wherever_it_is(true: float, fixed: float, slope: float) -> None:
    found = score.solve(lambda factor: max(fixed, slope * factor), max(fixed, slope * true) * (1 + 1e-9))
    assert found is not None
    if slope * true > fixed * (1 + 1e-6):
        assert found == pytest.approx(true, rel=1e-6)


def test_no_factor_explains_a_step_shorter_than_its_exchanges() -> None:
    assert score.solve(lambda factor: 2 + factor, 1.0) is None
    assert score.solve(lambda factor: factor, 1e9) is None


def test_what_is_not_worth_keeping_is_told_and_not_kept(folder: Path, laptop: Cluster) -> None:
    rewrite(folder / "metrics.jsonl", lambda row: row if row["step"] <= 5 else None)
    found = score.score(folder, laptop)
    assert found.residual is None
    assert "steady steps: 2, and 5 are needed" in found.doubts[0]
    rewrite(folder / "metrics.jsonl", lambda row: row | {"flops": 2 * row["flops"]} if "flops" in row else row)
    assert any("100 % more passes" in doubt for doubt in score.score(folder, laptop).doubts)


def test_steps_behind_a_resume_do_not_count(folder: Path, laptop: Cluster) -> None:
    attempts = json.loads((folder / "record.json").read_text())["attempts"]
    edited(folder / "record.json", attempts=[*attempts, attempts[0] | {"step": 5}])
    assert len(score.score(folder, laptop).run.seconds) == 3  # steps 4, 5 and 9


def test_measured_energy_stands_beside_the_told(folder: Path, laptop: Cluster) -> None:
    energy = {"measured_share": 1.0, "phases_kwh": {"train": 18 / KWH, "validate": 1.0}}
    edited(folder / "summary.json", energy=energy)
    found = score.score(folder, laptop)
    (part,) = [part for part in found.parts if part.unit == "J"]
    assert part.measured == pytest.approx(2.0)
    assert part.predicted == pytest.approx(found.seconds.total * laptop.watts.value)


def test_a_run_that_goes_on_is_scored_too(folder: Path, laptop: Cluster) -> None:
    (folder / "summary.json").unlink()
    assert len(score.score(folder, laptop).run.seconds) == 6


def test_memory_is_that_of_the_rank_that_took_most(folder: Path, laptop: Cluster) -> None:
    """The same run as if two replicas had made it, the second with more workspace."""
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("dp_replicate = 1", "dp_replicate = 2"))
    second = folder / "ranks" / "00001" / "events.jsonl"
    second.parent.mkdir(parents=True)
    shutil.copy(folder / "events.jsonl", second)

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["name"] == "memory":
            row["attrs"]["measured"]["workspace"] += 1_000_000
        return row

    rewrite(second, change)
    found = score.score(folder, laptop)
    assert found.run.choice.layout.ranks == 2
    assert found.run.choice.micro_batches == 1
    assert found.run.memory is not None
    assert found.run.memory[0] == 1
    measured = json.loads((folder / "summary.json").read_text())["memory"]["measured"]
    parts = {part.name: part for part in found.parts}
    assert parts["workspace"].measured == measured["workspace"] + 1_000_000


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run(tmp_path: Path, laptop: Cluster) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match="no run's folder"):
            score.score(path, laptop)


def test_another_kind_of_device(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"the run was on cpu, and .* is a cluster of gpus"):
        score.score(folder, clusters.load("dgx-a100"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record.json", "{"),
        ("record.json", "[]"),
        ("record.json", '{"attempts": [{"step": 0}]}'),
        ("metrics.jsonl", "{no json}\n"),
        ("metrics.jsonl", '{"step": 7, "seconds": "soon", "flops": 1}\n'),
        ("metrics.jsonl", '{"step": 7, "seconds": -1, "flops": 1}\n'),
        ("events.jsonl", '{"name": "memory", "attrs": {"measured": {"wait": 3}}}\n'),
        ("summary.json", "[]"),
    ],
)
def test_damaged_files_of_a_run_are_told(folder: Path, laptop: Cluster, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(LmworksError, match="do not say what a run's files say"):
        score.score(folder, laptop)


def test_a_run_without_steady_steps(folder: Path, laptop: Cluster) -> None:
    rewrite(folder / "metrics.jsonl", lambda row: row if row["step"] <= 3 else None)
    with pytest.raises(UsageError, match="no steps behind the first 3"):
        score.score(folder, laptop)


def test_recipes_that_cannot_be_read_and_layouts_that_no_plan_models(folder: Path, laptop: Cluster) -> None:
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace("batch_size", "batch_sise"))
    with pytest.raises(RecipeError, match="problem"):
        score.score(folder, laptop)
    (folder / "recipe.toml").write_text(text.replace('use = "ranks"', 'use = "zero"\nlevel = 3'))
    with pytest.raises((UsageError, RecipeError)):
        score.score(folder, laptop)


@pytest.mark.ranks
def test_a_run_whose_states_lie_on_levels_is_told_as_well(tmp_path: Path, laptop: Cluster) -> None:
    """Weights whole, gradients by pairs, optimizer state over all four ranks."""
    layout = {"dp_shard": 4, "state": {"weights": 1, "gradients": 2, "levels": [2]}}
    text = toy.corpus(tmp_path / "text")
    table = ranked.table(text, tmp_path / "cache", layout=layout, micro_batch_size=1, threads=1)
    gang.run(ranked.train, 4, table, str(tmp_path / "run"))
    found = score.score(tmp_path / "run", laptop)
    parts = {part.name: part for part in found.parts}
    assert found.run.choice.layout.state == StatePlacement(weights=1, gradients=2, levels=(2,))
    for name in ("weights", "gradients", "optimizer state"):
        ratio = parts[name].ratio  # what is told is of the rank with most rows: 257 of them are not even
        assert ratio is not None
        assert 0.99 < ratio <= 1.0
    assert parts["step"].predicted is not None
    assert parts["step"].predicted > 0
