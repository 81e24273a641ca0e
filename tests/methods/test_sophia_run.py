"""Sophia in whole runs: from a recipe, resumed, refused, watched."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.core.journal import rows
from lmworks.methods.sophia import Sophia, SophiaHealth
from lmworks.model.checkpoint import complete
from lmworks.train import save
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.slots import Objective, StepRecord, Watcher
from tests.train import toy

KINDS = ["gauss-newton", "hutchinson"]


def sophia(kind: str, **over: Any) -> dict[str, Any]:
    return {"use": "sophia", "lr": 1e-2, "estimator": kind, "every": 5, "share": 0.5, **over}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_books_its_estimates(kind: str, text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, steps=30, micro_batch_size=2, optimizer=sophia(kind, per_block=True))
    folder, _ = toy.train(made, tmp_path / "run")
    steps = [row for row in rows(folder.metrics) if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    estimated = [row["step"] for row in steps if "sophia/h_norm" in row]
    assert estimated == [1, 6, 11, 16, 21, 26]
    passes = 4 if kind == "gauss-newton" else 9
    cost = [b["flops"] - a["flops"] for a, b in itertools.pairwise(steps)]
    assert cost[4] / cost[3] == pytest.approx(1 + passes / 6)  # step 6 against step 5, half the rows
    assert steps[5]["sophia/estimate_cost"] == pytest.approx(passes / 6)
    for row in steps:
        assert 0 <= row["sophia/win_rate"] + row["sophia/clipped"] <= 1 + 1e-6
        assert {"sophia/clipped/embed", "sophia/clipped/blocks.0", "sophia/clipped/blocks.1"} <= set(row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_bitwise_before_and_after_an_estimate(kind: str, text: Path, cache: Path, tmp_path: Path) -> None:
    """Estimates are made in steps 1, 5 and 9: going on after step 4 begins with one, after step 6 it does not."""
    made = toy.recipe(text, cache, optimizer=sophia(kind, every=4), checkpoints={"every": 2, "keep": 9})
    whole, _ = toy.train(made, tmp_path / "whole")
    want = save.read(complete(whole.checkpoints)[-1]).tensors
    for step in (4, 6):
        again = tmp_path / f"from-{step}"
        (again / "checkpoints").mkdir(parents=True)
        name = f"step-{step:08d}"
        shutil.copytree(whole.checkpoints / name, again / "checkpoints" / name)
        folder, report = toy.train(made, again)
        assert any(f"step {step}" in note for note in report.notes)
        got = save.read(complete(folder.checkpoints)[-1]).tensors
        for file in ("model", "optimizer", "random"):
            assert set(got[file]) == set(want[file])
            for key, value in want[file].items():
                assert torch.equal(got[file][key], value), (step, key)
    assert int(want["optimizer"]["sophia/step"]) == 12
    assert int(want["optimizer"]["sophia/last_estimate"]) == 9
    assert "embed.weight/momentum" in want["optimizer"]
    assert "embed.weight/curvature" in want["optimizer"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"every": 0}, r"optimizer\.every.*greater than 0"),
        ({"gamma": -0.1}, r"optimizer\.gamma.*greater than or equal to 0"),
        ({"share": 0.0}, r"optimizer\.share"),
        ({"estimator": "newton"}, r"optimizer\.estimator"),
        ({"directions": "rademacher"}, r"optimizer\.directions: has no effect without estimator"),
    ],
)
def test_settings_without_sense_are_refused(over: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        toy.recipe(tmp_path, tmp_path, optimizer={"use": "sophia", "lr": 1e-3, **over})


def test_gamma_0_is_legal_and_means_sign_momentum(tmp_path: Path) -> None:
    made = toy.recipe(tmp_path, tmp_path, optimizer={"use": "sophia", "lr": 1e-3, "gamma": 0})
    assert isinstance(made.optimizer, Sophia)


class Preference(Objective):
    """An objective that predicts no targets."""

    count = CrossEntropy.count
    loss = CrossEntropy.loss


def test_gauss_newton_needs_an_objective_that_predicts(tmp_path: Path) -> None:
    made = toy.recipe(tmp_path, tmp_path, optimizer={"use": "sophia", "lr": 1e-3})
    assert isinstance(made.optimizer, Sophia)
    assert list(made.optimizer.check(made)) == []
    other = dataclasses.replace(made, objective=Preference())
    (problem,) = made.optimizer.check(other)
    assert problem.path == "estimator"
    assert "draws targets" in problem.text
    assert 'Take estimator = "hutchinson"' in problem.text
    assert list(dataclasses.replace(made.optimizer, estimator="hutchinson").check(other)) == []


def test_hutchinson_does_not_run_in_compiled_blocks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="compiled blocks cannot") as caught:
        toy.recipe(tmp_path, tmp_path, compile=True, optimizer={"use": "sophia", "lr": 1e-3, "estimator": "hutchinson"})
    assert "compile = false" in str(caught.value)


# --- health --------------------------------------------------------------------------------------------------------


def look(watcher: Watcher, rates: list[float]) -> list[str | None]:
    probe = Probe(toy.model(), CrossEntropy(), seed=0)
    said = []
    for step, rate in enumerate(rates, start=1):
        probe.begin()
        probe.note("sophia/win_rate", rate)
        record = StepRecord(step=step, tokens=0, loss=1.0, grad_norm=1.0, lr=1e-3, seconds=0.1)
        change = watcher.look(record, probe)
        assert change is None or not change.stop
        said.append(None if change is None else change.reason)
    return said


def test_500_steps_below_or_above_say_where_to_move_gamma() -> None:
    said = look(SophiaHealth().start(), [0.02] * 1000)
    assert [step for step, text in enumerate(said, start=1) if text] == [500, 1000]
    assert "below 0.05 for 500 steps (0.020 now): raise optimizer.gamma" in str(said[499])
    said = look(SophiaHealth().start(), [0.7] * 500)
    assert "above 0.6 for 500 steps (0.700 now): lower optimizer.gamma" in str(said[-1])


def test_a_healthy_step_and_a_change_of_sides_begin_anew() -> None:
    assert look(SophiaHealth().start(), [0.02] * 499 + [0.3] + [0.02] * 499) == [None] * 999
    assert look(SophiaHealth(patience=3).start(), [0.02, 0.02, 0.9, 0.9, 0.02, 0.02]) == [None] * 6
    assert look(SophiaHealth(patience=1).start(), [0.05, 0.6, 0.3]) == [None] * 3


def test_its_count_goes_on_after_a_resume() -> None:
    first, second = SophiaHealth(patience=5).start(), SophiaHealth(patience=5).start()
    look(first, [0.7] * 3)
    second.load(first.state())
    assert look(second, [0.7] * 2)[-1] is not None


def test_the_watcher_speaks_in_a_run_and_only_beside_sophia(text: Path, cache: Path, tmp_path: Path) -> None:
    watchers = [{"use": "sophia-health", "patience": 3}]
    made = toy.recipe(text, cache, steps=5, optimizer=sophia("gauss-newton", gamma=0), watchers=watchers)
    folder, report = toy.train(made, tmp_path / "run")
    assert sum("raise optimizer.gamma" in note for note in report.notes) == 1
    assert "raise optimizer.gamma" in (folder.path / "events.jsonl").read_text()
    assert sum(1 for row in rows(folder.metrics) if "loss" in row) == 5
    with pytest.raises(RecipeError, match=r"watchers\.0: has no effect"):
        toy.recipe(text, cache, watchers=watchers)


# --- shipped -------------------------------------------------------------------------------------------------------


def test_the_shipped_recipe_is_sophia() -> None:
    made = recipes.load("methods/sophia", verb="train")
    assert isinstance(made.optimizer, Sophia)
    assert made.watchers == (SophiaHealth(),)


def test_the_shipped_proof_tunes_every_arm_the_same() -> None:
    proof = recipes.load("proofs/sophia", verb="prove")
    assert [arm.name for arm in proof.arms] == ["adamw", "lion", "muon", "sophia-g", "sophia-h"]
    assert all(len(arm.grid["optimizer.lr"]) == 4 for arm in proof.arms)
    assert all(len(arm.grid["optimizer.gamma"]) == 3 for arm in proof.arms if arm.name.startswith("sophia"))
