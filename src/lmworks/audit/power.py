"""Energy of a recorded file of power over time."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmworks.core.energy.footprint import kwh_of
from lmworks.core.energy.power import Integrator
from lmworks.core.errors import DataError

SECONDS = {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}
WATTS = {"W": 1.0, "mW": 1e-3, "kW": 1e3}


def replay(path: Path, *, period: float | None = None) -> dict[str, float]:
    """Energy of a CSV file of power over time: two columns, each with its unit, as in 'time (s)' and 'power (W)'.

    `period`: seconds between samples; None: the median. Gaps above five of them are not integrated, and told. Raises
    DataError for a file without units, or with lines that are no numbers.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    if len(lines) < 3:
        raise DataError("has fewer than two samples", where=str(path))
    scales = [_scale(lines[0], table, what, path) for table, what in ((SECONDS, "time"), (WATTS, "power"))]
    samples = [_sample(line, scales, path, number) for number, line in enumerate(lines[1:], start=2)]
    steps = np.diff([at for at, _ in samples])
    if (steps < 0).any():
        raise DataError("time runs backwards", where=f"{path}:{int(np.argmax(steps < 0)) + 3}")
    found = Integrator(period=period or float(np.median(steps)))
    joules = sum(found.add(at, watts) for at, watts in samples)
    return {
        "kwh": kwh_of(joules),
        "joules": joules,
        "seconds": samples[-1][0] - samples[0][0],
        "gap_seconds": found.gap_seconds,
        "missing": found.missing,
        "clamped": found.clamped,
    }


def _scale(header: Sequence[str], table: dict[str, float], what: str, path: Path) -> tuple[int, float]:
    """Column and scale of the first heading that ends in a unit of the table."""
    for column, name in enumerate(header):
        match = re.search(r"[\s_(\[]([A-Za-z]+)[)\]]?\s*$", name)
        if match and match[1] in table:
            return column, table[match[1]]
    raise DataError(
        f"no column has a unit of {what}: {', '.join(header)}",
        where=f"{path}:1",
        legal=f"a heading that ends in one of {', '.join(table)}, as in 'time (s),power (W)'",
    )


def _sample(line: Sequence[str], scales: Sequence[tuple[int, float]], path: Path, number: int) -> tuple[float, float]:
    (when, seconds), (what, watts) = scales
    try:
        power = line[what].strip()
        return float(line[when]) * seconds, float(power) * watts if power else math.nan
    except (ValueError, IndexError):
        raise DataError(f"is no sample: {','.join(line)}", where=f"{path}:{number}") from None
