from __future__ import annotations

from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.data.mixture import Mixture
from tests.oracles import mixing

weights = st.lists(st.floats(1e-3, 1e3, allow_nan=False), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(weights)
def test_counts_stay_within_one_row_of_the_weights(shares: list[float]) -> None:
    mixture = Mixture(shares)
    exact = [Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    counts = [0] * len(shares)
    for n in range(1, 200):
        _, counts = mixture.take(counts, 1)
        assert sum(counts) == n
        assert all(abs(count - share * n) < 1 for count, share in zip(counts, exact, strict=True))


@settings(max_examples=30, deadline=None)
@given(weights)
def test_turns_are_the_papers(shares: list[float]) -> None:
    order, _ = Mixture(shares).take([0] * len(shares), 100)
    assert order == list(islice(mixing.turns(shares), 100))


@given(weights, st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_counts_are_the_whole_state(shares: list[float], draws: list[int]) -> None:
    mixture = Mixture(shares)
    counts, pieces = [0] * len(shares), []
    for rows in draws:
        order, counts = mixture.take(counts, rows)
        pieces += order
    whole, after = mixture.take([0] * len(shares), sum(draws))
    assert (pieces, counts) == (whole, after)


def test_the_largest_deficit_would_drift_by_more_than_a_row() -> None:
    """Why the rule is Tijdeman's: the simple one fails on these weights, and this one does not."""
    weights = [2, 8, 2, 40, 40, 40]
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    mixture = Mixture([float(weight) for weight in weights])
    simple, ours = [0] * 6, [0] * 6
    worst = {"simple": Fraction(0), "ours": Fraction(0)}
    for n in range(1, 200):
        lag = [share * n - count for share, count in zip(shares, simple, strict=True)]
        simple[lag.index(max(lag))] += 1
        _, ours = mixture.take(ours, 1)
        for name, counts in (("simple", simple), ("ours", ours)):
            drift = max(abs(share * n - count) for share, count in zip(shares, counts, strict=True))
            worst[name] = max(worst[name], drift)
    assert worst["ours"] < 1 < worst["simple"]


def test_only_ratios_of_weights_count() -> None:
    assert Mixture([3, 1]).take([0, 0], 50) == Mixture([0.75, 0.25]).take([0, 0], 50)


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [-1.0], [1.0, -1.0]])
def test_weights_must_be_positive(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Mixture(bad)


@given(weights, st.lists(st.integers(0, 3), max_size=4))
def test_a_source_of_weight_zero_has_no_turn_and_changes_none(shares: list[float], at: list[int]) -> None:
    order, _ = Mixture(shares).take([0] * len(shares), 60)
    padded, names = list(shares), list(range(len(shares)))
    for place in at:
        padded.insert(min(place, len(padded)), 0.0)
        names.insert(min(place, len(names)), -1)
    among, _ = Mixture(padded).take([0] * len(padded), 60)
    assert [names[i] for i in among] == order
