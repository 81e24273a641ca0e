"""Collectives whose tensors travel as block codes: an all-gather, and a reduce-scatter by all-to-all in hops.

Ranks count with the first hop fastest: of 2 hops of n and m ranks (in a node, across nodes), rank j n + i is place i of
its node and place j of those with its i. It has a slice for every rank and shall be left with the sum of its own:

    hop 1    to place i of the node go the slices of ranks i, n + i, 2 n + i, ...: m of them, coded; their sums are left
    hop 2    to place j of equal ranks goes the slice of rank j n + i, coded; its sum is left

So slices are taken in another order before they are sent, and land in the order of reduce_scatter_tensor. A value is
coded once a hop, not once a rank as in a ring, and is summed in float32.

With `feedback` b (error feedback, as in LoCo), what a hop's codes missed is b times added to what it codes next time.
It is kept in int8 blocks: a byte for each value that the hop sends, on every rank, beside the gradients.

Bytes on the bill are those of packets (scales and codes) that leave the rank, by the name of the hop's axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lmworks.maths.blockwise import INT8, Blocks, Code, Runs, quantise, unpacked
from lmworks.parallel.wire import Running, Wire, gather_into

FORGET = 1024
"""After so many sums what earlier codes missed is forgotten: an error that fed itself would end there (LoCo resets it
as well)."""


def gather(out_N: Tensor, part_n: Tensor, axis: str, code: Code, runs: Runs, wire: Wire) -> None:
    """Fill out with the ranks' parts behind each other, as their codes tell them; `runs`: how a part is cut.

    This rank's own part is told by its codes as well, so that all ranks hold the same values.
    """
    found_RS = gather_packets(quantise(part_n[None], code, runs).packet(code)[0], axis, code, wire)
    out_N.view(len(found_RS), -1).copy_(unpacked(found_RS, code, runs).decode(out_N.dtype))


def gather_packets(sent_S: Tensor, axis: str, code: Code, wire: Wire) -> Tensor:
    """The ranks' packets, uint8 (R, S), all of one size."""
    found_RS = torch.empty(wire.size(axis), sent_S.numel(), dtype=torch.uint8, device=sent_S.device)
    with wire.counted(axis, f"all-gather {code.name}", (len(found_RS) - 1) * sent_S.nbytes):
        gather_into(found_RS.view(-1), sent_S, group=wire.group(axis))
    return found_RS


@dataclass(frozen=True, kw_only=True)
class Missed:
    """What codes of one tensor missed, by hop: the memory of error feedback."""

    share: float
    """How much of it is added the next time; 0 to 1."""
    _held: dict[int, Blocks] = field(default_factory=dict)
    _sums: dict[int, int] = field(default_factory=dict)

    def added(self, x_RN: Tensor, hop: int) -> Tensor:
        """x and what was missed before."""
        held = self._held.get(hop)
        return x_RN if held is None else x_RN + held.decode()

    def keep(self, wanted_RN: Tensor, told: Blocks, hop: int) -> None:
        """Remember what the codes of `wanted` do not tell. What is not finite is not kept: it is seen without it."""
        self._sums[hop] = self._sums.get(hop, 0) + 1
        if self._sums[hop] % FORGET == 0:
            self._held.pop(hop, None)
            return
        missed_RN = (wanted_RN - told.decode()).mul_(self.share).nan_to_num_(0.0, 0.0, 0.0)
        self._held[hop] = quantise(missed_RN, INT8, told.runs)

    def state(self) -> dict[str, Tensor]:
        """All of it, as a checkpoint keeps it: by 'hop/sums' how many there were, codes and scales of what is held."""
        found = {f"{hop}/sums": torch.tensor(number) for hop, number in self._sums.items()}
        for hop, held in self._held.items():
            found |= {f"{hop}/codes": held.codes_RN, f"{hop}/scale": held.scale_RK}
        return found

    def load(self, state: Mapping[str, Tensor], hop: int, runs: Runs) -> None:
        """Take up what `state` told of one hop; `runs`: how its rows are cut."""
        if f"{hop}/sums" in state:
            self._sums[hop] = int(state[f"{hop}/sums"])
        if f"{hop}/codes" in state:
            self._held[hop] = Blocks(codes_RN=state[f"{hop}/codes"], scale_RK=state[f"{hop}/scale"], runs=runs)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(held.codes_RN.nbytes + held.scale_RK.nbytes for held in self._held.values())


@dataclass(frozen=True, kw_only=True)
class Route:
    """A reduce-scatter by hops: the axis of each, neighbours first, and how a slice is coded."""

    hops: Sequence[str]
    code: Code
    runs: Runs
    wire: Wire
    missed: Missed | None = None

    def begin(self, out_n: Tensor, x_N: Tensor) -> Sum:
        """Begin to sum x, a slice for each rank, and to leave this rank's slice in `out`. x may be changed at once."""
        return Sum(out_n=out_n, route=self, first=self.send(x_N.float(), 0))

    def slices(self, number: int) -> int:
        """How many go to each rank of a hop: one for each rank of the later ones."""
        return math.prod(self.wire.size(axis) for axis in self.hops[number + 1 :])

    def rows(self, number: int) -> Runs:
        """How what goes to one rank of a hop is cut."""
        return self.runs.times(self.slices(number))

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether that is what codes of these sums missed."""
        wanted: dict[str, tuple[int, ...]] = {}
        for number, axis in enumerate(self.hops):
            ranks, runs = self.wire.size(axis), self.rows(number)
            wanted |= {f"{number}/codes": (ranks, runs.values), f"{number}/scale": (ranks, runs.blocks)}
            wanted[f"{number}/sums"] = ()
        return all(wanted.get(name) == tuple(x.shape) for name, x in state.items())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what codes missed before."""
        assert self.missed is not None, "these sums are fed back"
        for number in range(len(self.hops)):
            self.missed.load(state, number, self.rows(number))

    def send(self, x_N: Tensor, number: int) -> Parcels:
        """Begin one hop with the slices that are left."""
        axis, slices = self.hops[number], self.slices(number)
        ranks = self.wire.size(axis)
        wanted_RN = x_N.view(slices, ranks, self.runs.values).transpose(0, 1).reshape(ranks, -1)
        wanted_RN = wanted_RN if self.missed is None else self.missed.added(wanted_RN, number)
        told = quantise(wanted_RN, self.code, self.rows(number))
        if self.missed is not None:
            self.missed.keep(wanted_RN, told, number)
        sent_RS = told.packet(self.code)
        found_RS = torch.empty_like(sent_RS)
        operation, size = f"all-to-all {self.code.name}", (ranks - 1) * sent_RS[0].nbytes
        self.wire.note(axis, operation, size)
        begun: Running = dist.all_to_all_single(found_RS, sent_RS, group=self.wire.group(axis), async_op=True)
        running = self.wire.watched(begun, axis, operation, size)
        return Parcels(sent_RS=sent_RS, found_RS=found_RS, running=running)

    def receive(self, parcels: Parcels, number: int) -> Tensor:
        """The sum of what has come over one hop, slice behind slice, float32."""
        parcels.running.wait()
        return unpacked(parcels.found_RS, self.code, self.rows(number)).decode().sum(0)


@dataclass(frozen=True, kw_only=True)
class Parcels:
    """Packets of one hop on their way."""

    sent_RS: Tensor
    """Kept until they have left."""
    found_RS: Tensor
    running: Running


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A reduce-scatter that has begun."""

    out_n: Tensor
    route: Route
    first: Parcels

    def wait(self) -> bool:
        """Return when the sum stands in `out`. Later hops are made here, so their ranks come here in one order."""
        x_N = self.route.receive(self.first, 0)
        for number in range(1, len(self.route.hops)):
            x_N = self.route.receive(self.route.send(x_N, number), number)
        self.out_n.copy_(x_N)
        return True


def bytes_of_gather(ranks: int, code: Code, runs: Runs) -> int:
    """What a rank sends in `gather`; `runs` of its part."""
    return (ranks - 1) * runs.nbytes(code)


def bytes_of_sum(ranks: Sequence[int], code: Code, runs: Runs) -> list[int]:
    """What a rank sends in each hop of a Route over groups of so many ranks; `runs` of a slice."""
    return [(size - 1) * runs.times(math.prod(ranks[i + 1 :])).nbytes(code) for i, size in enumerate(ranks)]
