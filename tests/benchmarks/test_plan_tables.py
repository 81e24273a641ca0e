"""Published tables beside the planner, and the fits that lie in `recipes/clusters/fits/`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from lmworks.methods.megatron import WEAK_SCALING, Row
from lmworks.plan import cluster as clusters

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan_ladders as ladders
import plan_tables as tables

DGX, HGX = clusters.load("dgx-a100"), clusters.load("hgx-h100")


ROWS = [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.pipeline > 8 else []) for row in WEAK_SCALING]
"""torch takes seconds to order a long pipeline."""


@pytest.mark.parametrize("row", ROWS)
def test_megatrons_rows_are_within_a_tenth_and_are_the_points_of_the_fit(row: Row) -> None:
    told = tables.megatron_row(row, DGX)
    assert abs(told["residual"]) <= 0.10
    point = next(point for point in DGX.efficiency.points if point.name == row.name)
    assert told["modelled"] == pytest.approx(point.modelled, abs=0.06)
    assert point.published == row.teraflops
    assert point.used == (row in WEAK_SCALING[:4])


@pytest.mark.parametrize("row", tables.TITAN_ROWS, ids=lambda row: row.name)
def test_torchtitans_rows_are_within_a_tenth_or_say_why_not(row: Any) -> None:
    told = tables.titan_row(row)
    assert abs(told["residual"]) <= 0.10 or row.why
    point = next(point for point in HGX.efficiency.points if point.name == row.name)
    assert told["modelled"] == pytest.approx(point.modelled, abs=0.06)


def test_interleaving_gains_most_with_few_micro_batches() -> None:
    gains = [entry["interleaving_gains"] for entry in tables.interleaving(DGX)]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) > 0.10  # the paper: 10 % and more, from 12 to 60 rows


def test_interleaving_gains_at_405_billion_what_was_published() -> None:
    plain, interleaved = (tables.titan_row(row)["modelled"] for row in tables.TITAN_ROWS[-2:])
    assert interleaved / plain == pytest.approx(1.28, abs=0.05)


def test_the_papers_days() -> None:
    assert [round(value, 1) for value in tables.days().values()] == [33.9, 83.9]


def test_megascales_ladder_goes_up_as_published_and_ends_where_it_says_why() -> None:
    told = [ladders.rung_row(rung) for rung in ladders.rungs()]
    steps = [row["modelled"] for row in told[:8]]
    assert all(below <= above for below, above in itertools.pairwise(steps))
    assert steps[0] < steps[1] < steps[3] < steps[7]
    assert [abs(row["residual"]) <= 0.10 for row in told[:3]] == [True] * 3
    assert all(abs(row["residual"]) <= 0.15 and row["why"] for row in told)
    old, new = told[8:]
    assert 1.0 < new["modelled"] / old["modelled"] < 1.34, "the paper's, in which ranks also wait for slow ones"


def test_frontiers_rows_have_the_papers_order_and_say_why_not_its_size() -> None:
    plus, three, scaling = ladders.frontier_rows()
    assert 1.0 < plus["modelled"] < three["modelled"]
    assert 1.0 < plus["waiting"] < three["waiting"]
    for row in (plus, three):
        assert row["why"]
        assert row["waiting"] == pytest.approx(row["waiting_in_closed_form"], rel=0.25)
    assert abs(scaling["residual"]) <= 0.10
