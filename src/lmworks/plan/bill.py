"""What a run costs beside time: seconds x devices x watts, and what a kilowatt-hour and an hour cost there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from lmworks.core.energy import embodied
from lmworks.core.energy.footprint import Range
from lmworks.core.energy.grid import intensity_of, near_place, place_code
from lmworks.core.energy.hours import Profile
from lmworks.core.errors import UsageError
from lmworks.plan.cluster import Cluster, OfRegion
from lmworks.plan.time import Seconds

Objective = Literal["time", "energy", "money", "co2"]
KWH = 3.6e6
"""Joules."""
WAITING = ("gather", "away", "bubble", "reduce")
"""What of a step a device does not compute in."""


@final
@dataclass(frozen=True, kw_only=True)
class Bill:
    """A run's cost; None where the cluster has no figure."""

    seconds: float
    kwh: float
    """Of all devices and their share of the nodes; no cooling."""
    dollars: float | None
    co2_kg: float | None
    """Of that energy."""
    made_kg: Range | None
    """CO2 of making the devices and their share of the nodes, as falls on the run's hours; apart from `co2_kg`."""

    def value(self, objective: Objective) -> float:
        """What is made small."""
        found = {"time": self.seconds, "energy": self.kwh, "money": self.dollars, "co2": self.co2_kg}[objective]
        assert found is not None, "objective_known was asked first"
        return found


def of_run(cluster: Cluster, seconds: Seconds, *, devices: int, steps: int, region: str | None) -> Bill:
    """A run of so many equal steps. Devices that wait take the idle power."""
    waiting = sum(getattr(seconds, name) for name in WAITING)
    joules = (seconds.total - waiting) * cluster.watts.value + waiting * cluster.idle_watts.value
    kwh = joules * devices * steps / KWH
    price, carbon = in_region(cluster.price, region), carbon_in(cluster, region)
    hours = seconds.total * steps * devices / 3600
    return Bill(
        seconds=seconds.total * steps,
        kwh=kwh,
        dollars=None if price is None else hours * price.value,
        co2_kg=None if carbon is None else kwh * carbon[0] / 1000,
        made_kg=_made(cluster, hours),
    )


def _made(cluster: Cluster, device_hours: float) -> Range | None:
    """Kg of CO2 of making devices and their share of the nodes, as falls on so many hours of one."""
    if cluster.node_memory_bytes is None:
        return None
    whole = embodied.of_node(
        cluster.device if cluster.kind == "gpu" else None,
        devices=cluster.devices_per_node,
        gibibytes=cluster.node_memory_bytes.value / 2**30,
        sockets=cluster.sockets,
        dies=cluster.dies,
    )
    return embodied.share_of_life(whole, device_hours)


def by_start(profile: Profile, found: Bill) -> list[Range]:
    """24: kg of CO2 of a run that begins at each full hour of the day (UTC), its power the same throughout."""
    return [grams.times(found.kwh / 1000) for grams in profile.starts(found.seconds / 3600)]


def carbon_in(cluster: Cluster, region: str | None) -> tuple[float, str] | None:
    """Grams of CO2 per kWh, and where that is from: the cluster's own figure of a region, the table's of a country or a
    part of one, or, where none is named, the cluster's first."""
    known = {entry.region for entry in cluster.carbon}
    if region is not None and region not in known and place_code(region) is not None:
        grid = intensity_of(region)
        return grid.grams.central, f"{grid.in_words()}; {grid.source}"
    found = in_region(cluster.carbon, region)
    return None if found is None else (found.value, f"{found.value:g} g/kWh ({found.region}); {found.source}")


def in_region(known: tuple[OfRegion, ...], region: str | None) -> OfRegion | None:
    """The entry of a region; the first one where it is not named or has none."""
    return next((entry for entry in known if entry.region == region), known[0] if known else None)


def check(cluster: Cluster, objective: Objective, region: str | None) -> None:
    """Raise UsageError for an objective that the cluster has no figure for, and for a region that nobody knows."""
    regions = sorted({entry.region for entry in (*cluster.price, *cluster.carbon)})
    if region is not None and region not in regions and place_code(region) is None:
        raise UsageError(
            f"no figure is for the region '{region}'{near_place(region, regions)}",
            where=cluster.name,
            legal=", ".join([*regions, "a country or a part of one, as Poland or US-CA"]),
        )
    lacking = {"money": not cluster.price, "co2": carbon_in(cluster, region) is None}
    if lacking.get(objective):
        setting = "price" if objective == "money" else "carbon"
        raise UsageError(
            f"there is no {setting} to minimise {objective} by",
            where=cluster.name,
            legal="time, energy",
            next_step=f"copy the cluster's file, add [[{setting}]], and give it as --cluster FILE.toml",
        )
