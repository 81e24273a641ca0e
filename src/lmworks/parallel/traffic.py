"""What a rank sends in one step, by axis, from settings alone: the formulas that the counted door is held against.

f = (n - 1) / n for n ranks on the axis; X: bytes of a micro-batch's hidden states on one rank, b T / cp x D values;
m micro-batches; P the bytes of this rank's parameters.

    tp     8 f X per block and micro-batch, of which half forward; 2 f X for the token table, 3 or 2 f X for the head
           (X is in proportion to rows: a last micro-batch that is smaller sends less by as much)
    cp     per block and micro-batch, what `of_context` says; ids of documents
    pp     X per micro-batch, boundary and direction, divided by tp with sequence_parallel
    fsdp   f P for each time that weights are gathered, f P for the gradients, once
    dp     2 f P / fsdp for the gradients, once
    edp    2 f of the experts' gradients, once; what ep sends hangs on what tokens choose, and has no formula

With a placement of states these take the place of fsdp and dp; s is the bytes of sums, w those of weights as they are
used, both of this rank's part of the coarser state:

    weights     f w for each time that they are gathered, f s with every micro-batch
    secondary   f w with every micro-batch, in place of the second gather over weights
    gradients   f s with every micro-batch, f w once
    optimizer   f s and f w, once
    copies      2 f s, once

In a pipeline every micro-batch's sums are made once, with the last one. What travels as codes `parcels.py` counts.

What ranks that serve each other's attention send hangs on the documents: `dispatch.sent` tells it of a plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from lmworks.model.sizes import BlockSizes, Shape
from lmworks.parallel.ladder import bucketed
from lmworks.parallel.layout import Layout
from lmworks.parallel.parcels import Parcels
from lmworks.parallel.pipeline import held_by, holder, split
from lmworks.parallel.shard import Slice, part_of, shares, slice_of
from lmworks.parallel.state import STATE_AXES, StatePlacement

COLUMNS = ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj")
"""Matrices whose rows tp divides."""
ROWS = ("o_proj", "down_proj")
"""Matrices whose columns tp divides."""


Degree = Literal["weights", "gradients", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does on each rank."""

    rows: int
    """Of a micro-batch on one rank."""
    micro_batches: int
    last: int | None = None
    """Rows of the last micro-batch, where they are fewer; not in a pipeline, whose micro-batches are of one size."""
    sequence: int
    """Tokens of a row."""
    value_bytes: int = 4
    """Of an activation."""
    weight_bytes: int = 4
    """Of a weight and of its gradient."""
    recomputed: frozenset[int] = frozenset()
    """Blocks that run forward again in the backward pass."""

    @property
    def all_rows(self) -> int:
        """Of all micro-batches on one rank."""
        return (self.micro_batches - 1) * self.rows + (self.rows if self.last is None else self.last)


def traffic(config: Shape, layout: Layout, rank: int, work: Work) -> dict[str, float]:
    """Bytes that a rank sends in one step, by axis: pp, dp_replicate, fsdp, cp, tp. Counts and norms, a few numbers a
    step, are left out."""
    held = held_by(layout, layout.place(rank, "pp")) if layout.pp > 1 else [0]
    found: dict[str, float] = defaultdict(float)
    for first, last, blocks in held_stages(config, layout, rank, sequence=work.sequence):
        for axis, size in _Part(config, layout, rank, work, blocks, first, last).sent().items():
            found[axis] += size
    found["pp"] = _between_stages(config, layout, rank, work, held)
    if layout.pp > 1 and config.tied and not layout.both_ends_on_one_rank and {0, layout.stages - 1} & set(held):
        table = _Part(config, layout, rank, work, range(0), True, True).values("embed.weight")
        found["ends" if layout.pp > 2 else "pp"] += table * work.weight_bytes  # 2 (2 - 1) / 2 = 1
    return {axis: size for axis, size in found.items() if size}


def portions(
    config: Shape, layout: Layout, rank: int, *, sequence: int, degree: Degree = "weights"
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter's part on a rank, by name, from settings alone; experts' biases among them.

    `degree`: of which state, where a placement of states divides them otherwise.
    """
    found: dict[str, tuple[int, ...]] = {}
    for first, last, blocks in held_stages(config, layout, rank, sequence=sequence):
        part = _Part(config, layout, rank, Work(rows=1, micro_batches=1, sequence=sequence), blocks, first, last)
        found |= {name: part.portion(name, degree) for name in part.names()}
    return found


def summed(config: Shape, layout: Layout, rank: int, *, sequence: int) -> int:
    """Values of the sums of gradients that a rank with masters keeps, the rows that fill chunks up among them."""
    found = 0
    for first, last, blocks in held_stages(config, layout, rank, sequence=sequence):
        part = _Part(config, layout, rank, Work(rows=1, micro_batches=1, sequence=sequence), blocks, first, last)
        found += part.divided()[2] // layout.size("gradients")
    return found


def held_stages(config: Shape, layout: Layout, rank: int, *, sequence: int) -> list[tuple[bool, bool, range]]:
    """The stages of a rank: whether it is the first of all, whether the last, its blocks."""
    if layout.pp == 1:
        return [(True, True, range(config.n_layers))]
    stages = split(config, layout, sequence=sequence)
    held = held_by(layout, layout.place(rank, "pp"))
    return [(stage == 0, stage == layout.stages - 1, stages[stage]) for stage in held]


def _between_stages(config: Shape, layout: Layout, rank: int, work: Work, held: list[int]) -> float:
    """Hidden states to the next stage and gradients to the one before, where other ranks hold them."""
    divided = layout.tp if layout.sequence_parallel else 1
    values = work.rows * (work.sequence // layout.cp // divided) * config.hidden_size
    here = layout.place(rank, "pp")
    boundaries = sum(
        0 <= other < layout.stages and holder(layout, other) != here
        for stage in held
        for other in (stage - 1, stage + 1)
    )
    return float(boundaries * work.micro_batches * values * work.value_bytes) if layout.pp > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Bytes that a rank of cp sends per token of its own: to the next rank, and back to others."""

    forward: tuple[float, float]
    backward: tuple[float, float]


def of_context(layout: Layout, heads: int, groups: int, head_dim: int, *, value_bytes: int) -> Ways:
    """What attention over cp sends, for n ranks with N query and G key/value heads of h values:

        all-gather    forward, backward: 2 G h
        ring          forward: 2 G h; backward: 2 G h, and 2 G h sums
        tokenring     forward: N h, back N h and N sums; backward: 2 N h and 2 N sums, back N h
        ulysses       forward, backward: (2 N h + 2 G h) / n

    each n - 1 times. Sums are float32 at least. A collective has no way; it is counted as the first.
    """
    n, sums = layout.cp, max(4, value_bytes)
    query, keys = heads * head_dim * value_bytes, 2 * groups * head_dim * value_bytes
    once = {
        "all-gather": ((keys, 0), (keys, 0)),
        "ring": ((keys, 0), (keys + 2 * groups * head_dim * sums, 0)),
        "tokenring": ((query, query + heads * sums), (2 * query + 2 * heads * sums, query)),
        "ulysses": (((2 * query + keys) / n, 0), ((2 * query + keys) / n, 0)),
    }
    forward, backward = (((n - 1) * forth, (n - 1) * back) for forth, back in once[layout.context])
    return Ways(forward=forward, backward=backward)


class _Part:
    """One stage on one rank."""

    def __init__(
        self, config: Shape, layout: Layout, rank: int, work: Work, blocks: range, first: bool, last: bool
    ) -> None:
        self.config, self.layout, self.work = config, layout, work
        self.blocks, self.first, self.last = blocks, first, last
        self.rank, self.place = rank, layout.place(rank, "tp")
        self.sizes = config.blocks()
        self.shapes = dict(config.shapes())
        self.tokens = work.all_rows * work.sequence // layout.cp
        """Of all micro-batches."""
        self.hidden = self.tokens * config.hidden_size * work.value_bytes

    def sent(self) -> dict[str, float]:
        """Bytes by axis."""
        return {"tp": self._tensor(), "cp": self._context(), **self._data()}

    def local(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter on this rank of tp."""
        shape, tp = list(self.shapes[name]), self.layout.tp
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        dim = 0 if leaf in (*COLUMNS, "embed", "head") else 1 if leaf in ROWS and len(shape) == 2 else None
        if dim is not None:
            shape[dim] = shares(shape[dim], tp)[self.place][1]
        return tuple(shape)

    def values(self, name: str) -> int:
        """Values of a parameter's gradient on this rank, as its optimizer gets it."""
        return math.prod(self.portion(name, "optimizer"))

    def portion(self, name: str, degree: Degree = "weights") -> tuple[int, ...]:
        """The shape of a parameter on this rank, which is divided by rows; experts of ep and what is not trained are
        left alone."""
        first, *rest = self.local(name)
        if name.endswith("expert_bias"):
            return first, *rest
        if ".ffn.experts." in name and self.layout.ep > 1:
            return first // self.layout.ep, *rest
        if self.layout.state is None:
            return part_of(first, self.layout.size("fsdp"), self.layout.place(self.rank, "fsdp")).length, *rest
        lies = self._slice(name)
        parts = {"weights": lies.rows, "gradients": lies.gradients.length, "optimizer": lies.optimizer.length}
        return parts[degree], *rest

    def _slice(self, name: str) -> Slice:
        """Where this rank's finer parts of a parameter lie."""
        first = self.local(name)[0]
        rows = part_of(first, self.layout.size("weights"), self.layout.place(self.rank, "weights")).length
        return slice_of(rows, self.layout, self.rank)

    def names(self) -> list[str]:
        """The parameters of this stage; a tied table that both ends of a pipeline share counts with the first."""
        kept, shared = [], self.layout.pp > 1 and self.layout.both_ends_on_one_rank
        for name in self.shapes:
            top, _, rest = name.partition(".")
            at_first = top in ("positions", "embed")
            at_last = top in ("norm", "head") or (top == "embed" and self.config.tied and not shared)
            if top == "blocks":
                if int(rest.partition(".")[0]) in self.blocks:
                    kept.append(name)
            elif (at_first and self.first) or (at_last and self.last):
                kept.append(name)
        return kept

    def _recomputed(self, block: int) -> bool:
        return block in self.work.recomputed

    def _tensor(self) -> float:
        n = self.layout.tp
        if n == 1:
            return 0.0
        f, divided = (n - 1) / n, self.layout.sequence_parallel
        sent = 0.0
        for block in self.blocks:
            whole = divided and self.layout.tp_slices > 1  # products in slices are run again with their sums
            again = (4 if whole else 3 if divided else 2) if self._recomputed(block) else 0  # all but the last sum
            sent += f * self.hidden * (8 + again)
        if self.first:
            sent += 2 * f * self.hidden
        if self.last:
            sent += (3 if divided else 2) * f * self.hidden
            sent += f * 2 * n * self.tokens * max(4, self.work.value_bytes)  # what ranks hear of each token's loss
        partial = sum(self.values(name) for name in self.names() if self._partial(name))
        return sent + 2 * f * partial * self.work.weight_bytes

    def _partial(self, name: str) -> bool:
        """Whether each rank of tp has a part of this gradient."""
        whole = self.local(name) == self.shapes[name]
        return whole and (self.layout.sequence_parallel or name.endswith((".q_norm.weight", ".k_norm.weight")))

    def _context(self) -> float:
        n = self.layout.cp
        if n == 1:
            return 0.0
        f, rows = (n - 1) / n, self.work.all_rows
        windows = len({size.window for size in self.sizes})
        served = self.layout.servers is not None  # what attention sends is then no matter of cp
        sent = 0.0 if served else f * rows * self.work.sequence * 8.0 * windows  # documents' ids
        for block in self.blocks:
            forward, backward = (0.0, 0.0) if served else self._attention(self.sizes[block])
            sent += forward * (2 if self._recomputed(block) else 1) + backward
            chosen = (self.sizes[block].experts or 0) * rows * 8  # counts of a row's tokens by expert
            sent += 2 * f * chosen * (2 if self._recomputed(block) else 1)
        return sent

    def _attention(self, block: BlockSizes) -> tuple[float, float]:
        """Bytes of one block's attention forward and backward, both ways of the links."""
        heads, groups = block.n_heads // self.layout.tp, block.n_kv_heads // self.layout.tp
        found = of_context(self.layout, heads, groups, block.head_dim, value_bytes=self.work.value_bytes)
        return self.tokens * sum(found.forward), self.tokens * sum(found.backward)

    def _data(self) -> dict[str, float]:
        n, copies, work = self.layout.size("fsdp"), self.layout.dp_replicate, self.work
        if n * copies == 1:
            return {}
        if self.layout.state is not None:
            return self._states(self.layout.state)
        f, edp = (n - 1) / n, self.layout.size("edp")
        blocks = rest = experts = 0
        for name in self.names():
            shape = self.local(name)
            if name.endswith("expert_bias"):
                continue
            if ".ffn.experts." in name and self.layout.ep > 1:
                experts += math.prod(shape) // self.layout.ep
                continue
            padded = -(-shape[0] // n) * n * math.prod(shape[1:])
            if name.startswith("blocks."):
                blocks += padded
            else:
                rest += padded
        reshard = self.layout.reshard if self.layout.reshard is not None else self.layout.pp == 1
        gathers = work.micro_batches if self.layout.pp == 1 else 1
        gathered = min(4, work.value_bytes) if work.value_bytes < work.weight_bytes else work.weight_bytes
        sent = f * gathered * gathers * (blocks * (2 if reshard else 1) + rest)
        sent += f * work.weight_bytes * (blocks + rest)
        return {
            "fsdp": sent,
            "dp_replicate": 2 * (copies - 1) / copies * work.weight_bytes * ((blocks + rest) / n + experts),
            "edp": 2 * (edp - 1) / edp * work.weight_bytes * experts,
        }

    def _states(self, state: StatePlacement) -> dict[str, float]:
        """What a placement of states sends."""
        layout, work = self.layout, self.work
        f = {axis: (layout.size(axis) - 1) / layout.size(axis) for axis in STATE_AXES}
        used = min(work.value_bytes, work.weight_bytes)
        times = work.micro_batches if layout.pp == 1 else 1
        blocks, whole, sums, fine = self.divided()
        reshard = layout.reshard if layout.reshard is not None else layout.pp == 1
        again = reshard and state.secondary is None
        up = used if layout.narrow_weights else work.weight_bytes
        sent: dict[str, float] = defaultdict(float)
        sent["weights"] = f["weights"] * times * used * (whole + again * blocks)
        sent["secondary"] = f["secondary"] * times * used * blocks if state.secondary is not None else 0.0
        sent["copies"] = 2 * f["copies"] * work.weight_bytes * (fine / layout.size("optimizer"))
        sums_of = {"weights": f["weights"] * times * work.weight_bytes * whole}
        if layout.masters:
            sums_of["gradients"] = f["gradients"] * times * work.weight_bytes * sums
            sent["gradients"] = f["gradients"] * up * sums
            sent["optimizer"] = f["optimizer"] * fine * (work.weight_bytes + up)
        self._coded(state, sent, sums_of, times=times, again=again, held=up)
        for axis, size in sums_of.items():
            sent[axis] += size
        return sent

    def _coded(
        self,
        state: StatePlacement,
        sent: dict[str, float],
        sums_of: dict[str, float],
        *,
        times: int,
        again: bool,
        held: int,
    ) -> None:
        """Put what travels as codes in the place of what would be sent plain. `held`: bytes of a weight."""
        units: dict[str, list[int]] = defaultdict(list)
        sizes = {name: math.prod(self.portion(name)) * held for name in self._trained()}
        for name in sizes:
            chunk = part_of(self.local(name)[0], self.layout.size("weights"), 0).chunk
            units[".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""].append(chunk * self._row(name))
        parcels, blocks = Parcels(layout=self.layout, state=state), [u for unit, u in units.items() if unit]
        if state.weights_as != "plain":
            sent["weights"] = times * (parcels.gathered(list(units.values())) + again * parcels.gathered(blocks))
        if state.secondary_as != "plain":
            sent["secondary"] = times * parcels.copied(blocks)
        if state.gradients_as != "plain":
            rows = {
                "weights": list(units.values()),
                "gradients": [
                    [self._slice(name).gradients.chunk * self._row(name) for name in names] for names in bucketed(sizes)
                ],
            }
            for axis in list(sums_of):
                del sums_of[axis]
                if self.layout.size(axis) > 1:
                    sums_of |= {hop: times * size for hop, size in parcels.summed(axis, rows[axis]).items()}

    def _trained(self) -> list[str]:
        """The parameters of this stage that a placement of states divides."""
        return [name for name in self.names() if not name.endswith("expert_bias")]

    def _row(self, name: str) -> int:
        """Values of a row."""
        return math.prod(self.local(name)[1:])

    def divided(self) -> tuple[int, int, int, int]:
        """Values, with the rows that fill chunks up, of the blocks' weights; of all weights; of this rank's part of
        them, as the ranks of gradients share it; and of its part of those, as the ranks of optimizer do."""
        weights, gradients, optimizer = (self.layout.size(axis) for axis in ("weights", "gradients", "optimizer"))
        blocks = whole = sums = fine = 0
        for name in self._trained():
            lies, first, row = self._slice(name), self.local(name)[0], self._row(name)
            values = part_of(first, weights, 0).chunk * weights * row
            whole += values
            blocks += values if name.startswith("blocks.") else 0
            sums += lies.gradients.chunk * gradients * row
            fine += (lies.optimizer.chunk * optimizer if optimizer > 1 else lies.gradients.chunk) * row
        return blocks, whole, sums, fine


def as_table(found: dict[str, float]) -> list[dict[str, Any]]:
    """Rows for a report: axis and bytes, the largest first."""
    return [{"axis": axis, "bytes": size} for axis, size in sorted(found.items(), key=lambda pair: -pair[1])]
