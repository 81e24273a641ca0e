"""From what sensors say to joules: counters that wrap and are reset, samples of power, models where there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lmworks.core.energy.footprint import Range

GAP = 5.0
"""Sampling periods without a sample beyond which nothing is integrated: the machine slept, or the sampler did."""


@dataclass
class Counter:
    """A counter of energy that only rises, until it starts again."""

    whole: int | None = None
    """At which value it starts again at 0; None: it does so only when it is reset."""
    last: int | None = None
    resets: int = 0
    """Times that it was reset: what was counted between the last reading and the reset is not known."""

    def since(self, reading: int, most: float = math.inf) -> int:
        """What was counted since the last reading, never less than 0. `most`: what can have been counted at most; a
        counter that went round by more was reset."""
        before, self.last = self.last, reading
        if before is None or reading == before:
            return 0
        if reading > before:
            return reading - before
        round_once = (reading - before) % self.whole if self.whole is not None else None
        if round_once is None or round_once > most:
            self.resets += 1
            return 0
        return round_once


@dataclass
class Integrator:
    """Joules from samples of power at any times, by trapezoids."""

    period: float
    """Seconds that should lie between two samples."""
    gap_seconds: float = 0.0
    """Not integrated: no sample for longer than GAP periods."""
    clamped: int = 0
    """Samples below 0, taken as 0."""
    missing: int = 0
    """Samples that were no number."""
    _last: tuple[float, float] | None = field(default=None, repr=False)

    def add(self, at: float, watts: float | None) -> float:
        """Take a sample at a time in seconds; joules since the sample before it.

        A sample that is missing is bridged by its neighbours. Raises ValueError when time runs backwards.
        """
        if watts is None or not math.isfinite(watts):
            self.missing += 1
            return 0.0
        if watts < 0:
            self.clamped += 1
            watts = 0.0
        before, self._last = self._last, (at, watts)
        if before is None:
            return 0.0
        seconds = at - before[0]
        if seconds < 0:
            raise ValueError(f"samples come in order: {at} after {before[0]}")
        if seconds > GAP * self.period:
            self.gap_seconds += seconds
            return 0.0
        return seconds * (before[1] + watts) / 2


# --- models: where there is no counter --------------------------------------------------------------------------------

IDLE = 0.1
"""Share of its thermal design power that a processor takes without load, in the load model."""


def cpu_watts(load: float, tdp: Range) -> Range:
    """Power of a processor by its load (0 to 1) and its thermal design power: TDP (0.1 + 0.9 load^3).

    The ends are the envelope of five processors that were measured against their load (codecarbon's profiles of
    2025-01-14): at least TDP load^1.5 / 2, at most TDP min(1.4, 0.1 + 2 load).
    """
    load = min(max(load, 0.0), 1.0)
    return Range(
        tdp.low * load**1.5 / 2,
        tdp.central * (IDLE + (1 - IDLE) * load**3),
        tdp.high * min(1.4, IDLE + 2 * load),
    )


def cpu_watts_of_share(share: float, tdp: Range) -> Range:
    """Power that falls on processes which took a share of a processor's time: TDP share. Its idle power is nobody's."""
    share = min(max(share, 0.0), 1.0)
    return Range(tdp.low * share / 2, tdp.central * share, tdp.high * share * 1.4)


DIMM_WATTS, DIMM_WATTS_ARM = 5.0, 1.5
LEAST_WATTS, LEAST_WATTS_ARM = 10.0, 3.0
WATTS_PER_GIB = 3.0 / 8.0
"""The older rule: 3 W for 8 GB."""
STEPS = ((4, 1.0), (4, 0.9), (8, 0.8), (16, 0.7))
"""So many modules, one after another, and what each of them takes of a module's power."""


def dimms_of(gibibytes: float) -> int:
    """Modules that a machine with so much memory is likely to have."""
    for most, count in ((2, 1), (16, 2), (64, 4), (128, 8)):
        if gibibytes <= most:
            return count
    size = max(size for size in (4, 8, 16, 32, 64, 128) if size <= gibibytes / 8)
    return min(math.ceil(gibibytes / size), 32)


def memory_watts(gibibytes: float, *, arm: bool = False) -> Range:
    """Power of a machine's memory: by modules; the range reaches to the older rule of 3 W for 8 GB."""
    left, total = dimms_of(gibibytes), 0.0
    for count, share in STEPS:
        taken = min(left, count)
        total += taken * share * (DIMM_WATTS_ARM if arm else DIMM_WATTS)
        left -= taken
    central = max(total, LEAST_WATTS_ARM if arm else LEAST_WATTS)
    older = gibibytes * WATTS_PER_GIB
    return Range(min(central, older), central, max(central, older))
