"""Energy, carbon, money: published runs, units, ranges that stay in order, and the comparison of points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.energy.footprint import (
    NOTHING,
    Made,
    Range,
    break_even_requests,
    device_hours,
    embodied_kg,
    estimate,
    front,
    grams_per_kwh,
    inference_flops,
    joules_of,
    kwh_of,
    mix_intensity,
    of_energy,
    training_flops,
)
from lmworks.core.energy.grid import figures
from tests.oracles import footprint as oracle

RUNS = [
    # active parameters, tokens (both in billions), kg/kWh, PUE, W, TFLOP/s, efficiency, devices
    # -> MWh and t as the formula gives them, t as published
    ("T5", 11, 600, 0.545, 1.12, 310, 123, 0.37, 512, 83.9, 45.74, 46.7),
    ("GPT-3", 175, 300, 0.429, 1.10, 330, 125, 0.197, 10_000, 1289.8, 553.34, 552.1),
    ("GShard", 2.3, 1000, 0.177, 1.09, 288, 123, 0.39, 1000, 25.1, 4.44, 4.3),
    ("Switch", 7.41, 2000, 0.33, 1.10, 245, 123, 0.28, 1000, 193.3, 63.78, 59.1),
    ("XLM", 0.55, 7000, 0.413, 1.10, 342, 125, 0.212, 512, 91.1, 37.62, 39.0),
]
"""LLMCarbon's reference runs; of the mixtures of experts (GShard, Switch) the active parameters."""

figure = st.floats(0, 1e9)
ranges = st.tuples(figure, figure, figure).map(lambda ends: Range(*sorted(ends)))


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row[0])
def test_published_runs(row: tuple[float, ...]) -> None:
    _, parameters, tokens, kg, pue, watts, peak, share, n, mwh, tonnes, published = row
    flops = training_flops(parameters * 1e9, tokens * 1e9)
    hours = device_hours(flops, peak_flops=peak * 1e12, efficiency=share) / n
    found = estimate(
        devices=n, hours=hours, watts=Range.exact(watts), pue=Range.exact(pue), grams_per_kwh=Range.exact(1e3 * kg)
    )
    assert found.kg_co2e.central / 1e3 == pytest.approx(tonnes, rel=1e-3)
    assert found.kwh.central * pue / 1e3 == pytest.approx(mwh, rel=1e-3)
    assert abs(found.kg_co2e.central / 1e3 / published - 1) < 0.08, "as far from the published figure as the formula is"
    slow = oracle.tonnes(
        parameters=parameters * 1e9, tokens=tokens * 1e9, kg_per_kwh=kg, pue=pue, watts=watts, peak=peak * 1e12,
        share=share, n=int(n),
    )  # fmt: skip
    assert (found.kwh.central * pue / 1e3, found.kg_co2e.central / 1e3) == pytest.approx(slow, rel=1e-12)


def test_embodied_of_xlm() -> None:
    parts = [
        Made(units=1.47, kg_per_unit=1.0, count=64),
        Made(units=256, kg_per_unit=0.4, count=64),
        Made(units=32_768, kg_per_unit=0.018, count=64),
        Made(units=111.6, kg_per_unit=1.2, count=64),
        Made(units=8.15, kg_per_unit=1.2, count=512),
    ]
    assert embodied_kg(parts, days=20.4) / 1e3 == pytest.approx(0.648, abs=1e-3)
    assert embodied_kg(parts, days=0) == 0


def test_no_tokens_take_nothing_and_doubling_a_factor_doubles_energy() -> None:
    assert training_flops(1e9, 0) == 0
    assert inference_flops(1e9, 5) == 1e10

    def kwh(parameters: float, tokens: float, devices: float, watts: float) -> float:
        hours = device_hours(training_flops(parameters, tokens), peak_flops=1e14, efficiency=0.4)
        exact = Range.exact(1.0)
        return estimate(
            devices=devices, hours=hours, watts=Range.exact(watts), pue=exact, grams_per_kwh=exact
        ).kwh.central

    base = [1e9, 1e10, 1.0, 300.0]
    for i in range(4):
        more = [x * (2 if i == j else 1) for j, x in enumerate(base)]
        assert kwh(*more) == pytest.approx(2 * kwh(*base), rel=1e-12)


def test_a_mix_of_fuels() -> None:
    by_fuel = {name: row["g_per_kwh"] for name, row in figures("fuels")["fuels"].items()}
    shares = {"coal": 0.25, "petroleum": 0.35, "gas": 0.26, "nuclear": 0.14}
    assert mix_intensity(shares, by_fuel) == pytest.approx(731.59, abs=0.005)
    with pytest.raises(ValueError, match="add up to 1"):
        mix_intensity({"coal": 0.25}, by_fuel)


@pytest.mark.parametrize(
    ("value", "unit", "grams"),
    [
        (409, "g/kWh", 409),
        (0.409, "kg/kWh", 409),
        (409, "kg/MWh", 409),
        (0.409, "t/MWh", 409),
        (409, "t/GWh", 409),
        (1000, "lb/MWh", 453.59237),
        (1, "lb/kWh", 453.59237),
        (409e3, "g/MWh", 409),
    ],
)
def test_units_of_intensity(value: float, unit: str, grams: float) -> None:
    assert grams_per_kwh(value, unit) == pytest.approx(grams, rel=1e-12)


@given(figure)
def test_joules_and_kwh_go_there_and_back(x: float) -> None:
    assert joules_of(kwh_of(x)) == pytest.approx(x, rel=1e-12)
    assert kwh_of(3.6e6) == 1.0


@given(ranges, ranges, st.floats(1, 3), st.floats(0, 2))
def test_ranges_stay_in_order(a: Range, b: Range, pue: float, price: float) -> None:
    for found in (a.plus(b), a.times(b), Range.around(a.central, 0.3)):
        assert found.low <= found.central <= found.high
    found = of_energy(a, pue=Range(1, pue, 3), grams_per_kwh=b, price_per_kwh=price, rent=7.0)
    assert found.kg_co2e.low <= found.kg_co2e.central <= found.kg_co2e.high
    assert found.kg_co2e.central == pytest.approx(a.central * pue * b.central / 1e3)
    assert found.money is not None
    assert found.money.central == pytest.approx(a.central * pue * price + 7.0)
    assert of_energy(a, pue=Range.exact(pue), grams_per_kwh=b).money is None


def test_a_range_that_goes_down_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="goes up"):
        Range(2, 1, 3)
    with pytest.raises(ValueError, match="goes up"):
        Range(math.nan, 1, 3)
    with pytest.raises(ValueError, match="from 0 upwards"):
        NOTHING.times(-1.0)


@given(st.dictionaries(st.text("abc", min_size=1), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_the_front_is_what_nothing_beats(points: dict[str, tuple[int, int]]) -> None:
    slow = set()
    for name, (cost, loss) in points.items():
        others = [point for other, point in points.items() if other != name]
        if not any(c <= cost and q <= loss and (c, q) != (cost, loss) for c, q in others):
            slow.add(name)
    assert front({name: (float(c), float(q)) for name, (c, q) in points.items()}) == slow


def test_break_even() -> None:
    assert break_even_requests(100.0, 0.5) == 200
    assert break_even_requests(100.0, 0.0) == math.inf
    assert break_even_requests(-5.0, 1.0) == 0
