"""What an exchange takes on a cluster's ladder of links, and which links an axis of a layout runs over.

A ring over n ranks that stand `stride` apart crosses the levels up to the first that joins all of them. On each it goes
as fast as that level's links, times its own ranks within a block of the level below: those have links of their own side
by side, and rings are laid over all of them. The slowest level counts. A call costs log2(n) latencies besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from lmworks.parallel.layout import Layout
from lmworks.parallel.timeline import Link
from lmworks.plan.cluster import Cluster

BELOW = {
    "tp": (),
    "cp": ("tp",),
    "fsdp": ("tp",),
    "edp": ("tp",),
    "dp_shard": ("tp", "cp"),
    "dp_replicate": ("tp", "cp", "dp_shard"),
    "pp": ("tp", "cp", "dp_shard", "dp_replicate"),
}
"""The axes whose ranks stand between two neighbours of an axis."""


@final
@dataclass(frozen=True)
class Ring:
    """Ranks that exchange, as the cluster carries it."""

    ranks: int
    bytes_per_second: float
    """That each of them sends."""
    latency_seconds: float
    """Of a call."""

    def seconds(self, sent: float, calls: float = 1) -> float:
        """To send so many bytes a rank in so many calls; 0 for a rank alone."""
        return sent / self.bytes_per_second + calls * self.latency_seconds if self.ranks > 1 else 0.0


def ring(cluster: Cluster, ranks: int, stride: int) -> Ring:
    """The ring of `ranks` ranks that stand `stride` apart."""
    rate, latency, below = math.inf, 0.0, 1
    for level in cluster.links:
        beside = min(ranks, max(1, below // stride))
        joined = level.ranks or ranks * stride
        if joined > stride:  # neighbours meet on this level, or on one above
            rate = min(rate, level.bytes_per_second.value * beside)
            latency = level.latency_seconds.value
        if joined >= ranks * stride:
            break
        below = joined
    return Ring(ranks, rate, latency * math.log2(max(2, ranks)))


def spread(cluster: Cluster, ranks: int, stride: int) -> Ring:
    """Ranks `stride` apart of which each sends as much to every other: what goes over a level is its own alone."""
    rate, latency, met = math.inf, 0.0, 1
    for level in cluster.links:
        here = min(ranks, max(1, (level.ranks or ranks * stride) // stride))
        if here > met:
            rate = min(rate, level.bytes_per_second.value * (ranks - 1) / (here - met))
            latency = level.latency_seconds.value
        met = max(met, here)
        if met == ranks:
            break
    return Ring(ranks, rate, latency * math.log2(max(2, ranks)))


def stride(layout: Layout, axis: str) -> int:
    """How far apart neighbours of an axis stand."""
    return math.prod(layout.size(other) for other in BELOW[axis])


def of_axis(cluster: Cluster, layout: Layout, axis: str) -> Ring:
    """The ring of an axis of a settled layout."""
    return ring(cluster, layout.size(axis), stride(layout, axis))


def between(cluster: Cluster, here: int, there: int) -> Link:
    """The link from one rank to another."""
    for level in cluster.links:
        if level.ranks is None or here // level.ranks == there // level.ranks:
            return Link(latency_seconds=level.latency_seconds.value, bytes_per_second=level.bytes_per_second.value)
    raise AssertionError("the last level joins all ranks")


def of_pipeline(cluster: Cluster, layout: Layout) -> dict[tuple[int, int], Link]:
    """The links between places of a pipeline, neighbours and both ends, at the first rank of each."""
    apart, found = stride(layout, "pp"), {}
    for place in range(layout.pp):
        for other in {(place + 1) % layout.pp, (place - 1) % layout.pp} - {place}:
            found[place, other] = between(cluster, place * apart, other * apart)
    return found
