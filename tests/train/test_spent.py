"""What an account comes to: facts with labels, hours that sum to the total, energy above idle, making the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.energy.embodied import host
from lmworks.core.energy.footprint import Range
from lmworks.core.energy.grid import in_words
from lmworks.core.energy.hours import HOURS, Profile, seconds_by_hour
from lmworks.core.errors import RecipeError
from lmworks.train.energy import BY_HOUR, FIELDS, MADE, PHASES, RESTING, Meter, total
from lmworks.train.hardware import Hardware, hardware_of
from lmworks.train.metering import Metering
from lmworks.train.sensors import Modelled
from lmworks.train.spent import bill_of, told
from tests.train import toy
from tests.train.test_energy import steady
from tests.train.test_sensors import Clock


def account_of(joules: float, measured: float = 0.0) -> dict[str, list[float]]:
    empty = {phase: [0.0] * len(FIELDS) for phase in PHASES}
    return {**empty, "train": [joules / 2, joules, 2 * joules, measured, 10.0]}


@pytest.mark.parametrize(
    ("measured", "words"), [(0.0, "modelled"), (3.6e6, "measured"), (1e6, "partly measured, partly modelled")]
)
def test_facts_say_how_they_are_known(measured: float, words: str) -> None:
    settings = Metering(country="France", pue=1.2, price="0.1 EUR/kWh")
    facts = told(account_of(3.6e6, measured), settings, Meter([]), tokens=1000, flops=1e12)
    assert facts is not None
    assert facts["method"] == words
    assert facts["kwh"] == {"low": 0.5, "central": 1.0, "high": 2.0}
    assert facts["kg_co2e"]["central"] == pytest.approx(1.2 * 0.056, rel=0.01)
    assert facts["money"]["central"] == pytest.approx(0.12)
    assert (facts["joules_per_token"], facts["joules_per_flop"]) == pytest.approx((3600.0, 3.6e-6))
    assert sum(facts["phases_kwh"].values()) == pytest.approx(1.0)
    line = in_words(facts)
    for part in (words, "France", "2023", "PUE 1.2", "location-based"):
        assert part in line


def test_a_place_that_is_not_known_is_flagged() -> None:
    facts = told(account_of(3.6e6), Metering(), Meter([]), tokens=0, flops=0.0)
    assert facts is not None
    assert not facts["place_known"]
    assert facts["joules_per_token"] is None
    assert "PLACE NOT KNOWN" in in_words(facts)
    assert facts["kg_co2e"]["low"] < facts["kg_co2e"]["central"] < facts["kg_co2e"]["high"]
    assert told(account_of(0.0), Metering(), Meter([]), tokens=1, flops=1.0) is None


def test_own_figures_are_taken_with_their_units() -> None:
    settings = Metering(intensity="1000 lb/MWh", intensity_year=2022, basis="market", country="a wind farm")
    bill = bill_of(account_of(3.6e6), settings)
    assert bill.kg_co2e == pytest.approx(0.45359237)
    assert bill.money is None
    assert settings.grid().basis == "market"


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ({"country": "Frence"}, r"energy\.country: 'Frence' is not in the table; did you mean 'France'"),
        ({"intensity": "409"}, r"energy\.intensity: '409' has no unit; legal: a number and a unit: g/kWh"),
        ({"intensity": "409 g/kwh"}, r"has the unit 'g/kwh'; did you mean 'g/kWh'"),
        ({"intensity": "-1 g/kWh"}, r"is not 0 or more"),
        ({"intensity": "many g/kWh"}, r"'many g/kWh' is not a carbon intensity"),
        ({"intensity_year": 2022}, r"energy\.intensity_year: has no effect without intensity"),
        ({"country": "US-XX"}, r"energy\.country: 'US-XX' is not in the table; did you mean 'US-"),
        ({"hourly": "none.csv"}, r"energy\.hourly: none\.csv: cannot be read"),
        ({"idle_seconds": -1}, r"energy\.idle_seconds"),
        ({"idle_seconds": 5, "counts": "process"}, r'energy\.idle_seconds: has no effect with counts = "process"'),
        ({"basis": "market"}, r"energy\.basis: \"market\" needs intensity"),
        ({"price": "0.1"}, r"energy\.price: '0\.1' is no price of energy"),
        ({"price": "cheap EUR/kWh"}, r"energy\.price: 'cheap EUR/kWh' is not a price"),
        ({"pue": 0.9}, r"energy\.pue"),
        ({"period": 0}, r"energy\.period"),
    ],
)
def test_wrong_settings_are_told(energy: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        recipes.decode(toy.table(tmp_path, tmp_path, energy=energy))


# --- by the hour ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(PHASES[:-1]), st.floats(0, 5000)), max_size=20),
    st.integers(0, 10**9),
    st.lists(st.floats(0, 900), min_size=HOURS, max_size=HOURS),
)
def test_hours_sum_to_the_total_and_carbon_is_their_sum(
    steps: list[tuple[str, float]], begin: int, grams: list[float]
) -> None:
    clock = Clock()
    meter = Meter([steady(clock)], clock=clock, wall=lambda: begin + clock.now)
    for phase, seconds in steps:
        with meter.phase(phase):
            clock.now += seconds
    account = meter.account()
    whole = total(account)[1]
    assert sum(account[BY_HOUR]) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    right = [10 * seconds for seconds in seconds_by_hour(begin, begin + clock.now)]
    assert account[BY_HOUR] == pytest.approx(right, rel=1e-6, abs=1e-3)
    day = tuple(Range.exact(g) for g in grams)
    profile = Profile(grams=day, source="x", year=2024, basis="location", place="here", file="x.csv")
    if whole > 0:
        slow = sum(joules * g for joules, g in zip(account[BY_HOUR], grams, strict=True)) / sum(account[BY_HOUR])
        assert profile.intensity(account[BY_HOUR]).grams.central == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_energy_counts_with_the_carbon_of_its_hour(tmp_path: Path) -> None:
    day = [100.0] * HOURS
    day[13] = 700.0
    settings = Metering(hourly=toy.day_file(tmp_path, day), country="Elsewhere", pue=2.0)
    account = account_of(3.6e6) | {BY_HOUR: [0.0] * HOURS}
    account[BY_HOUR][12], account[BY_HOUR][13] = 2.7e6, 0.9e6
    facts = told(account, settings, Meter([]), tokens=1, flops=1.0)
    assert facts is not None
    assert facts["kg_co2e"]["central"] == pytest.approx(2 * (0.75 * 0.1 + 0.25 * 0.7))
    assert bill_of(account, settings).kg_co2e == facts["kg_co2e"]["central"]
    assert facts["hourly"]["kwh"][12:14] == [0.75, 0.25]
    assert facts["hourly"]["g_per_kwh"][13]["central"] == 700.0
    assert (facts["place"], facts["year"], facts["scope"]) == ("Elsewhere", 2024, None)
    assert "250 g/kWh location-based, by the hour" in in_words(facts)


def test_energy_from_before_hours_were_counted_has_the_mean_of_the_day(tmp_path: Path) -> None:
    settings = Metering(hourly=toy.day_file(tmp_path, [100.0] * 12 + [300.0] * 12))
    facts = told(account_of(3.6e6), settings, Meter([]), tokens=1, flops=1.0)
    assert facts is not None
    assert facts["g_per_kwh"] == {"low": 100.0, "central": pytest.approx(200.0), "high": 300.0}
    assert facts["hourly"]["kwh_of_no_known_hour"] == 1.0


def test_hours_go_on_after_a_kill() -> None:
    clock = Clock()
    saved = {"train": [1.0, 2.0, 3.0, 0.0, 4.0], BY_HOUR: [2.0, *[0.0] * 23]}
    known = {"train": [2.0, 4.0, 6.0, 0.0, 8.0], BY_HOUR: [3.0, 1.0, *[0.0] * 22]}
    meter = Meter([steady(clock)], clock=clock, wall=lambda: 3600.0 + clock.now)
    meter.go_on(saved, known, thrown=True)
    clock.now += 1.0
    meter.read(soon=True)
    account = meter.account()
    assert account[BY_HOUR][:2] == [3.0, 11.0], "lost work emitted as well"
    assert sum(account[BY_HOUR]) == total(account)[1]


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ({"basis": "market"}, r"energy\.hourly: .*grid\.csv: is 'location'-based, energy\.basis is 'market'"),
        ({"intensity_year": 2020}, r"energy\.hourly: .*mixes the years 2020, 2024"),
        ({"intensity": "5 g/kWh"}, r"energy\.intensity: has no effect beside hourly"),
    ],
)
def test_settings_that_a_file_contradicts_are_told(energy: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = Path(toy.day_file(tmp_path, [1.0] * HOURS))
    path.write_text("# basis: location\n" + path.read_text())
    with pytest.raises(RecipeError, match=words):
        recipes.decode(toy.table(tmp_path, tmp_path, energy={"hourly": str(path), **energy}))


# --- above idle power, and making the machine -------------------------------------------------------------------------


def test_what_a_run_takes_above_idle_power() -> None:
    clock = Clock()
    busy = Modelled("busy", lambda seconds: Range(20, 40, 80).times(seconds * (clock.now > 10.5)), clock=clock)
    meter = Meter([steady(clock), busy], clock=clock)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    meter.rest(10.0, sleep)
    assert meter.resting == Range(5, 10, 20)
    assert total(meter.account()) == [0.0] * len(FIELDS), "waiting is not the run's"
    with meter.phase("train"):
        clock.now += 3600.0
    facts = told(meter.account(), Metering(), meter, tokens=1, flops=1.0)
    assert facts is not None
    assert facts["kwh"]["central"] == pytest.approx(0.05)
    assert facts["above_idle"]["kwh"] == pytest.approx({"low": 0.02, "central": 0.04, "high": 0.08})
    assert facts["above_idle"]["idle_watts"] == pytest.approx({"low": 5, "central": 10, "high": 20})
    assert not facts["above_idle"]["busier_before"]
    assert "0.04 (0.02 to 0.08) kWh of it above idle power" in in_words(facts)


def test_without_idle_power_of_each_attempt_nothing_is_told_of_it() -> None:
    account = account_of(3.6e6) | {RESTING: [1.0, 2.0, 3.0, 0.0, 5.0]}
    facts = told(account, Metering(), Meter([]), tokens=1, flops=1.0)
    assert facts is not None
    assert facts["above_idle"] is None, "5 of 10 seconds"
    busier = told(account | {RESTING: [1.0, 9e9, 9e9, 0.0, 10.0]}, Metering(), Meter([]), tokens=1, flops=1.0)
    assert busier is not None
    assert busier["above_idle"]["busier_before"]
    assert "(THE MACHINES WERE BUSIER BEFORE)" in in_words(busier)
    assert busier["above_idle"]["kwh"]["central"] == 0.0


def test_making_the_machine_is_told_apart() -> None:
    clock = Clock()
    pieces = host(gibibytes=100.0)
    meter = Meter(
        [steady(clock)], clock=clock, hardware=Hardware(own=[pieces[0]], shared=pieces[1:], share=lambda s: 0.5)
    )
    clock.now += 3600.0
    meter.read(soon=True)
    facts = told(meter.account(), Metering(), meter, tokens=1, flops=1.0)
    assert facts is not None
    kg = (1.47 * 1.0 + 0.5 * (100 * 0.4 + 111.6 * 1.2)) / (5 * 365 * 24)
    assert facts["embodied"]["kg_co2e"]["central"] == pytest.approx(kg)
    assert facts["embodied"]["seconds"] == 3600.0
    assert [piece["part"] for piece in facts["embodied"]["parts"]] == ["processors", "memory", "rest of the board"]
    assert facts["kg_co2e"]["central"] == pytest.approx(0.01 * 0.481), "never in the sum"
    assert "apart from that" in in_words(facts)
    earlier = Meter([steady(Clock())], hardware=Hardware(own=pieces))
    earlier.go_on(account_of(3.6e6) | {MADE: [1.0, 2.0, 3.0, 0.0, 4.0]}, None, thrown=False)
    found = told(earlier.account(), Metering(), earlier, tokens=1, flops=1.0)
    assert found is not None
    assert found["embodied"]["kg_co2e"]["central"] == pytest.approx(2.0)
    assert found["embodied"]["notes"] == ["6 s of attempts before it was counted are not in it"]


def test_a_process_pays_for_its_share_of_a_machine() -> None:
    whole, part = (hardware_of(torch.device("cpu"), counts) for counts in ("machine", "process"))
    assert (len(whole.own), len(whole.shared)) == (3, 0)
    assert (len(part.own), len(part.shared)) == (0, 3)
    assert part.made(1e-3).central <= whole.made(1e-3).central
