"""How much ranks wait for each other because documents are of unequal length: one block's step under four packings.

Everything is worked out from lengths and speeds; no process is started. Without exchanges inside a block a step takes
as long as the slowest rank; with them every block does. Waiting for an exchange is idle time too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from lmworks.parallel.balance import balance
from lmworks.parallel.laying import Row, by_work, over_ranks, whole
from lmworks.parallel.speeds import (
    BACKWARD_ATTENTION,
    BACKWARD_LINEAR,
    Float,
    Speeds,
    Turns,
    block_seconds,
    exchange_seconds,
    server_seconds,
)
from lmworks.parallel.tasks import Plan, plain

Packing = Literal["plain", "by-work", "by-document", "shared"]


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all packings."""

    ranks: int
    speeds: Speeds
    tolerance: float = 0.1
    tile: int = 128
    buffer_bytes: int | None = None
    cap: float = 1.0
    """Tokens that `by-work` may lay on a rank, over those of plain rows."""
    turns: Turns = "in-block"
    activation_bytes: float = 0.0
    """That a rank keeps of a token and a block for the backward pass; 0: no more than its keys and values."""


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A step, or several in sum."""

    seconds: float
    """Of one block, forward and backward, by the slowest rank."""
    busy: float
    """Seconds that a rank computes, on average."""
    moved_bytes: float
    """Between all ranks, forward."""
    gather_bytes: float
    """What gathering all keys on all ranks would move."""
    memory: float
    """The most that a rank keeps, over what an equal share of the tokens takes; of several steps the largest."""
    tokens: int
    """That were trained on: `by-work` may leave some for later."""
    largest: float
    """The largest attention of a rank over the mean, in pairs; of several steps the mean."""
    reason: str | None = None
    """Why the first plan that is not as it was asked for is not."""

    @property
    def idle(self) -> float:
        """Part of a rank's time in which it does not compute."""
        return 1 - self.busy / self.seconds if self.seconds else 0.0


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several steps as one."""
    return Outcome(
        seconds=sum(one.seconds for one in outcomes),
        busy=sum(one.busy for one in outcomes),
        moved_bytes=sum(one.moved_bytes for one in outcomes),
        gather_bytes=sum(one.gather_bytes for one in outcomes),
        memory=max((one.memory for one in outcomes), default=1.0),
        tokens=sum(one.tokens for one in outcomes),
        largest=sum(one.largest for one in outcomes) / max(1, len(outcomes)),
        reason=next((one.reason for one in outcomes if one.reason is not None), None),
    )


def outcome(packing: Packing, step: Sequence[Sequence[Row]], setting: Setting) -> Outcome:
    """One step of plain rows, [rank][row], under a packing. `shared` takes two rows a rank or one: its nano-batches."""
    if packing == "by-work":
        return _by_work(step, setting)
    if packing == "by-document":
        return _by_document(step, setting)
    held = [[length for row in rows for length in row] for rows in step]
    if packing == "plain":
        return _apart(plain(whole(held), setting.ranks), setting, _tokens(held))
    return _shared(step, setting)


def _tokens(held: Iterable[Iterable[int]]) -> Float:
    return np.array([float(sum(lengths)) for lengths in held])


def _gathered(tokens: float, setting: Setting) -> float:
    return tokens * (setting.ranks - 1) * setting.speeds.sizes.keys


def _apart(plan: Plan, setting: Setting, tokens_R: Float, extra_seconds: float = 0.0) -> Outcome:
    """Every rank by itself to the end of the step."""
    own_R = (1 + BACKWARD_LINEAR) * setting.speeds.linear * tokens_R
    own_R = own_R + (1 + BACKWARD_ATTENTION) * server_seconds(plan, setting.speeds.attention)
    return Outcome(
        seconds=float(own_R.max()) + extra_seconds,
        busy=float(own_R.mean()),
        moved_bytes=0.0,
        gather_bytes=_gathered(float(tokens_R.sum()), setting),
        memory=float(tokens_R.max() / tokens_R.mean()),
        tokens=int(tokens_R.sum()),
        largest=plan.imbalance,
    )


def _by_work(step: Sequence[Sequence[Row]], setting: Setting) -> Outcome:
    lengths = [length for rows in step for row in rows for length in row]
    share = sum(lengths) / setting.ranks
    packed = by_work(lengths, ranks=setting.ranks, room=int(setting.cap * share))
    tokens_R = _tokens(packed.held)
    made = _apart(plain(whole(packed.held), setting.ranks), setting, tokens_R)
    return Outcome(**(vars(made) | {"memory": float(tokens_R.max()) / share}))


def _by_document(step: Sequence[Sequence[Row]], setting: Setting) -> Outcome:
    """All keys are gathered before attention, and again backward, where their gradients are summed as well; nothing
    hides that. What was gathered is kept until then."""
    lengths = [length for rows in step for row in rows for length in row]
    plan = plain(over_ranks(lengths, setting.ranks), setting.ranks)
    tokens_R = np.full(setting.ranks, sum(lengths) / setting.ranks)
    sent = _gathered(float(tokens_R.sum()), setting)
    made = _apart(plan, setting, tokens_R, 3 * sent / setting.ranks / setting.speeds.bytes_per_second)
    keys = setting.speeds.sizes.keys
    kept = setting.activation_bytes or keys
    memory = (kept + (setting.ranks - 1) * keys) / kept
    return Outcome(**(vars(made) | {"memory": memory, "moved_bytes": sent}))


def _shared(step: Sequence[Sequence[Row]], setting: Setting) -> Outcome:
    plans = shared_plans(step, setting)
    tokens_R = _tokens([length for row in rows for length in row] for rows in step)
    turns = [shared_block(step, plans, setting, backward=backward) for backward in (False, True)]
    loads = np.sum([plan.loads for plan in plans], axis=0)
    return Outcome(
        seconds=sum(seconds for seconds, _ in turns),
        busy=sum(float(busy_R.mean()) for _, busy_R in turns),
        moved_bytes=float(sum(plan.moved_bytes(setting.speeds.sizes) for plan in plans)),
        gather_bytes=_gathered(float(tokens_R.sum()), setting),
        memory=float(tokens_R.max() / tokens_R.mean()),
        tokens=int(tokens_R.sum()),
        largest=float(loads.max() / loads.mean()),
        reason=next((plan.reason for plan in plans if plan.reason is not None), None),
    )


def shared_plans(step: Sequence[Sequence[Row]], setting: Setting) -> list[Plan]:
    """The plan of each nano-batch: the first rows of all ranks, and the second ones. A rank may have none."""
    return [
        balance(
            whole([rows[half] if half < len(rows) else () for rows in step]),
            setting.ranks,
            sizes=setting.speeds.sizes,
            tolerance=setting.tolerance,
            tile=setting.tile,
            buffer_bytes=setting.buffer_bytes,
        )
        for half in (0, 1)
    ]


def shared_block(
    step: Sequence[Sequence[Row]], plans: Sequence[Plan], setting: Setting, *, backward: bool
) -> tuple[float, Float]:
    """Seconds of a block whose attention is shared, forward or backward; and those that each rank computes, (ranks)."""
    speeds = setting.speeds
    of_linear, of_attention = (BACKWARD_LINEAR, BACKWARD_ATTENTION) if backward else (1.0, 1.0)
    linear = [
        of_linear * speeds.linear * _tokens(rows[half] if half < len(rows) else () for rows in step) for half in (0, 1)
    ]
    attention = [of_attention * server_seconds(plan, speeds.attention) for plan in plans]
    exchanges = [exchange_seconds(plan, speeds, backward=backward) for plan in plans]
    busy_R: Float = np.sum([*linear, *attention], axis=0)
    return block_seconds(setting.turns, linear, attention, exchanges), busy_R
