"""The sampler of proxies: RegMix's settings, its invariants, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.mix.sample import Sampler, candidates, draw, to_units
from tests.mix.planted import problem
from tests.oracles.mixtures import proxies_one_by_one

tokens = st.lists(st.integers(1, 10_000), min_size=2, max_size=17)


@given(tokens, st.integers(1, 20), st.integers(0, 3))
def test_rows_are_mixtures_of_whole_steps(counts: list[int], wanted: int, seed: int) -> None:
    of = problem(len(counts), tokens=counts)
    found = draw(of, wanted, seed=seed, sampler=Sampler())
    assert found.shape == (wanted, len(counts))
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-9
    assert ((found == 0) | (found >= 2e-4 - 1e-12)).all()
    assert (found <= np.minimum(15 * of.natural, 1) + 1e-9).all()
    assert len(np.unique(found, axis=0)) == wanted
    assert (found == draw(of, wanted, seed=seed, sampler=Sampler())).all()
    assert np.abs(found * 5000 - np.round(found * 5000)).max() < 1e-6


def test_one_and_two_sources() -> None:
    assert draw(problem(1), 5, seed=0, sampler=Sampler()).tolist() == [[1.0]]
    assert draw(problem(2), 64, seed=0, sampler=Sampler()).shape == (64, 2)


def test_bounds_are_kept() -> None:
    of = problem(4, bounds={"s0": (0.2, 0.5), "s3": (0.0, 0.05)})
    found = draw(of, 200, seed=1, sampler=Sampler())
    assert found[:, 0].min() >= 0.2 - 1e-9
    assert found[:, 0].max() <= 0.5 + 1e-9
    assert found[:, 3].max() <= 0.05 + 1e-9


def test_narrow_bounds_are_filled_from_the_nearest() -> None:
    of = problem(3, bounds={"s0": (0.30, 0.31), "s1": (0.30, 0.31)})
    found = draw(of, 50, seed=0, sampler=Sampler())
    assert len(np.unique(found, axis=0)) == 50
    assert all(of.why_not(row) is None for row in found)


def test_caps_that_leave_nothing_are_named() -> None:
    with pytest.raises(UsageError, match=r"within the caps: s0 0 to 0\.2, s1 0 to 0\.15"):
        draw(problem(4), 3, seed=0, sampler=Sampler(epochs=0.5))
    with pytest.raises(UsageError, match="different mixtures are within the bounds, 50 are wanted"):
        draw(problem(2, bounds={"s0": (0.5, 0.501)}), 50, seed=0, sampler=Sampler())


def test_it_draws_what_the_script_draws() -> None:
    """Means and spreads of shares agree with the loop of the script, within what 250 draws leave open."""
    of = problem(5, tokens=[5000, 3000, 1000, 500, 500])
    ours = draw(of, 250, seed=0, sampler=Sampler())
    strengths = np.geomspace(0.1, 5.0, 15)
    theirs = proxies_one_by_one(of.natural, 250, 0.5, strengths, 15.0, 2e-4, seed=1)
    sd = ours.std(axis=0)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * sd * np.sqrt(2 / 250)).all()
    assert (np.abs(sd - theirs.std(axis=0)) < 4 * sd * np.sqrt(1 / 250)).all()


def test_candidates_are_within_the_caps() -> None:
    of = problem(4, budget=1000, max_epochs=1.5)
    found = candidates(of, 1000, seed=0, sampler=Sampler(epochs=None))
    assert found.shape == (1000, 4)
    assert all(of.why_not(row) is None for row in found)


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8))
def test_whole_steps_are_the_nearest(raw: list[float]) -> None:
    p = np.array(raw) / sum(raw)
    none, all_of_it = np.zeros(len(p), dtype=np.int64), np.full(len(p), 100)
    (units,) = to_units(p[None], 100, none, all_of_it)
    assert units.sum() == 100
    assert np.abs(units - 100 * p).max() < 1
