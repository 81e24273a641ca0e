"""What the ranks of a test of quantised collectives do, and what they give back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from lmworks.maths.blockwise import CODES, Runs
from lmworks.parallel import world
from lmworks.parallel.comms import SecondCopy
from lmworks.parallel.layout import Layout
from lmworks.parallel.quantised import Missed, Route, gather
from lmworks.parallel.wire import Wire, reduce_scatter_into
from lmworks.train import rehearse

Bills = dict[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sums over all ranks."""

    hops: tuple[int, ...]
    code: str
    lengths: tuple[int, ...] = (11, 6)
    block: int = 4
    whole: bool = False
    """Whole numbers, alike on all ranks, with the largest in every block."""
    feedback: float = 0.0
    times: int = 1
    dtype: str = "float32"
    bad: float | None = None
    """What rank 1 has as the first value of slice 0."""

    @property
    def runs(self) -> Runs:
        """Of a slice."""
        return Runs(lengths=self.lengths, block=self.block)

    def parts(self, world: int) -> torch.Tensor:
        """(ranks, ranks x slice): what each rank has."""
        made = torch.Generator().manual_seed(7)
        size = world * self.runs.values
        if self.whole:
            row = torch.randint(-7, 8, (size,), generator=made).float()
            starts = [at + i for at in range(0, size, self.runs.values) for i in self._starts()]
            row[starts] = 7.0
            return row.repeat(world, 1).to(getattr(torch, self.dtype))
        parts = torch.randn(world, size, generator=made).to(getattr(torch, self.dtype))
        if self.bad is not None:
            parts[1, 0] = self.bad
        return parts

    def _starts(self) -> list[int]:
        """Where the blocks of a slice begin."""
        found, at = [], 0
        for length in self.lengths:
            found += range(at, at + length, self.block)
            at += length
        return found


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one case on one rank."""

    sums: list[Any]
    """Each time."""
    plain: Any
    """By reduce_scatter_tensor."""
    bills: Bills


AXES = ("cp", "dp_shard", "dp_replicate")
"""From neighbours on: the first hop, the second, the third."""


def wire_of(rank: int, sizes: tuple[int, ...]) -> tuple[Wire, tuple[str, ...]]:
    """A wire whose axes are hops of these sizes, and their names. All ranks call it together."""
    layout = dataclasses.replace(Layout(dp_shard=1), **dict(zip(AXES, sizes, strict=False)))
    return world.wire(layout, world.Seat(rank=rank, world=layout.ranks)), AXES[: len(sizes)]


def sums(rank: int, ranks: int, cases: list[Case]) -> list[Seen]:
    """All cases."""
    found = []
    for case in cases:
        wire, hops = wire_of(rank, case.hops)
        x_N = case.parts(ranks)[rank]
        out_n = torch.empty(case.runs.values, dtype=x_N.dtype)
        plain_n = torch.empty_like(out_n)
        reduce_scatter_into(plain_n, x_N.clone(), group=wire.group("world"))
        missed = Missed(share=case.feedback) if case.feedback else None
        code = CODES[case.code]
        route = Route(hops=hops, code=code, runs=case.runs, wire=wire, missed=missed)
        each = []
        for _ in range(case.times):
            route.begin(out_n, x_N).wait()
            each.append(out_n.float().numpy().copy())
        bills = {key: bill.bytes for key, bill in wire.bills.items()}
        found.append(Seen(sums=each, plain=plain_n.float().numpy(), bills=bills))
    return found


def gathers(rank: int, ranks: int, code: str, runs: Runs, dtype: str) -> tuple[Any, Any, Bills]:
    """(what is gathered, what was this rank's part, bill)."""
    wire, _ = wire_of(rank, (ranks,))
    part_n = torch.randn(runs.values, generator=torch.Generator().manual_seed(rank)).to(getattr(torch, dtype))
    before_n = part_n.clone()
    out_N = torch.empty(ranks * runs.values, dtype=part_n.dtype)
    gather(out_N, part_n, "cp", CODES[code], runs, wire)
    assert part_n.equal(before_n)
    return out_N.float().numpy(), part_n.float().numpy(), {key: bill.bytes for key, bill in wire.bills.items()}


def held(rank: int, scenes: list[rehearse.Scene]) -> list[tuple[int, int]]:
    """Of a step of each scene, the bytes of second copies and of what is fed back, read off the collectives."""
    found = []
    for scene in scenes:
        made = rehearse.placed(rank, scene, torch.float32)
        rehearse.stepping(made, scene)()
        copies, routes = 0, [bucket.begin.__self__ for bucket in getattr(made.ladder, "_buckets", ())]
        for module in made.chunks[0].modules():
            if hasattr(module, "_get_fsdp_state"):
                group = module._get_fsdp_state()._fsdp_param_group
                if isinstance(group._all_gather_comm, SecondCopy):
                    kept = group._all_gather_comm.kept
                    copies += kept.codes_RN.nbytes + kept.scale_RK.nbytes
                routes.append(group._reduce_scatter_comm.route)
        found.append((copies, sum(route.missed.nbytes for route in routes if isinstance(route, Route))))
    return found
