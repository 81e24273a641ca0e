"""Pipeline schedules as data: which rank does what in which order. No process is started and no tensor is made.

    gpipe               all forward, then all backward; every micro-batch's activations are held
    1f1b                as few forward as fill the pipeline, then one backward for every forward
    interleaved-1f1b    several stages per rank: rank r holds r, r + p, ...; the bubble is divided by their number
    zero-bubble-v       two stages per rank, down and back up; gradients of weights fill the waiting time
    dualpipe-v          the same V; forward and backward of different micro-batches side by side

Letters: p ranks, m micro-batches, v stages per rank. The orders are torch's own, so what `parallel.timeline` tells of
an order holds for the run that torch makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, final

from torch.distributed import pipelining

from lmworks.core.errors import UsageError, did_you_mean
from lmworks.parallel.layout import ONE_STAGE

TORCH: Mapping[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved-1f1b": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble-v": pipelining.ScheduleZBVZeroBubble,
    "dualpipe-v": pipelining.ScheduleDualPipeV,
}
"""torch's class for every schedule."""
TWO_STAGES = ("zero-bubble-v", "dualpipe-v")
"""Schedules whose ranks hold two stages each: rank r holds r and 2 p - 1 - r."""


class Kind(StrEnum):
    """What is done with a micro-batch in a stage."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Gradients of the stage's input and of its weights."""
    BACKWARD_INPUT = "backward-input"
    """The gradient of the stage's input alone, which the stage before waits for."""
    BACKWARD_WEIGHT = "backward-weight"
    """The gradients of the stage's weights, which nobody waits for."""


class Action(NamedTuple):
    """One piece of work of a rank."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        """As errors name it."""
        return f"{self.kind} of micro-batch {self.micro_batch} in stage {self.stage}"


@final
@dataclass(frozen=True, kw_only=True)
class Order:
    """What each rank does, one thing after the other. Raises UsageError when something is missing or done twice."""

    name: str
    """Where the order comes from, for pictures and errors."""
    ranks: tuple[tuple[Action, ...], ...]
    """The actions of every rank, in turn."""

    def __post_init__(self) -> None:
        wrong = next(self._wrong(), None)
        if wrong is not None:
            legal = "every micro-batch goes once forward and once backward (or backward-input, then backward-weight)"
            raise UsageError(wrong, where=f"pipeline order '{self.name}'", legal=f"{legal} in every stage")

    def _wrong(self) -> Iterator[str]:
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if self.holder[action.stage] != rank:
                    yield f"ranks {rank} and {self.holder[action.stage]} both hold stage {action.stage}"
        done = Counter(action for actions in self.ranks for action in actions)
        for stage in range(self.stages):
            for micro_batch in range(self.micro_batches):
                forward, backward, of_input, of_weights = (done[Action(kind, stage, micro_batch)] for kind in Kind)
                for what, times in (("forward", forward), ("backward", backward + of_input)):
                    if times != 1:
                        yield f"micro-batch {micro_batch} goes {times} times {what} in stage {stage}"
                if of_weights != of_input:
                    yield f"micro-batch {micro_batch} has {of_weights} backward-weight in stage {stage}, not {of_input}"

    @cached_property
    def holder(self) -> dict[int, int]:
        """The rank that holds each stage."""
        return {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}

    @cached_property
    def stages(self) -> int:
        """Stages of the pipeline, on all ranks."""
        return 1 + max((action.stage for actions in self.ranks for action in actions), default=-1)

    @cached_property
    def micro_batches(self) -> int:
        """m."""
        return 1 + max((action.micro_batch for actions in self.ranks for action in actions), default=-1)

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, in order."""
        return tuple(tuple(sorted({action.stage for action in actions})) for actions in self.ranks)

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """The most micro-batches whose activations each rank holds at a time, counted once for every stage.

        Held from the start of the forward pass to the end of the backward pass, its part for weights included. Divide
        by the stages per rank to compare schedules: a stage of v per rank holds 1/v of the layers.
        """
        return tuple(_most_held(actions) for actions in self.ranks)


def _most_held(actions: Sequence[Action]) -> int:
    most = now = 0
    for action in actions:
        if action.kind is Kind.FORWARD:
            now += 1
            most = max(most, now)
        elif action.kind is not Kind.BACKWARD_INPUT:
            now -= 1
    return most


def order(schedule: str, *, ranks: int, micro_batches: int, stages_per_rank: int | None = None) -> Order:
    """The order in which torch runs `micro_batches` through a pipeline of `ranks`.

    `stages_per_rank` is for interleaved-1f1b, 2 when left out; the others have 1 or 2 by their nature. Raises
    UsageError for numbers that the schedule cannot order, with the nearest that it can.
    """
    if schedule not in TORCH:
        raise UsageError(f"no schedule is called '{schedule}'{did_you_mean(schedule, TORCH)}", legal=", ".join(TORCH))
    natural = 1 if schedule in ONE_STAGE else 2
    held = natural if stages_per_rank is None else stages_per_rank
    where = f"pipeline schedule '{schedule}'"
    if held != natural and (schedule != "interleaved-1f1b" or held < 2):
        legal = "2 or more; 1f1b has 1" if schedule == "interleaved-1f1b" else str(natural)
        raise UsageError(f"{held} stages per rank", where=where, legal=legal)
    if ranks < 1 or micro_batches < 1:
        raise UsageError(f"{ranks} ranks, {micro_batches} micro-batches", where=where, legal="1 or more of each")
    legal_number = next_micro_batches(schedule, ranks=ranks, micro_batches=micro_batches)
    if legal_number != micro_batches:
        text = f"cannot order {micro_batches} micro-batches on {ranks} ranks"
        raise UsageError(text, where=where, legal=f"{legal_number} is the next larger number that it can")
    return _ordered(schedule, ranks, micro_batches, held)


@lru_cache(maxsize=256)
def _ordered(schedule: str, ranks: int, micro_batches: int, held: int) -> Order:
    """An order that can be: planners ask for the same ones again and again."""
    return Order(name=schedule, ranks=_from_torch(schedule, ranks, micro_batches, held))


def next_micro_batches(schedule: str, *, ranks: int, micro_batches: int) -> int:
    """The smallest number of micro-batches, `micro_batches` or more, that torch can order.

    1f1b needs one for every rank, dualpipe-v one for every stage. interleaved-1f1b works in rounds of equal size, of
    which there are max(1, m // p): m < p will do, and m = 10 on p = 4 makes two rounds of 5; the paper's order takes
    multiples of p only.
    """
    if schedule == "1f1b":
        return max(micro_batches, ranks)
    if schedule == "dualpipe-v":
        return max(micro_batches, 2 * ranks)
    if schedule == "interleaved-1f1b":
        while micro_batches % max(1, micro_batches // ranks):
            micro_batches += 1
    return micro_batches


def _from_torch(schedule: str, ranks: int, micro_batches: int, held: int) -> tuple[tuple[Action, ...], ...]:
    """Every rank's actions by torch's class: the one place that knows its private names.

    What it takes is the same in torch 2.11, 2.12 and 2.13: `pipeline_order`, the fields of its actions, and that a
    schedule is made from stages of which it reads numbers only. `_prepare_schedule_with_comms` lowers the order to
    sends and receives, which takes most of the time and is not looked at here.
    """
    theirs = TORCH[schedule]
    unlowered = type(theirs.__name__, (theirs,), {"_prepare_schedule_with_comms": lambda *_, **__: None})
    stages = [
        SimpleNamespace(
            stage_index=i, num_stages=ranks * held, group_size=ranks, group_rank=0, is_last=False, submod=None
        )
        for i in range(held)
    ]
    made = unlowered(stages[0] if held == 1 else stages, micro_batches)
    found = []
    for rank in range(ranks):
        actions = [ours for their in made.pipeline_order[rank] for ours in _translated(their)]
        found.append(tuple(_renumbered(actions) if schedule == "1f1b" else actions))
    return tuple(found)


_KINDS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.BACKWARD_INPUT, "W": Kind.BACKWARD_WEIGHT}


def _translated(their: Any) -> Iterator[Action]:
    """torch's action as ours: a gap and what is no computation is none, an overlapped pair is two in turn.

    torch runs such a pair in turn as well, unless it is given a function of its own for it.
    """
    if their is None:
        return
    for part in their.sub_actions or (their,):
        if part.computation_type.value in _KINDS:
            yield Action(_KINDS[part.computation_type.value], part.stage_index, part.microbatch_index)


def _renumbered(actions: Sequence[Action]) -> Iterator[Action]:
    """The same kinds with the micro-batches of each counted from 0.

    torch's `pipeline_order` of 1f1b counts the forward passes of the last rank from 1; what it runs counts from 0.
    """
    seen: Counter[Kind] = Counter()
    for action in actions:
        yield action._replace(micro_batch=seen[action.kind])
        seen[action.kind] += 1
