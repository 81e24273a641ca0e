"""Who writes what several ranks hold alike: each of them as many bytes as the others, and each value once.

The tensors that the same ranks hold are laid end to end, by name, and the line is cut in equal lengths, at whole rows.
So no rank writes more than its even share and a row, a tensor is in few pieces, and every rank finds its part of the
line by itself: those that hold the same know the same names and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lmworks.model.pieces import Box
from lmworks.parallel.apply import Placement
from lmworks.parallel.shard import local


def share(sizes: Mapping[str, tuple[int, int]], place: int, ranks: int) -> dict[str, range]:
    """Of tensors that `ranks` ranks hold alike, which rows the one at `place` writes; those of which it writes none are
    left out. `sizes`: by name, rows and the bytes of one."""
    whole = sum(rows * row for rows, row in sizes.values())
    found, before = {}, 0
    for name in sorted(sizes):
        rows, row = sizes[name]
        if not rows * row:
            continue
        # the first row that begins at or behind each end of the share
        start, stop = (-(-(whole * end - before * ranks) // (row * ranks)) for end in (place, place + 1))
        part = range(min(max(start, 0), rows), min(max(stop, 0), rows))
        if part:
            found[name] = part
        before += rows * row
    return found


def saved(placement: Placement, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Box]]:
    """Of tensors named 'parameter' or 'parameter/state': what this rank writes, and where it lies in the whole ones.

    What does not lie as its parameter does, such as a step count, is small, and written by its first holder.
    """
    shared: dict[tuple[str, ...], dict[str, tuple[Tensor, Box]]] = {}
    others: dict[str, Tensor] = {}
    for name, either in tensors.items():
        parameter = name if name in placement.boxes else name.rpartition("/")[0]
        box, value = placement.boxes.get(parameter), local(either)
        lies = None if box is None else box.of(value.shape, box.lengths)
        if lies is None:
            others[name] = either
            continue
        axes = tuple(axis for axis, ranks in placement.others_alike(parameter).items() if ranks > 1)
        shared.setdefault(axes, {})[name] = (value, lies)
    mine, where = placement.saved(others)
    for axes, held in shared.items():
        sizes = {name: (x.shape[0], math.prod(x.shape[1:]) * x.element_size()) for name, (x, _) in held.items()}
        for name, rows in share(sizes, *place_among(placement, axes)).items():
            value, lies = held[name]
            mine[name] = value[rows.start : rows.stop]
            where[name] = lies.narrowed(0, rows.start, len(rows))
    return mine, where


def place_among(placement: Placement, axes: tuple[str, ...]) -> tuple[int, int]:
    """Where this rank stands among those that differ along some axes only, and how many they are."""
    place, ranks = 0, 1
    for axis in axes:
        place = place * placement.wire.size(axis) + place_on(placement, axis)
        ranks *= placement.wire.size(axis)
    return place, ranks


def place_on(placement: Placement, axis: str) -> int:
    """Where this rank stands on one axis. Of the ends of a pipeline the first rank is 0, the last one 1."""
    if axis == "ends":
        return int(placement.wire.place("pp") > 0)
    return placement.wire.place(axis)
