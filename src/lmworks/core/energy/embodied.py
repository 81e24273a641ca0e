"""What making a machine cost the climate, part by part, and the share of it that falls on the hours of a run.

    kg = sum over parts of units x kg per unit x count, times hours of use / hours of life

Figures, their source and the ends of their ranges stand in `figures/embodied.toml`. Disks and network are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from lmworks.core.energy.devices import MOST_THREADS, longest
from lmworks.core.energy.footprint import DAYS_PER_YEAR, HOURS_PER_DAY, LIFE_YEARS, NOTHING, Made, Range
from lmworks.core.energy.grid import figures

SLICE = re.compile(r"\bMIG (\d+)g\.")
SLICES = 7
"""Slices of computing that NVIDIA cuts a whole GPU into."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a machine that was made."""

    name: str
    kg: Range
    """Of CO2 equivalent, of all of its count."""
    note: str
    """Where the figure is from, or what is not known of it."""

    def to_json(self) -> dict[str, Any]:
        """For a run's record."""
        return {"part": self.name, "kg_co2e": self.kg.to_json(), "note": self.note}


def host(*, gibibytes: float, sockets: int = 1, threads: int | None = None) -> list[Piece]:
    """A machine without its GPUs: processors, memory, all else of the board but disks.

    `threads`: of a virtual machine, which may be a small part of its host; None on real hardware. The low end of what
    it does not own alone is its threads' share of the largest socket.
    """
    table = figures("embodied")
    processor = Made(units=table["processor"]["units"], kg_per_unit=table["processor"]["kg_per_unit"], count=sockets)
    memory = Made(units=gibibytes, kg_per_unit=table["memory"]["kg_per_unit"], count=1)
    board = Made(units=table["board"]["units"], kg_per_unit=table["board"]["kg_per_unit"], count=1)
    least = 1.0 if threads is None else min(1.0, threads / MOST_THREADS)
    shared = "" if threads is None else f"; a virtual machine of {threads} threads, which may be a small part of it"
    dies = f"{sockets} die{'s' if sockets > 1 else ''} of {processor.units:g} cm2, whatever the processor{shared}"
    return [
        Piece(name="processors", kg=_ranged(processor, least), note=dies),
        Piece(name="memory", kg=_ranged(memory, 1.0), note=f"{gibibytes:.0f} GB"),
        Piece(name="rest of the board", kg=_ranged(board, least), note=f"of a server, without disks{shared}"),
    ]


def gpu(name: str) -> Piece:
    """The die of a board by the name that it gives itself; of one that is not in the table, anything from the smallest
    to the largest that are. A slice of a GPU (MIG) counts as so many sevenths."""
    table = figures("embodied")["gpus"]
    by_process = table["kg_per_cm2"]
    found = longest(name, table["dies"])
    if found is not None:
        row = table["dies"][found]
        kg = _ranged(Made(units=row["cm2"], kg_per_unit=by_process[row["process"]], count=1), 1.0)
        note = f"{found}, a die of {row['cm2']:g} cm2 ({row['process']})"
    else:
        all_of_them = sorted(row["cm2"] * by_process[row["process"]] for row in table["dies"].values())
        ends = figures("embodied")["ends"]
        kg = Range(all_of_them[0] * ends["low"], median(all_of_them), all_of_them[-1] * ends["high"])
        note = "not in the table: from its smallest die to its largest"
    cut = SLICE.search(name)
    if cut is not None:
        slices = min(int(cut[1]), SLICES)
        kg, note = kg.times(slices / SLICES), f"{note}; {slices} of {SLICES} slices of it"
    return Piece(name=f"GPU ({name})", kg=kg, note=note)


def _ranged(made: Made, least: float) -> Range:
    """What a part cost, from the table's low end, times a share, to its high end."""
    ends, kg = figures("embodied")["ends"], made.units * made.kg_per_unit * made.count
    return Range(ends["low"] * least * kg, kg, ends["high"] * kg)


def kg_of(pieces: Iterable[Piece]) -> Range:
    """All of them together."""
    total = NOTHING
    for piece in pieces:
        total = total.plus(piece.kg)
    return total


def share_of_life(kg: Range, hours: float) -> Range:
    """What falls on so many hours of the years that hardware is in use."""
    return kg.times(hours / (LIFE_YEARS * DAYS_PER_YEAR * HOURS_PER_DAY))


@cache
def of_node(device: str | None, *, devices: int, gibibytes: float, sockets: int, dies: int = 1) -> Range:
    """One device with its share of the node that it stands in. `device`: a board's name; None: the processor itself.
    `dies`: devices that a board holds."""
    around = kg_of(host(gibibytes=gibibytes, sockets=sockets)).times(1 / devices)
    return around if device is None else around.plus(gpu(device).kg.times(1 / dies))


def told(pieces: Sequence[Piece], share: Range) -> dict[str, Any]:
    """Facts for a record: the parts, and the share of making them that falls on a run; apart from what it emitted."""
    table = figures("embodied")
    return {
        "kg_co2e": share.to_json(),
        "machine_kg_co2e": kg_of(pieces).to_json(),
        "life_years": LIFE_YEARS,
        "parts": [piece.to_json() for piece in pieces],
        "source": table["source"],
    }
