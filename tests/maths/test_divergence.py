"""Divergences against the oracle, and what they must be whatever the counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.maths.divergence import kl_bits, smoothed
from tests.oracles import slimpajama as oracle


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]))
def test_divergences_are_the_oracles(sources: int, tokens: int, seed: int, added: float) -> None:
    counts = np.random.default_rng(seed).integers(0, 5, (sources, tokens))
    counts[:, 0] += 1  # a source has tokens
    found = kl_bits(smoothed(counts, added))
    rows = counts.tolist()
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            assert found[i, j] == pytest.approx(oracle.kl_bits(first, second, added), abs=1e-12)
    assert np.diag(found) == pytest.approx(0.0, abs=1e-12)


def test_a_token_that_the_other_lacks_is_infinitely_far_without_smoothing() -> None:
    counts = np.array([[4, 4], [8, 0]])
    found = kl_bits(smoothed(counts, 0.0))
    assert found.tolist() == [[0.0, math.inf], [1.0, 0.0]]
    assert np.isfinite(kl_bits(smoothed(counts, 1.0))).all()


@pytest.mark.parametrize(("counts", "added"), [([[0, 0], [1, 2]], 0.0), ([[1, 1]], -0.1)])
def test_shares_need_tokens(counts: list[list[int]], added: float) -> None:
    with pytest.raises(ValueError, match="needs tokens"):
        smoothed(np.array(counts), added)
