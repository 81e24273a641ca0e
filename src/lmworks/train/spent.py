"""What a run's account comes to: kWh, CO2 of the energy and of making the machines, money; as ranges, with sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmworks.core.energy.footprint import Estimate, Range, kwh_of, of_energy
from lmworks.core.energy.grid import Intensity, pue_of
from lmworks.core.energy.hours import HOURS
from lmworks.train.energy import BY_HOUR, FIELDS, MADE, PHASES, RESTING, Meter, total
from lmworks.train.metering import Metering, terms


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
    found = _cost_of(account, settings, _grid(account, settings))
    money = None if found.money is None else found.money.central
    return Bill(joules=central, measured=measured, kwh=found.kwh.central, kg_co2e=found.kg_co2e.central, money=money)


def _grid(account: Mapping[str, Sequence[float]], settings: Metering) -> Intensity:
    """Carbon of the account's kWh: where the recipe has a grid by the hour, by the hours in which they were taken."""
    by_hour = account.get(BY_HOUR, [0.0] * HOURS)
    return settings.grid(by_hour, _of_no_hour(account))


def _of_no_hour(account: Mapping[str, Sequence[float]]) -> float:
    """Joules of which no hour is known: of attempts before hours were counted. What is only rounding is none."""
    central = total(account)[1]
    left = central - sum(account.get(BY_HOUR, ()))
    return left if left > 1e-9 * central else 0.0


def _cost_of(account: Mapping[str, Sequence[float]], settings: Metering, grid: Intensity) -> Estimate:
    price = terms(settings)[2]
    return of_energy(
        _range([kwh_of(x) for x in total(account)]),
        pue=pue_of(settings.pue),
        grams_per_kwh=grid.grams,
        price_per_kwh=None if price is None else price.per_kwh,
    )


def _range(fields: Sequence[float]) -> Range:
    """The first three of FIELDS; sums of them are rounded."""
    low, central, high = fields[:3]
    return Range(min(low, central), central, max(central, high))


def told(
    account: Mapping[str, Sequence[float]], settings: Metering, meter: Meter, *, tokens: int, flops: float
) -> dict[str, Any] | None:
    """The facts for summary.json and record.json, every figure labelled; None where nothing was counted."""
    _, central, _, measured, seconds = total(account)
    if central <= 0:
        return None
    grid, price = _grid(account, settings), terms(settings)[2]
    found = _cost_of(account, settings, grid)
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
        "hourly": _by_hour(account, settings),
        "above_idle": _above_idle(account),
        "embodied": _embodied(account, meter),
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


def _by_hour(account: Mapping[str, Sequence[float]], settings: Metering) -> dict[str, Any] | None:
    """Energy and carbon of each hour of the day, in UTC; None where the recipe has no grid by the hour."""
    profile = terms(settings)[1]
    if profile is None:
        return None
    return {
        "file": profile.file,
        "kwh": [kwh_of(joules) for joules in account.get(BY_HOUR, [0.0] * HOURS)],
        "kwh_of_no_known_hour": kwh_of(_of_no_hour(account)),
        "g_per_kwh": [grams.to_json() for grams in profile.grams],
    }


def _above_idle(account: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """What the run took beyond its machines' idle power, end by end, since an error of a sensor is in both; None where
    idle power was not read before each attempt."""
    resting, whole = account.get(RESTING, [0.0] * len(FIELDS)), total(account)
    if resting[4] <= 0 or resting[4] < 0.999 * whole[4]:
        return None
    above = [kwh_of(max(0.0, whole[i] - resting[i])) for i in range(3)]
    return {
        "kwh": Range(min(above), above[1], max(above)).to_json(),
        "idle_watts": _range(resting).times(1 / resting[4]).to_json(),
        "busier_before": resting[1] > whole[1],
    }


def _embodied(account: Mapping[str, Sequence[float]], meter: Meter) -> dict[str, Any] | None:
    """CO2 of making the machines, as falls on the run; None where nobody looked at them. Never part of `kg_co2e`."""
    made = account.get(MADE, [0.0] * len(FIELDS))
    if meter.hardware is None or made[4] <= 0:
        return None
    missing = total(account)[4] - made[4]
    notes = [f"{missing:.0f} s of attempts before it was counted are not in it"] if missing > 1 else []
    return {**meter.hardware.told(_range(made)), "seconds": made[4], "notes": notes}


def _gaps(meter: Meter) -> list[str]:
    """A sentence about time that no sample covers, of any sensor; none where all is covered."""
    seconds = meter.lost().get("gap_seconds", 0.0)
    return [f"{seconds:.0f} s without samples are not in the figure"] if seconds else []
