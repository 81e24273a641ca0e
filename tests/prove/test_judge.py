"""Verdicts from known runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.prove.judge import judge
from lmworks.prove.recipe import Test
from lmworks.train.arm import Measured, reach

SEEDS = (1, 2, 3)


def run_of(losses: list[float], failed: str | None = None) -> Measured:
    """A run that was validated after every 10 of its steps."""
    rows: list[dict[str, Any]] = [
        {"val_loss": loss, "at/step": 10.0 * (i + 1), "at/tokens": 100.0 * (i + 1)} for i, loss in enumerate(losses)
    ]
    return Measured(folder=Path(), failed=failed, rows=rows)


def ends(a: list[float], b: list[float]) -> dict[str, dict[int, Measured]]:
    return {
        "new": {seed: run_of([5.0, value]) for seed, value in zip(SEEDS, a, strict=False)},
        "old": {seed: run_of([5.0, value]) for seed, value in zip(SEEDS, b, strict=False)},
    }


def held(**settings: Any) -> Test:
    return Test(**{"claim": "c", "arm": "new", "against": "old", "want": "less", **settings})


@pytest.mark.parametrize(
    ("a", "want", "bound", "verdict"),
    [
        ([2.8, 2.7, 2.75], "less", None, "holds"),
        ([2.8, 2.7, 2.75], "less", -0.5, "not seen"),
        ([2.8, 3.2, 2.75], "less", None, "not seen"),
        ([3.2, 3.3, 3.4], "less", None, "contrary"),
        ([3.2, 3.3, 3.4], "more", None, "holds"),
        ([2.8, 2.7, 2.75], "more", 0.1, "contrary"),
        ([3.02, 2.98, 3.0], "same", 0.05, "holds"),
        ([3.2, 3.3, 3.4], "same", 0.05, "contrary"),
        ([3.2, 2.98, 3.0], "same", 0.05, "not seen"),
    ],
)
def test_the_verdict_follows_from_the_interval(a: list[float], want: str, bound: float | None, verdict: str) -> None:
    found = judge(held(want=want, bound=bound), ends(a, [3.0, 3.0, 3.0]), SEEDS, "steps")
    assert found.verdict == verdict
    assert found.values == pytest.approx([x - 3.0 for x in a])
    assert found.interval == pytest.approx((min(a) - 3.0, max(a) - 3.0))


def test_differences_are_paired_by_seed() -> None:
    found = judge(held(), ends([1.9, 2.9, 3.9], [2.0, 3.0, 4.0]), SEEDS, "steps")
    assert found.verdict == "holds", "seeds lie apart, but each pair differs by the same"
    assert found.could_see < 1e-6


def test_one_seed_refuses_a_verdict() -> None:
    found = judge(held(), ends([1.0], [2.0]), SEEDS[:1], "steps")
    assert found.verdict == "refused"
    assert "one seed" in found.why
    assert found.could_see == math.inf


def test_confounded_arms_get_no_verdict() -> None:
    found = judge(held(), ends([1.0] * 3, [2.0] * 3), SEEDS, "steps", confounders=("schedule",))
    assert found.verdict == "confounded"
    assert "schedule" in found.why


def test_a_missing_column_refuses() -> None:
    found = judge(held(column="nothing"), ends([1.0] * 3, [2.0] * 3), SEEDS, "steps")
    assert found.verdict == "refused"
    assert "'nothing' is missing" in found.why


def test_a_run_that_exploded_counts_as_infinite() -> None:
    runs = ends([1.0] * 3, [2.0] * 3)
    runs["new"][2] = run_of([5.0], failed="loss is nan")
    found = judge(held(), runs, SEEDS, "steps")
    assert found.verdict == "not seen"
    assert found.mean == math.inf


def test_spread_is_the_range_of_the_baselines_seeds() -> None:
    found = judge(held(want="same", bound="spread"), ends([3.05, 3.0, 2.95], [3.0, 2.9, 3.1]), SEEDS, "steps")
    assert found.bound == pytest.approx(0.2)
    assert found.verdict == "holds"


def test_ratios_are_neutral_at_one() -> None:
    found = judge(held(compare="ratio", bound=0.95), ends([2.7] * 3, [3.0] * 3), SEEDS, "steps")
    assert found.mean == pytest.approx(0.9)
    assert found.verdict == "holds"
    slower = judge(held(compare="ratio", bound=0.95), ends([3.3] * 3, [3.0] * 3), SEEDS, "steps")
    assert slower.verdict == "contrary"


def test_reach_is_the_share_of_the_others_budget() -> None:
    runs = {
        "new": {seed: run_of([4.0, 3.0, 2.0]) for seed in SEEDS},
        "old": {seed: run_of([5.0, 4.0, 3.5]) for seed in SEEDS},
    }
    found = judge(held(take="reach", bound=0.9), runs, SEEDS, "tokens")
    assert found.values == pytest.approx([0.5] * 3), "3.5 is half way between 100 and 200 tokens of 300"
    assert found.verdict == "holds"
    never = judge(held(arm="old", against="new", take="reach", bound=0.9), runs, SEEDS, "tokens")
    assert never.mean == math.inf
    assert never.verdict == "contrary"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 10))
def test_reach_lies_where_the_curve_is_at_the_target(values: list[float], target: float) -> None:
    curve = [(float(i + 1), value) for i, value in enumerate(values)]
    place = reach(curve, target, budget=1.0)
    if all(value > target for value in values):
        assert place == math.inf
    else:
        first = next(i for i, value in enumerate(values) if value <= target)
        assert (first or 1.0) <= place <= first + 1 + 1e-9
