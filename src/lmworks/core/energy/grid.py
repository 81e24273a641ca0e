"""What a kWh costs the climate and the purse, by place and year: figures in files, and people's own with units."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lmworks.core.energy.footprint import INTENSITIES, Range, grams_per_kwh
from lmworks.core.errors import UsageError, did_you_mean

FIGURES = Path(__file__).parent / "figures"
Basis = Literal["location", "market"]
"""Location: what the grid of a place emits. Market: what contracts say; the two are never summed."""
Scope = Literal["life-cycle", "direct"]
"""Life-cycle: the making of plants and fuels is in a figure. Direct: only what plants emit."""


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """Carbon of a kWh: how much, where, of which year, counted how."""

    grams: Range
    """Of CO2 equivalent per kWh."""
    place: str
    year: int | None
    """None: a person gave the figure and did not say."""
    basis: Basis
    source: str
    known: bool = True
    """Whether the place itself is known; otherwise this is the world's mean."""
    scope: Scope | None = None
    """None: a person gave the figure."""

    def in_words(self) -> str:
        """One line: figure, place, year, basis."""
        year = "year not given" if self.year is None else str(self.year)
        flag = "" if self.known else "; PLACE NOT KNOWN, the world's mean stands in"
        scope = ", direct emissions only" if self.scope == "direct" else ""
        return f"{self.grams.central:.0f} g/kWh ({self.place}, {year}, {self.basis}-based{scope}{flag})"

    def to_json(self) -> dict[str, Any]:
        """For a run's record."""
        return {
            "g_per_kwh": self.grams.to_json(),
            "place": self.place,
            "place_known": self.known,
            "year": self.year,
            "basis": self.basis,
            "scope": self.scope,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a kWh is bought for."""

    per_kwh: float
    currency: str
    source: str


@cache
def figures(name: str) -> dict[str, Any]:
    """A table of `figures/`, by the file's name without its ending."""
    return tomllib.loads((FIGURES / f"{name}.toml").read_text(encoding="utf-8"))


# --- carbon -----------------------------------------------------------------------------------------------------------


@cache
def intensity_of(place: str | None) -> Intensity:
    """The grid of a country, by its three letters (ISO 3166) or its English name, or of a part of one ("US-CA"); None,
    or a place that is in no table: the world's mean, from the cleanest to the dirtiest grid, with `known` false."""
    table = figures("grids")
    rows = table["countries"]
    code = place_code(place) if place is not None else None
    if code is None:
        world, all_of_them = table["world"], [row["g_per_kwh"] for row in rows.values()]
        return Intensity(
            grams=Range(min(all_of_them), world["g_per_kwh"], max(all_of_them)),
            place=world["name"],
            year=world["year"],
            basis=table["basis"],
            source=world["source"],
            known=False,
            scope=table["scope"],
        )
    if code not in rows:
        return _of_region(code)
    row = rows[code]
    return Intensity(
        grams=Range.around(row["g_per_kwh"], figures("assumed")["grid"]["share"]),
        place=row["name"],
        year=row["year"],
        basis=table["basis"],
        source=table["source"],
        scope=table["scope"],
    )


def _of_region(code: str) -> Intensity:
    """The grid of a part of a country, by its name in `figures/regions.toml`."""
    table = next(table for table in _regions().values() if code in table["places"])
    row = table["places"][code]
    grams = grams_per_kwh(row["value"], table["unit"])
    return Intensity(
        grams=Range.around(grams, figures("assumed")["grid"]["share"]),
        place=f"{row['name']}, {table['country']}",
        year=table["year"],
        basis=figures("regions")["basis"],
        source=table["source"],
        scope=table["scope"],
    )


def _regions() -> dict[str, Any]:
    """Tables of `figures/regions.toml`, by country."""
    return {name: table for name, table in figures("regions").items() if isinstance(table, dict)}


def place_code(place: str) -> str | None:
    """The letters of a country, or of a part of one, that is in a table; None for another."""
    rows = figures("grids")["countries"]
    if place.upper() in rows or any(place.upper() in table["places"] for table in _regions().values()):
        return place.upper()
    return next((code for code, row in rows.items() if row["name"].casefold() == place.casefold()), None)


def near_place(place: str, others: Iterable[str] = ()) -> str:
    """The end of a sentence that names the nearest place of the tables, or of `others`."""
    rows = figures("grids")["countries"]
    regions = [code for table in _regions().values() for code in table["places"]]
    return did_you_mean(place, [*others, *rows, *(row["name"] for row in rows.values()), *regions])


def own_intensity(text: str, *, year: int | None, basis: Basis, place: str | None) -> Intensity:
    """A person's own figure, such as "409 g/kWh" or "900 lb/MWh". Raises UsageError without a unit that is known."""
    value, unit = quantity(text, INTENSITIES, what="a carbon intensity")
    grams = grams_per_kwh(value, unit)
    where = place or "a place that was not named"
    return Intensity(grams=Range.exact(grams), place=where, year=year, basis=basis, source="given")


def mixed(found: Iterable[Intensity]) -> list[str]:
    """Why carbon of these may not be summed or ranked without a word: other years, or other ways of counting."""
    found = list(found)
    bases = sorted({each.basis for each in found})
    scopes = sorted({each.scope for each in found if each.scope is not None})
    years = sorted({"not given" if each.year is None else str(each.year) for each in found})
    return [
        *([f"{' and '.join(f'{basis}-based' for basis in bases)} figures"] if len(bases) > 1 else []),
        *([f"{' and '.join(scopes)} emissions"] if len(scopes) > 1 else []),
        *([f"grids of the years {', '.join(years)}"] if len(years) > 1 else []),
    ]


# --- money, and what a site takes -------------------------------------------------------------------------------------


def price_of(text: str) -> Price:
    """A price such as "0.12 EUR/kWh", or of a place in `figures/prices.toml` ("US-TX"). Raises UsageError otherwise."""
    table = figures("prices")
    if text in table["places"]:
        row = table["places"][text]
        return Price(per_kwh=row["price"], currency=row["currency"], source=f"{table['source']}, {row['year']}")
    number, _, unit = text.strip().partition(" ")
    currency, slash, per = unit.strip().partition("/")
    if slash and currency.isalpha() and per in ("kWh", "MWh"):
        value, _ = quantity(f"{number} {unit.strip()}", {unit.strip(): 1.0}, what="a price")
        return Price(per_kwh=value / (1 if per == "kWh" else 1e3), currency=currency, source="given")
    raise UsageError(
        f"'{text}' is no price of energy",
        legal=f'a number with currency and unit, as in "0.12 EUR/kWh", or one of {", ".join(table["places"])}',
    )


def pue_of(pue: float | None) -> Range:
    """PUE as given; left out: 1 (only the machines), and a range up to the mean of the industry."""
    assumed = figures("assumed")["pue"]
    return Range(assumed["none"], assumed["none"], assumed["industry"]["value"]) if pue is None else Range.exact(pue)


def quantity(text: str, units: Iterable[str], *, what: str) -> tuple[float, str]:
    """The number and the unit of "12.5 g/kWh". Raises UsageError when either is missing, or no number of 0 or more."""
    legal = f"a number and a unit: {', '.join(units)}"
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number)
    except ValueError:
        raise UsageError(f"'{text}' is not {what}", legal=legal) from None
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"'{text}' is not {what}: {value} is not 0 or more", legal=legal)
    if unit.strip() not in set(units):
        problem = "has no unit" if not unit.strip() else f"has the unit '{unit.strip()}'{did_you_mean(unit, units)}"
        raise UsageError(f"'{text}' {problem}", legal=legal)
    return value, unit.strip()


# --- for people -------------------------------------------------------------------------------------------------------


def in_words(facts: Mapping[str, Any]) -> str:
    """The energy facts of a record in one line: energy, carbon, method, place, year, PUE; making the machines apart."""
    kwh, kg, pue = facts["kwh"], facts["kg_co2e"], facts["pue"]["central"]
    year = facts["year"] if facts["year"] is not None else "year not given"
    flag = "" if facts["place_known"] else ", PLACE NOT KNOWN"
    scope = ", direct emissions only" if facts.get("scope") == "direct" else ""
    by_hour = ", by the hour" if facts.get("hourly") else ""
    place = f"{facts['place']} {year}{flag}, {facts['g_per_kwh']['central']:.0f} g/kWh {facts['basis']}-based"
    text = f"{spread(kwh)} kWh {facts['method']}, {spread(kg)} kg CO2e ({place}{scope}{by_hour}, PUE {pue:g})"
    if facts.get("above_idle"):
        busier = " (THE MACHINES WERE BUSIER BEFORE)" if facts["above_idle"]["busier_before"] else ""
        text += f"; {spread(facts['above_idle']['kwh'])} kWh of it above idle power{busier}"
    if facts.get("embodied"):
        text += f"; apart from that {spread(facts['embodied']['kg_co2e'])} kg CO2e of making the machines"
    return text


def spread(figures: Mapping[str, float]) -> str:
    """A range for people: 1.2 (0.8 to 2)."""
    return f"{figures['central']:.3g} ({figures['low']:.2g} to {figures['high']:.2g})"
