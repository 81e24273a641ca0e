"""The meter: phases that add up, machines that are counted once, failures that stop nothing, work that was lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.energy.footprint import Range
from lmworks.core.energy.grid import in_words
from lmworks.core.errors import RecipeError
from lmworks.core.journal import rows
from lmworks.model.checkpoint import complete
from lmworks.parallel.gang import run as on_ranks
from lmworks.parallel.layout import Layout
from lmworks.parallel.wire import Wire
from lmworks.parallel.world import Seat, wire
from lmworks.train.energy import COST, FIELDS, PHASES, Meter, Metering, bill_of, meter_of, told, total
from lmworks.train.loop import run
from lmworks.train.sensors import Modelled, NvmlEnergy, constant
from tests.train import toy
from tests.train.test_sensors import Clock, Nvml


def joules(account: dict[str, list[float]], phase: str) -> float:
    return account[phase][1]


def steady(clock: Clock, watts: float = 10.0) -> Modelled:
    return Modelled("steady", constant(Range(watts / 2, watts, watts * 2)), period=1e9, clock=clock)


@given(st.lists(st.tuples(st.sampled_from(PHASES[:-1]), st.floats(0, 100)), max_size=30))
def test_phases_sum_to_the_total(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    meter = Meter([steady(clock)], clock=clock)
    spent = dict.fromkeys(PHASES, 0.0)
    for phase, seconds in steps:
        with meter.phase(phase):
            clock.now += seconds
        spent[phase] += seconds
    account = meter.account()
    for phase, seconds in spent.items():
        assert joules(account, phase) == pytest.approx(10 * seconds, rel=1e-9, abs=1e-9)
    low, central, high, measured, whole = total(account)
    assert central == pytest.approx(10 * clock.now, rel=1e-9)
    assert (low, high, measured) == pytest.approx((central / 2, central * 2, 0.0), rel=1e-9)
    assert whole == pytest.approx(clock.now, rel=1e-9)


class Slow:
    """A sensor whose reading takes 10 ms of a test's clock."""

    name, measured = "slow", True

    def __init__(self, clock: Clock) -> None:
        self.clock, self.asked = clock, 0

    def joules(self) -> Range:
        self.asked += 1
        self.clock.now += 0.01
        return Range.exact(1.0)

    def lost(self) -> dict[str, float]:
        return {}


def test_readings_take_a_thousandth_of_the_time_at_most() -> None:
    clock = Clock()
    sensor = Slow(clock)
    meter = Meter([sensor], clock=clock, period=10.0)
    for _ in range(2000):
        with meter.phase("train"):
            clock.now += 0.1
    assert sensor.asked > 10
    assert 0.01 * sensor.asked <= 1.1 * COST * clock.now + 0.01


def test_slow_readings_come_often_enough_not_to_be_taken_for_sleep() -> None:
    clock = Clock()
    slow, even = Slow(clock), Modelled("even", constant(Range.exact(10.0)), period=1.0, clock=clock)
    meter = Meter([slow, even], clock=clock, period=1.0)
    for _ in range(100):
        clock.now += 1.0
        meter.read()
    assert meter.lost() == {}
    assert total(meter.account())[1] == pytest.approx(10 * clock.now + slow.asked, rel=0.05)


class Broken:
    """A sensor whose driver goes away."""

    name, measured = "broken", True

    def __init__(self) -> None:
        self.left = 2

    def joules(self) -> Range:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the driver went away")
        return Range.exact(1.0)

    def lost(self) -> dict[str, float]:
        return {}


def test_a_sensor_that_fails_is_left_out_and_named() -> None:
    clock = Clock()
    meter = Meter([Broken(), steady(clock)], clock=clock)
    for _ in range(5):
        clock.now += 1.0
        meter.read(soon=True)
    assert [sensor.name for sensor in meter.sensors] == ["steady"]
    assert meter.notes == ["broken is not counted any more: RuntimeError: the driver went away"]
    assert total(meter.account())[1] == pytest.approx(50.0 + 1.0)


def test_what_was_thrown_away_is_lost_and_what_was_not_stays() -> None:
    clock = Clock()
    saved = {phase: [0.0, 10.0, 20.0, 0.0, 1.0] for phase in PHASES}
    known = {phase: [0.0, 13.0, 26.0, 0.0, 2.0] for phase in PHASES}
    meter = Meter([steady(clock)], clock=clock)
    assert meter.go_on(saved, known, thrown=True) == pytest.approx(10 + 3 + 4 * 3)
    account = meter.account()
    assert [joules(account, phase) for phase in ("train", "checkpoint", "prepare")] == [10.0, 13.0, 13.0]
    assert total(account)[1] == pytest.approx(13.0 * len(PHASES)), "nothing is lost twice, or not at all"
    kept = Meter([steady(clock)], clock=clock)
    assert kept.go_on(saved, known, thrown=False) == pytest.approx(13.0)
    assert joules(kept.account(), "train") == 13.0
    fresh = Meter([steady(clock)], clock=clock)
    assert fresh.go_on({}, None, thrown=False) == 0.0
    assert total(fresh.account()) == [0.0] * len(FIELDS)


def test_the_thread_reads_and_ends() -> None:
    meter = Meter([steady(Clock())], period=0.005)
    with meter.running():
        assert meter._thread is not None
        assert meter._thread.is_alive()
    assert not meter._thread.is_alive()


# --- several machines -------------------------------------------------------------------------------------------------


def _one_of_four(rank: int) -> tuple[list[float], list[float]]:
    """A rank of four on two machines of two GPUs each; the first of a machine reads both."""
    host, local = divmod(rank, 2)
    shared = wire(Layout(dp_shard=4), Seat(rank=rank, world=4, local_rank=local))
    assert shared.first_here == (local == 0)
    clock, library = Clock(), Nvml()
    boards = [NvmlEnergy(library, handle, handle) for handle in ("a", "b")] if shared.first_here else []
    meter = Meter(boards, clock=clock)
    for phase in ("train", "validate", "train"):
        with meter.phase(phase):
            clock.now += 1.0
            library.mj["a"] += 1000 * (1 + host)
            library.mj["b"] += 500
    meter.read(soon=True)
    account = meter.account(shared)
    return total(account), [values[1] for values in account.values()]


@pytest.mark.ranks
def test_four_ranks_on_two_machines_are_counted_once() -> None:
    found = on_ranks(_one_of_four, 4)
    for whole, phases in found:
        assert whole[1] == pytest.approx(3 * (1.0 + 0.5) + 3 * (2.0 + 0.5), rel=1e-9)
        assert whole[3] == whole[1], "all of it measured"
        assert whole[4] == pytest.approx(6.0), "seconds of two machines, not of four ranks"
        assert sum(phases) == pytest.approx(whole[1], rel=1e-6)
    assert found[0] == found[3], "the same on all ranks"


# --- what it comes to -------------------------------------------------------------------------------------------------


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


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_energy_everywhere(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(
        text, cache, energy={"country": "SWE", "price": "US-TX", "processor_watts": 50.0}, samples={"prompts": ["li"]}
    )
    folder, report = toy.train(made, tmp_path / "run")
    summary = json.loads(folder.summary.read_text())["energy"]
    assert summary["place"] == "Sweden"
    assert summary == json.loads(folder.record.read_text())["energy"]
    assert "50 W as given" in " ".join(summary["sensors"])
    assert sum(summary["phases_kwh"].values()) == pytest.approx(summary["kwh"]["central"], rel=1e-6)
    assert {"prepare", "train", "validate", "sample", "checkpoint"} <= set(summary["phases_kwh"])
    steps = [row for row in rows(folder.metrics) if "loss" in row]
    assert 0 < steps[0]["kwh"] <= steps[-1]["kwh"] <= summary["kwh"]["central"]
    kg = steps[-1]["kwh"] * 40.695 / 1e3
    assert steps[-1]["kg_co2e"] == pytest.approx(kg, rel=1e-3)
    assert [note for note in report.notes if note.startswith("energy: ") and "Sweden 2023" in note]


def test_switched_off_nothing_is_counted(text: Path, cache: Path, tmp_path: Path) -> None:
    folder, report = toy.train(toy.recipe(text, cache, energy={"on": False}, steps=2), tmp_path / "run")
    assert json.loads(folder.summary.read_text())["energy"] is None
    assert "energy" not in json.loads(folder.record.read_text())
    assert not {"kwh", "joules", "joules_modelled"} & {key for row in rows(folder.metrics) for key in row}
    assert not [note for note in report.notes if note.startswith("energy")]


def test_going_back_books_what_was_thrown_away(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, checkpoints={"every": 4, "keep": 9}, energy={"processor_watts": 50.0})
    whole, _ = toy.train(made, tmp_path / "run")
    before = json.loads(whole.record.read_text())["energy"]["kwh"]["central"]
    folder, report = toy.train(made, whole.path, resume=str(complete(whole.checkpoints)[0]))
    after = json.loads(folder.summary.read_text())["energy"]
    assert after["phases_kwh"]["lost"] > 0
    assert after["kwh"]["central"] > before
    assert "went into steps that are made again" in " ".join(report.notes)
    last = [event for event in rows(folder.events) if event["name"] == "energy"][-1]
    assert set(last["attrs"]["account"]) == set(PHASES)


def test_a_run_that_is_stopped_and_goes_on_loses_nothing(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, energy={"processor_watts": 50.0})
    toy.stopped(made, tmp_path / "run", 6, signal.SIGTERM)
    before = json.loads((tmp_path / "run" / "record.json").read_text())["energy"]["kwh"]["central"]
    folder, _ = toy.train(made, tmp_path / "run")
    after = json.loads(folder.summary.read_text())["energy"]
    assert after["kwh"]["central"] > before > 0
    assert after["phases_kwh"].get("lost", 0.0) == 0.0


def test_a_checkpoint_from_before_energy_was_counted_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, energy={"on": False}, steps=4)
    whole, _ = toy.train(made, tmp_path / "a")
    last = complete(whole.checkpoints)[-1]
    on = toy.recipe(text, cache, steps=6)
    folder = run(on, tmp_path / "b", resume=str(last), report=toy.Silent())
    assert json.loads(folder.summary.read_text())["energy"]["kwh"]["central"] > 0


def test_a_meter_that_breaks_stops_no_run(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: Any, **more: Any) -> tuple[Sequence[Any], list[str]]:
        return [Broken()], []

    monkeypatch.setattr("lmworks.train.energy.sensors", broken)
    folder, _ = toy.train(toy.recipe(text, cache), tmp_path / "run")
    assert folder.is_done()


def test_a_machine_that_tells_nothing_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*words: Any, **more: Any) -> None:
        raise RuntimeError("no /proc")

    monkeypatch.setattr("lmworks.train.energy.sensors", broken)
    meter = meter_of(Metering(), torch.device("cpu"), first_here=True)
    assert meter.notes == ["nothing is counted: RuntimeError: no /proc"]
    assert meter_of(Metering(), torch.device("cpu"), first_here=False).notes == [], "another rank of the machine"


def test_counting_that_is_switched_off_for_a_while_keeps_what_was_counted(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    made = toy.recipe(text, cache)
    toy.stopped(made, tmp_path / "run", 5, signal.SIGTERM)
    toy.stopped(toy.recipe(text, cache, energy={"on": False}), tmp_path / "run", 8, signal.SIGTERM)
    before = json.loads((tmp_path / "run" / "record.json").read_text())
    folder, _ = toy.train(made, tmp_path / "run")
    assert "energy" not in before, "this attempt counted nothing"
    assert json.loads(folder.summary.read_text())["energy"]["phases_kwh"]["train"] > 0


def test_one_rank_needs_no_wire() -> None:
    alone = Wire(Layout(dp_shard=1), 0, {})
    meter = Meter([steady(Clock())])
    assert meter.account(alone) == meter.account()
    assert torch.tensor(total(meter.account())).sum() == 0
