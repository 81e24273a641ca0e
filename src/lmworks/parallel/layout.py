"""A layout: how many ranks stand on each axis. It is read, checked and compared without starting a process.

    axis          what is divided among its ranks                      what they exchange
    pp            blocks, in order: a pipeline's stages                hidden states, and their gradients
    dp_replicate  rows; every rank holds the same weights              gradients
    dp_shard      rows, and weights, gradients, optimizer state        weights and gradients (FSDP, ZeRO-3)
    cp            the tokens of a row                                  keys and values
    tp            heads, FFN width, vocabulary                         hidden states, twice in every block
    ep            experts; its ranks are neighbours on dp_shard x cp   tokens

The number of ranks is the product of all axes but ep. Ranks count with tp fastest, then cp, dp_shard, dp_replicate, pp:
ranks that speak most are neighbours. Three views join axes: batch = dp_replicate x dp_shard (who reads which rows),
fsdp = dp_shard x cp (who shards weights), loss = batch x cp (over whom losses are summed). edp are the ranks of fsdp
that hold the same experts. attention are the ranks of loss too: with `servers` they compute each other's.

`state` says of the ranks of fsdp how many share each kind of state, and adds axes of its own (`state.py`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem, RecipeError
from lmworks.core.recipe import PositiveInt
from lmworks.parallel import legal
from lmworks.parallel import state as states
from lmworks.parallel.servers import Servers
from lmworks.parallel.state import STATE_AXES, StatePlacement

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the slowest to the fastest in the order of ranks."""
VIEWS = {
    "batch": ("dp_replicate", "dp_shard"),
    "fsdp": ("dp_shard", "cp"),
    "loss": ("dp_replicate", "dp_shard", "cp"),
    "attention": ("dp_replicate", "dp_shard", "cp"),
    "world": AXES,
}
"""Neighbouring axes under one name."""
Schedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v"]
Engine = Literal["all-gather", "ring", "tokenring", "ulysses"]
Order = Literal["zigzag", "contiguous", "striped"]
OF_AXIS = {
    "tp": ("sequence_parallel", "tp_slices"),
    "cp": ("context", "order"),
    "pp": ("schedule", "stages_per_rank", "split", "sends"),
}
"""Settings without effect where an axis has one rank."""
ONE_STAGE = ("gpipe", "1f1b")
"""Schedules whose ranks hold one stage each."""
V_SHAPED = ("zero-bubble-v", "dualpipe-v")
"""Schedules whose ranks hold two stages each, one on the way down and one on the way back up."""


class Arrangement(ABC):
    """What stands in a recipe's `layout`: a layout, or a rule that finds one for so many ranks."""

    @property
    @abstractmethod
    def asked(self) -> int | None:
        """The ranks that it names by itself, at least; None when it takes as many as there are."""

    @abstractmethod
    def settle(self, world: int, recipe: Any) -> Layout:
        """The layout of `world` ranks for a training recipe. Raises RecipeError, with what is legal, without one."""

    def notes(self, world: int, recipe: Any) -> list[str]:
        """What people should know of the layout that is found, in sentences."""
        return []


@final
@dataclass(frozen=True, kw_only=True)
class Layout(Arrangement):
    """How many ranks stand on each axis, and how a pipeline is run."""

    pp: PositiveInt = 1
    """Pipeline parallel: ranks that hold successive blocks."""
    dp_replicate: PositiveInt = 1
    """Data parallel: ranks that hold the same weights and train on other rows."""
    dp_shard: PositiveInt | None = None
    """Fully sharded data parallel: ranks that train on other rows and hold a part of the weights each. Left out: all
    ranks that the other axes leave."""
    cp: PositiveInt = 1
    """Context parallel: ranks that hold other tokens of the same rows."""
    context: Engine = "all-gather"
    """How queries and keys of other ranks of cp meet. 'all-gather': every rank gathers all keys and values. 'ring':
    keys and values go round. 'tokenring': queries go round and what they found comes straight back, less to send each
    way with fewer query heads than twice the key/value heads. 'ulysses': every rank has all tokens of some heads."""
    order: Order = "zigzag"
    """Which tokens of a row a rank of cp holds. 'zigzag': an early and a late run, alike in work. 'contiguous': one
    run; later ones see more. 'striped': every cp-th token."""
    servers: Servers | None = None
    """Let all ranks that hold tokens of the same blocks compute each other's attention, whoever holds the longest
    documents; with cp as well, in place of `context`. Left out: each rank attends for its own tokens."""
    tp: PositiveInt = 1
    """Tensor parallel: ranks that hold other heads, other FFN columns and other vocabulary of the same blocks."""
    ep: PositiveInt = 1
    """Expert parallel: ranks that hold other experts. They are among those of dp_shard x cp, and no further ranks."""
    sequence_parallel: bool = False
    """Between the products of tp, divide the tokens among its ranks instead of repeating them."""
    tp_slices: PositiveInt = 1
    """Slices of the tokens in which tp exchanges them: one travels while another is multiplied. 1: exchange, then
    multiply. Where parts are summed anyway, the order of the sum is another one."""
    schedule: Schedule = "1f1b"
    """The order in which a pipeline's micro-batches go forward and backward."""
    stages_per_rank: PositiveInt | None = None
    """Stages that each rank of the pipeline holds. Left out: 1; 2 where the schedule has several."""
    sends: Literal["in-turn", "early"] = "in-turn"
    """How stages hand on micro-batches. 'in-turn': a rank waits for what it sends, and asks for what comes when it is
    needed. 'early': all receives stand from the start of a step, and no send is waited for before its end, as long as
    which it stays in memory. Needs gpipe or 1f1b."""
    split: tuple[PositiveInt, ...] | None = None
    """Blocks of each stage, in order. Left out: the split whose dearest stage is cheapest, head counted."""
    machines: tuple[str, ...] | None = None
    """Names of the machines in the order of the ranks, as many ranks on each. Left out: in the launcher's order."""
    reshard: bool | None = None
    """Give a block's gathered weights back after its forward pass, and gather them again for the backward pass. Left
    out: true without a pipeline; false with one, where every micro-batch would gather anew."""
    state: StatePlacement | None = None
    """How many ranks of dp_shard x cp share weights, gradients and optimizer state. Left out: all share all three, and
    gradients are summed once a step, with the last micro-batch."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings without effect, and what the model, the batch and the other parts cannot do."""
        yield from self._alone()
        yield from legal.problems(self, recipe)
        if self.servers is not None:
            for problem in self.servers.problems(self.size("attention") if self.settled else None, recipe):
                yield Problem(path=f"servers.{problem.path}".rstrip("."), text=problem.text)

    def _alone(self) -> Iterator[Problem]:
        yield from self._machines()
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for axis, names in OF_AXIS.items():
            for name in names if self.size(axis) == 1 else ():
                if getattr(self, name) != usual[name]:
                    yield Problem(path=name, text=f"has no effect with {axis} = 1")
        if self.servers is not None and self.context != "all-gather":
            yield Problem(path="context", text="has no effect with servers: queries and keys go where a plan says")
        if self.state is not None:
            for problem in states.problems(self.state, self):
                yield Problem(path=f"state.{problem.path}".rstrip("."), text=problem.text)
        yield from self._pipelined()

    def _pipelined(self) -> Iterator[Problem]:
        if self.pp == 1:
            return
        held = self.stages_per_rank
        if self.schedule in V_SHAPED and held not in (None, 2):
            yield Problem(path="stages_per_rank", text=f"is {held}; {self.schedule} has 2")
        if self.schedule in ONE_STAGE and held not in (None, 1):
            yield Problem(path="stages_per_rank", text=f"is {held}; {self.schedule} has 1. interleaved-1f1b has more")
        if self.schedule == "interleaved-1f1b" and held == 1:
            yield Problem(path="stages_per_rank", text="is 1, which is 1f1b; interleaved-1f1b takes 2 or more")
        if self.sends == "early" and self.schedule not in ONE_STAGE:
            text = f"{self.schedule} has several stages on a rank, whose messages would meet. Legal: in-turn, or 1f1b"
            yield Problem(path="sends", text=text)
        if self.split is not None and len(self.split) != self.stages:
            yield Problem(path="split", text=f"has {len(self.split)} entries; this pipeline has {self.stages} stages")

    def _machines(self) -> Iterator[Problem]:
        """Machines that are named twice, or do not share the ranks."""
        names = self.machines
        if names is None:
            return
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            text = f"names {', '.join(twice)} more than once" if twice else "names none. Leave it out"
            yield Problem(path="machines", text=text)
        elif self.settled and self.ranks % len(names):
            yield Problem(path="machines", text=f"names {len(names)}, which cannot share {self.ranks} ranks alike")

    @property
    def held(self) -> int:
        """Stages on each rank of the pipeline."""
        return self.stages_per_rank or (1 if self.schedule in ONE_STAGE else 2)

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline; 1 without one."""
        return self.pp * self.held if self.pp > 1 else 1

    @property
    def runs(self) -> int:
        """By what a row's tokens are divisible, so that every rank of cp holds as many."""
        return 2 * self.cp if self.cp > 1 and self.order == "zigzag" else self.cp

    @property
    def both_ends_on_one_rank(self) -> bool:
        """Whether the first and the last stage of the pipeline are held by the same rank."""
        return self.pp == 1 or self.schedule in V_SHAPED

    @property
    def masters(self) -> bool:
        """Whether the optimizer steps finer parts, in float32, than those that blocks are given."""
        return self.state is not None and self.state.masters(self.size("fsdp"))

    @property
    def narrow_weights(self) -> bool:
        """Whether a rank keeps its weights in the type that they are used in, beside masters.

        Not the ranks of a pipeline that hold weights whole: there autograd sums micro-batches in the type of a weight.
        """
        return self.masters and not (self.pp > 1 and self.size("weights") == 1)

    @property
    def settled(self) -> bool:
        """Whether every degree is known."""
        return self.dp_shard is not None

    @property
    def others(self) -> int:
        """The product of all axes but dp_shard."""
        return self.pp * self.dp_replicate * self.cp * self.tp

    @property
    def ranks(self) -> int:
        """The number of ranks. `settle` first where dp_shard is left out."""
        assert self.dp_shard is not None, "the layout is settled"
        return self.others * self.dp_shard

    def waits(self, micro_batches: int) -> float:
        """Seconds that a pipeline's ranks wait over seconds that they compute, stages being equal and sends free.

        (p - 1) / (v m): GPipe, 1F1B and its interleaved form (Narayanan et al. 2021). The others wait less.
        """
        return (self.pp - 1) / (self.held * micro_batches)

    def size(self, axis: str) -> int:
        """Ranks along an axis or a view."""
        if axis in VIEWS:
            return math.prod(self.size(part) for part in VIEWS[axis])
        if axis == "edp":
            return self.size("fsdp") // self.ep
        if axis.partition("/")[0] in STATE_AXES:
            assert self.state is not None, "asked of a layout with a placement of states"
            return self.state.size(axis, self.size("fsdp"))
        size = getattr(self, axis)
        assert isinstance(size, int), "the layout is settled"
        return size

    def place(self, rank: int, axis: str) -> int:
        """Where a rank stands along an axis or a view."""
        if axis in ("ep", "edp"):
            here = self.place(rank, "fsdp")
            return here % self.ep if axis == "ep" else here // self.ep
        if axis.partition("/")[0] in STATE_AXES:
            assert self.state is not None, "asked of a layout with a placement of states"
            return self.state.place(axis, self.size("fsdp"), self.place(rank, "fsdp"))
        if axis in VIEWS:
            place = 0
            for part in VIEWS[axis]:
                place = place * self.size(part) + self.place(rank, part)
            return place
        for name in reversed(AXES):
            size = self.size(name)
            if name == axis:
                return rank % size
            rank //= size
        raise KeyError(axis)

    @property
    def asked(self) -> int:
        """The product of all degrees, with dp_shard = 1 where it is left out."""
        return self.others * (self.dp_shard or 1)

    def settle(self, world: int, recipe: Any = None) -> Layout:
        """The layout with dp_shard filled in. Raises RecipeError, with the nearest legal layout, when `world` ranks
        cannot be arranged so."""
        others = self.others
        if self.dp_shard is None and world % others == 0:
            return dataclasses.replace(self, dp_shard=world // others)
        if self.dp_shard is not None and self.ranks == world:
            return self
        shard = "" if self.dp_shard is None else f" x dp_shard {self.dp_shard}"
        axes = " x ".join(f"{a} {self.size(a)}" for a in AXES if a != "dp_shard" and self.size(a) > 1)
        product = others * (self.dp_shard or 1)
        text = (
            f"{axes or 'all axes 1'}{shard} = {product} ranks{' or a multiple' if self.dp_shard is None else ''}, "
            f"but {world} were started. {self._nearest(world)}"
        )
        raise RecipeError([Problem(path="layout", text=text)])

    def _nearest(self, world: int) -> str:
        """What to change: the largest degrees below those asked for that divide what is there."""
        left, kept = world, {}
        for axis in ("tp", "pp", "cp", "dp_replicate"):
            kept[axis] = math.gcd(left, self.size(axis))
            left //= kept[axis]
        named = ", ".join(f"{axis} = {size}" for axis, size in kept.items() if size > 1)
        nearest = f"{named}, dp_shard = {left}" if named else f"dp_shard = {left}"
        return f"Legal with {world}: {nearest}; or start {self.asked} ranks: lmworks launch RECIPE --local {self.asked}"


def problems_of(recipe: Any) -> list[Problem]:
    """What is wrong with a recipe's settled layout, with paths in the recipe."""
    return [Problem(path=f"layout.{p.path}".rstrip("."), text=p.text) for p in recipe.layout.check(recipe)]
