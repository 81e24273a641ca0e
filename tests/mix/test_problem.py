"""Bounds, epochs, projection: what a mixture may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.mix.problem import Fidelity, MixtureProblem, Source, nearest_within
from tests.mix.planted import problem
from tests.oracles.mixtures import nearest_by_search

shares = st.floats(-2.0, 2.0, allow_nan=False)


@settings(max_examples=30)
@given(st.integers(1, 6).flatmap(lambda m: st.tuples(*[st.lists(shares, min_size=m, max_size=m)] * 3)))
def test_the_nearest_feasible_mixture(drawn: tuple[list[float], list[float], list[float]]) -> None:
    p, a, b = (np.array(one) for one in drawn)
    lower = np.abs(a) / (1 + np.abs(a).sum())
    upper = np.minimum(1.0, lower + 0.05 + (1 - lower.sum()) * np.abs(b) / max(1.0, np.abs(b).sum()))
    if upper.sum() < 1:
        upper = np.ones(len(p))
    near = nearest_within(p[None], lower, upper)[0]
    assert abs(near.sum() - 1) < 1e-9
    assert (near >= lower - 1e-9).all()
    assert (near <= upper + 1e-9).all()
    oracle = nearest_by_search(p, lower, upper)
    assert np.linalg.norm(near - p) <= np.linalg.norm(oracle - p) + 1e-6


def test_natural_shares_are_those_of_tokens() -> None:
    assert problem(4).natural.tolist() == [0.4, 0.3, 0.2, 0.1]
    unknown = MixtureProblem(sources=(Source(name="a", tokens=5), Source(name="b")), target={"a": 1.0})
    assert unknown.natural.tolist() == [0.5, 0.5]
    assert unknown.epochs([0.5, 0.5]) == {}


def test_epochs_bound_a_share() -> None:
    found = problem(4, budget=1000, max_epochs=2.0)
    assert found.upper.tolist() == [0.8, 0.6, 0.4, 0.2]
    assert found.epochs([0.8, 0.1, 0.05, 0.05]) == pytest.approx({"s0": 2.0, "s1": 1 / 3, "s2": 0.25, "s3": 0.5})
    assert found.why_not([0.8, 0.1, 0.05, 0.05]) is None
    assert "s3" in (found.why_not([0.1, 0.3, 0.3, 0.3]) or "")


def test_caps_that_leave_nothing_are_named() -> None:
    with pytest.raises(UsageError, match=r"caps, which sum to 0\.5: s0 0\.2, s1 0\.15") as caught:
        problem(4, budget=2000, max_epochs=1.0)
    assert "raise max_epochs" in str(caught.value)
    with pytest.raises(UsageError, match=r"least shares sum to 1\.2"):
        problem(3, bounds={"s0": (0.6, 1.0), "s1": (0.6, 1.0)})
    with pytest.raises(UsageError, match="nothing in between"):
        problem(3, bounds={"s0": (0.6, 0.5)})


def test_off_the_simplex_or_over_a_bound_tells_the_nearest() -> None:
    with pytest.raises(UsageError, match="not on the simplex") as caught:
        problem(3).must_be_feasible([0.5, 0.5, 0.5])
    assert "[0.3333, 0.3333, 0.3333]" in str(caught.value)
    with pytest.raises(UsageError, match=r"gives 's0' 0\.9"):
        problem(3, bounds={"s0": (0.0, 0.5)}).must_be_feasible([0.9, 0.1, 0.0])
    with pytest.raises(UsageError, match="is not 3 finite shares"):
        problem(3).must_be_feasible([float("nan"), 0.5, 0.5])


def test_costs_must_rise() -> None:
    with pytest.raises(UsageError, match="must rise"):
        MixtureProblem(
            sources=(Source(name="a"),),
            target={"a": 1.0},
            fidelities=(Fidelity(name="x", cost=1.0), Fidelity(name="y", cost=0.5)),
        )
    with pytest.raises(UsageError, match="cost above 0"):
        MixtureProblem(sources=(Source(name="a"),), target={"a": 1.0}, fidelities=(Fidelity(name="x", cost=0.0),))


@pytest.mark.parametrize(
    ("sources", "target", "text"),
    [
        ((), {"a": 1.0}, "at least one source"),
        ((Source(name="a"), Source(name="a")), {"a": 1.0}, "two have the name 'a'"),
        ((Source(name="a"),), {}, "weight other than 0"),
        ((Source(name="a"),), {"a": float("nan")}, "weight other than 0"),
    ],
)
def test_what_is_no_problem_is_refused(sources: tuple[Source, ...], target: dict[str, float], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MixtureProblem(sources=sources, target=target)


def test_a_target_is_a_weighted_sum() -> None:
    found = problem(3, target={"s0": 2.0, "s2": 0.5})
    assert found.value({"s0": 1.0, "s1": 9.0, "s2": 4.0}) == 4.0
    assert np.isnan(found.value({"s0": 1.0}))
