"""Joules out of samples, counters and models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.energy.footprint import Range, kwh_of
from lmworks.core.energy.power import Counter, Integrator, cpu_watts, cpu_watts_of_share, dimms_of, memory_watts
from tests.oracles import footprint as oracle

PROFILES = json.loads((Path(__file__).parent / "processors.json").read_text(encoding="utf-8"))["profiles"]


def test_a_hundred_watts_for_an_hour() -> None:
    found = Integrator(period=1.0)
    assert kwh_of(sum(found.add(float(second), 100.0) for second in range(3601))) == pytest.approx(0.1, abs=1e-9)


watts = st.one_of(st.none(), st.just(math.nan), st.floats(-50, 2000))


@given(st.lists(st.tuples(st.floats(0, 12), watts), max_size=30))
def test_irregular_missing_and_negative_samples(steps: list[tuple[float, float | None]]) -> None:
    at, samples = 0.0, []
    for gap, value in steps:
        at += gap
        samples.append((at, value))
    found = Integrator(period=1.0)
    joules = sum(found.add(when, value) for when, value in samples)
    assert (joules, found.gap_seconds) == pytest.approx(oracle.joules_of_samples(samples, 1.0), rel=1e-9, abs=1e-9)
    assert joules >= 0
    assert found.missing == sum(value is None or value != value for _, value in samples)
    assert found.clamped == sum(value is not None and value < 0 for _, value in samples)


def test_time_that_runs_backwards_is_an_error() -> None:
    found = Integrator(period=1.0)
    found.add(5.0, 1.0)
    with pytest.raises(ValueError, match="in order"):
        found.add(4.0, 1.0)


@given(st.lists(st.integers(0, 2**31), min_size=1), st.integers(0, 2**32 - 1))
def test_a_counter_that_wraps_at_2_to_32_loses_nothing(steps: list[int], start: int) -> None:
    counter, value, found = Counter(whole=2**32), start, 0
    counter.since(value)
    for step in steps:
        value = (value + step) % 2**32
        found += counter.since(value)
    assert found == sum(steps)
    assert counter.resets == 0


@given(st.lists(st.integers(0, 10**12), min_size=2))
def test_a_counter_that_is_reset_adds_nothing_negative(readings: list[int]) -> None:
    counter = Counter()
    found = [counter.since(reading) for reading in readings]
    assert min(found) >= 0
    assert sum(found) == sum(max(0, b - a) for a, b in itertools.pairwise(readings))
    assert counter.resets == sum(b < a for a, b in itertools.pairwise(readings))


def test_a_reset_is_told_from_a_wrap_by_what_can_have_been_spent() -> None:
    counter = Counter(whole=1000)
    counter.since(900)
    assert counter.since(100, most=300) == 200
    counter.since(500)
    assert counter.since(100, most=300) == 0
    assert counter.resets == 1


@given(st.floats(-1, 2), st.floats(1, 500))
def test_the_load_model(load: float, tdp: float) -> None:
    found = cpu_watts(load, Range.exact(tdp))
    assert 0 <= found.low <= found.central <= found.high <= 1.4 * tdp
    assert cpu_watts(0, Range.exact(tdp)).central == pytest.approx(0.1 * tdp)
    assert cpu_watts(1, Range.exact(tdp)).central == pytest.approx(tdp)
    share = cpu_watts_of_share(load, Range.exact(tdp))
    assert share.central == pytest.approx(tdp * min(max(load, 0), 1))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile["name"])
def test_measured_processors_lie_within_the_range(profile: dict[str, object]) -> None:
    tdp = float(profile["tdp"])  # type: ignore[arg-type]
    for load, measured in profile["points"]:  # type: ignore[attr-defined]
        found = cpu_watts(load / 100, Range.exact(tdp))
        # asleep, a package takes less than any curve that is drawn through its idle power
        assert found.low <= measured or load <= 3, (load, measured, found)
        assert measured <= found.high, (load, measured, found)


@given(st.floats(0.5, 8192))
def test_memory_by_modules(gibibytes: float) -> None:
    assert memory_watts(gibibytes).central == pytest.approx(oracle.modules(gibibytes))
    assert memory_watts(gibibytes, arm=True).central >= 3.0
    assert 1 <= dimms_of(gibibytes) <= 32
    assert memory_watts(gibibytes).low <= gibibytes * 0.375 <= memory_watts(gibibytes).high
