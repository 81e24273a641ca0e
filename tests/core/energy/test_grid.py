"""Figures of places: where they are from, own figures with units, what may not be mixed."""

from __future__ import annotations

import pytest

from lmworks.core.energy.grid import (
    INTENSITIES,
    figures,
    intensity_of,
    mixed,
    near_place,
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


@pytest.mark.parametrize(
    ("place", "grams", "name", "year", "scope"),
    [
        ("US-CA", 394.769 * 0.45359237, "California, United States", 2023, "direct"),
        ("us-tx", 771.179 * 0.45359237, "Texas, United States", 2023, "direct"),
        ("CN-SC", 156.4, "Sichuan, China", 2023, "direct"),
        ("NO4", 51.7, "Northern Norway, Norway", 2025, "life-cycle"),
    ],
)
def test_parts_of_countries(place: str, grams: float, name: str, year: int, scope: str) -> None:
    found = intensity_of(place)
    assert found.known
    assert found.grams.central == pytest.approx(grams)
    assert (found.place, found.year, found.scope) == (name, year, scope)
    assert ("direct emissions only" in found.in_words()) == (scope == "direct")


def test_every_part_has_its_year_and_its_source() -> None:
    tables = [table for table in figures("regions").values() if isinstance(table, dict)]
    assert [len(table["places"]) for table in tables] == [51, 30, 3, 5]
    for table in tables:
        assert table["source"]
        assert 2020 <= table["year"] <= 2026
        assert table["unit"] in INTENSITIES
        assert all(0 < row["value"] < 2500 for row in table["places"].values())
    assert near_place("US-CX").startswith("; did you mean 'US-")


def test_direct_and_life_cycle_figures_do_not_mix() -> None:
    here, there = intensity_of("FRA"), intensity_of("US-CA")
    assert mixed([here, there]) == ["direct and life-cycle emissions"]
    own = own_intensity("60 g/kWh", year=2023, basis="location", place=None)
    assert mixed([there, own]) == []


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
