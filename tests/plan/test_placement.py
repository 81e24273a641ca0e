"""Orders of machines: the objective against an oracle, the search against all orders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.plan.placement import Ground, accepts, anneal, exact
from tests.oracles import placement as oracle


def links(machines: int, seed: int, *, alike: bool = False) -> Any:
    draw = np.random.default_rng(seed)
    return np.full((machines, machines), 3.0) if alike else np.exp(draw.normal(0, 0.5, (machines, machines)))


def ground(bandwidth: Any, stages: int, **over: Any) -> Ground:
    facts = {"boundary_bytes": 1.0, "gradient_bytes": 5.0} | over
    return Ground(bytes_per_second=bandwidth.tolist(), stages=stages, **facts)


CASES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))


@given(CASES, st.sampled_from(["slowest", "first"]), st.randoms(use_true_random=False))
def test_the_objective_is_the_pages(case: tuple[int, int, int], rings: Any, chance: Any) -> None:
    pipelines, stages, seed = case
    bandwidth = links(pipelines * stages, seed)
    order = chance.sample(range(pipelines * stages), pipelines * stages)
    want = oracle.seconds(order, bandwidth, stages=stages, boundary=1.0, gradients=5.0, all_stages=rings == "slowest")
    assert ground(bandwidth, stages, rings=rings).seconds(order) == pytest.approx(want, rel=1e-12)


@given(CASES, st.randoms(use_true_random=False))
def test_with_links_alike_every_order_takes_what_the_closed_form_says(case: tuple[int, int, int], chance: Any) -> None:
    pipelines, stages, seed = case
    number = pipelines * stages
    order = chance.sample(range(number), number)
    want = (stages - 1) * 2 * 1.0 / 3.0 + (2 * (pipelines - 1) / pipelines * 5.0 / 3.0)
    found = ground(links(number, 0, alike=True), stages)
    assert found.seconds(order) == pytest.approx(want)
    assert anneal(found, seed=seed, moves=50).seconds == pytest.approx(want)


@given(CASES, st.integers(0, 3), st.booleans())
def test_another_first_pipeline_and_the_other_way_round_change_nothing(
    case: tuple[int, int, int], turn: int, back: bool
) -> None:
    pipelines, stages, seed = case
    found = ground(links(pipelines * stages, seed), stages)
    order = [int(x) for x in np.random.default_rng(seed).permutation(pipelines * stages)]
    rows = list(found.rows(order))
    rows = rows[turn % pipelines :] + rows[: turn % pipelines]
    rows = rows[::-1] if back else rows
    assert found.seconds([machine for row in rows for machine in row]) == pytest.approx(found.seconds(order))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_the_numbers_of_pipelines_do_not_matter(pipelines: int, stages: int, seed: int) -> None:
    """Up to three any order of them is the same ring; C never depends on it."""
    found = ground(links(pipelines * stages, seed), stages)
    rows = found.rows(range(pipelines * stages))
    costs = [found.seconds([m for row in other for m in row]) for other in permutations(rows)]
    assert max(costs) == pytest.approx(min(costs))


@given(CASES)
def test_a_start_never_takes_longer_than_what_becomes_of_it(case: tuple[int, int, int]) -> None:
    pipelines, stages, seed = case
    found = ground(links(pipelines * stages, seed), stages)
    order = range(pipelines * stages)
    costs = [found.seconds(order[:size]) for size in range(len(order) + 1)]
    assert all(a <= b + 1e-12 for a, b in pairwise(costs))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("stages", [2, 3])
def test_six_machines_annealed_are_the_best_of_720(stages: int, seed: int) -> None:
    bandwidth = links(6, seed)
    best = oracle.best(bandwidth, stages=stages, boundary=1.0, gradients=5.0)
    found = ground(bandwidth, stages)
    assert exact(found).seconds == pytest.approx(best, rel=1e-12)
    annealed = anneal(found, seed=seed, moves=8000)
    assert annealed.seconds == pytest.approx(best, rel=1e-12)
    assert annealed.seconds == pytest.approx(found.seconds(annealed.order), rel=1e-12)
    assert sorted(annealed.order) == list(range(6))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(1, 7), (2, 7), (7, 7), (3, 6)]))
def test_leaving_starts_out_loses_nothing(seed: int, size: tuple[int, int]) -> None:
    stages, machines = size
    if machines % stages:
        return
    bandwidth = links(machines, seed)
    found = exact(ground(bandwidth, stages))
    assert found.seconds == pytest.approx(oracle.best(bandwidth, stages=stages, boundary=1.0, gradients=5.0))
    assert found.tried < sum(math.perm(machines, k) for k in range(machines + 1))


def test_the_same_seed_gives_the_same_order() -> None:
    found = ground(links(12, 0), 3)
    first, again = (anneal(found, seed=5, moves=500) for _ in range(2))
    assert first == again
    assert first.order != anneal(found, seed=6, moves=500).order


def test_the_best_so_far_comes_back_when_time_is_up() -> None:
    def clock() -> Iterator[float]:
        yield from (0.1 * i for i in range(10_000))

    ticks = clock()
    found = ground(links(12, 0), 3)
    short = anneal(found, seed=5, seconds=1.0, now=lambda: next(ticks))
    assert 5 < short.tried < 15
    assert short.seconds == pytest.approx(found.seconds(short.order))
    none = anneal(found, seed=5, seconds=0.0)
    assert none.tried == 1
    assert sorted(none.order) == list(range(12))
    assert short.seconds <= none.seconds


def test_one_machine_needs_no_search() -> None:
    assert anneal(ground(links(1, 0), 1), seed=0).order == (0,)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_what_is_accepted_has_no_unit(scale: float) -> None:
    times = 4000
    draw = np.random.default_rng(0)
    taken = sum(accepts(0.25 * scale, 0.5, draw) for _ in range(times)) / times
    assert taken == pytest.approx(math.exp(-0.25 / 0.5), abs=0.03)
    assert accepts(0.0, 0.0, draw)
    assert not accepts(0.25 * scale, 0.0, draw)


def test_sizes_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"4 stages do not share 6 machines(.|\n)*legal: 1, 2, 3, 6"):
        ground(links(6, 0), 4)
    with pytest.raises(UsageError, match=r"all orders of 12 machines(.|\n)*up to 10"):
        exact(ground(links(12, 0), 3))
