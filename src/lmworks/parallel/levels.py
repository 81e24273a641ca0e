"""Bytes by the level of links that they cross: in a pair of dies, in a node, between nodes.

A placement of states names the levels (`StatePlacement.levels`); the network is above them all. Ring algorithms send
from each rank to the next one along the axis, from the last to the first; what goes to all others is spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmworks.parallel.layout import Layout
from lmworks.parallel.state import STATE_AXES

TO_ALL = "all-to-all"
"""How the names of operations begin that send to every other rank of the axis."""


def by_level(layout: Layout, rank: int, sent: Mapping[tuple[str, str], float]) -> list[float]:
    """Bytes that a rank sends over each level, from the fastest on; the last is the network.

    `sent`: bytes by (axis, operation), as a Wire's bills have them; axes that are no state's are left out.
    """
    assert layout.state is not None, "a layout with a placement of states"
    found = [0.0] * (len(layout.state.levels) + 1)
    for (axis, operation), size in sent.items():
        if axis.partition("/")[0] in STATE_AXES and layout.size(axis) > 1:
            to = _receivers(layout, rank, axis, all_others=operation.startswith(TO_ALL))
            for other in to:
                found[layout.state.level(layout.place(rank, "fsdp"), other)] += size / len(to)
    return found


def _receivers(layout: Layout, rank: int, axis: str, *, all_others: bool) -> list[int]:
    """Places in the view fsdp of the ranks that a rank sends to along an axis."""
    assert layout.state is not None, "a layout with a placement of states"
    ranks, here, own = layout.size(axis), layout.place(rank, axis), layout.place(rank, "fsdp")
    stride = layout.state.stride(axis, layout.size("fsdp"))
    to = [place for place in range(ranks) if place != here] if all_others else [(here + 1) % ranks]
    return [own + (place - here) * stride for place in to]


def names(layout: Layout) -> list[str]:
    """What the levels are called: by the ranks that they join."""
    levels: Sequence[int] = layout.state.levels if layout.state is not None else ()
    return [f"among {size}" for size in levels] + ["network"]
