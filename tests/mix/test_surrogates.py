"""Surrogates against planted functions and plain formulas; held-out rows; the choice between them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import LmworksError, UsageError
from lmworks.mix.folds import choose, cross_validate, folds_of
from lmworks.mix.gaussian import GaussianProcess
from lmworks.mix.learn import KINDS, kinds_of, learn, rank_of_unseen, resampled
from lmworks.mix.linear import LogLinear, Ols
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Surrogate
from lmworks.mix.trees import Trees
from tests.mix.planted import SIZE, mixtures, problem, rows, table, truth
from tests.oracles.mixtures import exponential


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(0, 20))
def test_log_linear_recovers_what_was_planted(sources: int, seed: int) -> None:
    of = problem(sources)
    seen = rows(of, 3 * (sources + 1), seed=seed)
    found = LogLinear().fit(seen)
    c, a_M = truth(sources)
    new = mixtures(of, 50, seed=seed + 1)
    assert found.predict(new).mean_N == pytest.approx(exponential(c, a_M, new), abs=1e-6)
    assert found.c == pytest.approx(c, abs=1e-5)
    assert found.a_M == pytest.approx(a_M, abs=1e-5)


def test_ols_is_least_squares() -> None:
    seen = rows(problem(5), 40, noise=0.1)
    b = np.linalg.lstsq(seen.mixtures_NM, seen.values_N, rcond=None)[0]
    found = Ols().fit(seen)
    assert found.b_M == pytest.approx(b, abs=1e-12)
    with_constant = np.column_stack([np.ones(40), seen.mixtures_NM])
    again = np.linalg.lstsq(with_constant, seen.values_N, rcond=None)[0]
    assert found.predict(seen.mixtures_NM).mean_N == pytest.approx(with_constant @ again, abs=1e-9)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_order_of_sources_does_not_matter(kind: str) -> None:
    seen = rows(problem(4), 60, noise=0.02)
    order = [2, 0, 3, 1]
    moved = Rows(seen.mixtures_NM[:, order], seen.values_N)
    surrogate = dataclasses.replace(KINDS[kind], starts=0) if "gp" in kind else KINDS[kind]
    asked = mixtures(problem(4), 20, seed=5)
    a, b = surrogate.fit(seen).predict(asked), surrogate.fit(moved).predict(asked[:, order])
    assert a.mean_N == pytest.approx(b.mean_N, abs=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_held_out_rows_are_refused(kind: str) -> None:
    seen = rows(problem(4), 40)
    kept = Rows(seen.mixtures_NM, seen.values_N, held_out=True)
    with pytest.raises(LmworksError, match="40 held-out runs were given to learn from"):
        KINDS[kind].fit(kept)
    with pytest.raises(LmworksError, match="held-out"):
        KINDS[kind].settle(kept) if kind in ("lightgbm", "gp", "log-gp") else cross_validate(KINDS[kind], kept)
    assert kept.take(np.arange(3)).held_out


@pytest.mark.parametrize("kind", list(KINDS))
def test_too_few_rows_are_refused(kind: str) -> None:
    seen = rows(problem(4), 4)
    with pytest.raises(LmworksError, match=f"'{kind}' needs"):
        KINDS[kind].fit(seen)


def test_a_missing_value_is_refused() -> None:
    seen = rows(problem(4), 20)
    values = seen.values_N.copy()
    values[3] = np.nan
    with pytest.raises(LmworksError, match="1 of 20 runs have no finite value"):
        Ols().fit(Rows(seen.mixtures_NM, values))


def test_trees_tell_apart_with_few_rows() -> None:
    """LightGBM's own 20 rows in a leaf give one answer for all when there are 32."""
    found = Trees().fit(rows(problem(4), 32, noise=0.01))
    assert len(np.unique(found.predict(mixtures(problem(4), 20, seed=3)).mean_N)) > 3


def test_trees_are_the_same_again() -> None:
    seen = rows(problem(4), 60, noise=0.05)
    a, b = Trees().fit(seen), Trees().settle(seen).fit(seen)
    asked = mixtures(problem(4), 10, seed=2)
    assert (a.predict(asked).mean_N == b.predict(asked).mean_N).all()


def test_spreads_cover_the_truth() -> None:
    """Of 200 new mixtures about 95 % lie within two standard deviations, noise included."""
    of = problem(4)
    new = mixtures(of, 200, seed=9)
    c, a_M = truth(4)
    noisy = exponential(c, a_M, new) + 0.05 * np.random.default_rng(3).standard_normal(200)
    for surrogate in (LogLinear(), GaussianProcess(starts=0), GaussianProcess(starts=0, logs=True)):
        told = surrogate.fit(rows(of, 60, noise=0.05)).predict(new)
        assert 0.85 < float((np.abs(told.mean_N - noisy) < 2 * told.sd_N).mean()) <= 1.0


def test_every_row_is_left_out_once() -> None:
    masks = list(folds_of(23, 5, seed=1))
    assert len(masks) == 5
    assert (np.sum(masks, axis=0) == 1).all()
    assert len(list(folds_of(3, 5, seed=0))) == 3


def test_the_better_surrogate_is_chosen() -> None:
    curved = rows(problem(4), 40, noise=0.01)
    able: list[Surrogate] = [Ols(), LogLinear()]
    chosen, scores = choose(able, curved)
    assert chosen.name == "log-linear"
    assert {score.surrogate for score in scores} == {"ols", "log-linear"}
    flat = Rows(curved.mixtures_NM, curved.mixtures_NM @ np.array([1.0, 2.0, 3.0, 4.0]))
    assert choose([Ols(), Trees()], flat)[0].name == "ols"
    with pytest.raises(LmworksError, match="6 runs are too few"):
        choose([Trees()], rows(problem(4), 6))


def test_names_of_surrogates() -> None:
    assert [one.name for one in kinds_of("auto")] == ["lightgbm", "log-linear", "ols", "gp", "log-gp"]
    with pytest.raises(UsageError, match="did you mean 'lightgbm'"):
        kinds_of("lightgmb")


def test_what_is_learnt_predicts_what_is_held_out() -> None:
    of = problem(4, target={"s0": 1.0, "s2": 1.0})
    runs = table(of, 15, unseen=8)
    learnt = learn(runs, SIZE)
    count, rank = rank_of_unseen(learnt, runs, SIZE)
    assert count == 8
    assert rank > 0.99
    assert len(learnt.mixtures) == 15
    assert set(learnt.surrogates) == {"s0", "s2"}
    assert len(resampled(learnt, 3, seed=0)) == 3


def test_too_few_runs_are_refused_with_what_was_lost() -> None:
    of = problem(4)
    runs = table(of, 5)
    with pytest.raises(LmworksError, match="5 runs of size 'proxy' are left to learn from; 4 sources need 6"):
        learn(runs, SIZE)


def test_lengths_are_sought_by_some_rows_and_all_are_learnt_from() -> None:
    seen = rows(problem(3), 60, noise=0.01)
    few = GaussianProcess(starts=0, searched=30).fit(seen)
    assert len(few.process.X_train_) == 60
    asked = mixtures(problem(3), 20, seed=7)
    whole = GaussianProcess(starts=0).fit(seen)
    assert few.predict(asked).mean_N == pytest.approx(whole.predict(asked).mean_N, abs=0.05)


def test_a_process_of_logarithms_stays_above_its_floor() -> None:
    found = GaussianProcess(starts=0, logs=True).fit(rows(problem(4), 20))
    told = found.predict(np.eye(4)).mean_N
    assert found.floor is not None
    assert (told > found.floor).all()
