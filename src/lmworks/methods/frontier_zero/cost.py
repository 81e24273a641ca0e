"""What ZeRO-3, ZeRO++ and ZeRO-topo hold on a rank and send in a step, in closed form.

Bytes are counted by node: in a flat gather every byte enters a node once over the network, and reaches each of its
ranks over that rank's own links. Nothing is hidden behind computing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes and their links, GB/s. Defaults: Frontier, from memory."""

    nodes: int
    per_node: int = 8
    pair: float = 200.0
    """Between the two dies of a package, per rank."""
    link: float = 50.0
    """Inside a node, per rank."""
    net: float = 100.0
    """Of a node's network cards together."""

    def across(self, gigabytes: float) -> float:
        """Seconds in which so much enters every node that does not hold it."""
        return gigabytes * (1 - 1 / self.nodes) / self.net

    def inside(self, gigabytes: float) -> float:
        """Seconds in which the ranks of a node exchange so much, of which each has a part."""
        return gigabytes * (1 - 1 / self.per_node) / self.link

    def flat(self, gigabytes: float) -> float:
        """Seconds of a gather over all ranks: the network, or the links behind it."""
        return max(self.across(gigabytes), gigabytes / self.link)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of communication in a step: for each micro-batch, and once."""

    micro: float
    once: float = 0.0

    def of(self, accumulation: int) -> float:
        """With so many micro-batches."""
        return accumulation * self.micro + self.once


def memory(
    values: float, *, weights: int, gradients: int, optimizer: int, secondary: int | None = None, copied: float = 1.0
) -> float:
    """Bytes of a rank in mixed precision, P values: 2 P / s_w + copied P / s_2 + 2 P / s_g + 12 P / s_o.

    `copied`: bytes of a value of the second copy; 1 for int8, 2 for the plain one of hpZ.
    """
    second = 0.0 if secondary is None else copied * values / secondary
    return 2 * values / weights + second + 2 * values / gradients + 12 * values / optimizer


def zero_3(cluster: Cluster, gathered: float) -> Seconds:
    """Weights twice and gradients once over all ranks; `gathered`: GB of all weights in bf16, M."""
    return Seconds(micro=3 * cluster.flat(gathered))


def zero_plus_plus(cluster: Cluster, gathered: float) -> Seconds:
    """int8 forward over all, plain backward inside the node, int4 gradients inside and across."""
    quarter = gathered / 4
    backward = cluster.inside(gathered)
    return Seconds(
        micro=cluster.flat(gathered / 2) + backward + cluster.inside(quarter) + cluster.across(quarter),
    )


def topo(cluster: Cluster, gathered: float) -> Seconds:
    """Plain forward over the pair, int8 backward and int4 gradients inside the node; once a step gradients out and
    weights back across nodes, and the pairs' halves from the node's eighths."""
    half = gathered / 2
    micro = half / cluster.pair + cluster.inside(half) + cluster.inside(gathered / 4)
    refresh = gathered * (1 / 2 - 1 / cluster.per_node) / cluster.link
    return Seconds(micro=micro, once=2 * cluster.across(gathered) + refresh)


def break_even(cluster: Cluster, gathered: float) -> float:
    """Micro-batches a step from which topo sends for less time than ZeRO++; infinite where it never does."""
    ours, theirs = topo(cluster, gathered), zero_plus_plus(cluster, gathered)
    saved = theirs.micro - ours.micro
    return ours.once / saved if saved > 0 else float("inf")
