"""A grid by the hour: a person's own file of carbon intensities, what a run's hours come to with it, when to start.

    # source: who says so
    # year: 2024
    hour (UTC),carbon (g/kWh)
    0,310
    ...

One row for each hour of the day, or rows with times (ISO 8601, with their offset from UTC), each of which holds for the
hour that it begins. Of those the mean of each hour of the day counts, with a range from the least day to the greatest.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from lmworks.core.energy.footprint import INTENSITIES, NOTHING, Range, grams_per_kwh
from lmworks.core.energy.grid import Basis, Intensity
from lmworks.core.errors import DataError

HOURS = 24
HOUR, DAY = 3600, 86_400
"""Seconds."""
LEGAL = (
    "two columns, 'hour (UTC)' from 0 to 23 or 'time' as in 2024-05-01T13:00Z, and one that ends in a unit, as in "
    f"'carbon (g/kWh)': {', '.join(INTENSITIES)}"
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Carbon of a kWh by the hour of the day, in UTC."""

    grams: tuple[Range, ...]
    """24: of CO2 equivalent per kWh, in the hour that begins then."""
    source: str
    year: int
    basis: Basis
    place: str
    file: str

    def mean(self) -> Range:
        """Over a day of equal power."""
        return self._weighted([1.0] * HOURS)

    def intensity(self, by_hour: Sequence[float], unknown: float = 0.0) -> Intensity:
        """The intensity of energy that was taken so much in each hour, and so much nobody knows when: that counts with
        the mean of the day, from the cleanest hour to the dirtiest. Of nothing at all: the mean of the day."""
        parts = [(self._weighted(by_hour), sum(by_hour))] if sum(by_hour) > 0 else []
        if unknown > 0:
            mean = self.mean().central  # may be rounded beyond 24 equal hours
            ends = [mean, *(g.low for g in self.grams), *(g.high for g in self.grams)]
            parts.append((Range(min(ends), mean, max(ends)), unknown))
        whole, grams = sum(size for _, size in parts), NOTHING
        for part, size in parts:
            grams = grams.plus(part.times(size / whole))
        return Intensity(
            grams=grams if parts else self.mean(),
            place=self.place,
            year=self.year,
            basis=self.basis,
            source=f"{self.source}, by the hour ({self.file})",
        )

    def starts(self, hours: float) -> list[Range]:
        """24: the intensity of a run of so many hours of equal power that begins at each full hour."""
        return [self._weighted(seconds_by_hour(start * HOUR, start * HOUR + hours * HOUR)) for start in range(HOURS)]

    def _weighted(self, weights: Sequence[float]) -> Range:
        whole, found = sum(weights), NOTHING
        for grams, weight in zip(self.grams, weights, strict=True):
            found = found.plus(grams.times(weight / whole))
        return found


def seconds_by_hour(start: float, end: float) -> list[float]:
    """24: how many seconds of the time from `start` to `end` (seconds since the epoch) lie in each hour of the day."""
    days, rest = divmod(max(end - start, 0.0), DAY)
    found, at = [days * HOUR] * HOURS, start
    while rest > 0:
        hour = math.floor(at / HOUR)
        part = min(rest, (hour + 1) * HOUR - at)
        found[hour % HOURS] += part
        rest, at = rest - part, (hour + 1) * HOUR
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, *, year: int | None = None, basis: Basis = "location", place: str | None = None) -> Profile:
    """The profile in a file. `year`, `basis` and `place` as settings have them; the file's own must agree.

    Raises DataError for units, hours, a source or a year that are missing, for values that are no intensity, and for
    years or bases that do not agree.
    """
    notes, lines = _lines(path)
    number, heading = lines[0]
    time, value, unit = _columns(heading, path, number)
    rows = [(at, *_row(line, time, value, path, at)) for at, line in lines[1:]]
    in_file, years = _by_hour(rows, path) if heading[time].casefold().startswith("hour") else _by_time(rows, path)
    return Profile(
        grams=tuple(grams.times(grams_per_kwh(1.0, unit)) for grams in in_file),
        source=notes.get("source") or _refuse("names no source", path, "a line '# source: who says so'"),
        year=_year(notes.get("year"), years, year, path),
        basis=_basis(notes.get("basis"), basis, path),
        place=place or notes.get("place") or "a place that was not named",
        file=path.name,
    )


def _refuse(what: str, path: Path, legal: str = LEGAL, *, line: int | None = None) -> NoReturn:
    raise DataError(what, where=str(path) if line is None else f"{path}:{line}", legal=legal)


def _lines(path: Path) -> tuple[dict[str, str], list[tuple[int, list[str]]]]:
    """What comments say by name, and the other lines with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    notes: dict[str, str] = {}
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#"):
            name, _, value = line.lstrip("# \t").partition(":")
            notes[name.strip().casefold()] = value.strip()
        elif line.strip():
            found.append((number, next(csv.reader([line]))))
    if len(found) < 2:
        _refuse("has no rows", path)
    return notes, found


def _columns(heading: Sequence[str], path: Path, line: int) -> tuple[int, int, str]:
    """Column of the hour or time, column of the intensity and its unit."""
    heads = [name.strip() for name in heading]
    times = [i for i, name in enumerate(heads) if re.match(r"(hour\b.*\bUTC\b|time\b)", name, re.IGNORECASE)]
    units = [(i, found[1]) for i, name in enumerate(heads) if (found := re.search(r"([A-Za-z]+/[A-Za-z]+)\W*$", name))]
    legal = [(i, unit) for i, unit in units if unit in INTENSITIES]
    if len(times) != 1:
        _refuse(f"{'no' if not times else 'more than one'} column is the hour in UTC or the time", path, line=line)
    if len(legal) != 1:
        _refuse(f"{'no' if not legal else 'more than one'} column has a unit of carbon intensity", path, line=line)
    return times[0], *legal[0]


def _row(line: Sequence[str], time: int, value: int, path: Path, number: int) -> tuple[str, float]:
    try:
        found = float(line[value])
    except (ValueError, IndexError):
        _refuse(f"is no row of a time and an intensity: {','.join(line)}", path, line=number)
    if not (math.isfinite(found) and found >= 0):
        _refuse(f"an intensity is 0 or more, not {line[value].strip()}", path, "a number of 0 or more", line=number)
    if len(line) <= time:
        _refuse(f"is no row of a time and an intensity: {','.join(line)}", path, line=number)
    return line[time].strip(), found


def _by_hour(rows: Sequence[tuple[int, str, float]], path: Path) -> tuple[list[Range], set[int]]:
    """24 figures as they stand, in the file's unit; no year is in them."""
    found: dict[int, float] = {}
    for number, hour, value in rows:
        if not hour.isdecimal() or int(hour) >= HOURS:
            _refuse(f"'{hour}' is no hour of a day", path, "0 to 23", line=number)
        if int(hour) in found:
            _refuse(f"has the hour {int(hour)} a second time", path, "one row for each hour", line=number)
        found[int(hour)] = value
    missing = [str(hour) for hour in range(HOURS) if hour not in found]
    if missing:
        _refuse(f"has no row for the hours {', '.join(missing)}", path, "one row for each of 24 hours")
    return [Range.exact(found[hour]) for hour in range(HOURS)], set()


def _by_time(rows: Sequence[tuple[int, str, float]], path: Path) -> tuple[list[Range], set[int]]:
    """24 means over days with what they may be, in the file's unit, and the years of the rows."""
    found: dict[datetime, float] = {}
    years: set[int] = set()
    for number, text, value in rows:
        at = _moment(text, path, number)
        years.add(at.year)
        hour = at.astimezone(UTC)
        if hour.minute or hour.second or hour.microsecond:
            _refuse(f"'{text}' is not at a full hour", path, "one row for each hour", line=number)
        if hour in found:
            _refuse(f"has {text} a second time", path, "one row for each hour", line=number)
        found[hour] = value
    first, last = min(found), max(found)
    every = [first + timedelta(hours=i) for i in range(round((last - first).total_seconds() / HOUR) + 1)]
    missing = [hour for hour in every if hour not in found]
    if missing or len(every) < HOURS:
        where = f"{missing[0]:%Y-%m-%dT%H:%MZ}" if missing else "a whole day"
        more = f" and {len(missing) - 1} other hours" if len(missing) > 1 else ""
        _refuse(f"has no rows for {where}{more}", path, "a row for each hour from first to last, of a day at least")
    by_hour = [[value for hour, value in found.items() if hour.hour == h] for h in range(HOURS)]
    # a mean of equal numbers may be rounded beyond them
    return [Range(min(v), min(max(fmean(v), min(v)), max(v)), max(v)) for v in by_hour], years


def _moment(text: str, path: Path, line: int) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        _refuse(f"'{text}' is no time", path, "ISO 8601, as in 2024-05-01T13:00Z", line=line)
    if at.tzinfo is None:
        _refuse(f"'{text}' has no offset from UTC", path, "2024-05-01T13:00Z, 2024-05-01T15:00+02:00", line=line)
    return at


def _year(named: str | None, rows: set[int], given: int | None, path: Path) -> int:
    """The year that a file's comment, its rows and the settings agree on."""
    if named is not None and not named.isdecimal():
        _refuse(f"'{named}' is no year", path, "a line '# year: 2024'")
    years = rows | ({int(named)} if named is not None else set()) | ({given} if given is not None else set())
    if len(years) == 1:
        return years.pop()
    if not years:
        _refuse("names no year", path, "a line '# year: 2024', or energy.intensity_year")
    _refuse(f"mixes the years {', '.join(map(str, sorted(years)))}", path, "rows of one year, which all agree on")


def _basis(named: str | None, given: Basis, path: Path) -> Basis:
    if named is not None and named != given:
        _refuse(f"is '{named}'-based, energy.basis is '{given}'", path, "the same in both: location or market")
    return given
