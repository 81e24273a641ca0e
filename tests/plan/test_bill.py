"""Energy, money and CO2 of seconds."""

from __future__ import annotations

import dataclasses

import pytest

from lmworks.core.energy.footprint import Range
from lmworks.core.energy.hours import Profile
from lmworks.core.errors import UsageError
from lmworks.plan import bill
from lmworks.plan import cluster as clusters
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


def test_a_country_or_a_part_of_one_is_a_region(priced: Cluster) -> None:
    bill.check(priced, "time", "US-CA")
    bill.check(dataclasses.replace(priced, carbon=()), "co2", "Poland")
    found = bill.of_run(priced, Seconds(compute=3600.0), devices=1, steps=1, region="US-CA")
    assert found.co2_kg == pytest.approx(394.769 * 0.45359237 / 1000)
    with pytest.raises(UsageError, match="did you mean 'US-"):
        bill.check(priced, "time", "US-CX")


def test_making_the_devices_is_told_apart() -> None:
    dgx = clusters.load("dgx-a100")
    found = bill.of_run(dgx, Seconds(compute=3600.0), devices=4, steps=10, region=None)
    one = 8.26 * 1.6 + (2048 * 0.4 + 2 * 1.47 + 111.6 * 1.2) / 8
    assert found.made_kg is not None
    assert found.made_kg.central == pytest.approx(one * 40 / (5 * 365 * 24))
    assert found.made_kg.low < found.made_kg.central < found.made_kg.high
    silent = dataclasses.replace(dgx, node_memory_bytes=None)
    assert bill.of_run(silent, Seconds(compute=1.0), devices=1, steps=1, region=None).made_kg is None
    die, board = (
        bill.of_run(clusters.load(name), Seconds(compute=3600.0), devices=1, steps=1, region=None).made_kg
        for name in ("frontier", "laptop")
    )
    assert die is not None
    assert board is not None
    assert die.central == pytest.approx((14.48 * 1.6 / 2 + (512 * 0.4 + 1.47 + 133.92) / 8) / (5 * 365 * 24))
    assert board.central == pytest.approx((16 * 0.4 + 1.47 + 133.92) / 2 / (5 * 365 * 24))


def test_the_hour_to_start_at(priced: Cluster) -> None:
    grams = tuple(Range.exact(100.0 if 10 <= hour < 14 else 500.0) for hour in range(24))
    profile = Profile(grams=grams, source="x", year=2024, basis="location", place="here", file="x.csv")
    four = bill.of_run(priced, Seconds(compute=3600.0), devices=1, steps=4, region=None)
    kg = [start.central for start in bill.by_start(profile, four)]
    assert kg.index(min(kg)) == 10
    assert min(kg) == pytest.approx(0.4)
    assert kg[9] == pytest.approx(0.3 + 0.5)
    assert kg[14] == max(kg) == pytest.approx(2.0)
