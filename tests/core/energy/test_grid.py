"""Figures of places: where they are from, own figures with units, what may not be mixed."""

from __future__ import annotations

import pytest

from lmworks.core.energy.grid import (
    INTENSITIES,
    figures,
    intensity_of,
    mixed,
    own_intensity,
    price_of,
    pue_of,
    quantity,
)
from lmworks.core.errors import UsageError


def test_every_figure_has_its_year_and_its_source() -> None:
    grids, fuels, prices = figures("grids"), figures("fuels"), figures("prices")
    assert grids["source"]
    assert grids["world"]["year"] == 2023
    assert len(grids["countries"]) > 200
    for code, row in grids["countries"].items():
        assert len(code) == 3
        assert 0 < row["g_per_kwh"] < 1000
        assert 2021 <= row["year"] <= 2026
    for row in fuels["fuels"].values():
        assert row["source"]
        assert row["year"]
    assert prices["source"]
    assert all(row["year"] for row in prices["places"].values())
    devices = figures("devices")
    for kind in ("gpus", "cpus"):
        assert devices[kind]["source"]
        assert all(5 <= watts <= 1500 for watts in devices[kind]["watts"].values())


@pytest.mark.parametrize(("country", "grams"), [("FRA", 56.0), ("germany", 381.0), ("Fin", 79.2), ("CHN", 582.3)])
def test_grids_as_ourworldindata_has_them(country: str, grams: float) -> None:
    found = intensity_of(country)
    assert found.grams.central == pytest.approx(grams, abs=0.5)
    assert found.known
    assert found.year == 2023
    assert found.grams.low < found.grams.central < found.grams.high


@pytest.mark.parametrize("country", [None, "Atlantis"])
def test_the_world_stands_in_with_a_flag(country: str | None) -> None:
    found = intensity_of(country)
    assert not found.known
    assert "PLACE NOT KNOWN" in found.in_words()
    assert found.grams.low < 50
    assert found.grams.high > 700


def test_own_figures() -> None:
    found = own_intensity("900 lb/MWh", year=2022, basis="location", place="Virginia")
    assert found.grams.central == pytest.approx(408.23, abs=0.01)
    assert found.in_words() == "408 g/kWh (Virginia, 2022, location-based)"
    assert quantity(" 5 g/kWh ", INTENSITIES, what="x") == (5.0, "g/kWh")


@pytest.mark.parametrize("text", ["409", "409 furlongs", "g/kWh", "nan g/kWh", "-4 g/kWh", "", "inf g/kWh"])
def test_own_figures_without_units_or_sense(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        own_intensity(text, year=None, basis="location", place=None)
    assert "g/kWh" in str(caught.value.legal)


def test_years_and_bases_do_not_mix() -> None:
    france, poland = intensity_of("FRA"), intensity_of("POL")
    assert mixed([france, poland]) == []
    market = own_intensity("0 g/kWh", year=2023, basis="market", place=None)
    assert mixed([france, market]) == ["location-based and market-based figures"]
    older = own_intensity("60 g/kWh", year=2019, basis="location", place=None)
    assert mixed([france, older]) == ["grids of the years 2019, 2023"]


def test_prices_and_pue() -> None:
    assert price_of("120 EUR/MWh").per_kwh == pytest.approx(0.12)
    assert price_of("US-TX").currency == "USD"
    with pytest.raises(UsageError, match="is no price"):
        price_of("US-TY")
    assert pue_of(1.2).to_json() == {"low": 1.2, "central": 1.2, "high": 1.2}
    assert pue_of(None).high == 1.58
