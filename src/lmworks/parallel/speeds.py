"""How long attention takes on a clock: tasks by a measured table or by a roofline, and one block with its exchanges.

A block is linear work, an exchange to the servers, attention, an exchange back, and linear work again. Two halves of a
micro-batch, nano-batches 0 and 1, take turns, so that one half's exchange runs beside the other's work:

    ticks      the paper's: linear work behind attention joins that of the next block; all ranks wait at every tick
                   in 0 | linear 1,   in 1 | attention 0,   out 0 | attention 1,   out 1 | linear 0 of the next block
    in-block   ours: the same exchanges within one block, each waited for where it is needed
    single     one stream: no exchange runs beside anything
    signal     ticks whose exchanges carry nothing: the bound of what can be hidden
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import UsageError
from lmworks.parallel.tasks import Plan, Sizes

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Turns = Literal["ticks", "in-block", "single", "signal"]
Seconds = Callable[[Int, Int], Float]
"""Forward seconds of tasks of (q) queries on (q) keys each, of which the last query sees all."""
BACKWARD_ATTENTION, BACKWARD_LINEAR = 2.5, 2.0
"""A backward pass over a forward one: five products with a score for each pair instead of two; two instead of one."""


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Seconds of tasks that were measured, and between them by seconds per pair, linear in logarithms. Raises
    UsageError for a table that is none."""

    queries: tuple[int, ...]
    """Rising."""
    ratios: tuple[float, ...]
    """Keys over queries, rising from 1."""
    seconds: tuple[tuple[float, ...], ...]
    """[queries][ratios], of one task."""

    def __post_init__(self) -> None:
        shape = (len(self.queries), len(self.ratios))
        rising = all(list(axis) == sorted(set(axis)) and axis for axis in (self.queries, self.ratios))
        right = rising and self.queries[0] >= 1 and self.ratios[0] >= 1 and np.shape(self.seconds) == shape
        if not right or np.min(self.seconds) <= 0:
            legal = "queries from 1 on and ratios from 1 on, both rising, and seconds above 0 for every pair of them"
            raise UsageError(f"{shape[0]} x {shape[1]} entries", where="table of attention times", legal=legal)

    def __call__(self, queries: Int, keys: Int) -> Float:
        """Seconds by the nearest four entries; beyond an edge as at the edge, per pair."""
        axes = np.log(np.array(self.queries)), np.log(np.array(self.ratios))
        of_table = np.array([[_pairs(q, round(q * ratio)) for ratio in self.ratios] for q in self.queries])
        per_pair = np.log(np.array(self.seconds) / of_table)
        at = np.log(queries), np.log(keys / queries)
        (i, u), (j, w) = (_between(axis, value) for axis, value in zip(axes, at, strict=True))
        low = per_pair[i, j] * (1 - w) + per_pair[i, np.minimum(j + 1, len(axes[1]) - 1)] * w
        i = np.minimum(i + 1, len(axes[0]) - 1)
        high = per_pair[i, j] * (1 - w) + per_pair[i, np.minimum(j + 1, len(axes[1]) - 1)] * w
        seconds: Float = np.exp(low * (1 - u) + high * u) * _pairs(queries, keys)
        return seconds


@final
@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a kernel that computes whole tiles of queries and keys: a shard below a tile costs a tile's rows."""

    flops_per_pair: float
    """4 N h: two products of N heads of h values."""
    flops_per_second: float
    """That the kernel reaches."""
    sizes: Sizes
    bytes_per_second: float = math.inf
    """Of memory."""
    tile: int = 128

    def __call__(self, queries: Int, keys: Int) -> Float:
        """The longer of products and memory."""
        tiles, t = -(-queries // self.tile), self.tile
        before = -(-(keys - queries) // t)
        blocks = (tiles - 1) * before + tiles * (tiles - 1) // 2 + -(-keys // t)
        products = blocks * (t * t * self.flops_per_pair / self.flops_per_second)
        moved = queries * (self.sizes.query + self.sizes.found) + keys * self.sizes.keys
        longer: Float = np.maximum(products, moved / self.bytes_per_second)
        return longer


@final
@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a rank does in a second."""

    attention: Seconds
    linear: float
    """Forward seconds of all else in one block, for one token."""
    bytes_per_second: float
    """Of a rank's link, in each direction."""
    sizes: Sizes


def server_seconds(plan: Plan, attention: Seconds) -> Float:
    """(ranks) forward seconds of every server's tasks."""
    of = np.array([(task.stop - task.start, task.stop, task.server) for task in plan.tasks], dtype=np.int64)
    if not len(of):
        return np.zeros(plan.ranks)
    found: Float = np.bincount(of[:, 2], attention(of[:, 0], of[:, 1]), plan.ranks).astype(np.float64)
    return found


def exchange_seconds(plan: Plan, speeds: Speeds, *, backward: bool) -> tuple[float, float]:
    """Seconds to the servers and back, by the fullest direction of any rank. Backward, what servers need is sent
    again."""
    sizes = speeds.sizes
    queries, keys = np.array(plan.sent_queries), np.array(plan.sent_keys)
    if backward:
        there = queries * (2 * sizes.query + sizes.found) + keys * sizes.keys
        back = queries * sizes.query + keys * sizes.keys
    else:
        there, back = queries * sizes.query + keys * sizes.keys, queries * sizes.found
    fullest = [max(sent.sum(0).max(initial=0), sent.sum(1).max(initial=0)) for sent in (there, back)]
    return fullest[0] / speeds.bytes_per_second, fullest[1] / speeds.bytes_per_second


def block_seconds(
    turns: Turns,
    linear: Sequence[Float],
    attention: Sequence[Float],
    exchanges: Sequence[tuple[float, float]],
    *,
    before: float = 0.4,
) -> float:
    """Seconds of one block of all ranks, in a row of such blocks.

    linear, attention: (ranks) seconds of each nano-batch; exchanges: seconds to the servers and back of each.
    `before`: the part of linear work that lies before attention, for in-block.
    """
    (in_0, out_0), (in_1, out_1) = exchanges
    if turns == "single":
        return float(sum(map(np.max, (*linear, *attention)))) + in_0 + in_1 + out_0 + out_1
    if turns in ("ticks", "signal"):
        beside = (in_0, in_1, out_0, out_1) if turns == "ticks" else (0.0,) * 4
        work = (linear[1], attention[0], attention[1], linear[0])
        return float(sum(max(np.max(seconds), sent) for seconds, sent in zip(work, beside, strict=True)))
    return _in_block(linear, attention, exchanges, before)


def _in_block(
    linear: Sequence[Float], attention: Sequence[Float], exchanges: Sequence[tuple[float, float]], before: float
) -> float:
    """Every rank computes in turn and waits for exchanges, which begin when all ranks have come to them."""
    now = np.zeros_like(linear[0])
    line = 0.0  # when the links are free

    def begin(seconds: float) -> float:
        nonlocal line
        line = max(line, float(now.max())) + seconds
        return line

    arrived = []
    for half in (0, 1):
        now = now + before * linear[half]
        arrived.append(begin(exchanges[half][0]))
    back = []
    for half in (0, 1):
        now = np.maximum(now, arrived[half]) + attention[half]
        back.append(begin(exchanges[half][1]))
    for half in (0, 1):
        now = np.maximum(now, back[half]) + (1 - before) * linear[half]
    return float(now.max())


def _pairs(queries: Any, keys: Any) -> Any:
    return queries * keys - queries * (queries - 1) / 2


def _between(axis: Float, at: Float) -> tuple[Int, Float]:
    """The entry at or below each value, and how far it is to the next."""
    i = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, max(0, len(axis) - 2))
    if len(axis) == 1:
        return i, np.zeros_like(at)
    return i, np.clip((at - axis[i]) / (axis[i + 1] - axis[i]), 0, 1)
