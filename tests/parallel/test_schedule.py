"""Pipeline orders against closed forms and against what torch runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.parallel.schedule import TORCH, Action, Kind, Order, next_micro_batches, order
from tests.oracles import schedules as oracle

LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W"}


def letters(found: Order) -> list[list[oracle.Step]]:
    """As the oracle writes it."""
    return [[(LETTERS[a.kind], a.stage, a.micro_batch) for a in actions] for actions in found.ranks]


def from_letters(ranks: list[list[oracle.Step]]) -> Order:
    kinds = {letter: kind for kind, letter in LETTERS.items()}
    return Order(name="by hand", ranks=tuple(tuple(Action(kinds[k], s, j) for k, s, j in steps) for steps in ranks))


# --- against closed forms --------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 9))
def test_1f1b_is_the_closed_form(ranks: int, more: int) -> None:
    found = order("1f1b", ranks=ranks, micro_batches=ranks + more)
    assert letters(found) == oracle.one_forward_one_backward(ranks, ranks + more)


@given(st.integers(1, 6), st.integers(1, 24), st.integers(2, 4))
def test_interleaved_1f1b_is_the_closed_form(ranks: int, micro_batches: int, held: int) -> None:
    legal = next_micro_batches("interleaved-1f1b", ranks=ranks, micro_batches=micro_batches)
    found = order("interleaved-1f1b", ranks=ranks, micro_batches=legal, stages_per_rank=held)
    assert letters(found) == oracle.interleaved(ranks, legal, held)


@given(st.integers(1, 6), st.integers(1, 12))
def test_gpipe_is_all_forward_then_all_backward(ranks: int, micro_batches: int) -> None:
    found = order("gpipe", ranks=ranks, micro_batches=micro_batches)
    assert letters(found) == [[(kind, rank, j) for kind in "FB" for j in range(micro_batches)] for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "legal"), [(4, 10, 10), (4, 3, 3), (4, 9, 10), (2, 7, 8), (4, 8, 8)]
)
def test_rounds_of_equal_size_need_not_be_multiples_of_the_ranks(ranks: int, micro_batches: int, legal: int) -> None:
    assert next_micro_batches("interleaved-1f1b", ranks=ranks, micro_batches=micro_batches) == legal


@pytest.mark.parametrize("held", [2, 4])
@pytest.mark.parametrize("rank", range(4))
def test_warm_up_of_interleaved_1f1b(rank: int, held: int) -> None:
    actions = order("interleaved-1f1b", ranks=4, micro_batches=16, stages_per_rank=held).ranks[rank]
    warm_up = next(i for i, action in enumerate(actions) if action.kind is not Kind.FORWARD) - 1
    assert warm_up == 2 * (4 - 1 - rank) + (held - 1) * 4


# --- against what torch runs -----------------------------------------------------------------------------------------


class Recorder:
    """A stage that computes nothing and notes what it is told to do; it has no neighbours."""

    def __init__(self, index: int, stages: int) -> None:
        self.stage_index, self.num_stages, self.done = index, stages, list[oracle.Step]()
        self.is_last, self.has_backward = False, True

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.done.append(("F", self.stage_index, micro_batch))

    def backward_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self.done.append(("B", self.stage_index, micro_batch))

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: []


@pytest.mark.parametrize(("name", "micro_batches"), [("gpipe", 2), ("gpipe", 5), ("1f1b", 4), ("1f1b", 9)])
def test_what_torch_runs_is_the_order(name: str, micro_batches: int) -> None:
    expected = letters(order(name, ranks=4, micro_batches=micro_batches))
    for rank in range(4):
        stage = Recorder(rank, 4)
        schedule = TORCH[name](stage, micro_batches)
        schedule._has_backward = True
        schedule._initialize_stage = lambda *_, **__: None
        schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
        assert stage.done == expected[rank]


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zero-bubble-v", "dualpipe-v"])
def test_torch_lowers_the_same_order(name: str) -> None:
    """Made whole, as a run makes it, torch's sends and receives carry the computations of our order."""
    lowered: list[Any] = []
    theirs = TORCH[name]

    def kept(schedule: Any, actions: Any) -> None:
        theirs._prepare_schedule_with_comms(schedule, actions)
        lowered.append(schedule.pipeline_order_with_comms)

    expected = letters(order(name, ranks=2, micro_batches=6))
    stand_in = type("Kept", (theirs,), {"_prepare_schedule_with_comms": kept})
    stages = [Recorder(i, 4) for i in range(2)]
    for stage in stages:
        stage.group_size, stage.group_rank, stage.submod = 2, 0, None  # type: ignore[attr-defined]
    stand_in(stages, 6)
    for rank, actions in lowered[0].items():
        parts = [part for action in actions for part in action.sub_actions or (action,)]
        found = [(str(a.computation_type.value), a.stage_index, a.microbatch_index) for a in parts]
        assert [step for step in found if step[0] in "FBIW"] == expected[rank]


def test_dualpipe_v_runs_pairs_in_turn() -> None:
    found = letters(order("dualpipe-v", ranks=2, micro_batches=4))
    at = found[0].index(("F", 0, 3))
    assert found[0][at : at + 4] == [("F", 0, 3), ("B", 3, 1), ("F", 3, 2), ("B", 0, 0)]


# --- live micro-batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (4, 8), (4, 4), (3, 11)])
def test_live_micro_batches_of_1f1b_and_gpipe(ranks: int, micro_batches: int) -> None:
    one = order("1f1b", ranks=ranks, micro_batches=micro_batches)
    assert one.peak_live == tuple(min(ranks - rank, micro_batches) for rank in range(ranks))
    assert order("gpipe", ranks=ranks, micro_batches=micro_batches).peak_live == (micro_batches,) * ranks


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 2), (5, 1), (3, 3)])
def test_1f1b_with_few_micro_batches_holds_them_all_on_rank_0(ranks: int, micro_batches: int) -> None:
    """torch makes no such order; the paper's does."""
    found = from_letters(oracle.one_forward_one_backward(ranks, micro_batches))
    assert found.peak_live[0] == min(ranks, micro_batches)


def test_live_micro_batches_of_interleaved_1f1b_are_warm_up_and_one() -> None:
    found = order("interleaved-1f1b", ranks=4, micro_batches=16, stages_per_rank=2)
    assert found.peak_live == tuple(2 * (4 - 1 - rank) + 4 + 1 for rank in range(4))


def test_gradients_of_weights_keep_activations() -> None:
    early = from_letters([[("F", 0, 0), ("I", 0, 0), ("W", 0, 0), ("F", 0, 1), ("I", 0, 1), ("W", 0, 1)]])
    late = from_letters([[("F", 0, 0), ("I", 0, 0), ("F", 0, 1), ("I", 0, 1), ("W", 0, 0), ("W", 0, 1)]])
    assert (early.peak_live, late.peak_live) == ((1,), (2,))


# --- shape of an order -----------------------------------------------------------------------------------------------


def test_ranks_hold_stages_in_turn_or_in_a_v() -> None:
    assert order("interleaved-1f1b", ranks=3, micro_batches=3, stages_per_rank=3).held == (
        (0, 3, 6),
        (1, 4, 7),
        (2, 5, 8),
    )
    assert order("zero-bubble-v", ranks=3, micro_batches=3).held == ((0, 5), (1, 4), (2, 3))
    assert order("dualpipe-v", ranks=2, micro_batches=4).holder == {0: 0, 3: 0, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([[("F", 0, 0)]], "micro-batch 0 goes 0 times backward in stage 0"),
        ([[("F", 0, 0), ("F", 0, 0), ("B", 0, 0)]], "micro-batch 0 goes 2 times forward in stage 0"),
        ([[("F", 0, 0), ("I", 0, 0)]], "micro-batch 0 has 0 backward-weight in stage 0, not 1"),
        ([[("F", 0, 0), ("B", 0, 0), ("I", 0, 0)]], "2 times backward"),
        ([[("F", 0, 0)], [("B", 0, 0)]], "ranks 0 and 1 both hold stage 0"),
        ([[("F", 1, 0), ("B", 1, 0)]], "micro-batch 0 goes 0 times forward in stage 0"),
    ],
)
def test_an_order_that_is_not_whole_is_refused(steps: list[list[oracle.Step]], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        from_letters(steps)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "1f1f", "ranks": 2, "micro_batches": 2}, "did you mean '1f1b'"),
        ({"schedule": "1f1b", "ranks": 4, "micro_batches": 3}, "4 is the next larger"),
        ({"schedule": "interleaved-1f1b", "ranks": 4, "micro_batches": 9}, "10 is the next larger"),
        ({"schedule": "dualpipe-v", "ranks": 4, "micro_batches": 7}, "8 is the next larger"),
        ({"schedule": "gpipe", "ranks": 0, "micro_batches": 1}, "1 or more of each"),
        ({"schedule": "gpipe", "ranks": 2, "micro_batches": 2, "stages_per_rank": 2}, "legal: 1"),
        ({"schedule": "zero-bubble-v", "ranks": 2, "micro_batches": 2, "stages_per_rank": 1}, "legal: 2"),
        ({"schedule": "interleaved-1f1b", "ranks": 2, "micro_batches": 2, "stages_per_rank": 1}, "1f1b has 1"),
    ],
)
def test_what_torch_cannot_order_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        order(**settings)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("micro_batches", range(1, 10))
def test_refusals_are_torchs(name: str, micro_batches: int) -> None:
    """What is refused here torch refuses as well, and the other way round."""
    held = 1 if name in ("gpipe", "1f1b") else 2
    stages = [Recorder(i, 3 * held) for i in range(held)]
    for stage in stages:
        stage.group_size, stage.group_rank, stage.submod = 3, 0, None  # type: ignore[attr-defined]
    legal = next_micro_batches(name, ranks=3, micro_batches=micro_batches) == micro_batches
    try:
        TORCH[name](stages[0] if held == 1 else stages, micro_batches)
    except ValueError:
        assert not legal
    else:
        assert legal
