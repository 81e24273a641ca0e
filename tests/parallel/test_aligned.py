"""A pipeline whose stages share their attention: one phase a tick, no more ticks than 1f1b, and the memory it takes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.data.lengths import drawn
from lmworks.parallel.aligned import order_of, plain_pipeline, shared_pipeline, ticks
from lmworks.parallel.idle import Setting, outcome
from lmworks.parallel.laying import steps
from lmworks.parallel.schedule import Kind, order
from lmworks.parallel.timeline import simulate
from tests.parallel.test_idle import FREE


@given(st.integers(1, 6), st.integers(0, 8))
def test_ticks_are_a_pipeline_as_quick_as_1f1b(stages: int, more: int) -> None:
    count = stages + more
    made = ticks(stages, count)
    assert len(made) == 2 * (count + stages - 1)
    aligned = order_of(made)  # which refuses what is missing or done twice
    timeline = simulate(aligned, forward_seconds=1.0, backward_seconds=1.0)
    plain = simulate(order("1f1b", ranks=stages, micro_batches=count), forward_seconds=1.0, backward_seconds=1.0)
    assert timeline.makespan <= len(made) == plain.makespan
    assert aligned.peak_live == tuple(min(count, 2 * (stages - s) - 1) for s in range(stages))


@given(st.integers(1, 6), st.integers(0, 8))
def test_a_micro_batch_is_where_the_tick_before_left_it(stages: int, more: int) -> None:
    made = ticks(stages, stages + more)
    for kind, step in ((Kind.FORWARD, 1), (Kind.BACKWARD, -1)):
        own = [tick.micro_batches for tick in made if tick.kind is kind]
        for before, after in pairwise(own):
            pairs = range(stages - 1) if step == 1 else range(1, stages)
            assert [after[s + step] for s in pairs] == [before[s] for s in pairs]


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 micro-batches in 3 stages(.|\n)*3 micro-batches or more"):
        ticks(3, 2)


def replicas(data: int, count: int, tokens: int = 2048) -> list[list[tuple[tuple[int, ...], ...]]]:
    made = next(
        steps(drawn("log-uniform", 4000, longest=tokens).tolist(), ranks=data * count, tokens=tokens, rows_each=2)
    )
    return [list(made[i * count : (i + 1) * count]) for i in range(data)]


def test_equal_micro_batches_wait_as_long_as_the_formula_says_either_way() -> None:
    same = [[((64,), (64,))] * 4] * 2
    setting = Setting(ranks=4, speeds=FREE, tile=16)
    plain, shared = plain_pipeline(same, 2, setting), shared_pipeline(same, 2, setting)
    assert plain.idle == pytest.approx(1 / 5)
    assert shared.seconds < plain.seconds  # stages that have nothing serve those that have


def test_one_stage_is_data_parallel() -> None:
    micro = replicas(4, 1)
    setting = Setting(ranks=4, speeds=FREE, tile=16)
    for packing, piped in (("plain", plain_pipeline), ("shared", shared_pipeline)):
        alone = outcome(packing, [own[0] for own in micro], setting)  # type: ignore[arg-type]
        found = piped(micro, 1, setting)
        assert found.seconds == pytest.approx(alone.seconds)
        assert found.idle == pytest.approx(alone.idle)


def test_unequal_micro_batches_wait_less_when_stages_share() -> None:
    setting = Setting(ranks=8, speeds=FREE, tile=16)
    plain, shared = (piped(replicas(4, 4), 2, setting) for piped in (plain_pipeline, shared_pipeline))
    assert shared.seconds < plain.seconds
    assert shared.idle < plain.idle
