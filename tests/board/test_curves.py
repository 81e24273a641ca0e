"""Columns of metrics.jsonl: sums, what is not finite, thinning that keeps peaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.board.curves import Columns, Curves
from tests.board import folders


def test_rows_become_columns(tmp_path: Path) -> None:
    folders.append(tmp_path / "metrics.jsonl", folders.rows(100))
    picture = Curves(tmp_path / "metrics.jsonl").picture()
    assert picture["steps"]["step"] == list(range(1, 101))
    assert picture["steps"]["elapsed"][-1] == pytest.approx(10.0)
    assert picture["steps"]["joules_so_far"][-1] == 200.0
    assert picture["checks"]["step"] == [50, 100]
    assert picture["checks"]["flops"] == [50e9, 100e9]
    assert picture["checks"]["elapsed"] == pytest.approx([5.0, 10.0])


def test_what_is_new_is_added(tmp_path: Path) -> None:
    path, given_rows = tmp_path / "metrics.jsonl", folders.rows(60)
    curves = Curves(path)
    assert curves.picture()["rows"] == 0
    for start in range(0, len(given_rows), 20):
        folders.append(path, given_rows[start : start + 20])
        now = curves.picture()
        assert now == Curves(path).picture()
    assert now["rows"] == 60


def test_a_loss_that_explodes_is_named(tmp_path: Path) -> None:
    given_rows = folders.rows(10)
    given_rows[4]["loss"], given_rows[6]["loss"] = float("nan"), float("inf")
    folders.append(tmp_path / "metrics.jsonl", given_rows)
    picture = Curves(tmp_path / "metrics.jsonl").picture()
    assert picture["not_finite"] == [5, 7]
    assert [i for i, loss in enumerate(picture["steps"]["loss"]) if loss is None] == [4, 6]


def test_a_column_that_comes_late_is_empty_before(tmp_path: Path) -> None:
    folders.append(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "new": 3.0}])
    assert Curves(tmp_path / "metrics.jsonl").picture()["steps"]["new"] == [None, 3.0]


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": "x", "loss": 1.0}, {"step": 1, "loss": {"a": 1}}, {}])
def test_rows_that_are_none_of_ours_do_no_harm(tmp_path: Path, row: dict[str, Any]) -> None:
    folders.append(tmp_path / "metrics.jsonl", [row, {"step": 2, "loss": 1.0}])
    assert Curves(tmp_path / "metrics.jsonl").picture()["steps"]["step"] == [2]


@given(st.lists(st.floats(0, 10) | st.just(math.nan), min_size=1, max_size=300), st.integers(1, 20))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    columns = Columns()
    for step, value in enumerate(values):
        columns.add({"step": float(step), "loss": value})
    picture = columns.picture("loss", most)
    steps, losses = picture["step"], [value for value in picture["loss"] if value is not None]
    finite = [value for value in values if math.isfinite(value)]
    assert steps[0] == 0
    assert steps[-1] == len(values) - 1
    assert steps == sorted(set(steps))
    assert len(steps) <= max(3 * most + 1, 1)
    if finite:
        assert min(losses) == pytest.approx(min(finite), rel=1e-6)
        assert max(losses) == pytest.approx(max(finite), rel=1e-6)
