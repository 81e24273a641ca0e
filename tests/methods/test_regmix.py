"""RegMix as a part: what it asks for, what it recommends, whole searches on a toy, and the published tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError, UsageError
from lmworks.methods.regmix import RegMix
from lmworks.mix import outcome, tables
from lmworks.mix.apply import predict
from lmworks.mix.asking import Recommendation, drive
from lmworks.mix.problem import MixtureProblem
from lmworks.mix.runs import Run, RunTable, Trial
from lmworks.mix.swarm import Swarm
from tests.mix.planted import SIZE, losses, problem
from tests.train import toy

PART = RegMix(surrogate="log-linear", proxies=12, unseen=4, repeats=2, simulated=2000, top=20, resamples=4)


def planted(of: MixtureProblem) -> Any:
    """Makes runs whose losses are known."""

    def make(trials: Any) -> list[Run]:
        p_NM = np.array([trial.mixture for trial in trials])
        values = losses(p_NM)
        return [
            Run(trial=trial, losses={k: float(v[i]) for k, v in values.items()}, cost=0.1)
            for i, trial in enumerate(trials)
        ]

    return make


def test_it_asks_for_repeats_proxies_and_unseen_runs() -> None:
    of = problem(4)
    trials = RegMix().ask(of, RunTable(of), seed=3, count=1000)
    assert [trial.purpose for trial in trials] == ["noise"] * 3 + ["proxy"] * 15 + ["unseen"] * 8
    assert {trial.fidelity for trial in trials} == {SIZE}
    assert {trial.seed for trial in trials if trial.purpose != "noise"} == {3}
    assert len({trial.key for trial in trials}) == 26
    assert trials == RegMix().ask(of, RunTable(of), seed=3, count=1000)
    assert trials != RegMix().ask(of, RunTable(of), seed=4, count=1000)


def test_a_search_that_was_cut_short_asks_for_the_rest() -> None:
    of = problem(3)
    whole = PART.ask(of, RunTable(of), seed=0, count=1000)
    table = RunTable(of, planted(of)(whole[:5]))
    assert PART.ask(of, table, seed=0, count=1000) == whole[5:]
    table.tell(Run(trial=whole[5], failed="loss is nan"))
    assert PART.ask(of, table, seed=0, count=1000) == whole[6:]
    one, other = RunTable(of), RunTable(of)
    for run in planted(of)(whole):
        one.tell(run)
    for run in reversed(planted(of)(whole)):
        other.tell(run)
    assert PART.recommend(of, one, seed=0) == PART.recommend(of, other, seed=0)


def test_the_loop_ends_with_a_mixture() -> None:
    of = problem(4, target={"s0": 1.0, "s1": 1.0})
    table = RunTable(of)
    advice = drive(PART, table, planted(of), seed=0)
    assert len(table) == 18
    assert of.why_not(advice.mixture) is None
    assert advice.mixture[0] + advice.mixture[1] > 0.75
    assert table.spent() == pytest.approx(1.8)


def test_one_source_gets_all() -> None:
    of = problem(1)
    advice = drive(PART, RunTable(of), planted(of), seed=0)
    assert advice.mixture == (1.0,)


def test_settings_that_contradict_each_other() -> None:
    texts = [p.text for p in dataclasses.replace(PART, strengths=(5.0, 0.1), top=4000, step=3e-4).check(None)]
    assert ["must rise" in texts[0], "more than the 2000" in texts[1], "not a multiple" in texts[2]] == [True] * 3
    assert list(RegMix().check(None)) == []


# --- live, on a toy ---------------------------------------------------------------------------------------------------


class Listening:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}

    def stage(self, name: str, jobs: int) -> None:
        self.stages[name] = self.stages.get(name, 0) + jobs

    def job(self, name: str, event: str) -> None:
        pass


def letters(folder: Path) -> Path:
    """Three sources that share nothing: digits, vowels, and a long line of dots."""
    for name, text in (("digits", "0123456789"), ("vowels", "aeiouaeoiu"), ("dots", "..,.,,.,..")):
        (folder / name).mkdir(parents=True)
        for i, turn in itertools.product(range(40), range(1)):
            body = "".join(text[(i * 7 + j * j + turn) % 10] for j in range(90))
            (folder / name / f"{i}.txt").write_text(f"{name} {i} {body}")
    return folder


def recipe_of(folder: Path, **over: Any) -> dict[str, Any]:
    """A search over the three, below a second for each run."""
    text = letters(folder / "text")
    shared = toy.table(text, folder / "cache", steps=8, checkpoints={}, threads=1)
    shared["data"]["readers"] = [
        {"use": "text", "name": name, "paths": [f"{text}/{name}/*.txt"]} for name in ("digits", "vowels", "dots")
    ]
    search = {"use": "regmix", "proxies": 6, "unseen": 3, "repeats": 2, "simulated": 1000, "top": 10, "resamples": 3}
    return {
        "do": "mix",
        "recipe": shared,
        "search": search,
        "sizes": [{"name": "proxy", "set": {"model.n_layers": 1, "steps": 6}}],
        "target": {"digits": 1.0},
        "max_epochs": 50.0,
        **over,
    }


@pytest.mark.slow
def test_a_whole_search_and_the_same_again(tmp_path: Path) -> None:
    verify = {"mixtures": ["chosen", "natural", "uniform", "worst"], "seeds": [1, 2]}
    decoded = recipes.decode(recipe_of(tmp_path, verify=verify), verb="mix")
    told = Listening()
    swarm = Swarm(decoded, tmp_path / "out", told)
    content = outcome.run(decoded, swarm)
    assert (
        sum(told.stages.values())
        == 11 + len({str(one["mixture"]) for one in content["verified"]["mixtures"].values()}) * 2
    )
    assert 0 < swarm.problem.fidelities[0].cost < 1
    assert sum(one["share"] for one in content["sources"]) == pytest.approx(1.0)
    assert {one["purpose"] for one in content["ledger"]} == {"proxy", "unseen", "noise", "verify"}
    assert content["cost"]["search"] == pytest.approx(11 * swarm.problem.fidelities[0].cost)
    assert content["recommendation"]["verified"]
    assert content["verified"]["order"]["predicted"][-1] == "worst"
    json.dumps(content, allow_nan=False)
    trained = recipes.load(tmp_path / "out" / "recipe.toml", verb="train")
    assert [reader.weight for reader in trained.data.readers] == [one["share"] for one in content["sources"]]
    kept = tables.again(swarm.problem, tmp_path / "out" / "runs.parquet")
    assert len(kept) == sum(one["runs"] for one in content["ledger"])
    again = Listening()
    same = outcome.run(decoded, Swarm(decoded, tmp_path / "out", again))
    assert sum(again.stages.values()) == 0
    assert same["recommendation"] == content["recommendation"]


@pytest.mark.slow
def test_a_run_that_explodes_is_left_out_and_paid_for(tmp_path: Path) -> None:
    table = recipe_of(tmp_path)
    table["sizes"][0]["set"] |= {"optimizer": {"use": "sgd", "lr": 1e30}, "gradient": []}
    decoded = recipes.decode(table, verb="mix")
    swarm = Swarm(decoded, tmp_path / "out", Listening())
    trials = decoded.search.trials(swarm.problem, seed=0)[:2]
    runs = swarm.make(trials)
    assert [run.losses for run in runs] == [{}, {}]
    assert all("the update was not made" in (run.failed or "") for run in runs)
    assert RunTable(swarm.problem, runs).spent() > 0


@pytest.mark.slow
def test_one_tokenizer_for_all_sizes(tmp_path: Path) -> None:
    """A byte-pair tokenizer would be trained on the readers by weight: each mixture would have its own."""
    table = recipe_of(tmp_path)
    table["recipe"]["data"]["tokenizer"] = {"use": "bpe", "vocab_size": 280}
    decoded = recipes.decode(table, verb="mix")
    swarm = Swarm(decoded, tmp_path / "out", Listening())
    runs = swarm.make(
        [Trial(mixture=(0.8, 0.1, 0.1), fidelity="proxy"), Trial(mixture=(0.0, 0.0, 1.0), fidelity="proxy")]
    )
    assert len({run.tokenizer for run in runs}) == 1
    assert swarm.recipe((1.0, 0.0, 0.0))["data"]["tokenizer"]["use"] == "file"
    assert set(runs[1].losses) == {"digits", "vowels", "dots"}, "a source without a share is held out all the same"


@pytest.mark.parametrize(
    ("over", "path"),
    [
        ({"target": {"digit": 1.0}}, "target.digit: no reader is called 'digit'; did you mean 'digits'?"),
        ({"bounds": {"x": [0.0, 1.0]}}, "bounds.x: no reader is called 'x'"),
        ({"bounds": {"dots": [0.5, 0.1]}}, "bounds.dots: must be [least, greatest] from 0 to 1"),
        ({"sizes": [{"name": "target"}]}, "sizes.0.name: 'target' is taken"),
        (
            {"sizes": [{"name": "a", "set": {"data.tokenizer": "bytes"}}]},
            "sizes.0.set.data.tokenizer: would make losses",
        ),
        ({"sizes": [{"name": "a", "set": {"model.layers": 1}}]}, "sizes.0.model.layers: decoder has no setting"),
        ({"target": {"digits": 0.0}}, "target: all weights are 0"),
        ({"search": {"use": "regmx"}}, "did you mean 'regmix'?"),
    ],
)
def test_recipes_that_cannot_be_searched(tmp_path: Path, over: dict[str, Any], path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.decode(recipe_of(tmp_path, **over), verb="mix")
    assert path in str(caught.value)


def test_weights_and_no_held_out_documents_are_refused(tmp_path: Path) -> None:
    table = recipe_of(tmp_path)
    table["recipe"]["data"] |= {"validation": 0.0}
    table["recipe"]["data"]["readers"][0]["weight"] = 3.0
    with pytest.raises(RecipeError) as caught:
        recipes.decode(table, verb="mix")
    assert "recipe.data.validation: is 0" in str(caught.value)
    assert "recipe.data.readers.0.weight: has no effect" in str(caught.value)


@pytest.mark.slow
def test_a_source_that_cannot_fill_its_caps_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no mixture is within the caps, which sum to 0\.\d+: digits"):
        Swarm(recipes.decode(recipe_of(tmp_path, max_epochs=0.05), verb="mix"), tmp_path / "out", Listening())


def test_values_are_held_against_seeds() -> None:
    mixtures = dict.fromkeys(("chosen", "natural", "uniform"), (0.5, 0.5))
    values = {"chosen": [1.0, 1.02, 1.01], "natural": [1.5, 1.52, 1.51], "uniform": [1.02, 1.03, 1.04]}
    found = outcome.judged(values, mixtures)
    assert found["seed_sd"] == pytest.approx(0.01)
    assert found["chosen_is_less_by"] == pytest.approx({"natural": 0.5, "uniform": 0.02})
    assert found["beyond_two_sd"] == {"natural": True, "uniform": False}
    lost = outcome.judged({"chosen": [1.0, float("nan")], "natural": [2.0, 2.0]}, mixtures)
    assert lost["mixtures"]["chosen"]["failed"] == 1
    assert lost["chosen_is_less_by"] == {"natural": None}


def verified(**means: float) -> dict[str, Any]:
    """Of verification runs with a seed noise of 0.01."""
    values = {name: [mean - 0.01, mean, mean + 0.01] for name, mean in means.items()}
    return outcome.judged(values, {name: (0.5, 0.5) if name == "chosen" else (0.25, 0.75) for name in means})


def test_the_target_size_has_the_last_word() -> None:
    advice = Recommendation(mixture=(0.5, 0.5), rule="mean", predicted=1.0, sd=0.1)
    kept = outcome.after_verification(advice, verified(chosen=1.0, natural=1.5))
    assert kept.verified
    assert (kept.mixture, kept.warnings) == ((0.5, 0.5), ())
    close = outcome.after_verification(advice, verified(chosen=1.0, natural=0.99))
    assert close.mixture == (0.5, 0.5)
    assert close.warnings == ("at the target's size 'natural' was better, by 0.01",)
    taken = outcome.after_verification(advice, verified(chosen=1.0, natural=0.9))
    assert taken.mixture == (0.25, 0.75)
    assert taken.rule.startswith("the natural mixture, which was better at the target's size")
    for nothing in (None, verified(natural=1.0), verified(chosen=float("nan"), natural=1.0)):
        assert "unverified" in outcome.after_verification(advice, nothing).warnings[-1]


# --- published tables -------------------------------------------------------------------------------------------------

FOLDER = os.environ.get("LMWORKS_REGMIX_DATA")
published = pytest.mark.skipif(FOLDER is None, reason="needs LMWORKS_REGMIX_DATA, a folder with RegMix' run tables")


def pair(kind: str, size: str) -> tables.Published:
    """A published table; the test is skipped where it is not in the folder."""
    paths = [Path(FOLDER or ".") / f"{kind}_{what}_{size}.csv" for what in ("mixture", "pile_loss")]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"{paths[0].name} is not in {FOLDER}")
    return tables.read(paths)


@published
@pytest.mark.slow
@pytest.mark.parametrize(
    ("surrogate", "size", "low", "high"),
    [
        ("lightgbm", "1m", 0.985, 1.0),
        ("lightgbm", "60m", 0.98, 1.0),
        ("lightgbm", "1b", 0.95, 1.0),
        ("ols", "1m", 0.89, 0.91),
        ("ols", "60m", 0.88, 0.90),
        ("ols", "1b", 0.86, 0.89),
    ],
)
def test_published_runs_are_ranked_as_the_paper_says(surrogate: str, size: str, low: float, high: float) -> None:
    content = predict(pair("train", "1m"), pair("test", size), target=["pile_cc"], surrogate=surrogate)
    told = content["columns"]["the_pile_pile_cc"]
    assert low <= told["spearman"] <= high
    if surrogate == "lightgbm" and size == "1b":
        assert told["rank_of_predicted_best"] == 0


@published
@pytest.mark.slow
@pytest.mark.parametrize(("surrogate", "size"), [("log-linear", "1b"), ("log-gp", "60m"), ("gp", "60m")])
def test_fifty_four_published_runs_are_enough(surrogate: str, size: str) -> None:
    seen, other = pair("train", "1m"), pair("test", size)
    ranks = []
    for seed in range(5):
        few = seen.take(np.random.default_rng(seed).choice(len(seen.ids), 54, replace=False).tolist())
        ranks.append(predict(few, other, target=["pile_cc"], surrogate=surrogate)["mean_spearman"])
    assert np.mean(ranks) >= 0.95
