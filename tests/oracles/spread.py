"""Row by row: who writes what several ranks hold alike."""

from __future__ import annotations

from collections.abc import Mapping


def rows_of(sizes: Mapping[str, tuple[int, int]], place: int, ranks: int) -> dict[str, list[int]]:
    """The line of all bytes is cut in `ranks` equal lengths; a row belongs to the length in which it begins."""
    line = [(name, i) for name in sorted(sizes) for i in range(sizes[name][0]) for _ in range(sizes[name][1])]
    found: dict[str, list[int]] = {}
    for at, (name, i) in enumerate(line):
        begins = at == 0 or line[at - 1] != (name, i)
        if begins and at * ranks // len(line) == place:
            found.setdefault(name, []).append(i)
    return found
