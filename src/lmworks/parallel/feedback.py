"""What codes of gradients missed, in checkpoints.

It belongs to the rank that sent the codes and to the sums that it sent them for, so it is kept by rank, and only the
layout that it was made on goes on with it. Names are 'rank-RANK/SUM/HOP/what'; sums count in the order in which they
are made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmworks.model.pieces import Pieces
from lmworks.parallel.layout import Layout
from lmworks.parallel.quantised import Route
from lmworks.parallel.wire import Wire


def made_on(layout: Layout) -> dict[str, Any]:
    """Which rank does what, as JSON tells it: the layout, whatever its machines are called."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(layout)))
    return {name: value for name, value in found.items() if name != "machines"}


def state(routes: Sequence[Route], rank: int) -> dict[str, Tensor]:
    """Of all sums of a rank."""
    missed = [route.missed.state() if route.missed is not None else {} for route in routes]
    return {f"rank-{rank}/{i}/{name}": x for i, found in enumerate(missed) for name, x in found.items()}


def load(
    routes: Sequence[Route], wire: Wire, stored: Pieces, there: dict[str, Any] | None, device: torch.device
) -> str | None:
    """Give each of a rank's sums what its codes missed; all ranks call it. `there`: `made_on` of the checkpoint, None
    where it does not tell. `device`: where this rank computes.

    On another layout, and where some rank finds other sums than its own, nobody is given anything: the sentence that
    is returned says so.
    """
    if wire.layout.state is None or not wire.layout.state.feedback:
        return None
    same = there == made_on(wire.layout)
    found = _of_rank(stored, wire.rank) if same else {}
    here = [found.pop(number, {}) for number in range(len(routes))]
    fits = same and not found and all(map(Route.fits, routes, here))  # a rank without rows of its own has sums of none
    if bool(wire.maximum(torch.tensor([float(not fits)], device=device), "world")):
        why = "of other sums" if same else "of another layout"
        return f"feedback begins anew: what codes of gradients missed is {why} in this checkpoint"
    for route, missed in zip(routes, here, strict=True):
        route.load({name: x.to(device) for name, x in missed.items()})
    return None


def _of_rank(stored: Pieces, rank: int) -> dict[int, dict[str, Tensor]]:
    """What a rank left, by the number of the sum."""
    found: dict[int, dict[str, Tensor]] = {}
    for name in stored.shapes():
        owner, number, what = name.split("/", 2)
        if owner == f"rank-{rank}":
            found.setdefault(int(number), {})[what] = stored.read(name)
    return found
