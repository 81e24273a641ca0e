"""What a run takes: joules by phase, read while it goes, and what they come to in kWh, CO2 and money.

The meter reads its sensors once a period from a thread of its own, and where a phase ends, unless a reading was just
made: none comes sooner after another than a thousand times what a reading takes, so it costs 0.1 % at most. Readings
that take more than that of two and a half periods, 2.5 ms of a second's, still come that often: a longer pause would be
taken for sleep.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge

from lmworks.core.energy.footprint import Estimate, Range, kwh_of, of_energy
from lmworks.core.energy.grid import (
    Basis,
    Intensity,
    Price,
    country_code,
    intensity_of,
    near_country,
    own_intensity,
    price_of,
    pue_of,
)
from lmworks.core.energy.power import GAP
from lmworks.core.errors import Problem, UsageError
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.train.sensors import Clock, Sensor, sensors

PHASES = ("prepare", "train", "validate", "sample", "checkpoint", "idle", "lost")
"""Documents and model made ready; steps; held-out documents read; texts written; saves; all between; and steps that a
kill or a failure threw away, which were trained again."""
AGAIN = ("train", "validate", "sample", "idle")
"""Phases that are gone through again after steps were thrown away."""
FIELDS = ("low", "central", "high", "measured", "seconds")
"""Of each phase: joules as a range, the part of `central` that was measured, seconds of the machines."""
COST = 1e-3
"""Share of the time that readings may take."""

Account = dict[str, list[float]]
"""Phase -> FIELDS."""


@dataclass(frozen=True, kw_only=True)
class Metering:
    """How energy is counted, and what a kWh costs where the run is."""

    on: bool = True
    """false: nothing is counted."""
    counts: Literal["machine", "process"] = "machine"
    """'machine': all that the run's machines take, other work on them included; one meter a machine. 'process': the
    processor time of the run's own processes, and its own GPUs, for machines that are shared; memory is left out."""
    country: str | None = None
    """Three letters (ISO 3166) or the English name; left out: the world's mean carbon intensity, with a flag."""
    intensity: str | None = None
    """Carbon of a kWh where it is known better, with its unit: "409 g/kWh", "900 lb/MWh"; over `country`."""
    intensity_year: PositiveInt | None = None
    """Of which year `intensity` is."""
    basis: Basis = "location"
    """Whether `intensity` is the grid's ('location') or a contract's ('market')."""
    pue: Annotated[float, Ge(1)] | None = None
    """What the site takes over what its machines take; left out: 1, with a range up to the mean of the industry."""
    price: str | None = None
    """Of a kWh, "0.12 EUR/kWh", or a place of the table, "US-TX"; left out: no money is told."""
    processor_watts: PositiveFloat | None = None
    """Thermal design power of a machine's processors together; left out: by their name. Counters go before it."""
    period: PositiveFloat = 1.0
    """Seconds between two readings."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Figures without units, countries that are none, settings without effect."""
        for name, read in (("intensity", self._own), ("price", self.money)):
            try:
                read()
            except UsageError as error:
                yield Problem(path=name, text=f"{error.what}; legal: {error.legal}")
        if self.country is not None and self.intensity is None and country_code(self.country) is None:
            yield Problem(path="country", text=f"'{self.country}' is not in the table{near_country(self.country)}")
        if self.intensity is None:
            if self.intensity_year is not None:
                yield Problem(path="intensity_year", text="has no effect without intensity")
            if self.basis == "market":
                yield Problem(path="basis", text='"market" needs intensity: the table is location-based')

    def _own(self) -> Intensity | None:
        if self.intensity is None:
            return None
        return own_intensity(self.intensity, year=self.intensity_year, basis=self.basis, place=self.country)

    def grid(self) -> Intensity:
        """Carbon of a kWh: the recipe's own figure, its country's, the world's."""
        return self._own() or intensity_of(self.country)

    def money(self) -> Price | None:
        """Price of a kWh, where there is one."""
        return None if self.price is None else price_of(self.price)


class Sums(Protocol):
    """Sums a vector over all ranks; what `Wire.sum` does on 'world'."""

    def sum(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """The sum over the axis, in place."""
        ...


class Meter:
    """Joules by phase of one machine, or of one process. With no sensors it only says so."""

    def __init__(
        self, found: Sequence[Sensor], notes: Sequence[str] = (), *, period: float = 1.0, clock: Clock = time.monotonic
    ) -> None:
        self.sensors, self.notes = list(found), list(notes)
        """Sensors that work; sentences about those that do not."""
        self.names = [f"{each.name} ({'measured' if each.measured else 'modelled'})" for each in found]
        self.own: Account = {phase: [0.0] * len(FIELDS) for phase in PHASES}
        """What this meter read, and on the first rank what was spent before this attempt."""
        self._period, self._clock = period, clock
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._reads = bool(self.sensors)
        self._phase, self._since = "prepare", clock()
        self._waiting = dict.fromkeys(PHASES, 0.0)
        self._last = -float("inf")
        self._costs: deque[float] = deque(maxlen=5)
        self.read(soon=True)
        self._waiting = dict.fromkeys(PHASES, 0.0)
        self.own = {phase: [0.0] * len(FIELDS) for phase in PHASES}

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

    # --- over machines and attempts ---------------------------------------------------------------------------------

    def account(self, wire: Sums | None = None, device: torch.device | None = None) -> Account:
        """Joules and seconds so far, with `wire` of all machines together; all ranks then ask together, with a tensor
        on their `device`."""
        with self._lock:
            flat = [x for phase in PHASES for x in self.own[phase]]
        if wire is not None:
            flat = wire.sum(torch.tensor(flat, dtype=torch.float64, device=device), "world").tolist()
        width = len(FIELDS)
        return {phase: flat[i * width : (i + 1) * width] for i, phase in enumerate(PHASES)}

    def go_on(
        self, saved: Mapping[str, Sequence[float]], known: Mapping[str, Sequence[float]] | None, *, thrown: bool
    ) -> float:
        """Add what earlier attempts spent, on one rank of all: what the checkpoint knows (`saved`), and what was spent
        beyond it, as far as the run's events tell (`known`). `thrown`: steps beyond the checkpoint are made again, and
        what they took is lost. Gives the joules of all lost work."""
        nothing = [0.0] * len(FIELDS)
        with self._lock:
            for phase in PHASES:
                there = list(saved.get(phase, nothing))
                later = list((known or saved).get(phase, there))
                beyond = [max(0.0, b - a) for a, b in zip(there, later, strict=True)]
                self._add(phase, there)
                self._add("lost" if thrown and phase in AGAIN else phase, beyond)
            return self.own["lost"][1]

    def _add(self, phase: str, values: Sequence[float]) -> None:
        self.own[phase] = [a + b for a, b in zip(self.own[phase], values, strict=True)]

    def lost(self) -> dict[str, float]:
        """What sensors could not count, summed by kind."""
        found: dict[str, float] = {}
        for sensor in self.sensors:
            for name, value in sensor.lost().items():
                found[name] = found.get(name, 0.0) + value
        return found


def meter_of(settings: Metering, device: torch.device, *, first_here: bool) -> Meter:
    """The meter of this rank: in 'machine' only a machine's first rank reads anything."""
    if not settings.on or (settings.counts == "machine" and not first_here):
        return Meter([], period=settings.period)
    try:
        found, notes = sensors(device, counts=settings.counts, period=settings.period, tdp=settings.processor_watts)
    except Exception as error:  # noqa: BLE001  (whatever a machine does not tell, training begins)
        found, notes = [], [f"nothing is counted: {type(error).__name__}: {error}"]
    return Meter(found, notes, period=settings.period)


# --- what it comes to -------------------------------------------------------------------------------------------------


def total(account: Mapping[str, Sequence[float]]) -> list[float]:
    """FIELDS of all phases together."""
    return [sum(values[i] for values in account.values()) for i in range(len(FIELDS))]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a run has spent so far; plain numbers, for watchers and rows."""

    joules: float
    """Of all machines, in all phases; the central figure."""
    measured: float
    """The part of it that counters gave; the rest is modelled."""
    kwh: float
    kg_co2e: float
    """With PUE."""
    money: float | None
    """Energy at its price, with PUE; None without a price."""


def bill_of(account: Mapping[str, Sequence[float]], settings: Metering) -> Bill:
    """What an account comes to."""
    _, central, _, measured, _ = total(account)
    found = _cost_of(account, settings)
    money = None if found.money is None else found.money.central
    return Bill(joules=central, measured=measured, kwh=found.kwh.central, kg_co2e=found.kg_co2e.central, money=money)


@cache
def _terms(settings: Metering) -> tuple[Intensity, Price | None]:
    """Read once: tables and texts behind a recipe's settings."""
    return settings.grid(), settings.money()


def _cost_of(account: Mapping[str, Sequence[float]], settings: Metering) -> Estimate:
    grid, price = _terms(settings)
    low, central, high = (kwh_of(x) for x in total(account)[:3])
    return of_energy(
        Range(min(low, central), central, max(central, high)),  # sums are rounded
        pue=pue_of(settings.pue),
        grams_per_kwh=grid.grams,
        price_per_kwh=None if price is None else price.per_kwh,
    )


def _gaps(meter: Meter) -> list[str]:
    """A sentence about time that no sample covers, of any sensor; none where all is covered."""
    seconds = meter.lost().get("gap_seconds", 0.0)
    return [f"{seconds:.0f} s without samples are not in the figure"] if seconds else []


def told(
    account: Mapping[str, Sequence[float]], settings: Metering, meter: Meter, *, tokens: int, flops: float
) -> dict[str, Any] | None:
    """The facts for summary.json and record.json, every figure labelled; None where nothing was counted."""
    _, central, _, measured, seconds = total(account)
    if central <= 0:
        return None
    found, (grid, price) = _cost_of(account, settings), _terms(settings)
    share = measured / central
    pue = pue_of(settings.pue)
    return {
        "method": "measured" if share > 0.999 else "modelled" if share == 0 else "partly measured, partly modelled",
        "measured_share": share,
        "kwh": found.kwh.to_json(),
        "kg_co2e": found.kg_co2e.to_json(),
        **grid.to_json(),
        "pue": pue.to_json(),
        "pue_given": settings.pue is not None,
        "money": None
        if found.money is None or price is None
        else {**found.money.to_json(), "currency": price.currency, "per_kwh": price.per_kwh, "source": price.source},
        "phases_kwh": {phase: kwh_of(account[phase][1]) for phase in PHASES if account[phase][4] or account[phase][1]},
        "seconds": seconds,
        "mean_watts": central / seconds if seconds > 0 else None,
        "joules_per_token": central / tokens if tokens else None,
        "joules_per_flop": central / flops if flops else None,
        "train_joules_per_token": account["train"][1] / tokens if tokens else None,
        "counts": settings.counts,
        "sensors": meter.names,
        "not_counted": meter.lost(),
        "notes": [*meter.notes, *_gaps(meter)],
    }
