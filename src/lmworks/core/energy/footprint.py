"""What work on machines costs: energy in joules and kWh, carbon in g, kg and t of CO2 equivalent, money. All as ranges.

    operational   kWh  = devices x hours x watts / 1000              kg = kWh x PUE x kg per kWh
    embodied      kg   = sum over parts of units x kg per unit x count x days in use / days of life

Energy is that of the machines; PUE (what the site takes over what its machines take) comes in with carbon and money.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

JOULES_PER_KWH = 3.6e6
HOURS_PER_DAY = 24.0
DAYS_PER_YEAR = 365.0
LIFE_YEARS = 5.0
"""For how long hardware is taken to be in use (LLMCarbon)."""
GRAMS_PER_POUND = 453.59237
FLOPS_TRAINING, FLOPS_INFERENCE = 6, 2
"""Per parameter that a token meets, and token: forward and backward pass; forward pass."""


# --- ranges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """A figure with what it may be at least and at most. Ends add up and multiply as ends: errors may go one way."""

    low: float
    central: float
    high: float

    def __post_init__(self) -> None:
        """Raise ValueError for ends that are not in order, or not numbers."""
        if not self.low <= self.central <= self.high:
            raise ValueError(f"a range goes up: {self.low}, {self.central}, {self.high}")

    @staticmethod
    def exact(value: float) -> Range:
        """A figure that is known."""
        return Range(value, value, value)

    @staticmethod
    def around(value: float, share: float) -> Range:
        """A figure of at least 0 that may be off by a share of itself."""
        return Range(value * (1 - share), value, value * (1 + share))

    def plus(self, other: Range) -> Range:
        """Both together."""
        return Range(self.low + other.low, self.central + other.central, self.high + other.high)

    def times(self, other: Range | float) -> Range:
        """The product with a range of at least 0, or with a number of at least 0."""
        by = other if isinstance(other, Range) else Range.exact(other)
        if min(self.low, by.low) < 0:
            raise ValueError("ranges are multiplied from 0 upwards only")
        return Range(self.low * by.low, self.central * by.central, self.high * by.high)

    def to_json(self) -> dict[str, float]:
        """Its three figures by name."""
        return {"low": self.low, "central": self.central, "high": self.high}


NOTHING = Range(0.0, 0.0, 0.0)


# --- units ------------------------------------------------------------------------------------------------------------


def kwh_of(joules: float) -> float:
    """Joules as kWh."""
    return joules / JOULES_PER_KWH


def joules_of(kwh: float) -> float:
    """KWh as joules."""
    return kwh * JOULES_PER_KWH


INTENSITIES = {
    "g/kWh": 1.0,
    "kg/kWh": 1e3,
    "kg/MWh": 1.0,
    "g/MWh": 1e-3,
    "t/MWh": 1e3,
    "t/GWh": 1.0,
    "lb/MWh": GRAMS_PER_POUND / 1e3,
    "lb/kWh": GRAMS_PER_POUND,
}
"""Units of a carbon intensity, and what one of each is in g/kWh."""


def grams_per_kwh(value: float, unit: str) -> float:
    """A carbon intensity in g of CO2e per kWh. Raises KeyError for a unit that is not in INTENSITIES."""
    return value * INTENSITIES[unit]


# --- operational ------------------------------------------------------------------------------------------------------


def training_flops(active_parameters: float, tokens: float) -> float:
    """6 P D. P: parameters that a token meets; of a mixture of experts the active ones."""
    return FLOPS_TRAINING * active_parameters * tokens


def inference_flops(active_parameters: float, tokens: float) -> float:
    """2 P D."""
    return FLOPS_INFERENCE * active_parameters * tokens


def device_hours(flops: float, *, peak_flops: float, efficiency: float) -> float:
    """Hours of one device for so many FLOPs at a share of its peak rate (FLOP/s)."""
    return flops / (peak_flops * efficiency) / 3600


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What work takes: energy of the machines, carbon and money with what the site takes on top."""

    kwh: Range
    kg_co2e: Range
    money: Range | None = None
    """In the currency of the prices that were given; None without any."""


def estimate(
    *,
    devices: float,
    hours: float,
    watts: Range,
    pue: Range,
    grams_per_kwh: Range,
    price_per_kwh: float | None = None,
    price_per_device_hour: float | None = None,
) -> Estimate:
    """Energy, carbon and money of `devices` over `hours`, known before the run.

    `watts`: of one device with its share of the machine around it. Money: energy with PUE at its price, and devices at
    theirs; who rents by the hour gives the second one alone, since it has the energy in it.
    """
    return of_energy(
        watts.times(devices * hours / 1e3),
        pue=pue,
        grams_per_kwh=grams_per_kwh,
        price_per_kwh=price_per_kwh,
        rent=None if price_per_device_hour is None else price_per_device_hour * devices * hours,
    )


def of_energy(
    kwh: Range, *, pue: Range, grams_per_kwh: Range, price_per_kwh: float | None = None, rent: float | None = None
) -> Estimate:
    """Carbon and money of energy that is known, or estimated. `rent`: money for the devices themselves."""
    site = kwh.times(pue)
    prices = [
        *([] if price_per_kwh is None else [site.times(price_per_kwh)]),
        *([] if rent is None else [Range.exact(rent)]),
    ]
    money = NOTHING.plus(prices[0]) if prices else None
    for more in prices[1:]:
        assert money is not None, "the first price was there"
        money = money.plus(more)
    return Estimate(kwh=kwh, kg_co2e=site.times(grams_per_kwh).times(1e-3), money=money)


def mix_intensity(shares: Mapping[str, float], by_fuel: Mapping[str, float]) -> float:
    """Intensity of a mix of fuels, in the unit of `by_fuel`. Raises ValueError when the shares do not add up to 1."""
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6) or min(shares.values()) < 0:
        raise ValueError(f"shares of a mix add up to 1, these to {sum(shares.values()):.6g}")
    return sum(share * by_fuel[fuel] for fuel, share in shares.items())


# --- embodied ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Made:
    """Hardware that was made: what a unit of it cost the climate."""

    units: float
    """Of one piece: cm2 of silicon, GB of memory."""
    kg_per_unit: float
    count: float


def embodied_kg(parts: Iterable[Made], *, days: float) -> float:
    """The share of making the hardware that falls on `days` of use, in kg of CO2e."""
    life = LIFE_YEARS * DAYS_PER_YEAR
    return sum(part.units * part.kg_per_unit * part.count for part in parts) * days / life


# --- comparing --------------------------------------------------------------------------------------------------------


def break_even_requests(extra_training: float, saved_per_request: float) -> float:
    """After how many requests energy (or money) put into training has come back; inf where a request saves nothing."""
    if extra_training <= 0:
        return 0.0
    return extra_training / saved_per_request if saved_per_request > 0 else math.inf


def front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the points (cost, loss), less being better in both, that no other point beats in both."""

    def beaten(name: str) -> bool:
        cost, loss = points[name]
        return any(
            c <= cost and q <= loss and (c < cost or q < loss) for other, (c, q) in points.items() if other != name
        )

    return {name for name in points if not beaten(name)}
