"""The search within caps, and advice from planted runs: what is recommended, how sure, and what speaks against it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import LmworksError
from lmworks.mix.advise import Asked, advise
from lmworks.mix.learn import learn
from lmworks.mix.linear import Plane
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Run, RunTable, Trial
from lmworks.mix.search import divergence, draw_for, on_grid, search
from lmworks.mix.slices import slice_of, triangle
from lmworks.mix.surrogate import Prediction
from lmworks.mix.worth import seed_noise, too_far, worth
from tests.mix.planted import SIZE, losses, problem, table
from tests.oracles.mixtures import divergence as slow_divergence

FEW = Asked(surrogate="log-linear", simulated=4000, top=40, resamples=6)


def plane(*b: float) -> Plane:
    return Plane(b_M=np.array(b), cov_MM=np.zeros((len(b), len(b))), variance=0.0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.floats(1.0, 6.0), st.integers(0, 5))
def test_what_is_found_keeps_the_caps(tokens: list[int], epochs: float, seed: int) -> None:
    of = problem(len(tokens), tokens=tokens, budget=sum(tokens), max_epochs=epochs)
    b = np.random.default_rng(seed).standard_normal(len(tokens))
    found = search(plane(*b), of, draw_for(of, 400, seed=seed), top=20)
    assert of.why_not(found.mixture_M) is None
    assert of.why_not(found.worst_M) is None
    assert found.mean == pytest.approx(float(found.mixture_M @ b))


def test_the_mean_of_the_best_draws() -> None:
    of = problem(3)
    drawn = draw_for(of, 1000, seed=0)
    cost = drawn @ np.array([1.0, 2.0, 3.0])
    mean = drawn[np.argsort(cost, kind="stable")[:50]].mean(axis=0)
    found = search(plane(1.0, 2.0, 3.0), of, drawn, top=50)
    assert min(np.abs(found.mixture_M - mean).max(), np.abs(found.mixture_M - drawn[cost.argmin()]).max()) < 1e-4


class TwoWells:
    """Good at two corners, bad between them: the mean of good mixtures is bad."""

    def predict(self, mixtures_NM: Floats) -> Prediction:
        return Prediction(np.minimum(*(1 - mixtures_NM[:, :2]).T), np.zeros(len(mixtures_NM)))


def test_the_best_draw_where_a_mean_is_worse() -> None:
    of = problem(2, tokens=[1, 1])
    found = search(TwoWells(), of, draw_for(of, 2000, seed=0), top=100)
    assert found.rule.startswith("best of")
    assert found.mixture_M.max() > 0.99


def test_a_pull_keeps_to_the_natural_mixture() -> None:
    of, b = problem(4), plane(0.0, 1.0, 1.0, 1.0)
    drawn = draw_for(of, 4000, seed=0)
    free, pulled = (search(b, of, drawn, top=20, pull=pull).mixture_M for pull in (0.0, 5.0))
    assert free[0] > 0.95
    assert np.abs(pulled - of.natural).max() < 0.15


@given(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
def test_divergence(q: list[float], p: list[float]) -> None:
    if sum(p) > 0:
        a, b = np.array(p) / sum(p), np.array(q) / sum(q)
        assert divergence(a[None], b)[0] == pytest.approx(slow_divergence(a, b), abs=1e-12)


def test_on_the_grid() -> None:
    of = problem(3, bounds={"s0": (0.0, 0.12345)})
    found = on_grid(of.nearest([0.9, 0.05, 0.05]), of)
    assert found[0] == pytest.approx(0.1234)
    narrow = problem(2, bounds={"s0": (0.50001, 0.50002)})
    assert narrow.why_not(on_grid(narrow.nearest([0.5, 0.5]), narrow)) is None


def test_advice_on_planted_runs() -> None:
    """Target s0 + s2, each helped by its own source: more of both than is natural, and a gain that is there."""
    of = problem(4, target={"s0": 1.0, "s2": 1.0})
    advice = advise(table(of, 20, unseen=6, noise=0.005), SIZE, FEW)
    assert of.why_not(advice.mixture) is None
    assert advice.mixture[0] + advice.mixture[2] > 0.8
    assert advice.gain is not None
    assert advice.gain[0] > 2 * advice.gain[1] > 0
    true = losses(np.array([advice.mixture, tuple(of.natural)]))
    total = true["s0"] + true["s2"]
    assert advice.gain[0] == pytest.approx(total[1] - total[0], rel=0.2)
    assert advice.facts["unseen"]["spearman"] > 0.8
    assert all(low <= high for low, high in advice.spread)
    assert not advice.verified
    assert any("the target itself" in text for text in advice.warnings)
    assert {one["source"]: one["point"] > 0 for one in advice.facts["worth"]}["s3"] is False


def test_the_same_advice_again() -> None:
    runs = table(problem(3), 15, noise=0.01)
    assert advise(runs, SIZE, FEW) == advise(runs, SIZE, FEW)


def repeated(runs: RunTable, *values: float) -> RunTable:
    """With the natural mixture run several times."""
    natural = tuple(runs.problem.natural.tolist())
    for seed, value in enumerate(values):
        trial = Trial(mixture=natural, fidelity=SIZE, seed=100 + seed, purpose="noise")
        runs.tell(Run(trial=trial, losses={"s0": value}))
    return runs


def test_mixtures_that_cannot_be_told_apart_leave_the_natural_one() -> None:
    runs = repeated(table(problem(3), 15), 2.0, 5.0, 8.0)
    assert seed_noise(runs, SIZE) == pytest.approx(3.0)
    advice = advise(runs, SIZE, FEW)
    assert advice.mixture == pytest.approx(problem(3).natural, abs=1e-4)
    assert "cannot be told apart" in advice.rule
    assert advice.gain == (0.0, 0.0)


def test_seeds_are_held_against_the_spread_of_mixtures() -> None:
    runs = repeated(table(problem(3), 15), 2.50, 2.51)
    assert "natural" not in advise(runs, SIZE, FEW).rule
    assert seed_noise(table(problem(3), 15), SIZE) is None


def test_no_better_mixture_leaves_the_natural_one() -> None:
    of = problem(3, bounds={"s0": (0.5, 0.5), "s1": (1 / 3, 1 / 3)})
    advice = advise(table(problem(3), 15), SIZE, FEW)
    assert "natural" not in advice.rule
    held = RunTable(of, table(problem(3), 15))
    fixed = advise(held, SIZE, FEW)
    assert fixed.rule.startswith("the natural mixture: no mixture is predicted")


def test_caps_are_told_with_epochs() -> None:
    of = problem(3, tokens=[100, 1000, 1000], budget=1000, max_epochs=4.0)
    advice = advise(RunTable(of, table(problem(3), 15)), SIZE, FEW)
    assert advice.mixture[0] <= 0.4 + 1e-9
    assert any("'s0' is at its cap of 0.400, read 4.0 times" in text for text in advice.warnings)
    free = dataclasses.replace(of, max_epochs=None)
    advice = advise(RunTable(free, table(problem(3), 15)), SIZE, FEW)
    assert any("'s0' is read" in text and "teaches less" in text for text in advice.warnings)


def test_an_answer_far_from_all_runs_is_told_and_runs_are_proposed() -> None:
    of = problem(3)
    near = RunTable(of)
    rng = np.random.default_rng(0)
    for i, p in enumerate(rng.dirichlet([40.0, 40.0, 40.0], 15)):
        values = losses(p[None])
        trial = Trial(mixture=tuple(p.tolist()), fidelity=SIZE, seed=i)
        near.tell(Run(trial=trial, losses={k: float(v[0]) for k, v in values.items()}))
    advice = advise(near, SIZE, FEW)
    assert any("no run was made near it" in text for text in advice.warnings)
    assert len(advice.facts["proposed"]) == 3
    learnt = learn(near, SIZE)
    assert too_far(learnt, learnt.mixtures[0]) is None


def test_failed_runs_are_told_and_too_few_left_are_refused() -> None:
    runs = table(problem(3), 15)
    for seed in range(4):
        runs.tell(Run(trial=Trial(mixture=(0.2, 0.2, 0.6), fidelity=SIZE, seed=50 + seed), failed="loss is nan"))
    assert any(text == "4 runs left out: loss is nan" for text in advise(runs, SIZE, FEW).warnings)
    few = RunTable(problem(3), [*list(table(problem(3), 4)), *[run for run in runs if run.failed]])
    with pytest.raises(LmworksError, match=r"4 runs of size 'proxy' are left to learn from.*4 excluded: loss is nan"):
        advise(few, SIZE, FEW)


def test_bad_order_of_unseen_runs_is_told() -> None:
    runs = table(problem(3), 15)
    for i, run in enumerate(table(problem(3), 0, unseen=6, seed=4)):
        runs.tell(dataclasses.replace(run, losses={"s0": -run.losses["s0"]}, seconds=float(i)))
    assert any("6 unseen mixtures are ordered badly" in text for text in advise(runs, SIZE, FEW).warnings)


def test_worth_of_a_plane_is_its_slope() -> None:
    of, p = problem(3), np.array([0.5, 0.3, 0.2])
    b = np.array([1.0, 2.0, 4.0])
    found = worth(plane(*b), [plane(*b)] * 3, of, p)
    mean = float(p @ b)
    for j, one in enumerate(found):
        others = (mean - p[j] * b[j]) / (1 - p[j])
        assert one.point == pytest.approx(0.01 * (others - b[j]))
        assert one.without == pytest.approx(others - mean)
        assert one.point_sd == 0.0
    alone = worth(plane(1.0), [], problem(1), np.array([1.0]))
    assert alone[0].point == pytest.approx(0.0)


def test_a_slice_holds_the_other_sources_where_they_are() -> None:
    b, p = plane(1.0, 2.0, 4.0, 8.0), np.array([0.1, 0.4, 0.2, 0.3])
    runs = np.array([[0.0, 0.2, 0.4, 0.4], [0.9, 0.1, 0.0, 0.0]])
    part = slice_of(b, problem(4), p, runs)
    assert part is not None
    assert part["sources"] == ["s1", "s3", "s2"]
    assert part["whole"] == pytest.approx(0.9)
    first = triangle().tolist().index([1.0, 0.0, 0.0])
    assert part["values"][first] == pytest.approx(0.1 * 1.0 + 0.9 * 2.0)
    assert part["runs"] == [pytest.approx([0.2, 0.4, 0.4])]
    assert slice_of(plane(1.0, 2.0), problem(2), np.array([0.5, 0.5]), runs[:, :2]) is None
