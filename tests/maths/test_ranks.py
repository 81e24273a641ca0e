"""Rank correlation against its definition and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmworks.maths.ranks import ranks, spearman
from tests.oracles.mixtures import rank_correlation

pairs = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12)


@given(pairs)
def test_ties_share_their_ranks(values: list[tuple[int, int]]) -> None:
    a, b = ([float(v) for v in side] for side in zip(*values, strict=True))
    assert ranks(a).tolist() == scipy.stats.rankdata(a).tolist()
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(rank_correlation(a, b), abs=1e-12)
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_nothing_to_correlate_is_nan() -> None:
    assert math.isnan(spearman([1.0], [2.0]))
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0]))
    with pytest.raises(ValueError, match="pairs are needed"):
        spearman([1.0], [1.0, 2.0])


def test_only_order_counts() -> None:
    a = np.array([3.0, 1.0, 2.0, 10.0])
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
