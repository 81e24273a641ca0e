"""The closed forms against the order on a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.parallel.schedule import order
from lmworks.parallel.timeline import Link, simulate
from lmworks.plan.latency import (
    Pipeline,
    amp_exchange_seconds,
    amp_seconds,
    pipette_seconds,
    ring_seconds,
    two_level_seconds,
)

SECONDS = st.floats(0.01, 10.0)


def on_the_clock(pipeline: Pipeline) -> float:
    """1F1B, each link with an equal part of C."""
    found = order("1f1b", ranks=pipeline.ranks, micro_batches=pipeline.micro_batches)
    hop = pipeline.crossing / (2 * max(1, pipeline.ranks - 1))
    link = Link(bytes_per_second=1 / hop) if hop else None
    times = {"forward_seconds": pipeline.forward, "backward_seconds": pipeline.backward}
    return simulate(found, **times, link=link, boundary_bytes=1.0).makespan


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 16), SECONDS, SECONDS)
def test_it_is_exact_where_sends_are_free(ranks: int, more: int, forward: float, backward: float) -> None:
    pipeline = Pipeline(ranks=ranks, micro_batches=ranks + more, forward=forward, backward=backward)
    assert pipette_seconds(pipeline) == pytest.approx(on_the_clock(pipeline), rel=1e-9)


@given(st.integers(1, 8), st.integers(1, 7), SECONDS, SECONDS)
def test_fewer_micro_batches_than_ranks_fill_and_empty_once(ranks: int, m: int, f: float, w: float) -> None:
    """All go forward and come back behind each other; GPipe's order does the same with so few."""
    pipeline = Pipeline(ranks=ranks, micro_batches=min(m, ranks), forward=f, backward=w)
    found = order("gpipe", ranks=ranks, micro_batches=pipeline.micro_batches)
    clock = simulate(found, forward_seconds=f, backward_seconds=w).makespan
    assert pipette_seconds(pipeline) == pytest.approx(clock, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 16), st.floats(0.5, 3.0), st.floats(0.0, 0.1))
def test_short_sends_cost_what_it_says_within_five_in_a_hundred(
    ranks: int, more: int, backward: float, hop: float
) -> None:
    plain = Pipeline(ranks=ranks, micro_batches=ranks + more, forward=1.0, backward=backward)
    pipeline = replace(plain, crossing=2 * hop * (ranks - 1))
    assert pipette_seconds(pipeline) == pytest.approx(on_the_clock(pipeline), rel=0.05)


@given(st.integers(2, 8), st.integers(1, 7), st.integers(1, 4), SECONDS)
def test_whole_rounds_forget_the_last_one(ranks: int, more: int, rounds: int, crossing: float) -> None:
    m = rounds * ranks + more % ranks
    pipeline = Pipeline(ranks=ranks, micro_batches=m, forward=1.0, backward=2.0, crossing=crossing)
    forgotten = (m % ranks) / ranks * (ranks * 3.0 + crossing)
    assert pipette_seconds(pipeline) - pipette_seconds(pipeline, whole_rounds=True) == pytest.approx(forgotten)


def test_long_sends_order_the_forms_by_their_error() -> None:
    """The grid of the page: AMP counts one way through the links, whole rounds lose a part of a step."""
    errors: dict[str, list[float]] = {"amp": [], "whole rounds": [], "pipette": []}
    for hop in (0.1, 0.3, 1.0):
        for ranks in (2, 4, 8):
            for m in (ranks, 2 * ranks, 3 * ranks + 1, 8 * ranks):
                pipeline = Pipeline(
                    ranks=ranks, micro_batches=m, forward=1.0, backward=2.0, crossing=2 * hop * (ranks - 1)
                )
                true = on_the_clock(pipeline)
                errors["amp"].append(abs(amp_seconds(pipeline) / true - 1))
                errors["whole rounds"].append(abs(pipette_seconds(pipeline, whole_rounds=True) / true - 1))
                errors["pipette"].append(abs(pipette_seconds(pipeline) / true - 1))
    mean = {name: sum(each) / len(each) for name, each in errors.items()}
    assert mean["pipette"] < 0.05
    assert mean["pipette"] < mean["whole rounds"] < mean["amp"]


def test_rings_of_one_rank_send_nothing() -> None:
    assert ring_seconds(8.0, 1, 2.0) == 0.0
    assert ring_seconds(8.0, 4, 2.0) == pytest.approx(2 * 3 / 4 * 8 / 2)
    assert amp_exchange_seconds(8.0, 4, inside=10.0, between=2.0) == ring_seconds(8.0, 4, 2.0)


@given(st.integers(1, 8), st.integers(1, 8))
def test_two_levels_send_inside_and_then_between(inside: int, outside: int) -> None:
    sizes = {"inside_ranks": inside, "inside": 10.0, "outside_ranks": outside, "outside": 2.0}
    found = two_level_seconds(8.0, **sizes)
    assert found == (ring_seconds(8.0, inside, 10.0), ring_seconds(8.0, outside, 2.0))
    assert two_level_seconds(8.0, **sizes, times_inside=2) == (2 * found[0], found[1])
