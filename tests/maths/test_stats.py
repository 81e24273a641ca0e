"""Intervals, quantiles and power against SciPy and against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.maths.stats import bootstrap_interval, centre, risk_of_guessing, smallest_effect, t_cdf, t_quantile
from tests.oracles import slimpajama as oracle

FINITE = st.floats(-100, 100)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("probability", [0.025, 0.2, 0.5, 0.8, 0.975, 0.995])
def test_quantiles_of_t_are_those_of_scipy(degrees: int, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("probability", "degrees", "table"), [(0.975, 2, 4.303), (0.975, 9, 2.262), (0.8, 2, 1.061)])
def test_quantiles_of_t_are_those_of_printed_tables(probability: float, degrees: int, table: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(table, abs=5e-4)


@given(FINITE, st.integers(1, 40))
def test_the_distribution_of_t_is_symmetric_and_grows(t: float, degrees: int) -> None:
    assert t_cdf(t, degrees) + t_cdf(-t, degrees) == pytest.approx(1.0, abs=1e-9)
    assert t_cdf(t, degrees) <= t_cdf(t + 1, degrees) + 1e-12


def test_with_three_values_the_interval_is_their_range() -> None:
    assert bootstrap_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_few_values_are_counted_and_not_drawn() -> None:
    values = [0.3, -1.0, 2.0, 0.5, 0.1]
    means = sorted(float(np.mean(pick)) for pick in itertools.product(values, repeat=5))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(means[math.ceil(0.025 * len(means)) - 1])
    assert high == pytest.approx(means[math.ceil(0.975 * len(means)) - 1])


@given(st.lists(FINITE, min_size=1, max_size=12), FINITE)
def test_an_interval_holds_the_mean_and_moves_with_the_values(values: list[float], shift: float) -> None:
    low, high = bootstrap_interval(values)
    assert low - 1e-9 <= sum(values) / len(values) <= high + 1e-9
    moved = bootstrap_interval([value + shift for value in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_a_bootstrap_of_normal_values_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(list(generator.normal(1.0, 1.0, 8)))
        inside += low <= 1.0 <= high
    assert 0.82 <= inside / 200 <= 0.97, "the percentile interval of 8 values is known to be a little too narrow"


def test_infinite_values_make_infinite_ends() -> None:
    assert bootstrap_interval([math.inf, 0.5]) == (0.5, math.inf)
    assert centre([1.0, math.inf]) == math.inf


def test_the_smallest_effect_is_found_four_times_out_of_five() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    effect = smallest_effect(list(stats.norm.ppf((np.arange(6) + 0.5) / 6)))  # spread of about one
    spread = float(np.std(stats.norm.ppf((np.arange(6) + 0.5) / 6), ddof=1))
    found = sum(stats.ttest_1samp(generator.normal(effect, spread, 6), 0).pvalue < 0.05 for _ in range(1000))
    assert found / 1000 == pytest.approx(0.8, abs=0.06)
    assert smallest_effect([0.4]) == math.inf


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_the_risk_of_guessing_is_the_papers(scores: list[float]) -> None:
    assert risk_of_guessing(scores) == pytest.approx(oracle.risk_of_guessing(scores), abs=1e-12)


def test_the_risk_of_guessing_is_1_at_chance_and_a_quarter_when_all_is_right() -> None:
    assert risk_of_guessing([0.25] * 5) == 1.0
    assert risk_of_guessing([1.0] * 5) == 0.25
    assert risk_of_guessing([0.5], choices=2) == 1.0


@pytest.mark.parametrize(("scores", "choices"), [([], 4), ([1.2], 4), ([-0.1], 4), ([0.5], 1)])
def test_the_risk_of_guessing_needs_accuracies(scores: list[float], choices: int) -> None:
    with pytest.raises(ValueError, match="accuracies between 0 and 1"):
        risk_of_guessing(scores, choices)
