"""Recorded files of power: their sum, gaps, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.audit.power import replay
from lmworks.core.errors import DataError


def test_a_recorded_file_gives_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("note,time (ms),power_kW\n" + "".join(f"x,{1000 * i},0.1\n" for i in range(3601)))
    found = replay(path)
    assert found["kwh"] == pytest.approx(0.1, abs=1e-9)
    assert (found["seconds"], found["gap_seconds"], found["missing"], found["clamped"]) == (3600.0, 0, 0, 0)


def test_gaps_missing_and_negative_samples_are_told(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("time (s),power (W)\n0,100\n1,-5\n2,\n3,100\n60,100\n61,100\n")
    found = replay(path, period=1.0)
    assert (found["gap_seconds"], found["missing"], found["clamped"]) == (57.0, 1, 1)
    assert found["joules"] == pytest.approx(50 + 100 + 100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,power\n0,1\n1,1\n", r"power\.csv:1: no column has a unit of time: time, power"),
        ("time (s),power\n0,1\n1,1\n", "no column has a unit of power"),
        ("time (s),power (W)\n0,1\n1,much\n", r"power\.csv:3: is no sample: 1,much"),
        ("time (s),power (W)\n0,1\n1\n", r"is no sample: 1"),
        ("time (s),power (W)\n0,1\n5,1\n4,1\n", r"power\.csv:4: time runs backwards"),
        ("time (s),power (W)\n0,1\n", "fewer than two samples"),
    ],
)
def test_a_file_without_sense_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        replay(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        replay(tmp_path / "none.csv")
