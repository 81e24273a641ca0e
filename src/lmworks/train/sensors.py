"""Where a run's joules are read: counters of GPUs (NVML) and processor packages (RAPL), and models where there is none.

A sensor is asked now and then and answers with the joules since it was asked last. It may fail at any time; the meter
then goes on without it.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch

from lmworks.core.energy.devices import cpu_tdp, gpu_watts, this_cpu
from lmworks.core.energy.footprint import NOTHING, Range
from lmworks.core.energy.grid import figures
from lmworks.core.energy.power import GAP, Counter, Integrator, cpu_watts, cpu_watts_of_share, memory_watts

ZONES = Path("/sys/class/powercap")
MOST_WATTS = 2000.0
"""No package or board takes more; a counter that seems to say so was reset."""
Clock = Callable[[], float]


class Sensor(Protocol):
    """One source of joules."""

    name: str
    """What it is of and how it is read, for people."""
    measured: bool
    """False: a model."""

    def joules(self) -> Range:
        """Since it was asked last; nothing the first time. May raise whatever its library raises."""
        ...

    def lost(self) -> dict[str, float]:
        """What could not be counted: 'gap_seconds', 'resets', 'missing', 'clamped'; only what is not 0."""
        ...


def _nonzero(**facts: float) -> dict[str, float]:
    return {name: value for name, value in facts.items() if value}


def _counted(joules: float) -> Range:
    """What a counter said, with how far it may be off."""
    return Range.around(joules, figures("assumed")["counters"]["share"])


# --- measured ---------------------------------------------------------------------------------------------------------


class Rapl:
    """Processor packages by the counters that Linux shows; all processes of the machine together."""

    measured = True

    def __init__(self, folder: Path = ZONES, clock: Clock = time.monotonic) -> None:
        """Raises OSError where there is no counter that this user may read."""
        packages = sorted(folder.glob("*-rapl:[0-9]*"))
        # a package's cores are part of it, and stand beside it with a second number
        self._zones = [zone for zone in packages if zone.name.count(":") == 1]
        if not self._zones:
            raise OSError(f"no counters of energy in {folder}")
        wholes = [int((zone / "max_energy_range_uj").read_text()) + 1 for zone in self._zones]
        self._counters = [Counter(whole=whole) for whole in wholes]
        self._clock, self._at = clock, clock()
        self.name = f"processors: RAPL, {len(self._zones)} packages"
        self._read()

    def joules(self) -> Range:
        """Of all packages."""
        return _counted(self._read() / 1e6)

    def _read(self) -> int:
        now = self._clock()
        most, self._at = MOST_WATTS * 1e6 * max(now - self._at, 1.0), now
        readings = [int((zone / "energy_uj").read_text()) for zone in self._zones]
        return sum(c.since(reading, most) for c, reading in zip(self._counters, readings, strict=True))

    def lost(self) -> dict[str, float]:
        """Resets."""
        return _nonzero(resets=sum(counter.resets for counter in self._counters))


class NvmlEnergy:
    """One GPU by its own counter, in mJ since the driver was loaded; the whole board, whoever else is on it."""

    measured = True

    def __init__(self, library: Any, handle: Any, name: str) -> None:
        self._library, self._handle = library, handle
        self._counter = Counter()
        self.name = f"{name}: NVML counter"
        self.joules()  # raises where the board has none

    def joules(self) -> Range:
        """Of the board."""
        return _counted(self._counter.since(int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))) / 1e3)

    def lost(self) -> dict[str, float]:
        """Resets."""
        return _nonzero(resets=self._counter.resets)


class NvmlPower:
    """One GPU that has no counter: samples of its power."""

    measured = True

    def __init__(self, library: Any, handle: Any, name: str, *, period: float, clock: Clock = time.monotonic) -> None:
        self._library, self._handle, self._clock = library, handle, clock
        self._sum = Integrator(period=period)
        self.name = f"{name}: NVML power, a sample every {period:g} s"
        self.joules()

    def joules(self) -> Range:
        """Of the board."""
        return _counted(self._sum.add(self._clock(), self._library.nvmlDeviceGetPowerUsage(self._handle) / 1e3))

    def lost(self) -> dict[str, float]:
        """Gaps, samples below 0, samples that were none."""
        return _nonzero(gap_seconds=self._sum.gap_seconds, clamped=self._sum.clamped, missing=self._sum.missing)


# --- modelled ---------------------------------------------------------------------------------------------------------


class Modelled:
    """Joules that a model gives for the time since it was asked last."""

    measured = False

    def __init__(
        self,
        name: str,
        spent: Callable[[float], Range],
        *,
        period: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`spent`: joules of the last so many seconds. `period`: where nothing but the clock says that the machine was
        awake, seconds between two questions; gaps of more than five are left out. None: `spent` knows by itself."""
        self.name, self._spent, self._clock = name, spent, clock
        self._most = math.inf if period is None else GAP * period
        self._at: float | None = None
        self._gap = 0.0

    def joules(self) -> Range:
        """Since it was asked last."""
        now = self._clock()
        before, self._at = self._at, now
        seconds = 0.0 if before is None else max(now - before, 0.0)
        spent = self._spent(seconds)
        if seconds > self._most:
            self._gap += seconds
            return NOTHING
        return spent

    def lost(self) -> dict[str, float]:
        """Gaps."""
        return _nonzero(gap_seconds=self._gap)


def constant(watts: Range) -> Callable[[float], Range]:
    """The same power at all times."""
    return watts.times


def by_load(tdp: Range, busy: Callable[[], tuple[float, float]]) -> Callable[[float], Range]:
    """The load model over what `busy` says: seconds that processors worked, and seconds that they had, both rising."""
    last = busy()

    def spent(seconds: float) -> Range:
        nonlocal last
        before, last = last, busy()
        worked, had = last[0] - before[0], last[1] - before[1]
        return cpu_watts(worked / had if had > 0 else 0.0, tdp).times(seconds)

    return spent


def share_of_time(busy: Callable[[], float], cores: int) -> Callable[[float], float]:
    """The share of a machine's processor time, 0 to 1, that a process took of the last so many seconds; `busy`: its
    seconds so far."""
    last = busy()

    def share(seconds: float) -> float:
        nonlocal last
        before, last = last, busy()
        return min(max((last - before) / (seconds * cores), 0.0), 1.0) if seconds > 0 else 0.0

    return share


def by_share(tdp: Range, busy: Callable[[], float], cores: int) -> Callable[[float], Range]:
    """Power by the share of a machine's processor time that a process took; `busy`: its seconds so far."""
    share = share_of_time(busy, cores)
    return lambda seconds: cpu_watts_of_share(share(seconds), tdp).times(seconds)


def machine_busy() -> tuple[float, float]:
    """Seconds that this machine's processors worked and had since it started; those stolen by others are not work."""
    times = psutil.cpu_times()
    had = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # in user's and nice's already
    return had - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "steal", 0.0), had


def process_busy() -> float:
    """Seconds of processor time of this process and of its children that have ended."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


# --- what a machine has -----------------------------------------------------------------------------------------------


def sensors(
    device: torch.device,
    *,
    counts: Literal["machine", "process"],
    period: float,
    tdp: float | None,
    zones: Path = ZONES,
    nvml: Any = None,
) -> tuple[list[Sensor], list[str]]:
    """What can be read of this machine or of this process, the best of each kind; and why something cannot.

    `tdp`: of the machine's processors together, in W, as a person gave it. `nvml`: the library, when it is not to be
    looked for.
    """
    found: list[Sensor] = []
    notes: list[str] = []
    if device.type == "cuda":
        found += _gpus(boards(device, counts), nvml or _nvml(notes), period, notes)
    if counts == "process":
        watts, text = _tdp(tdp)
        model = by_share(watts, process_busy, os.cpu_count() or 1)
        found.append(Modelled(f"processors: share of the time, {text}", model))
        return found, notes
    try:
        found.append(Rapl(zones))
    except (OSError, ValueError):
        watts, text = _tdp(tdp)
        found.append(Modelled(f"processors: model by load, {text}", by_load(watts, machine_busy)))
    gibibytes = psutil.virtual_memory().total / 2**30
    watts = memory_watts(gibibytes, arm=platform.machine().lower().startswith(("arm", "aarch")))
    found.append(Modelled(f"memory: model by modules, {gibibytes:.0f} GiB", constant(watts), period=period))
    return found, notes


def _tdp(given: float | None) -> tuple[Range, str]:
    if given is not None:
        return Range.exact(given), f"{given:g} W as given"
    name, sockets, threads = this_cpu()
    return cpu_tdp(name, sockets=sockets, threads=threads)


def boards(device: torch.device, counts: str) -> list[int]:
    """torch's numbers of the GPUs that this meter answers for: the ranks' of this machine, or this rank's own."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if counts == "process" or local == 1:
        return [device.index or 0]
    return list(range(min(local, torch.cuda.device_count())))


def _nvml(notes: list[str]) -> Any:
    """nvidia-ml-py, ready; None where it is not installed or finds no driver."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception as error:  # noqa: BLE001  (its errors are its own classes; metering never stops a run)
        notes.append(f"GPU counters cannot be read ({error}); pip install 'lmworks[energy]' brings their library")
        return None
    return library


def _gpus(boards: Sequence[int], library: Any, period: float, notes: list[str]) -> list[Sensor]:
    """A sensor for each GPU: its counter, else samples of its power, else a model; None of these is said."""
    found: list[Sensor] = []
    for board in boards:
        name = torch.cuda.get_device_name(board)
        try:
            if library is None:
                raise OSError("no NVML")
            handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(board).uuid}")
            found.append(gpu_sensor(library, handle, f"GPU {board} ({name})", period=period))
        except Exception as error:  # noqa: BLE001  (as above)
            known = gpu_watts(name)
            if known is None:
                notes.append(f"GPU {board} ({name}) is NOT counted: {error}, and its power is not in the table")
            else:
                watts, text = known
                found.append(Modelled(f"GPU {board}: constant, {text}", constant(watts), period=period))
    return found


def gpu_sensor(library: Any, handle: Any, name: str, *, period: float) -> Sensor:
    """The counter of a board, or samples of its power where it has none. Raises what NVML raises without either."""
    try:
        return NvmlEnergy(library, handle, name)
    except Exception:  # noqa: BLE001  (boards before Volta: an error of the library's own)
        return NvmlPower(library, handle, name, period=period)
