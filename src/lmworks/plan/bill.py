"""What a run costs beside time: seconds x devices x watts, and what a kilowatt-hour and an hour cost there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from lmworks.core.errors import UsageError, did_you_mean
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
    """Of all devices and their share of the nodes; neither cooling nor what was spent on making them."""
    dollars: float | None
    co2_kg: float | None

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
    price, carbon = in_region(cluster.price, region), in_region(cluster.carbon, region)
    hours = seconds.total * steps * devices / 3600
    return Bill(
        seconds=seconds.total * steps,
        kwh=kwh,
        dollars=None if price is None else hours * price.value,
        co2_kg=None if carbon is None else kwh * carbon.value / 1000,
    )


def in_region(known: tuple[OfRegion, ...], region: str | None) -> OfRegion | None:
    """The entry of a region; the first one where it is not named or has none."""
    return next((entry for entry in known if entry.region == region), known[0] if known else None)


def check(cluster: Cluster, objective: Objective, region: str | None) -> None:
    """Raise UsageError for an objective that the cluster has no figure for, and for a region that it does not know."""
    regions = sorted({entry.region for entry in (*cluster.price, *cluster.carbon)})
    if region is not None and region not in regions:
        raise UsageError(
            f"no figure is for the region '{region}'{did_you_mean(region, regions)}",
            where=cluster.name,
            legal=", ".join(regions) or "none: the cluster's file has neither price nor carbon",
        )
    lacking = {"money": not cluster.price, "co2": not cluster.carbon}
    if lacking.get(objective):
        setting = "price" if objective == "money" else "carbon"
        raise UsageError(
            f"there is no {setting} to minimise {objective} by",
            where=cluster.name,
            legal="time, energy",
            next_step=f"copy the cluster's file, add [[{setting}]], and give it as --cluster FILE.toml",
        )
