"""Grids by the hour: what a file says, what it may not say, hours that add up, the best hour to start."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.energy.footprint import Range
from lmworks.core.energy.hours import DAY, HOUR, HOURS, Profile, read, seconds_by_hour
from lmworks.core.errors import DataError
from tests.oracles import footprint as oracle

HEAD = "# source: a test\n# year: 2024\n"
intensities = st.floats(0, 2000, allow_subnormal=False)
days = st.lists(intensities, min_size=HOURS, max_size=HOURS)


def written(folder: Path, values: list[float], head: str = HEAD, unit: str = "g/kWh") -> Path:
    path = folder / "grid.csv"
    rows = "".join(f"{hour},{value!r}\n" for hour, value in enumerate(values))
    path.write_text(f"{head}hour (UTC),carbon ({unit})\n{rows}")
    return path


@given(days, st.permutations(range(HOURS)))
def test_24_rows_come_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, day: list[float], order: list[int]
) -> None:
    path = tmp_path_factory.mktemp("x") / "grid.csv"
    rows = "".join(f"{hour}, {day[hour]!r}\n" for hour in order)
    path.write_text(f"# Source: a test\n#year: 2024\n\nHour (UTC),carbon (g/kWh)\n{rows}")
    found = read(path, place="here")
    assert [grams.central for grams in found.grams] == day
    assert all(grams.low == grams.high for grams in found.grams)
    assert (found.source, found.year, found.basis, found.place) == ("a test", 2024, "location", "here")


@given(st.lists(intensities, min_size=HOURS, max_size=4 * HOURS), st.integers(0, 23), st.integers(-12, 14))
def test_rows_with_times_are_means_of_an_hour_over_days(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], first: int, offset: int
) -> None:
    path = tmp_path_factory.mktemp("x") / "grid.csv"
    zone = timezone(timedelta(hours=offset))
    begin = datetime(2024, 5, 1, first, tzinfo=UTC)
    times = [(begin + timedelta(hours=i)).astimezone(zone) for i in range(len(values))]
    rows = "".join(f"{time.isoformat()},{value!r}\n" for time, value in zip(times, values, strict=True))
    path.write_text(f"# source: a test\ntime,zone,carbon (kg/MWh)\n{rows.replace(',', ',x,')}")
    found = read(path)
    slow = oracle.by_hour_of_day(first, values)
    for grams, (least, mean, most) in zip(found.grams, slow, strict=True):
        assert grams.central == pytest.approx(mean, rel=1e-12)
        assert (grams.low, grams.high) == (least, most)
    assert found.year == 2024


def test_units_are_turned_into_g_per_kwh(tmp_path: Path) -> None:
    found = read(written(tmp_path, [1000.0] * HOURS, unit="lb/MWh"))
    assert found.grams[3].central == pytest.approx(453.59237)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hour (UTC),carbon\n0,1\n", r"grid\.csv:3: no column has a unit of carbon intensity"),
        ("hour (UTC),carbon (g/h)\n0,1\n", "no column has a unit"),
        ("hour (UTC),a (g/kWh),b (kg/kWh)\n0,1,2\n", "more than one column has a unit"),
        ("hour,carbon (g/kWh)\n0,1\n", r"grid\.csv:3: no column is the hour in UTC"),
        ("hour (UTC),time,carbon (g/kWh)\n0,1,1\n", "more than one column is the hour"),
        ("hour (UTC),carbon (g/kWh)\n0,1\n1,2\n", "has no row for the hours 2, 3, 4"),
        ("hour (UTC),carbon (g/kWh)\n0,1\n0,2\n", r"grid\.csv:5: has the hour 0 a second time"),
        ("hour (UTC),carbon (g/kWh)\n24,1\n", "'24' is no hour of a day"),
        ("hour (UTC),carbon (g/kWh)\n-1,1\n", "'-1' is no hour of a day"),
        ("hour (UTC),carbon (g/kWh)\n0,-1\n", r"grid\.csv:4: an intensity is 0 or more, not -1"),
        ("hour (UTC),carbon (g/kWh)\n0,nan\n", "0 or more, not nan"),
        ("hour (UTC),carbon (g/kWh)\n0,much\n", "is no row of a time and an intensity: 0,much"),
        ("hour (UTC),carbon (g/kWh)\n0\n", "is no row of a time"),
        ("carbon (g/kWh),hour (UTC)\n5\n", "is no row of a time"),
        ("hour (UTC),carbon (g/kWh)\n", "has no rows"),
        ("time,carbon (g/kWh)\n2024-01-01T00:00,1\n", "'2024-01-01T00:00' has no offset from UTC"),
        ("time,carbon (g/kWh)\nnoon,1\n", "'noon' is no time"),
        ("time,carbon (g/kWh)\n2024-01-01T00:30Z,1\n", "is not at a full hour"),
        ("time,carbon (g/kWh)\n2024-01-01T00:00Z,1\n2024-01-01T00:00Z,1\n", "a second time"),
        ("time,carbon (g/kWh)\n2024-01-01T00:00Z,1\n2024-01-01T01:00Z,1\n", "has no rows for a whole day"),
        (
            "time,carbon (g/kWh)\n2024-01-01T00:00Z,1\n2024-01-03T00:00Z,1\n",
            "has no rows for 2024-01-01T01:00Z and 46 other hours",
        ),
    ],
)  # fmt: skip
def test_a_file_without_sense_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    path.write_text(HEAD + text)
    with pytest.raises(DataError, match=words):
        read(path)


def test_source_year_and_basis_are_asked_for(tmp_path: Path) -> None:
    day = [1.0] * HOURS
    with pytest.raises(DataError, match="names no source"):
        read(written(tmp_path, day, "# year: 2024\n"))
    with pytest.raises(DataError, match="names no year"):
        read(written(tmp_path, day, "# source: x\n"))
    assert read(written(tmp_path, day, "# source: x\n"), year=2022).year == 2022
    with pytest.raises(DataError, match="mixes the years 2022, 2024"):
        read(written(tmp_path, day), year=2022)
    with pytest.raises(DataError, match="'last' is no year"):
        read(written(tmp_path, day, "# source: x\n# year: last\n"))
    contract = written(tmp_path, day, HEAD + "# basis: market\n# place: a wind farm\n")
    with pytest.raises(DataError, match=r"is 'market'-based, energy\.basis is 'location'"):
        read(contract)
    assert read(contract, basis="market").place == "a wind farm"
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_rows_of_two_years_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "grid.csv"
    times = [datetime(2023, 12, 31, tzinfo=UTC) + timedelta(hours=i) for i in range(48)]
    path.write_text("# source: x\ntime,c (g/kWh)\n" + "".join(f"{time.isoformat()},1\n" for time in times))
    with pytest.raises(DataError, match="mixes the years 2023, 2024"):
        read(path)


# --- hours ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3 * DAY), st.integers(0, 5 * DAY))
def test_seconds_by_hour_second_by_second(start: int, length: int) -> None:
    # whole blocks of 900 s, so that the slow count is short
    start, length = start // 900 * 900, length // 900 * 900
    assert seconds_by_hour(start, start + length) == oracle.seconds_by_hour(start, start + length, step=900)


@given(st.floats(0, 4e9), st.floats(0, 1e6))
def test_seconds_by_hour_sum_to_the_time(start: float, length: float) -> None:
    found = seconds_by_hour(start, start + length)
    assert math.isclose(sum(found), (start + length) - start, rel_tol=1e-9, abs_tol=1e-5)
    assert min(found) >= 0
    assert seconds_by_hour(start + length + 1, start) == [0.0] * HOURS


def profile(tmp_path: Path, day: list[float]) -> Profile:
    return read(written(tmp_path, day))


def test_carbon_is_the_sum_over_hours(tmp_path: Path) -> None:
    found = profile(tmp_path, [100.0] * 12 + [500.0] * 12)
    assert found.mean().central == pytest.approx(300)
    assert found.intensity([0.0] * HOURS).grams == found.mean()
    joules = [3.0, *[0.0] * 22, 1.0]
    assert found.intensity(joules).grams.central == pytest.approx((3 * 100 + 500) / 4)
    unknown = found.intensity(joules, unknown=4.0)
    assert unknown.grams.central == pytest.approx((200 + 300) / 2)
    assert (unknown.grams.low, unknown.grams.high) == pytest.approx(((200 + 100) / 2, (200 + 500) / 2))
    assert "by the hour (grid.csv)" in unknown.source


@given(intensities, days.map(lambda day: [x + 1e-9 for x in day]), st.floats(0, 1e12))
def test_equal_hours_give_their_figure_whatever_is_rounded(grams: float, joules: list[float], unknown: float) -> None:
    equal = Profile(
        grams=(Range.exact(grams),) * HOURS, source="x", year=2024, basis="location", place="here", file="x.csv"
    )
    found = equal.intensity(joules, unknown).grams
    assert [found.low, found.central, found.high] == pytest.approx([grams] * 3, rel=1e-9)


@given(days, st.floats(0.01, 100))
def test_the_start_that_emits_least(tmp_path_factory: pytest.TempPathFactory, day: list[float], hours: float) -> None:
    found = profile(tmp_path_factory.mktemp("x"), day).starts(hours)
    slow = [oracle.mean_from(day, start, hours) for start in range(HOURS)]
    for fast, right in zip(found, slow, strict=True):
        assert fast.central == pytest.approx(right, rel=1e-6, abs=1e-6)


def test_a_whole_day_costs_the_same_whenever_it_starts(tmp_path: Path) -> None:
    found = profile(tmp_path, [float(hour) for hour in range(HOURS)])
    assert {round(start.central, 9) for start in found.starts(48)} == {11.5}
    short = [start.central for start in found.starts(1)]
    assert short == pytest.approx(list(range(HOURS)))
    assert HOUR * HOURS == DAY
