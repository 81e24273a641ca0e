"""Sensors of energy: counters as Linux and NVML show them, and the models that stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core.energy.devices import cpu_tdp, gpu_watts, named, this_cpu
from lmworks.core.energy.footprint import Range
from lmworks.train.sensors import (
    Modelled,
    NvmlEnergy,
    NvmlPower,
    Rapl,
    by_load,
    by_share,
    constant,
    gpu_sensor,
    machine_busy,
    process_busy,
    sensors,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Nvml:
    """As much of nvidia-ml-py as is asked for: boards with a counter in mJ, or with power in mW only."""

    def __init__(self, *, counter: bool = True) -> None:
        self.counter, self.mj, self.mw = counter, {"a": 5_000_000, "b": 0}, {"a": 100_000, "b": 300_000}

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802  (NVIDIA's name)
        if not self.counter:
            raise RuntimeError("Not Supported")
        return self.mj[handle]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self.mw[handle]


def zone(folder: Path, name: str, value: int) -> Path:
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "energy_uj").write_text(f"{value}\n")
    (place / "max_energy_range_uj").write_text("999999\n")
    return place


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 100)
    rapl = Rapl(tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 500_100)
    found = rapl.joules()
    assert found.central == pytest.approx(1.0)
    assert found.low < 1.0 < found.high
    assert rapl.joules().central == 0.0


def test_a_package_counter_that_starts_again_is_counted_on(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    rapl = Rapl(tmp_path)
    zone(tmp_path, "intel-rapl:0", 100_000)
    assert rapl.joules().central == pytest.approx(0.2)


def test_without_a_counter_there_is_no_such_sensor(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no counters"):
        Rapl(tmp_path)


def test_a_board_with_a_counter_and_a_driver_that_is_loaded_again() -> None:
    library = Nvml()
    sensor = gpu_sensor(library, "a", "GPU 0", period=1.0)
    assert isinstance(sensor, NvmlEnergy)
    library.mj["a"] += 7_000
    assert sensor.joules().central == pytest.approx(7.0)
    library.mj["a"] = 3
    assert sensor.joules().central == 0.0
    assert sensor.lost() == {"resets": 1}
    library.mj["a"] = 2_003
    assert sensor.joules().central == pytest.approx(2.0)


def test_a_board_without_a_counter_is_sampled() -> None:
    library, clock = Nvml(counter=False), Clock()
    assert isinstance(gpu_sensor(library, "b", "GPU 1", period=1.0), NvmlPower)
    sensor = NvmlPower(library, "b", "GPU 1", period=1.0, clock=clock)
    clock.now, library.mw["b"] = 2.0, 100_000
    assert sensor.joules().central == pytest.approx(400.0)
    clock.now = 8.0
    assert sensor.joules().central == 0.0, "it slept"
    assert sensor.lost() == {"gap_seconds": 6.0}


def test_the_load_model_over_a_quiet_and_a_busy_second() -> None:
    clock, times = Clock(), [0.0, 0.0]
    watts = by_load(Range.exact(200.0), lambda: (times[0], times[1]))
    sensor = Modelled("processors", watts, clock=clock)
    assert sensor.joules().central == 0.0
    clock.now, times[1] = 1.0, 2.0
    assert sensor.joules().central == pytest.approx(20.0), "a tenth of the design power without load"
    clock.now, times[:] = 2.0, [2.0, 4.0]
    assert sensor.joules().central == pytest.approx(200.0)
    clock.now, times[1] = 60.0, 120.0
    assert sensor.joules().central == pytest.approx(58 * 20.0), "processors say themselves how busy they were"
    assert sensor.lost() == {}


def test_a_process_pays_for_its_share() -> None:
    clock, spent = Clock(), [0.0]
    sensor = Modelled("share", by_share(Range.exact(100.0), lambda: spent[0], 4), clock=clock)
    sensor.joules()
    clock.now, spent[0] = 1.0, 2.0
    assert sensor.joules().central == pytest.approx(50.0)
    assert sensor.joules().central == 0.0


def test_what_this_machine_has_says_how_it_is_known(tmp_path: Path) -> None:
    found, notes = sensors(CPU, counts="machine", period=1.0, tdp=None, zones=tmp_path)
    assert [each.measured for each in found] == [False, False]
    assert "model by load" in found[0].name
    assert "model by modules" in found[1].name
    assert not notes
    (only,), _ = sensors(CPU, counts="process", period=1.0, tdp=65.0, zones=tmp_path)
    assert "65 W as given" in only.name
    zone(tmp_path, "intel-rapl:0", 5)
    found, _ = sensors(CPU, counts="machine", period=1.0, tdp=None, zones=tmp_path)
    assert [each.measured for each in found] == [True, False]


def test_clocks_of_this_machine_only_rise() -> None:
    worked, had = machine_busy()
    spent = process_busy()
    sum(i * i for i in range(200_000))
    assert machine_busy()[0] >= worked >= 0
    assert machine_busy()[1] >= had > 0
    assert process_busy() >= spent > 0


def test_devices_by_the_names_they_give_themselves() -> None:
    assert named("Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", "cpus") == ("Xeon Platinum 8259CL", 210.0)
    assert named("AMD EPYC 7763 64-Core Processor", "cpus") == ("EPYC 7763", 280.0)
    assert named("Weitek 4167", "cpus") is None
    for name, watts in (
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100-PCIE-40GB", 250),
        ("Tesla T4", 70),
        ("NVIDIA L40S", 350),
        ("NVIDIA L4", 72),
    ):
        found = named(name, "gpus")
        assert found is not None
        assert found[1] == watts
    assert gpu_watts("Voodoo 2") is None
    model = gpu_watts("Tesla T4")
    assert model is not None
    assert model[0].high == 70


def test_a_processor_that_is_not_known_has_a_wide_range_and_says_so() -> None:
    watts, text = cpu_tdp("Weitek 4167", sockets=2)
    assert (watts.low, watts.central, watts.high) == (30.0, 170.0, 1000.0)
    assert "not in the table" in text
    small, text = cpu_tdp("AMD EPYC 7763", threads=2)
    assert small.low < 2.0 < small.central == small.high == 280.0
    assert "virtual machine of 2 threads" in text


def test_the_processor_as_linux_tells_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    core = "model name\t: Xeon\nphysical id\t: {}\nflags\t\t: fpu{}\n\n"
    info.write_text(core.format(0, "") + core.format(1, ""))
    assert this_cpu(info) == ("Xeon", 2, None)
    info.write_text(core.format(0, " hypervisor") * 3)
    assert this_cpu(info) == ("Xeon", 1, 3)
    assert this_cpu(tmp_path / "none") == ("", 1, None)


def test_a_sensor_that_is_constant() -> None:
    clock = Clock()
    sensor: Any = Modelled("memory", constant(Range(1, 2, 3)), period=10.0, clock=clock)
    sensor.joules()
    clock.now = 4.0
    assert sensor.joules() == Range(4, 8, 12)
    clock.now = 104.0
    assert sensor.joules() == Range(0, 0, 0), "the machine slept, or who asks did"
    assert sensor.lost() == {"gap_seconds": 100.0}
