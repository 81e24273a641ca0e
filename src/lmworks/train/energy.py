"""What a run takes: joules by phase and by hour of the day, and what making its machines cost, read while it goes.

The meter reads its sensors once a period from a thread of its own, and where a phase ends, unless a reading was just
made: none comes sooner after another than a thousand times what a reading takes, so it costs 0.1 % at most. Readings
that take more than that of two and a half periods, 2.5 ms of a second's, still come that often: a longer pause would be
taken for sleep.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from lmworks.core.energy.footprint import Range
from lmworks.core.energy.hours import HOURS, seconds_by_hour
from lmworks.core.energy.power import GAP
from lmworks.train.hardware import Hardware, hardware_of
from lmworks.train.metering import Metering
from lmworks.train.sensors import Clock, Sensor, sensors

PHASES = ("prepare", "train", "validate", "sample", "checkpoint", "idle", "lost")
"""Documents and model made ready; steps; held-out documents read; texts written; saves; all between; and steps that a
kill or a failure threw away, which were trained again."""
AGAIN = ("train", "validate", "sample", "idle")
"""Phases that are gone through again after steps were thrown away."""
FIELDS = ("low", "central", "high", "measured", "seconds")
"""Of each phase: joules as a range, the part of `central` that was measured, seconds of the machines."""
RESTING, MADE, BY_HOUR = "resting", "made", "by_hour"
"""Beside the phases. What the machines would have taken idle, in FIELDS; what making them cost, in FIELDS with kg of
CO2e in the place of joules; the central joules of all phases by the hour of the day in UTC."""
WIDTHS = {**dict.fromkeys((*PHASES, RESTING, MADE), len(FIELDS)), BY_HOUR: HOURS}
COST = 1e-3
"""Share of the time that readings may take."""

Account = dict[str, list[float]]
"""Numbers by the names of WIDTHS. One from before a name was counted does not have it."""


class Sums(Protocol):
    """Sums a vector over all ranks; what `Wire.sum` does on 'world'."""

    def sum(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """The sum over the axis, in place."""
        ...


class Meter:
    """Joules by phase of one machine, or of one process. With no sensors it only says so."""

    def __init__(
        self,
        found: Sequence[Sensor],
        notes: Sequence[str] = (),
        *,
        hardware: Hardware | None = None,
        period: float = 1.0,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
    ) -> None:
        """`clock` tells how long something took, `wall` (seconds since the epoch) in which hour of the day it was."""
        self.sensors, self.notes = list(found), list(notes)
        """Sensors that work; sentences about those that do not."""
        self.names = [f"{each.name} ({'measured' if each.measured else 'modelled'})" for each in found]
        self.own = _nothing()
        """What this meter read, and on the first rank what was spent before this attempt."""
        self.hardware = hardware
        """What the run uses of its machine; None where nobody looked."""
        self.resting: Range | None = None
        """Watts of the machine before the run; None where they were not read."""
        self._period, self._clock, self._wall = period, clock, wall
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._reads = bool(self.sensors)
        self._phase, self._since = "prepare", clock()
        self._waiting = dict.fromkeys(PHASES, 0.0)
        self._last = -float("inf")
        self._costs: deque[float] = deque(maxlen=5)
        self.read(soon=True)
        self._start()

    def _start(self) -> None:
        """Forget what was read so far."""
        self._waiting = dict.fromkeys(PHASES, 0.0)
        self.own = _nothing()

    # --- reading ----------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Read once a period until the block ends."""
        if self.sensors:
            self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            if self._thread is not None:
                self._thread.join(timeout=5 * self._period)

    def rest(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait so long, and take what the machine takes meanwhile as its idle power; none of it is the run's."""
        self.read(soon=True)
        self._start()
        left = seconds
        while left > 0:
            sleep(min(left, self._period))
            left -= self._period
            self.read(soon=True)
        low, central, high, _, passed = total(self.own)
        watts = Range(min(low, central), central, max(central, high))  # sums are rounded
        self.resting = watts.times(1 / passed) if passed > 0 and self._reads else None
        self._start()

    def _sample(self) -> None:
        while not self._stop.wait(self._period):
            self.read()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book what is spent in the block under a phase."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> None:
        """Book what is spent from now on under a phase."""
        assert name in PHASES, name
        with self._lock:
            self._tick()
            self.read()
            self._phase = name

    def _tick(self) -> None:
        """Give the time since the last tick to the phase that it was."""
        now = self._clock()
        self._waiting[self._phase] += now - self._since
        self._since = now

    def read(self, *, soon: bool = False) -> None:
        """Ask all sensors, and share what they say among the phases by their time since the reading before.

        Does nothing when that was a moment ago, unless `soon`. A sensor that fails is left out from then on.
        """
        with self._lock:
            begun = self._clock()
            if not soon and begun - self._last < self._pause():
                return
            self._tick()
            spent = [0.0] * 4
            for sensor in list(self.sensors):
                self._ask(sensor, spent)
            self._book(spent)
            self._last = self._clock()
            self._costs.append(self._last - begun)

    def _pause(self) -> float:
        """Seconds that must lie between two readings. The least of the last costs: the others were interrupted."""
        return min(min(self._costs, default=0.0) / COST, self._period * GAP / 2)

    def _ask(self, sensor: Sensor, spent: list[float]) -> None:
        try:
            joules = sensor.joules()
        except Exception as error:  # noqa: BLE001  (whatever a driver does, training goes on)
            self.sensors.remove(sensor)
            self.resting = None  # it has this sensor's share in it
            self.notes.append(f"{sensor.name} is not counted any more: {type(error).__name__}: {error}")
            return
        measured = joules.central if sensor.measured else 0.0
        for i, value in enumerate((joules.low, joules.central, joules.high, measured)):
            spent[i] += value

    def _book(self, spent: Sequence[float]) -> None:
        if not self._reads:
            return
        whole = sum(self._waiting.values())
        for phase, seconds in self._waiting.items():
            share = seconds / whole if whole > 0 else float(phase == self._phase)
            self._add(phase, (*(share * x for x in spent), seconds))
        self._waiting = dict.fromkeys(PHASES, 0.0)
        now = self._wall()
        # a moment shorter than the clock's resolution lies in one hour
        in_hours = seconds_by_hour(now - whole, now) if now - whole < now else seconds_by_hour(now, now + 1.0)
        self._add(BY_HOUR, [spent[1] * seconds / sum(in_hours) for seconds in in_hours])
        if self.resting is not None:
            idle = self.resting.times(whole)
            self._add(RESTING, (idle.low, idle.central, idle.high, 0.0, whole))
        if self.hardware is not None:
            self._book_making(self.hardware, whole)

    def _book_making(self, hardware: Hardware, seconds: float) -> None:
        try:
            made = hardware.made(seconds)
        except Exception as error:  # noqa: BLE001  (as with sensors)
            self.hardware = None
            self.notes.append(f"making the machine is not counted any more: {type(error).__name__}: {error}")
            return
        self._add(MADE, (made.low, made.central, made.high, 0.0, seconds))

    # --- over machines and attempts ---------------------------------------------------------------------------------

    def account(self, wire: Sums | None = None, device: torch.device | None = None) -> Account:
        """Joules and seconds so far, with `wire` of all machines together; all ranks then ask together, with a tensor
        on their `device`."""
        with self._lock:
            flat = [x for name in WIDTHS for x in self.own[name]]
        if wire is not None:
            flat = wire.sum(torch.tensor(flat, dtype=torch.float64, device=device), "world").tolist()
        numbers = iter(flat)
        return {name: [next(numbers) for _ in range(width)] for name, width in WIDTHS.items()}

    def go_on(
        self, saved: Mapping[str, Sequence[float]], known: Mapping[str, Sequence[float]] | None, *, thrown: bool
    ) -> float:
        """Add what earlier attempts spent, on one rank of all: what the checkpoint knows (`saved`), and what was spent
        beyond it, as far as the run's events tell (`known`). `thrown`: steps beyond the checkpoint are made again, and
        what they took is lost. Gives the joules of all lost work."""
        with self._lock:
            for name, width in WIDTHS.items():
                there = list(saved.get(name, [0.0] * width))
                later = list((known or saved).get(name, there))
                beyond = [max(0.0, b - a) for a, b in zip(there, later, strict=True)]
                self._add(name, there)
                self._add("lost" if thrown and name in AGAIN else name, beyond)
            return self.own["lost"][1]

    def _add(self, name: str, values: Sequence[float]) -> None:
        self.own[name] = [a + b for a, b in zip(self.own[name], values, strict=True)]

    def lost(self) -> dict[str, float]:
        """What sensors could not count, summed by kind."""
        found: dict[str, float] = {}
        for sensor in self.sensors:
            for name, value in sensor.lost().items():
                found[name] = found.get(name, 0.0) + value
        return found


def _nothing() -> Account:
    return {name: [0.0] * width for name, width in WIDTHS.items()}


def total(account: Mapping[str, Sequence[float]]) -> list[float]:
    """FIELDS of all phases together."""
    return [sum(account[phase][i] for phase in PHASES if phase in account) for i in range(len(FIELDS))]


def meter_of(settings: Metering, device: torch.device, *, first_here: bool) -> Meter:
    """The meter of this rank: in 'machine' only a machine's first rank reads anything. With `idle_seconds` all ranks
    wait until the machines' idle power is known."""
    if not settings.on:
        return Meter([], period=settings.period)
    if settings.counts == "machine" and not first_here:
        time.sleep(settings.idle_seconds)
        return Meter([], period=settings.period)
    try:
        found, notes = sensors(device, counts=settings.counts, period=settings.period, tdp=settings.processor_watts)
        hardware = hardware_of(device, settings.counts)
    except Exception as error:  # noqa: BLE001  (whatever a machine does not tell, training begins)
        found, notes, hardware = [], [f"nothing is counted: {type(error).__name__}: {error}"], None
    meter = Meter(found, notes, hardware=hardware, period=settings.period)
    if settings.idle_seconds:
        meter.rest(settings.idle_seconds)
    return meter
