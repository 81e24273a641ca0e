"""Seconds of a step by closed forms: what planners of pipelines say of one, beside each other.

1F1B keeps p micro-batches under way and no more, so the first rank waits for a way there and back through the pipeline
once for every p micro-batches, and not once a step. `parallel.timeline` runs the order itself, and is what these are
held against. f and w are seconds of a micro-batch forward and backward in one stage, p ranks of the pipeline, m
micro-batches, C seconds of a micro-batch on all links of a pipeline, there and back.

    pipette_seconds   m >= p: m / p (p (f + w) + C) + (p - 1)(f + w);    m < p: p (f + w) + C + (m - 1)(f + w)
    amp_seconds       (m - 1 + p) 3 f + C
    ring_seconds      2 (n - 1) / n bytes / bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline under 1F1B, stages alike; seconds."""

    ranks: int
    """p."""
    micro_batches: int
    """m."""
    forward: float
    """f."""
    backward: float
    """w."""
    crossing: float = 0.0
    """C."""


def pipette_seconds(pipeline: Pipeline, *, whole_rounds: bool = False) -> float:
    """T_pipe of Pipette. Exact where sends are free.

    `whole_rounds`: m / p without its fraction, as the paper's code has it; a last round that is not full is then free.
    """
    p, m = pipeline.ranks, pipeline.micro_batches
    both = pipeline.forward + pipeline.backward
    if m < p:
        return p * both + pipeline.crossing + (m - 1) * both
    rounds = m // p if whole_rounds else m / p
    return rounds * (p * both + pipeline.crossing) + (p - 1) * both


def amp_seconds(pipeline: Pipeline) -> float:
    """The pipeline as AMP takes it: one way through the links in all, and a backward pass of two forward passes."""
    return (pipeline.micro_batches - 1 + pipeline.ranks) * 3 * pipeline.forward + pipeline.crossing


def ring_seconds(nbytes: float, ranks: int, bytes_per_second: float) -> float:
    """An all-reduce over a ring of which the slowest link carries `bytes_per_second`."""
    return 2 * (ranks - 1) / ranks * nbytes / bytes_per_second if ranks > 1 else 0.0


def amp_exchange_seconds(nbytes: float, ranks: int, inside: float, between: float) -> float:
    """The exchange of gradients as AMP takes it: one ring over all data-parallel ranks, on the slower of two links."""
    return ring_seconds(nbytes, ranks, min(inside, between))


def two_level_seconds(
    nbytes: float, *, inside_ranks: int, inside: float, outside_ranks: int, outside: float, times_inside: int = 1
) -> tuple[float, float]:
    """T_in and T_out of an exchange first inside machines and then between them, in bytes per second of each.

    `times_inside` = 2: what inside was summed for the links between is told to all afterwards, as the variant does that
    counts bandwidth only.
    """
    return (
        times_inside * ring_seconds(nbytes, inside_ranks, inside),
        ring_seconds(nbytes, outside_ranks, outside),
    )
