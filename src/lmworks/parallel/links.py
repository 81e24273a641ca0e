"""What the links between machines carry, as it was measured: a file that `lmworks probe` writes and planners read.

Entry [i][j] of a table is the way from machine i to machine j; [i][i] is inside of machine i. Each rank of a machine
has a partner on the other one, and all of them send at a time: an entry is the slowest rank's share of the link.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

from lmworks.core.errors import DataError
from lmworks.core.files import write_text

Table = tuple[tuple[float | None, ...], ...]
"""A row per machine; None: not measured."""
TABLES = ("bytes_per_second", "both_ways", "latency_seconds")
VERSION = 1
"""Of the file's form."""


@final
@dataclass(frozen=True, kw_only=True)
class Profile:
    """Machines, and what was measured between each two of them. Raises DataError for tables that cannot be."""

    machines: tuple[str, ...]
    """Their names, as `parallel.world` calls them."""
    ranks_per_machine: int
    device: str
    """The name of the GPU, or of the processor."""
    driver: str
    """Version of the GPU's driver; empty on a CPU."""
    flops_per_second: float | None
    """Of matrix products on the slowest rank; None where nobody measured."""
    message_bytes: int
    """What was sent for a bandwidth."""
    bytes_per_second: Table
    """One way at a time."""
    both_ways: Table
    """Each way, while as much goes the other way."""
    latency_seconds: Table
    """Of a message of four bytes, one way."""

    def __post_init__(self) -> None:
        wrong = next(self._wrong(), None)
        if wrong is not None:
            raise DataError(wrong, where="measured links", next_step="measure again: lmworks probe --out FILE")

    def _wrong(self) -> Iterator[str]:
        n = len(self.machines)
        if len(set(self.machines)) != n or n == 0:
            yield f"{n} machines with {len(set(self.machines))} names"
        for name in TABLES:
            rows = getattr(self, name)
            if len(rows) != n or any(len(row) != n for row in rows):
                sizes = sorted({len(row) for row in rows})
                yield f"{name} has {len(rows)} rows of {', '.join(map(str, sizes)) or 'no'} entries; {n} of {n} belong"
                continue
            for i, j in ((i, j) for i in range(n) for j in range(n)):
                value = rows[i][j]
                if value is not None and not (math.isfinite(value) and value > 0):
                    dead = ": the link is dead" if value == 0 else ""
                    yield f"{name} {self.pair(i, j)} is {value}, and not a number above 0{dead}"
        if self.flops_per_second is not None and not self.flops_per_second > 0:
            yield f"flops_per_second is {self.flops_per_second}"

    def pair(self, i: int, j: int) -> str:
        """Two machines as errors name them."""
        return f"inside of {self.machines[i]}" if i == j else f"from {self.machines[i]} to {self.machines[j]}"

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Pairs that were not measured; the inside of machines with one rank is none."""
        n, same = len(self.machines), self.ranks_per_machine > 1
        pairs = ((i, j) for i in range(n) for j in range(n) if i != j or same)
        return [(i, j) for i, j in pairs if any(getattr(self, name)[i][j] is None for name in TABLES)]

    def complete(self) -> Profile:
        """With every entry filled in: what was not measured is the median of what its two machines have, or of all.

        `missing` of the profile it is made from says which. Raises DataError when nothing was measured at all.
        """
        filled: dict[str, Any] = {name: self._filled(name) for name in TABLES}
        return replace(self, **filled)

    def _filled(self, name: str) -> Table:
        rows: Table = getattr(self, name)
        n = len(self.machines)
        between = {(i, j): seen for i in range(n) for j in range(n) if i != j and (seen := rows[i][j]) is not None}
        inside = [seen for i in range(n) if (seen := rows[i][i]) is not None]
        if n > 1 and not between:
            text = f"{name} has no measurement between machines"
            raise DataError(text, where="measured links", next_step="measure again: lmworks probe --out FILE")

        def value(i: int, j: int) -> float | None:
            if rows[i][j] is not None or (i == j and not inside):
                return rows[i][j]
            if i == j:
                return median(inside)
            near = [seen for pair, seen in between.items() if {i, j} & set(pair)]
            return median(near or between.values())

        return tuple(tuple(value(i, j) for j in range(n)) for i in range(n))

    def stale(self, device: str, driver: str) -> str | None:
        """What differs on this machine, in a sentence; None when it is as it was."""
        if device != self.device:
            return f"links were measured on '{self.device}', this is '{device}': measure again with lmworks probe"
        if driver != self.driver:
            return f"links were measured with driver {self.driver}, this is {driver}: measure again with lmworks probe"
        return None

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        write_text(path, to_json(self) + "\n")

    def as_table(self) -> str:
        """For people: GB/s of every way, and what all of them have in common."""
        width = max(9, *(len(name) for name in self.machines))
        lines = ["GB/s".ljust(width) + "".join(f"  {name:>{width}}" for name in self.machines)]
        for name, row in zip(self.machines, self.bytes_per_second, strict=True):
            cells = ("-" if value is None else f"{value / 1e9:.3g}" for value in row)
            lines.append(name.ljust(width) + "".join(f"  {cell:>{width}}" for cell in cells))
        late = [value for row in self.latency_seconds for value in row if value is not None]
        if late:
            lines.append(f"latency {1e6 * min(late):.3g} to {1e6 * max(late):.3g} microseconds")
        return "\n".join(lines)


def empty(machines: tuple[str, ...], **facts: Any) -> Profile:
    """A profile in which nothing is measured yet."""
    nothing: Table = ((None,) * len(machines),) * len(machines)
    return Profile(machines=machines, **facts | dict.fromkeys(TABLES, nothing))


def read(path: Path) -> Profile:
    """A profile from its file. Raises DataError for one that is not there, or not one."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
        raise DataError(text, where=str(path), next_step="lmworks probe --out FILE writes one") from error
    except DataError as error:
        raise DataError(error.what, where=str(path), next_step=error.next_step) from error


def to_json(profile: Profile) -> str:
    """As it stands in a file."""
    return json.dumps({"version": VERSION} | asdict(profile), indent=1)


def from_json(text: str) -> Profile:
    """A profile from what `to_json` made of it. Raises DataError for any other text."""
    wrong: str | Exception = f"version {VERSION} is wanted"
    try:
        content = json.loads(text)
        if content.pop("version") == VERSION:
            content["machines"] = tuple(content["machines"])
            content |= {name: tuple(tuple(row) for row in content[name]) for name in TABLES}
            return Profile(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = error
    text = f"not a file of measured links: {wrong}"
    raise DataError(text, where="measured links", next_step="lmworks probe --out FILE writes one")


def changed(table: Table, entries: dict[tuple[int, int], float]) -> Table:
    """The table with some entries replaced."""
    n = len(table)
    return tuple(tuple(entries.get((i, j), table[i][j]) for j in range(n)) for i in range(n))
