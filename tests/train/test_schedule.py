"""Schedules: ends, bounds, no jumps where none belong."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.train.schedule import Constant, Cosine, Linear, Schedule, WarmupStableDecay


def schedules(warmup: int) -> list[Schedule]:
    shapes = ("linear", "sqrt", "cosine")
    return [
        Constant(warmup=warmup),
        Cosine(warmup=warmup),
        Linear(warmup=warmup),
        *(WarmupStableDecay(warmup=warmup, decay=0.3, shape=shape) for shape in shapes),  # type: ignore[arg-type]
    ]


@given(steps=st.integers(2, 400), share=st.floats(0, 0.6))
def test_warm_up_rises_to_one_and_the_rest_never_rises(steps: int, share: float) -> None:
    warmup = int(share * steps)
    for schedule in schedules(warmup):
        factors = [schedule.factor(step, steps) for step in range(steps)]
        assert all(0.0 <= f <= 1.0 for f in factors)
        assert factors[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
        rest = factors[warmup:]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rest))


@given(steps=st.integers(3, 400), floor=st.floats(0, 1))
def test_the_last_step_is_at_the_floor(steps: int, floor: float) -> None:
    for schedule in (Cosine(floor=floor), Linear(floor=floor), WarmupStableDecay(floor=floor, decay=0.5)):
        assert schedule.factor(steps - 1, steps) == pytest.approx(floor)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert Cosine(floor=0.0).factor(50, 101) == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay() -> None:
    schedule = WarmupStableDecay(warmup=10, decay=0.2)
    assert [schedule.factor(step, 100) for step in (10, 50, 79)] == [1.0, 1.0, 1.0]
    assert schedule.factor(80, 100) == pytest.approx(1 - 1 / 20)
