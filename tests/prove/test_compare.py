"""Whole comparisons on a toy: pairs, budgets, tuning, resuming, reports, evidence."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, RecipeError
from lmworks.core.papers import METHODS
from lmworks.prove import evidence, report
from lmworks.prove.budget import cost_of_step, equal_steps, trial_table
from lmworks.prove.compare import Comparison, Tried, compare, confounded_arms, confounders, grid_points, seeds_of
from lmworks.prove.recipe import Arm, Proof, arm_table
from lmworks.train.arm import Measured
from tests.train import toy


def table(folder: Path, **over: Any) -> dict[str, Any]:
    """A proof over the toy recipe: AdamW, the same again, and Lion with a grid."""
    shared = toy.table(toy.corpus(folder / "text"), folder / "cache", steps=6, validation={"every": 2}, checkpoints={})
    return {
        "do": "prove",
        "baseline": "adamw",
        "seeds": [1, 2],
        "may_differ": ["optimizer"],
        "recipe": shared,
        "tuning": {"steps": 3},
        "arms": [
            {"name": "adamw"},
            {"name": "again"},
            {"name": "lion", "set": {"optimizer.use": "lion"}, "grid": {"optimizer.lr": [1e-3, 1e-2, 1e18]}},
        ],
        "claims": [
            {"name": "equal", "statement": "s", "condition": "c", "figure": "0", "source": "x"},
            {"name": "open", "statement": "s", "condition": "c", "figure": "1", "source": "x", "untested": "why not"},
        ],
        "tests": [
            {"claim": "equal", "arm": "again", "against": "adamw", "want": "same", "bound": 0.0},
            {"claim": "equal", "arm": "lion", "against": "adamw", "take": "reach", "want": "less", "bound": 0.9},
        ],
        **over,
    }


def proof_of(folder: Path, **over: Any) -> Proof:
    decoded: Proof = recipes.decode(table(folder, **over), verb="prove")
    return decoded


class Listening:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.done: list[str] = []

    def stage(self, name: str, jobs: int) -> None:
        self.stages[name] = self.stages.get(name, 0) + jobs

    def job(self, name: str, event: str) -> None:
        if event == "done":
            self.done.append(name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Comparison, Listening]:
    told = Listening()
    return compare(proof_of(place), place / "out", told), told


@pytest.mark.slow
def test_the_same_arm_twice_is_equal_seed_by_seed(finished: tuple[Comparison, Listening]) -> None:
    comparison, told = finished
    same, reach = comparison.findings
    assert same.values == (0.0, 0.0)
    assert same.verdict == "holds"
    assert len(reach.values) == 2
    assert told.stages == {"tuning": 3, "runs": 6}
    assert comparison.confounded == {}


@pytest.mark.slow
def test_tuning_takes_the_best_point_and_a_point_that_explodes_is_only_a_bad_one(
    finished: tuple[Comparison, Listening],
) -> None:
    lion = finished[0].arms["lion"]
    assert len(lion.tried) == 3
    assert max(tried.value for tried in lion.tried) > 1e3
    assert lion.chosen == min(lion.tried, key=lambda tried: tried.value).point
    assert lion.table["optimizer"]["lr"] == lion.chosen["optimizer.lr"]
    assert lion.table["steps"] == 6


def test_a_grid_in_turn_tries_each_setting_at_the_best_of_those_before() -> None:
    grid = {"lr": [1.0, 2.0, 3.0], "decay": [0.1, 0.2], "beta": [0.9]}
    arm = Arm(name="a", set={"decay": 0.2}, grid=grid)
    first = grid_points(arm, "in-turn", 0, [])
    assert first == [{"lr": lr, "decay": 0.2, "beta": 0.9} for lr in (1.0, 2.0, 3.0)]
    tried = [Tried(point=point, value=value) for point, value in zip(first, (5.0, 4.0, 6.0), strict=True)]
    second = grid_points(arm, "in-turn", 1, tried)
    assert second == [{"lr": 2.0, "decay": 0.1, "beta": 0.9}], "0.2 was tried in the first round"
    assert grid_points(arm, "in-turn", 2, tried) == []
    assert grid_points(arm, "in-turn", 3, tried) == []
    assert len(grid_points(arm, "product", 0, [])) == 6


@pytest.mark.slow
def test_what_is_done_is_not_done_again(place: Path, finished: tuple[Comparison, Listening]) -> None:
    told = Listening()
    again = compare(proof_of(place), place / "out", told)
    assert told.done == []
    assert again.findings == finished[0].findings
    told = Listening()
    more = dataclasses.replace(proof_of(place), seeds=(1, 2, 3))
    assert len(compare(more, place / "out", told).findings[0].values) == 3
    assert sorted(told.done) == ["run-adamw-3", "run-again-3", "run-lion-3"]


@pytest.mark.slow
def test_the_report_and_the_evidence_hold_every_run(
    place: Path, finished: tuple[Comparison, Listening], tmp_path: Path
) -> None:
    content = evidence.content_of(finished[0])
    page = report.write(content, [dataclasses.asdict(c) for c in finished[0].proof.claims], tmp_path)
    text = page.read_text()
    assert "why not" in text
    assert "http" not in text.split("</style>")[1], "the page links to nothing"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(arm["runs"]) for arm in kept["arms"]] == [2, 2, 2]
    assert kept["arms"][0]["runs"][0]["curve"][-1][1] == kept["arms"][0]["runs"][0]["val_loss"]
    assert {"code", "versions", "hardware", "command", "date"} <= set(kept)


def test_evidence_is_stale_when_its_method_or_proof_has_changed(tmp_path: Path) -> None:
    made_of = evidence.fingerprints("sophia")
    assert made_of
    content = {
        "method": "sophia",
        "date": "2026-01-01",
        "made_of": made_of,
        "code": {"commit": "abc", "dirty": True},
        "findings": [{"verdict": "holds"}, {"verdict": "not seen"}, {"verdict": "holds"}],
    }
    first = evidence.save(content, tmp_path)
    kept = evidence.Evidence(path=first, content=json.loads(first.read_text()))
    assert kept.stale() == []
    assert kept.summary() == "2 holds, 1 not seen"
    assert kept.commit == "abc+"
    older = {**content, "made_of": {**made_of, next(iter(made_of)): "of an older commit"}}
    second = evidence.save(older, tmp_path)
    assert second != first, "nothing is overwritten"
    stale = evidence.Evidence(path=second, content=json.loads(second.read_text()))
    assert stale.stale() == [next(iter(made_of))]
    assert stale.summary().endswith("(stale)")


def test_the_newest_evidence_of_a_day_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "evidence_folder", lambda: tmp_path)
    kept = [evidence.save({"method": "sophia", "date": "2026-11-24", "number": i}) for i in range(11)]
    evidence.save({"method": "sophia", "date": "2026-11-23", "number": -1})
    assert len(set(kept)) == 11
    assert [one.content["number"] for one in evidence.evidence_of("sophia")] == list(range(-1, 11))


def test_numbers_that_json_does_not_know_are_words() -> None:
    assert evidence.plain({"a": float("inf"), "b": [float("nan"), 1.5], 3: ("x",)}) == {
        "a": "inf",
        "b": ["nan", 1.5],
        "3": ["x"],
    }


@pytest.mark.slow
def test_a_proof_that_is_killed_goes_on_without_doing_anything_twice(tmp_path: Path) -> None:
    toml = tmp_path / "toy.toml"
    arms = [{"name": "adamw"}, {"name": "lion", "set": {"optimizer.use": "lion", "optimizer.lr": 1e-3}}]
    tests = [{"claim": "equal", "arm": "lion", "against": "adamw", "want": "less"}]
    claims = table(tmp_path)["claims"][:1]
    whole = table(tmp_path, arms=arms, tests=tests, claims=claims, executor={"use": "local", "processes": 1})
    toml.write_text(tomli_w.dumps(whole))
    command = [sys.executable, "-m", "lmworks", "prove", str(toml), "--out", str(tmp_path / "out"), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    jobs = tmp_path / "out" / "jobs"
    for _ in range(1200):
        if list(jobs.glob("*.result.json")):
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {path.name: path.stat().st_mtime_ns for path in jobs.glob("*.result.json")}
    assert before
    assert len(before) < 4
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode in (0, 4), done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in jobs.glob("*.result.json")}
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert len(json.loads(done.stdout)["findings"][0]["values"]) == 2


def test_arms_that_differ_in_more_than_is_named_are_confounded(tmp_path: Path) -> None:
    proof = proof_of(tmp_path)
    base = recipes.decode(arm_table(proof, proof.arm("adamw")))
    lion = recipes.decode(arm_table(proof, proof.arm("lion")))
    assert confounders(proof, lion, base) == ()
    other = dataclasses.replace(lion, batch_size=8)
    assert confounders(proof, other, base) == ("batch_size",)
    unnamed = dataclasses.replace(proof, may_differ=())
    assert confounders(unnamed, lion, base) == ()
    assert confounders(unnamed, other, base) == ("batch_size", "optimizer")
    longer = dataclasses.replace(base, steps=99, seed=5)
    assert confounders(proof, longer, base) == (), "steps follow from the budget"
    assert confounders(dataclasses.replace(proof, axis="steps"), longer, base) == ("steps",)


def test_equal_tokens_are_equal(tmp_path: Path) -> None:
    proof = proof_of(tmp_path)
    base = recipes.decode(arm_table(proof, proof.arm("adamw")))
    double = dataclasses.replace(base, batch_size=8)
    costs = {"base": cost_of_step("tokens", base, None), "double": cost_of_step("tokens", double, None)}
    assert equal_steps(costs, "base", 6) == {"base": 6, "double": 3}


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 1e3), min_size=1), st.integers(1, 10_000))
def test_equal_steps_spend_the_same_to_half_a_step(costs: dict[str, float], steps: int) -> None:
    base = next(iter(costs))
    for name, count in equal_steps(costs, base, steps).items():
        assert abs(count * costs[name] - steps * costs[base]) <= costs[name] / 2 + 1e-6 or count == 1


def test_a_trial_measures_the_mean_step_behind_the_first_three() -> None:
    rows = [{"loss": 1.0, "at/seconds": 100.0 + 0.5 * i} for i in range(13)]
    trial = Measured(folder=Path(), failed=None, rows=rows)
    assert cost_of_step("seconds", None, trial) == pytest.approx(0.5)
    assert trial_table({"steps": 9, "checkpoints": {"every": 1}})["checkpoints"] == {}


def test_joules_without_a_counter_are_refused() -> None:
    rows = [{"loss": 1.0, "at/joules": 0.0} for _ in range(13)]
    with pytest.raises(LmworksError, match="no energy counter"):
        cost_of_step("joules", None, Measured(folder=Path(), failed=None, rows=rows))


def test_more_seeds_than_a_proof_has_are_counted_on(tmp_path: Path) -> None:
    proof = proof_of(tmp_path)
    assert seeds_of(proof, None) == (1, 2)
    assert seeds_of(proof, 1) == [1]
    assert seeds_of(proof, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "adam"}, "did you mean 'adamw'"),
        ({"arms": [{"name": "adamw"}]}, "two arms or more"),
        ({"seeds": [0, 1]}, r"tuning\.seed: 0 is one of the seeds"),
        ({"seeds": []}, "seeds"),
        ({"axis": "hours"}, "axis"),
        ({"claims": []}, r"tests\.0\.claim"),
        ({"tests": []}, "has no test"),
        ({"arms": [{"name": "adamw"}, {"name": "b", "sets": {}}]}, r"arms\.1\.sets: arms\.1 has no setting"),
    ],
)
def test_a_proof_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        proof_of(tmp_path, **change)


def test_an_arm_that_is_no_recipe_names_the_arm(tmp_path: Path) -> None:
    proof = proof_of(
        tmp_path, arms=[{"name": "adamw"}, {"name": "odd", "set": {"optimizer.lrr": 1}}], tests=[], claims=[]
    )
    with pytest.raises(RecipeError, match="arm 'odd'"):
        compare(proof, tmp_path / "out", Listening())
    assert not (tmp_path / "out" / "jobs").exists()


@pytest.mark.parametrize("path", sorted(recipes.recipes_folder().glob("proofs/*.toml")), ids=lambda path: path.stem)
def test_every_shipped_proof_and_its_arms_decode(path: Path) -> None:
    proof = recipes.load(path, verb="prove")
    assert proof.method in METHODS
    assert proof.method == path.stem
    decoded = {arm.name: recipes.decode(arm_table(proof, arm), verb="train") for arm in proof.arms}
    assert confounded_arms(proof, decoded) == {}


def test_an_arm_is_confounded_by_what_it_is_held_against(tmp_path: Path) -> None:
    """Two arms that are longer than the baseline may be held against each other, not against it."""
    arms = [{"name": "adamw"}, *({"name": name, "set": {"steps": 9}} for name in ("long", "longer"))]
    test = {"claim": "equal", "arm": "long", "want": "same", "bound": 0.0}
    near = proof_of(tmp_path, arms=arms, axis="steps", claims=[CLAIM], tests=[{**test, "against": "longer"}])
    decoded = {arm.name: recipes.decode(arm_table(near, arm)) for arm in near.arms}
    assert confounded_arms(near, decoded) == {}
    far = proof_of(tmp_path, arms=arms, axis="steps", claims=[CLAIM], tests=[{**test, "against": "adamw"}])
    assert confounded_arms(far, decoded) == {"long": ("steps",), "longer": ("steps",)}


CLAIM = {"name": "equal", "statement": "s", "condition": "c", "figure": "0", "source": "x"}
