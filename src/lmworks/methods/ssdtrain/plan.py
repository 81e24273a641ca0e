"""How many blocks from the front may go out, by the paper's rule and a strict one, and the clock that tells them apart.

Letters: block i computes t_i seconds forward and b t_i backward (b = 2, or 3 where the block is run again), and saves
V_i bytes. `rest`: seconds between the last block's forward and its backward pass, which head and loss take. Writes
queue in the order of the blocks, reads behind them from the last block to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

BACKWARD = 2
"""Backward over forward seconds of a block that is not run again."""
EXACT = 1e-9
"""Stalls below this share of the whole are rounding."""


def paper_plan(
    seconds: Sequence[float], nbytes: Sequence[float], rate: float, *, rest: float = 0, backward: float = BACKWARD
) -> int:
    """How many blocks go out: up to the first n whose need(n) is more than `rate` bytes a second.

    need(n) = (V_before + 2 V_n) / ((1 + b) T - b t_before): all before n written, and n written and read, until the
    backward pass is through n. With (1 + b) T = (1 + b) sum t + rest.
    """
    whole, before, written = (1 + backward) * sum(seconds) + rest, 0.0, 0.0
    for n, (t, size) in enumerate(zip(seconds, nbytes, strict=True)):
        time = whole - backward * before
        if written + 2 * size > rate * time if time > 0 else size > 0:
            return n
        before, written = before + t, written + size
    return len(seconds)


def strict_plan(
    seconds: Sequence[float],
    nbytes: Sequence[float],
    write: float,
    read: float,
    *,
    rest: float = 0,
    backward: float = BACKWARD,
) -> int:
    """How many blocks go out: the most with which each is back before its own backward pass begins.

    For every j <= n: max(written_n, R) + (V_j + ... + V_n) / read <= R + b (t_{j+1} + ... + t_last), where R = sum t +
    rest is when the backward pass comes to the blocks, and written_n when the last of their writes is over.
    """
    ends = list(accumulate(seconds))
    turn = (ends[-1] if ends else 0) + rest
    written, most = 0.0, 0
    for n, size in enumerate(nbytes):
        if size and (write <= 0 or read <= 0):
            return most
        written = max(written, ends[n]) + (size / write if size else 0)
        back = max(written, turn)
        for j in range(n, -1, -1):
            back += nbytes[j] / read if nbytes[j] else 0
            if back > turn + backward * (ends[-1] - ends[j]):
                return most
        most = n + 1
    return most


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One step by the clock."""

    seconds: float
    """From the first block's forward to the end of its backward pass."""
    stalled: float
    """Of them the backward pass waited."""


def simulate(
    seconds: Sequence[float],
    nbytes: Sequence[float],
    out: int,
    write: float,
    read: float,
    *,
    ahead: int | None = None,
    duplex: bool = False,
    rest: float = 0,
    backward: float = BACKWARD,
) -> Outcome:
    """One step in which the first `out` blocks go out, and nothing is taken from memory whose write is not over.

    `ahead`: a block is asked for when the backward pass comes to the block so many behind it; None: when it comes to
    the first. `duplex`: reads do not wait for writes of other blocks, nor slow them.
    """
    now, free = 0.0, 0.0
    written = []
    for t, size in zip(seconds[:out], nbytes[:out], strict=True):
        now += t
        free = max(free, now) + (size / write if size else 0)
        written.append(free)
    now = sum(seconds) + rest
    free, stalled, asked = 0.0 if duplex else free, 0.0, out
    back: dict[int, float] = {}
    for j in range(len(seconds) - 1, -1, -1):
        while asked > 0 and (ahead is None or asked - 1 >= j - ahead):
            asked -= 1
            free = max(free, now, written[asked]) + (nbytes[asked] / read if nbytes[asked] else 0)
            back[asked] = free
        wait = max(0, back.get(j, 0) - now)
        stalled += wait
        now += wait + backward * seconds[j]
    return Outcome(seconds=now, stalled=stalled)


def least_ahead(
    seconds: Sequence[float],
    nbytes: Sequence[float],
    out: int,
    write: float,
    read: float,
    *,
    rest: float = 0,
    backward: float = BACKWARD,
) -> int:
    """How many blocks ahead must be asked for, so that the backward pass waits no longer than if all were at once."""
    bare = simulate(seconds, nbytes, out, write, read, rest=rest, backward=backward)
    for ahead in range(1, len(seconds)):
        found = simulate(seconds, nbytes, out, write, read, ahead=ahead, rest=rest, backward=backward)
        if found.stalled <= bare.stalled + EXACT * bare.seconds:
            return ahead
    return max(1, len(seconds))
