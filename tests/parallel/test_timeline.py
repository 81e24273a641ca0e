"""Times of pipeline orders: the paper's bubbles, a slow oracle, links, deadlocks, the picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.schedule import TORCH, Action, Kind, Order, next_micro_batches, order
from lmworks.parallel.timeline import Deadlock, Link, Timeline, draw, simulate
from tests.oracles import schedules as oracle

LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W"}


def named(name: str, ranks: int, micro_batches: int, held: int | None = None) -> Order:
    legal = next_micro_batches(name, ranks=ranks, micro_batches=micro_batches)
    return order(name, ranks=ranks, micro_batches=legal, stages_per_rank=held)


# --- exact times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "m", "v", "seconds"),
    [
        (4, 8, 1, 33.0),
        (4, 8, 2, 28.5),
        (4, 8, 4, 26.25),
        (4, 16, 2, 52.5),
        (8, 8, 2, 34.5),
        (8, 16, 2, 58.5),
        (8, 32, 4, 101.25),
    ],
)
def test_makespan_is_the_papers(p: int, m: int, v: int, seconds: float) -> None:
    found = order("1f1b" if v == 1 else "interleaved-1f1b", ranks=p, micro_batches=m, stages_per_rank=v)
    timeline = simulate(found, forward_seconds=1 / v, backward_seconds=2 / v)
    assert timeline.makespan == seconds == 3 * m * (1 + (p - 1) / (v * m))
    assert timeline.bubble_share == (p - 1) / (v * m)
    assert timeline.busy_seconds == (3.0 * m,) * p


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.5, 1.0, 3.0]))
def test_gpipe_waits_as_long_as_1f1b(p: int, m: int, forward: float) -> None:
    timeline = simulate(named("gpipe", p, m), forward_seconds=forward, backward_seconds=2.0)
    assert timeline.makespan == (m + p - 1) * (forward + 2.0)


def test_zero_bubble_waits_less_where_the_three_passes_take_equal_time() -> None:
    plain = simulate(named("interleaved-1f1b", 4, 8), forward_seconds=0.5, backward_seconds=1.0)
    split = simulate(named("zero-bubble-v", 4, 8), forward_seconds=0.5, backward_seconds=1.0)
    assert (plain.bubble_share, split.bubble_share) == (0.1875, 0.0625)
    uneven = simulate(named("zero-bubble-v", 4, 8), forward_seconds=0.5, backward_seconds=1.0, input_share=0.8)
    assert uneven.bubble_share > split.bubble_share


def test_micro_batches_that_the_ranks_do_not_divide() -> None:
    """Rounds of 5 on 4 ranks: the last round is a whole one, and the wait is the paper's."""
    timeline = simulate(named("interleaved-1f1b", 4, 10), forward_seconds=0.5, backward_seconds=1.0)
    assert timeline.makespan == 3 * 10 * (1 + 3 / (2 * 10))


def test_the_dearest_stage_sets_the_pace() -> None:
    timeline = simulate(named("1f1b", 2, 8), forward_seconds=[1.0, 2.0], backward_seconds=[2.0, 4.0])
    assert timeline.busy_seconds == (24.0, 48.0)
    assert timeline.makespan == 1.0 + 48.0 + 2.0
    assert timeline.peak_live == (2, 1)


# --- against the oracle ----------------------------------------------------------------------------------------------


@given(st.sampled_from(list(TORCH)), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_times_are_the_earliest_possible(name: str, ranks: int, micro_batches: int, seed: int) -> None:
    found = named(name, ranks, micro_batches)
    random = np.random.default_rng(seed)
    forward, backward = (random.integers(1, 9, found.stages).astype(float) for _ in range(2))
    share, hop = float(random.choice([0.25, 0.5, 0.75])), float(random.integers(0, 4))
    factors = tuple(random.integers(0, 4, found.micro_batches).astype(float) for _ in range(2))
    timeline = simulate(
        found,
        forward_seconds=tuple(forward),
        backward_seconds=tuple(backward),
        input_share=share,
        link=Link(latency_seconds=hop),
        boundary_bytes=1e9,
        factors=(tuple(factors[0]), tuple(factors[1])),
    )
    of_whole = {"F": 1.0, "B": 1.0, "I": share, "W": 1 - share}
    steps = [[(LETTERS[a.kind], a.stage, a.micro_batch) for a in actions] for actions in found.ranks]
    seconds = {
        (letter, stage, j): of_whole[letter]
        * float((forward if letter == "F" else backward)[stage])
        * float(factors[letter != "F"][j])
        for rank in steps
        for letter, stage, j in rank
    }
    ends = {(LETTERS[e.kind], e.stage, e.micro_batch): e.end for e in timeline.events}
    assert ends == pytest.approx(oracle.ends(steps, seconds, hop))


@given(st.sampled_from(list(TORCH)), st.integers(1, 4), st.integers(1, 6))
def test_a_rank_does_one_thing_at_a_time(name: str, ranks: int, micro_batches: int) -> None:
    timeline = simulate(named(name, ranks, micro_batches), forward_seconds=1.0, backward_seconds=2.0)
    for rank, actions in enumerate(timeline.order.ranks):
        own = [event for event in timeline.events if event.rank == rank]
        assert [Action(e.kind, e.stage, e.micro_batch) for e in own] == list(actions)
        assert all(one.end <= two.start for one, two in itertools.pairwise(own))


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_link_delays_the_next_stage() -> None:
    link = Link(latency_seconds=0.25, bytes_per_second=4.0)
    timeline = simulate(named("gpipe", 2, 1), forward_seconds=1.0, backward_seconds=2.0, link=link, boundary_bytes=2.0)
    assert timeline.makespan == 2 * 3.0 + 2 * (0.25 + 2.0 / 4.0)


def test_messages_of_one_line_go_one_after_the_other() -> None:
    link = Link(bytes_per_second=1.0)
    timeline = simulate(named("gpipe", 2, 3), forward_seconds=1.0, backward_seconds=0.0, link=link, boundary_bytes=5.0)
    starts = [event.start for event in timeline.events if event.kind is Kind.FORWARD and event.stage == 1]
    assert starts == [6.0, 11.0, 16.0]


def test_stages_of_one_rank_send_nothing() -> None:
    slow = Link(latency_seconds=100.0)
    timeline = simulate(
        named("zero-bubble-v", 1, 2), forward_seconds=1.0, backward_seconds=2.0, link=slow, boundary_bytes=1.0
    )
    assert timeline.makespan == 2 * 2 * 3.0
    assert timeline.bubble_share == 0.0


def test_interleaving_loses_on_a_narrow_link() -> None:
    """It sends 3 messages for every one of 1f1b on the line from rank 0 to 1: two forward, one backward."""
    link = Link(bytes_per_second=0.5)
    one = simulate(named("1f1b", 2, 16), forward_seconds=1.0, backward_seconds=2.0, link=link, boundary_bytes=1.0)
    two = simulate(
        named("interleaved-1f1b", 2, 16), forward_seconds=0.5, backward_seconds=1.0, link=link, boundary_bytes=1.0
    )
    assert two.makespan > one.makespan


# --- refusals --------------------------------------------------------------------------------------------------------


def by_hand(*ranks: str) -> Order:
    """From text such as 'F00 B00': kind, stage, micro-batch."""
    kinds = {letter: kind for kind, letter in LETTERS.items()}
    actions = (tuple(Action(kinds[w[0]], int(w[1]), int(w[2])) for w in rank.split()) for rank in ranks)
    return Order(name="by hand", ranks=tuple(actions))


def test_a_deadlock_names_who_waits_with_what_for_what() -> None:
    crossed = by_hand("F00 B00 F01 B01", "F11 B11 F10 B10")
    with pytest.raises(Deadlock) as told:
        simulate(crossed, forward_seconds=1.0, backward_seconds=2.0)
    text = str(told.value)
    assert "rank 0 waits with backward of micro-batch 0 in stage 0 for backward of micro-batch 0 in stage 1" in text
    assert "rank 1 waits with forward of micro-batch 1 in stage 1 for forward of micro-batch 1 in stage 0" in text
    assert "on rank 0" in text


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (("B00 F00",), "backward of micro-batch 0 in stage 0 for forward of micro-batch 0 in stage 0"),
        (("F00 W00 I00",), "backward-weight of micro-batch 0 in stage 0 for backward of micro-batch 0 in stage 0"),
    ],
)
def test_a_rank_that_waits_for_itself_is_stuck(ranks: tuple[str, ...], told: str) -> None:
    with pytest.raises(Deadlock, match=told):
        simulate(by_hand(*ranks), forward_seconds=1.0, backward_seconds=1.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"forward_seconds": [1.0], "backward_seconds": 2.0}, "or 2: one for every stage"),
        ({"forward_seconds": 1.0, "backward_seconds": [2.0, -1.0]}, "none below 0"),
        ({"forward_seconds": 1.0, "backward_seconds": 2.0, "input_share": 1.5}, "between 0 and 1"),
        ({"forward_seconds": 1.0, "backward_seconds": 2.0, "factors": ([1.0], [1.0, 1.0])}, "2 numbers for forward"),
    ],
)
def test_times_that_are_not_those_of_the_stages_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        simulate(named("1f1b", 2, 2), **settings)


# --- the picture -----------------------------------------------------------------------------------------------------


def pixels(timeline: Timeline, path: Path) -> Any:
    from matplotlib import image

    draw(timeline, path)
    return image.imread(path)


def test_a_picture_has_a_row_per_rank_and_a_colour_per_kind(tmp_path: Path) -> None:
    few = pixels(simulate(named("gpipe", 2, 2), forward_seconds=1.0, backward_seconds=2.0), tmp_path / "few.png")
    many = pixels(
        simulate(named("zero-bubble-v", 4, 8), forward_seconds=1.0, backward_seconds=2.0), tmp_path / "many.png"
    )
    assert many.shape[0] > few.shape[0]
    assert many.shape[1] == few.shape[1]
    split = np.array([0xA8, 0xD5, 0xA2]) / 255
    for picture, there in ((few, False), (many, True)):
        assert bool((np.abs(picture[..., :3] - split).max(axis=-1) < 0.01).any()) is there
