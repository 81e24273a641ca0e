"""How a run counts energy, and what a kWh costs where it is: the table `energy` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lmworks.core.energy import hours
from lmworks.core.energy.grid import (
    Basis,
    Intensity,
    Price,
    intensity_of,
    near_place,
    own_intensity,
    place_code,
    price_of,
)
from lmworks.core.errors import LmworksError, Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class Metering:
    """How energy is counted, and what a kWh costs where the run is."""

    on: bool = True
    """false: nothing is counted."""
    counts: Literal["machine", "process"] = "machine"
    """'machine': all that the run's machines take, other work on them included; one meter a machine. 'process': the
    processor time of the run's own processes, and its own GPUs, for machines that are shared; memory is left out."""
    country: str | None = None
    """Three letters (ISO 3166) or the English name, or a part of a country, "US-CA", "CN-SC", "SE3"; left out: the
    world's mean carbon intensity, with a flag."""
    intensity: str | None = None
    """Carbon of a kWh where it is known better, with its unit: "409 g/kWh", "900 lb/MWh"; over `country`."""
    hourly: str | None = None
    """A CSV file of the grid's carbon by the hour, with units, source and year; over `country`: each hour's energy then
    counts with that hour's carbon."""
    intensity_year: PositiveInt | None = None
    """Of which year `intensity` or `hourly` is."""
    basis: Basis = "location"
    """Whether `intensity` or `hourly` is the grid's ('location') or a contract's ('market')."""
    pue: Annotated[float, Ge(1)] | None = None
    """What the site takes over what its machines take; left out: 1, with a range up to the mean of the industry."""
    price: str | None = None
    """Of a kWh, "0.12 EUR/kWh", or a place of the table, "US-TX"; left out: no money is told."""
    processor_watts: PositiveFloat | None = None
    """Thermal design power of a machine's processors together; left out: by their name. Counters go before it."""
    period: PositiveFloat = 1.0
    """Seconds between two readings."""
    idle_seconds: NonNegativeFloat = 0.0
    """Wait so long before the run and read what the machines take idle, to tell the energy above it as well; 10 do."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Figures without units, countries that are none, settings without effect."""
        readers = (("intensity", self._own), ("hourly", self.profile), ("price", self.money))
        for name, read in readers:
            try:
                read()
            except LmworksError as error:
                where = "" if error.where is None else f"{error.where}: "
                yield Problem(path=name, text=f"{where}{error.what}; legal: {error.legal or 'a file that can be read'}")
        if self.country is not None and self._no_figure() and place_code(self.country) is None:
            yield Problem(path="country", text=f"'{self.country}' is not in the table{near_place(self.country)}")
        yield from self._without_effect()

    def _without_effect(self) -> Iterator[Problem]:
        if self._no_figure():
            if self.intensity_year is not None:
                yield Problem(path="intensity_year", text="has no effect without intensity or hourly")
            if self.basis == "market":
                yield Problem(path="basis", text='"market" needs intensity or hourly: the table is location-based')
        if self.intensity is not None and self.hourly is not None:
            yield Problem(path="intensity", text="has no effect beside hourly: give one of the two")
        if self.idle_seconds and self.counts == "process":
            yield Problem(path="idle_seconds", text='has no effect with counts = "process": idle power is nobody\'s')

    def _no_figure(self) -> bool:
        return self.intensity is None and self.hourly is None

    def _own(self) -> Intensity | None:
        if self.intensity is None:
            return None
        return own_intensity(self.intensity, year=self.intensity_year, basis=self.basis, place=self.country)

    def profile(self) -> hours.Profile | None:
        """The grid by the hour, where the recipe has one. Raises DataError for a file without sense."""
        if self.hourly is None:
            return None
        path = Path(self.hourly).expanduser()
        return hours.read(path, year=self.intensity_year, basis=self.basis, place=self.country)

    def grid(self, by_hour: Sequence[float] = (), unknown: float = 0.0) -> Intensity:
        """Carbon of a kWh: by the hours in which energy was taken, the recipe's own figure, its country's, the
        world's. `by_hour`, `unknown`: joules in each hour of the day in UTC, and those of which no hour is known."""
        profile = terms(self)[1]
        if profile is not None:
            return profile.intensity(by_hour or [0.0] * hours.HOURS, unknown)
        return terms(self)[0]

    def money(self) -> Price | None:
        """Price of a kWh, where there is one."""
        return None if self.price is None else price_of(self.price)

    def mean_grid(self) -> Intensity:
        """Carbon of a kWh whatever the hour: the recipe's own figure, its country's, the world's."""
        return self._own() or intensity_of(self.country)


@cache
def terms(settings: Metering) -> tuple[Intensity, hours.Profile | None, Price | None]:
    """Read once: tables, files and texts behind a recipe's settings."""
    return settings.mean_grid(), settings.profile(), settings.money()
