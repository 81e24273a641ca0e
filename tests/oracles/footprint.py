"""Energy and carbon by slow, plain sums: one second, one sample, one part at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def joules_of_samples(samples: Sequence[tuple[float, float | None]], period: float) -> tuple[float, float]:
    """Joules under straight lines between the samples that are numbers, and seconds of gaps above five periods."""
    there = [(at, max(0.0, watts)) for at, watts in samples if watts is not None and watts == watts]
    joules = gaps = 0.0
    for (at, watts), (later, then) in itertools.pairwise(there):
        if later - at > 5 * period:
            gaps += later - at
        else:
            joules += (later - at) * watts + (later - at) * (then - watts) / 2
    return joules, gaps


def tonnes(
    *, parameters: float, tokens: float, kg_per_kwh: float, pue: float, watts: float, peak: float, share: float, n: int
) -> tuple[float, float]:
    """(MWh of the site, t CO2e) as LLMCarbon writes it: days first."""
    days = 6 * parameters * tokens / (n * peak * share * 86400)
    megawatt_hours = watts * n * 24 * days * pue / 1e6
    return megawatt_hours, megawatt_hours * 1000 * kg_per_kwh / 1000


def modules(gibibytes: float) -> float:
    """Watts of memory on x86, module by module."""
    total = 0.0
    count = 1 if gibibytes <= 2 else 2 if gibibytes <= 16 else 4 if gibibytes <= 64 else 8
    if gibibytes > 128:
        size = 4
        while size < 128 and 2 * size <= gibibytes / 8:
            size *= 2
        count, left = 0, gibibytes
        while left > 0 and count < 32:
            left -= size
            count += 1
    for i in range(count):
        total += 5.0 * (1.0 if i < 4 else 0.9 if i < 8 else 0.8 if i < 16 else 0.7)
    return max(10.0, total)


def by_hour_of_day(first: int, values: Sequence[float]) -> list[tuple[float, float, float]]:
    """(least, mean, greatest) of each hour of the day of values that begin at the hour `first`."""
    found = []
    for hour in range(24):
        same = [value for i, value in enumerate(values) if (first + i) % 24 == hour]
        found.append((min(same), sum(same) / len(same), max(same)))
    return found


def seconds_by_hour(start: int, end: int, *, step: int) -> list[float]:
    """Seconds in each hour of the day, block by block."""
    found = [0.0] * 24
    for at in range(start, end, step):
        found[at // 3600 % 24] += step
    return found


def mean_from(day: Sequence[float], start: int, hours: float) -> float:
    """Mean of a day's values over so many hours from a full hour on, hour by hour."""
    left, at, total = hours, start, 0.0
    while left > 0:
        part = min(left, 1.0)
        total += part * day[at % 24]
        left, at = left - part, at + 1
    return total / hours
