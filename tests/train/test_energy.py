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

from lmworks.core.energy.embodied import gpu
from lmworks.core.energy.footprint import Range
from lmworks.core.energy.hours import HOURS
from lmworks.core.journal import rows
from lmworks.model.checkpoint import complete
from lmworks.parallel.gang import run as on_ranks
from lmworks.parallel.layout import Layout
from lmworks.parallel.wire import Wire
from lmworks.parallel.world import Seat, wire
from lmworks.train.energy import BY_HOUR, COST, FIELDS, MADE, PHASES, RESTING, WIDTHS, Meter, meter_of, total
from lmworks.train.hardware import Hardware
from lmworks.train.loop import run
from lmworks.train.metering import Metering
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


def test_what_fails_beside_the_sensors_is_left_out_and_named() -> None:
    clock = Clock()

    def gone(seconds: float) -> float:
        raise OSError("no /proc any more")

    parts = [gpu("Tesla T4")]
    meter = Meter([Broken(), steady(clock)], clock=clock, hardware=Hardware(own=[], shared=parts, share=gone))
    assert meter.notes == ["making the machine is not counted any more: OSError: no /proc any more"]
    meter.resting = Range(1, 2, 3)
    for _ in range(5):
        clock.now += 1.0
        meter.read(soon=True)
    account = meter.account()
    assert account[MADE] == [0.0] * len(FIELDS)
    assert account[RESTING][4] < total(account)[4], "idle power that had a broken sensor in it is nobody's"


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


def _one_of_four(rank: int) -> tuple[list[float], list[float], list[float], float]:
    """A rank of four on two machines of two GPUs each; the first of a machine reads both."""
    host, local = divmod(rank, 2)
    shared = wire(Layout(dp_shard=4), Seat(rank=rank, world=4, local_rank=local))
    assert shared.first_here == (local == 0)
    clock, library = Clock(), Nvml()
    boards = [NvmlEnergy(library, handle, handle) for handle in ("a", "b")] if shared.first_here else []
    hardware = Hardware(own=[gpu("Tesla T4"), gpu("Tesla T4")]) if shared.first_here else None
    meter = Meter(boards, clock=clock, wall=lambda: 3600.0 * 7 + clock.now, hardware=hardware)
    for phase in ("train", "validate", "train"):
        with meter.phase(phase):
            clock.now += 1.0
            library.mj["a"] += 1000 * (1 + host)
            library.mj["b"] += 500
    meter.read(soon=True)
    account = meter.account(shared)
    return total(account), [account[phase][1] for phase in PHASES], account[BY_HOUR], account[MADE][1]


@pytest.mark.ranks
def test_four_ranks_on_two_machines_are_counted_once() -> None:
    found = on_ranks(_one_of_four, 4)
    for whole, phases, by_hour, made in found:
        assert whole[1] == pytest.approx(3 * (1.0 + 0.5) + 3 * (2.0 + 0.5), rel=1e-9)
        assert whole[3] == whole[1], "all of it measured"
        assert whole[4] == pytest.approx(6.0), "seconds of two machines, not of four ranks"
        assert sum(phases) == pytest.approx(whole[1], rel=1e-6)
        assert by_hour[7] == pytest.approx(whole[1], rel=1e-6), "hours of all machines"
        assert made == pytest.approx(4 * 5.45 * 1.2 * 3.0 / (5 * 365 * 86400)), "four boards for three seconds"
    assert found[0] == found[3], "the same on all ranks"


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


def test_a_run_by_the_hour_and_above_idle(text: Path, cache: Path, tmp_path: Path) -> None:
    energy = {"processor_watts": 50.0, "hourly": toy.day_file(tmp_path, [250.0] * HOURS), "idle_seconds": 0.05}
    made = toy.recipe(text, cache, energy=energy)
    toy.stopped(made, tmp_path / "run", 6, signal.SIGTERM)
    folder, _ = toy.train(made, tmp_path / "run")
    found = json.loads(folder.record.read_text())["energy"]
    assert sum(found["hourly"]["kwh"]) == pytest.approx(found["kwh"]["central"], rel=1e-9)
    assert found["hourly"]["kwh_of_no_known_hour"] == 0.0
    assert found["kg_co2e"]["central"] == pytest.approx(0.25 * found["kwh"]["central"])
    assert found["above_idle"]["kwh"]["central"] < found["kwh"]["central"]
    assert found["above_idle"]["idle_watts"]["central"] > 0
    kg = found["embodied"]["machine_kg_co2e"]["central"] * found["seconds"] / (5 * 365 * 86400)
    assert found["embodied"]["kg_co2e"]["central"] == pytest.approx(kg, rel=1e-6)


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
    assert set(last["attrs"]["account"]) == set(WIDTHS)


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
