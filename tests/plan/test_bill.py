"""Energy, money and CO2 of seconds."""

from __future__ import annotations

import dataclasses

import pytest

from lmworks.core.errors import UsageError
from lmworks.plan import bill
from lmworks.plan.cluster import Cluster, Figure, OfRegion
from lmworks.plan.time import Seconds


@pytest.fixture
def priced(laptop: Cluster) -> Cluster:
    here = OfRegion(region="here", value=2.0, source="a test")
    there = OfRegion(region="there", value=500.0, source="a test")
    return dataclasses.replace(
        laptop,
        watts=Figure(value=1000.0, source="a test"),
        idle_watts=Figure(value=100.0, source="a test"),
        price=(here,),
        carbon=(dataclasses.replace(here, value=100.0), there),
    )


def test_an_hour_of_four_kilowatts(priced: Cluster) -> None:
    found = bill.of_run(priced, Seconds(compute=3600.0), devices=4, steps=1, region=None)
    assert found.kwh == pytest.approx(4.0)
    assert found.dollars == pytest.approx(8.0)
    assert found.co2_kg == pytest.approx(0.4)
    assert [found.value(objective) for objective in ("time", "energy")] == [3600.0, found.kwh]


def test_waiting_takes_the_idle_power(priced: Cluster) -> None:
    found = bill.of_run(priced, Seconds(compute=1800.0, bubble=1800.0), devices=1, steps=2, region="there")
    assert found.kwh == pytest.approx(2 * (0.5 * 1.0 + 0.5 * 0.1))
    assert found.co2_kg == pytest.approx(found.kwh * 0.5)
    assert found.dollars == pytest.approx(2 * 2.0)  # no price for it: the first one


def test_an_objective_or_a_region_without_figures_is_refused(priced: Cluster, laptop: Cluster) -> None:
    with pytest.raises(UsageError, match="no price to minimise money"):
        bill.check(dataclasses.replace(laptop, price=()), "money", None)
    with pytest.raises(UsageError, match="did you mean 'there'"):
        bill.check(priced, "time", "their")
    bill.check(priced, "co2", "there")
